-- Rollouts with entropies that are missing, negative, NaN or infinite.
-- cure:    Score them again: `echomine score --rescore` with the model that sampled them.
-- grain:   rollout_id
-- inputs:  rollouts
-- params:  none
-- columns:
--   rollout_id
--   num_impossible   tokens
with

counted as (
    select
        rollout_id,
        len(list_filter(completion_entropies, lambda e: e is null or not isfinite(e) or e < 0)) as num_impossible
    from rollouts
)

select rollout_id, num_impossible
from counted
where num_impossible > 0
