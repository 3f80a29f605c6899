-- Places in a group that several rollouts take.
-- cure:    Restore the catalog from a backup: a second rollout for a place is refused into quarantine.
-- grain:   group_id, sample_index
-- inputs:  rollouts
-- params:  none
-- columns:
--   group_id
--   sample_index
--   num_rollouts   rollouts
select group_id, sample_index, count(*) as num_rollouts
from rollouts
group by group_id, sample_index
having count(*) > 1
