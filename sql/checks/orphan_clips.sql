-- Clips whose rollout the lake does not hold.
-- cure:    Mine again (`echomine mine`) and export that mining; leave the old one alone.
-- grain:   mining_id, clip_id
-- inputs:  echo_clips, rollouts
-- params:  none
-- columns:
--   mining_id
--   clip_id
--   rollout_id
select echo_clips.mining_id, echo_clips.clip_id, echo_clips.rollout_id
from echo_clips
anti join rollouts using (rollout_id)
