-- Rollouts whose prompt the lake does not hold, although it holds others of their run.
-- cure:    Generate or import the run again: known rollouts are not doubled, and lost prompts come back.
-- grain:   rollout_id
-- inputs:  rollouts, prompts
-- params:  none
-- columns:
--   rollout_id
--   prompt_id
--   run_id
with

known_runs as (
    select distinct rollouts.run_id
    from rollouts
    join prompts using (prompt_id)
)

select rollouts.rollout_id, rollouts.prompt_id, rollouts.run_id
from rollouts
semi join known_runs using (run_id)
anti join prompts on prompts.prompt_id = rollouts.prompt_id
