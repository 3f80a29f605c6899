-- The reasoning steps of every rollout.
-- grain:   rollout_id, step_index
-- inputs:  rollouts
-- params:  none
-- columns:
--   rollout_id
--   group_id
--   step_index     from 0
--   step_start     first token
--   step_end       exclusive
--   num_tokens     tokens
--   step_entropy   nats, null while the rollout awaits the scorer
with

numbered as (
    select rollout_id, group_id, step_ends, step_entropies, unnest(range(1, len(step_ends) + 1)) as position
    from rollouts
)

select
    rollout_id,
    group_id,
    (position - 1)::integer as step_index,
    coalesce(step_ends[position - 1], 0) as step_start,
    step_ends[position] as step_end,
    step_ends[position] - coalesce(step_ends[position - 1], 0) as num_tokens,
    step_entropies[position] as step_entropy
from numbered
