-- Groups with more rollouts than were asked for. Expert rollouts aside.
-- cure:    Import the dump again with the true `group_size`, or with a group_id for each run.
-- grain:   group_id
-- inputs:  rollouts
-- params:  none
-- columns:
--   group_id
--   num_rollouts
--   group_size     rollouts asked for
select group_id, count(*) as num_rollouts, max(group_size) as group_size
from rollouts
where origin in ('policy', 'trainer')
group by group_id
having num_rollouts > max(rollouts.group_size)
