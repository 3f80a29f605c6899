-- Verdicts on rollouts that the lake does not hold.
-- cure:    Restore the catalog from a backup; until then these verdicts decide nothing.
-- grain:   rollout_id
-- inputs:  verdicts, rollouts
-- params:  none
-- columns:
--   rollout_id
--   num_verdicts   verdicts
select rollout_id, count(*) as num_verdicts
from verdicts
anti join rollouts using (rollout_id)
group by rollout_id
