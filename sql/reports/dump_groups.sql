-- Every group of a dump with its class and the rewards of its rollouts. Expert rollouts never count.
-- grain:   group_id
-- inputs:  dump_rollouts, group_classes
-- params:  none
-- columns:
--   group_id
--   group_class    all_success | all_fail | all_equal | mixed | incomplete
--   num_rollouts   rollouts
--   num_tokens     completion tokens, null where the dump does not tell them of each rollout
--   rewards        by sample_index
select
    dump_rollouts.group_id,
    group_classes.group_class,
    count(*) as num_rollouts,
    case when count(dump_rollouts.num_tokens) = count(*) then sum(dump_rollouts.num_tokens)::bigint end as num_tokens,
    list(dump_rollouts.reward order by dump_rollouts.sample_index) as rewards
from dump_rollouts
join group_classes using (group_id)
where dump_rollouts.origin in ('policy', 'trainer')
group by dump_rollouts.group_id, group_classes.group_class
order by dump_rollouts.group_id
