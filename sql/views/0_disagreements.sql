-- Verdicts that differ from the reward a rollout was stored with.
-- grain:   rollout_id, verifier, verifier_version, judged_at
-- inputs:  rollouts, verdicts
-- params:  none
-- columns:
--   rollout_id
--   group_id
--   prompt_id
--   stored_verifier           who gave the stored reward, null if unknown
--   stored_verifier_version
--   stored_reward             reward
--   verifier
--   verifier_version
--   reward                    reward
--   judged_at
select
    verdicts.rollout_id,
    rollouts.group_id,
    rollouts.prompt_id,
    rollouts.verifier as stored_verifier,
    rollouts.verifier_version as stored_verifier_version,
    rollouts.reward as stored_reward,
    verdicts.verifier,
    verdicts.verifier_version,
    verdicts.reward,
    verdicts.judged_at
from verdicts
join rollouts using (rollout_id)
where abs(verdicts.reward - rollouts.reward) > 1e-6
