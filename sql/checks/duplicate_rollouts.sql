-- Names that several rollouts bear.
-- cure:    Restore the catalog from a backup: EchoMine never writes a rollout twice.
-- grain:   rollout_id
-- inputs:  rollouts
-- params:  none
-- columns:
--   rollout_id
--   num_rollouts   rollouts
select rollout_id, count(*) as num_rollouts
from rollouts
group by rollout_id
having count(*) > 1
