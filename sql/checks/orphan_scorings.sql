-- Scorings of rollouts that the lake does not hold.
-- cure:    Restore the catalog from a backup; until then entropies of lost rollouts are simply not used.
-- grain:   rollout_id
-- inputs:  scorings, rollouts
-- params:  none
-- columns:
--   rollout_id
--   num_scorings   scorings
select rollout_id, count(*) as num_scorings
from scorings
anti join rollouts using (rollout_id)
group by rollout_id
