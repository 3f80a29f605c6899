-- Token entropy along the completions of a run: tokens by their relative position, successes apart from failures.
-- grain:   outcome, position
-- inputs:  judged_rollouts
-- params:  $run_id, $num_bins (bins), $success_reward, $reward_tolerance (reward),
--          $max_rollouts (rollouts; of more, those of smallest rollout_id, which is a hash: a fair sample)
-- columns:
--   outcome          success | failure
--   position         middle of the bin, 0: first token, 1: last
--   num_tokens       tokens
--   mean_entropy     nats
--   lower_quartile   nats
--   median           nats
--   upper_quartile   nats
with

scored as (
    select rollout_id, reward, entropy_kind, completion_entropies
    from judged_rollouts
    where run_id = $run_id and origin in ('policy', 'trainer') and len(completion_entropies) > 0
),

-- Kinds of entropy do not compare: the profile is that of the commonest.
sampled as (
    select *
    from scored
    where entropy_kind is not distinct from (
        select entropy_kind from scored group by entropy_kind order by count(*) desc, entropy_kind limit 1
    )
    order by rollout_id
    limit $max_rollouts
),

tokens as (
    select
        case when reward >= $success_reward - $reward_tolerance then 'success' else 'failure' end as outcome,
        len(completion_entropies) as length,
        unnest(range(len(completion_entropies))) as token_index,
        unnest(completion_entropies) as entropy
    from sampled
),

binned as (
    select outcome, entropy, floor((token_index + 0.5) * $num_bins / length) as bin
    from tokens
)

select
    outcome,
    (bin + 0.5) / $num_bins as position,
    count(*) as num_tokens,
    avg(entropy) as mean_entropy,
    quantile_cont(entropy, 0.25) as lower_quartile,
    quantile_cont(entropy, 0.5) as median,
    quantile_cont(entropy, 0.75) as upper_quartile
from binned
group by outcome, bin
order by outcome, position
