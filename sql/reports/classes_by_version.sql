-- Groups of each class under the last policy versions of one model, on-policy groups of trainings included.
-- grain:   policy_version, group_class
-- inputs:  groups, group_classes
-- params:  $model, $night (the last one), $max_versions (policy versions)
-- columns:
--   policy_version   optimizer steps
--   group_class      all_success | all_fail | all_equal | mixed | incomplete
--   num_groups       groups
--   version_share    of the policy version's groups
select
    groups.policy_version,
    group_classes.group_class,
    count(*) as num_groups,
    count(*) / sum(count(*)) over (partition by groups.policy_version) as version_share
from groups
join group_classes using (group_id)
where groups.model is not distinct from $model and groups.night <= $night
group by groups.policy_version, group_classes.group_class
qualify dense_rank() over (order by groups.policy_version desc) <= $max_versions
order by groups.policy_version, group_classes.group_class
