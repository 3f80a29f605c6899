-- Which EchoClips come again and again: the same tokens, cut from several rollouts?
-- grain:   prompt_id, clip_id
-- inputs:  clips, prompts
-- params:  none
-- columns:
--   question        of the prompt's last message
--   clip_tokens     tokens
--   num_rollouts    rollouts that it was cut from
--   num_minings     minings that found it
--   first_night
--   last_night
--   first_version   optimizer steps
--   last_version    optimizer steps
--   prompt_id
--   clip_id         of one of them
with

gathered as (
    select
        prompt_id,
        clip_ids,
        count(distinct rollout_id) as num_rollouts,
        count(distinct mining_id) as num_minings,
        min(night) as first_night,
        max(night) as last_night,
        min(policy_version) as first_version,
        max(policy_version) as last_version,
        min(clip_id) as clip_id
    from clips
    group by prompt_id, clip_ids
)

select
    question(prompts.messages) as question,
    len(gathered.clip_ids) as clip_tokens,
    gathered.num_rollouts,
    gathered.num_minings,
    gathered.first_night,
    gathered.last_night,
    gathered.first_version,
    gathered.last_version,
    gathered.prompt_id,
    gathered.clip_id
from gathered
left join prompts using (prompt_id)
where gathered.num_rollouts > 1
order by gathered.num_rollouts desc, gathered.num_minings desc, gathered.clip_id
