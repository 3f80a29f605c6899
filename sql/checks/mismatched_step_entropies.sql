-- Rollouts with another number of step entropies than steps, or with those of steps or tokens alone.
-- cure:    Score them again: `echomine score --rescore` with the model that sampled them.
-- grain:   rollout_id
-- inputs:  rollouts
-- params:  none
-- columns:
--   rollout_id
--   num_steps            steps
--   num_step_entropies   step entropies
select rollout_id, len(step_ends) as num_steps, len(step_entropies) as num_step_entropies
from rollouts
where len(step_entropies) <> len(step_ends) or (step_entropies is null) <> (completion_entropies is null)
