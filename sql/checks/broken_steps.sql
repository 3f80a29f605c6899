-- Rollouts whose steps do not cover the completion: ends that are missing, do not increase from above 0, or
-- do not end with the last token.
-- cure:    Import these rollouts again from their dump; until then leave their runs out of minings.
-- grain:   rollout_id
-- inputs:  rollouts
-- params:  none
-- columns:
--   rollout_id
--   num_tokens   completion tokens
--   step_ends    tokens, exclusive
select rollout_id, len(completion_ids) as num_tokens, step_ends
from rollouts
where step_ends is null
    or coalesce(step_ends[-1], 0) <> len(completion_ids)
    or len(list_filter(step_ends, lambda e, i: e is null or e <= coalesce(step_ends[i - 1], 0))) > 0
