-- Rollouts with the reward that counts: of those that were verified again, the newest verdict's.
-- grain:   rollout_id
-- inputs:  rollouts, current_verdicts
-- params:  none
-- columns:
--   rollout_id
--   group_id
--   prompt_id
--   run_id
--   night
--   origin
--   model
--   weights_hash
--   tokenizer_hash
--   policy_version
--   sample_index
--   group_size
--   seed
--   temperature
--   top_p
--   top_k
--   max_tokens
--   prompt_ids
--   completion_ids
--   completion
--   completion_logprobs
--   logprobs_kind
--   completion_entropies
--   entropy_kind
--   finish_reason
--   reward
--   reward_parts
--   verifier
--   verifier_version
--   step_ends
--   step_entropies
--   splitter
--   created_at
select
    rollouts.* replace (
        coalesce(current_verdicts.reward, rollouts.reward) as reward,
        coalesce(current_verdicts.verifier, rollouts.verifier) as verifier,
        case
            when current_verdicts.rollout_id is null then rollouts.verifier_version
            else current_verdicts.verifier_version
        end as verifier_version
    )
from rollouts
left join current_verdicts using (rollout_id)
