-- How much of each class of group was sampled.
-- grain:   group_class
-- inputs:  rollouts, group_classes
-- params:  none
-- columns:
--   group_class    all_success | all_fail | all_equal | mixed | incomplete
--   num_groups     groups
--   num_rollouts   rollouts
--   num_tokens     completion tokens
select
    group_classes.group_class,
    count(distinct group_id) as num_groups,
    count(*) as num_rollouts,
    sum(len(rollouts.completion_ids))::bigint as num_tokens
from rollouts
join group_classes using (group_id)
where rollouts.origin in ('policy', 'trainer')
group by group_classes.group_class
order by group_classes.group_class
