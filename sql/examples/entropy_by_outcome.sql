-- How does token entropy run along completions that succeed, and along those that fail?
-- grain:   model, entropy_kind, tenth
-- inputs:  tokens, judged_rollouts
-- params:  none
-- columns:
--   model
--   entropy_kind         kinds do not compare
--   tenth                of the completion, from 1
--   success_entropy      nats, mean over the tokens
--   failure_entropy      nats, mean over the tokens
--   num_success_tokens   tokens
--   num_failure_tokens   tokens
with

outcomes as (
    select rollout_id, model, entropy_kind, is_success(reward) as succeeded, len(completion_ids) as num_tokens
    from judged_rollouts
    where origin in ('policy', 'trainer') and completion_entropies is not null
)

select
    outcomes.model,
    outcomes.entropy_kind,
    10 * tokens.position // outcomes.num_tokens + 1 as tenth,
    avg(tokens.entropy) filter (where outcomes.succeeded) as success_entropy,
    avg(tokens.entropy) filter (where not outcomes.succeeded) as failure_entropy,
    count(*) filter (where outcomes.succeeded) as num_success_tokens,
    count(*) filter (where not outcomes.succeeded) as num_failure_tokens
from tokens
join outcomes using (rollout_id)
group by all
order by outcomes.model, outcomes.entropy_kind, tenth
