-- Clips that may be copies of another: of the same prompt and length, and split at the same places where one
-- rule split them all, as it splits the same tokens at the same places. Only their tokens need be read.
-- grain:   rollout_id
-- inputs:  group_clips
-- params:  none
-- columns:
--   rollout_id
--   clip_tokens   tokens
with

compared as (
    select
        *,
        min(splitter) over peers = max(splitter) over peers
            and min(splitter) over peers <> 'given'
            and coalesce(min(tokenizer_hash) over peers = max(tokenizer_hash) over peers, false)
            as is_of_one_rule
    from group_clips
    window peers as (partition by prompt_id, clip_tokens)
)

select rollout_id, clip_tokens
from compared
qualify count(*) over (
    partition by prompt_id, clip_tokens, case when is_of_one_rule then steps_hash end
) > 1
