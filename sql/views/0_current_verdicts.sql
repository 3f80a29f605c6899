-- What counts of the rollouts that were verified again: the newest verdict with a reward.
-- grain:   rollout_id
-- inputs:  verdicts
-- params:  none
-- columns:
--   rollout_id
--   verifier
--   verifier_version
--   reward             reward
--   judged_at
select rollout_id, verifier, verifier_version, reward, judged_at
from verdicts
where reward is not null
qualify row_number() over (partition by rollout_id order by judged_at desc, verifier, verifier_version) = 1
