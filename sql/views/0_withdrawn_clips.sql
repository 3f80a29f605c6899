-- Clips that may teach no more: the newest verdict says that their rollout is no success of their mining's rules.
-- grain:   mining_id, clip_id
-- inputs:  echo_clips, mining_runs, current_verdicts
-- params:  none
-- columns:
--   mining_id
--   clip_id
--   rollout_id
--   prompt_id
--   verifier           who overturned it
--   verifier_version
--   reward             reward
--   judged_at
select
    echo_clips.mining_id,
    echo_clips.clip_id,
    echo_clips.rollout_id,
    echo_clips.prompt_id,
    current_verdicts.verifier,
    current_verdicts.verifier_version,
    current_verdicts.reward,
    current_verdicts.judged_at
from echo_clips
join mining_runs using (mining_id)
join current_verdicts using (rollout_id)
where current_verdicts.reward
    < (mining_runs.config ->> 'success_reward')::double - (mining_runs.config ->> 'reward_tolerance')::double
