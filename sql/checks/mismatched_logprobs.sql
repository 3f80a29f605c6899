-- Rollouts with another number of log-probabilities than completion tokens.
-- cure:    Import these rollouts again from their dump; log-probs cannot be computed after the fact.
-- grain:   rollout_id
-- inputs:  rollouts
-- params:  none
-- columns:
--   rollout_id
--   num_tokens     completion tokens
--   num_logprobs   log-probabilities
select rollout_id, len(completion_ids) as num_tokens, len(completion_logprobs) as num_logprobs
from rollouts
where len(completion_logprobs) <> len(completion_ids)
