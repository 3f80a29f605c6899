-- Clips of the same prompt and length as another: only these can be copies, so only their tokens are read.
-- grain:   rollout_id
-- inputs:  group_clips
-- params:  none
-- columns:
--   rollout_id
--   clip_tokens   tokens
select rollout_id, clip_tokens
from group_clips
qualify count(*) over (partition by prompt_id, clip_tokens) > 1
