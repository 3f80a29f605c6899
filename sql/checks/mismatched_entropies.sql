-- Rollouts with another number of entropies than completion tokens.
-- cure:    Score them again: `echomine score --rescore` with the model that sampled them.
-- grain:   rollout_id
-- inputs:  rollouts
-- params:  none
-- columns:
--   rollout_id
--   num_tokens      completion tokens
--   num_entropies   entropies
select rollout_id, len(completion_ids) as num_tokens, len(completion_entropies) as num_entropies
from rollouts
where len(completion_entropies) <> len(completion_ids)
