-- Every night of each model: what was sampled, and how much of it taught nothing. Rollouts of trainings are left out.
-- grain:   night, model
-- inputs:  groups
-- params:  none
-- columns:
--   night
--   model
--   num_runs                    runs
--   min_policy_version          optimizer steps
--   max_policy_version          optimizer steps
--   num_groups                  groups
--   num_zero_advantage_groups   groups
--   num_rollouts                rollouts
--   num_tokens                  completion tokens
--   num_zero_advantage_tokens   completion tokens
--   mean_reward                 over the rollouts
with

marked as (
    select *, group_class in ('all_success', 'all_fail', 'all_equal') as is_zero_advantage
    from groups
    where origin = 'policy'
)

select
    night,
    model,
    count(distinct run_id) as num_runs,
    min(policy_version) as min_policy_version,
    max(policy_version) as max_policy_version,
    count(*) as num_groups,
    count(*) filter (where is_zero_advantage) as num_zero_advantage_groups,
    sum(num_rollouts)::bigint as num_rollouts,
    sum(num_tokens)::bigint as num_tokens,
    coalesce(sum(num_tokens) filter (where is_zero_advantage), 0)::bigint as num_zero_advantage_tokens,
    sum(mean_reward * num_rollouts) / sum(num_rollouts) as mean_reward
from marked
group by night, model
