-- The tokens and entropies of the successes that can yield a clip, to be split again.
-- grain:   rollout_id
-- inputs:  rollouts, successes
-- params:  $first_run, $last_run (between which runs they lie; null: any)
-- columns:
--   rollout_id
--   completion_ids
--   completion_entropies   nats
select rollouts.rollout_id, rollouts.completion_ids, rollouts.completion_entropies
from rollouts
join successes using (rollout_id)
where not successes.awaits_scorer
    and ($first_run is null or rollouts.run_id between $first_run and $last_run)
