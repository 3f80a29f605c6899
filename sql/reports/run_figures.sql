-- A run in numbers: how much was sampled, and how much of it taught nothing.
-- grain:   run_id
-- inputs:  rollouts, group_classes
-- params:  $run_id
-- columns:
--   run_id
--   night
--   model
--   min_policy_version          optimizer steps
--   max_policy_version          optimizer steps
--   num_groups                  groups
--   num_zero_advantage_groups   groups
--   num_rollouts                rollouts
--   num_tokens                  completion tokens
--   num_zero_advantage_tokens   completion tokens of zero-advantage groups
with

sampled as (
    select
        rollouts.*,
        group_classes.group_class in ('all_success', 'all_fail', 'all_equal') as zero_advantage
    from rollouts
    join group_classes using (group_id)
    where rollouts.run_id = $run_id and rollouts.origin in ('policy', 'trainer')
)

select
    run_id,
    any_value(night) as night,
    any_value(model) as model,
    min(policy_version) as min_policy_version,
    max(policy_version) as max_policy_version,
    count(distinct group_id) as num_groups,
    count(distinct group_id) filter (where zero_advantage) as num_zero_advantage_groups,
    count(*) as num_rollouts,
    sum(len(completion_ids))::bigint as num_tokens,
    coalesce(sum(len(completion_ids)) filter (where zero_advantage), 0)::bigint as num_zero_advantage_tokens
from sampled
group by run_id
