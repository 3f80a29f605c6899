-- Clips of a mining that is not recorded.
-- cure:    Mine again (`echomine mine`) and export that mining; nothing reads clips of an unrecorded one.
-- grain:   mining_id, clip_id
-- inputs:  echo_clips, mining_runs
-- params:  none
-- columns:
--   mining_id
--   clip_id
select echo_clips.mining_id, echo_clips.clip_id
from echo_clips
anti join mining_runs using (mining_id)
