-- What did each training run consume, and did the EchoClips' loss fall?
-- grain:   training_id
-- inputs:  clip_uses, echo_clips
-- params:  none
-- columns:
--   training_id
--   num_clips            clips
--   num_prompts          prompts
--   num_uses             of a clip in an optimizer step
--   num_optim_steps      optimizer steps that used clips
--   num_tokens           clip tokens, counted at every use
--   min_policy_version   optimizer steps, of the policy that sampled the clips
--   max_policy_version   optimizer steps
--   first_loss           nats per clip token, mean over the clips at their first use
--   last_loss            nats per clip token, at their last use
with

known_clips as (
    select
        clip_id,
        any_value(prompt_id) as prompt_id,
        any_value(policy_version) as policy_version,
        any_value(clip_tokens) as clip_tokens
    from echo_clips
    group by clip_id
),

by_clip as (
    select
        training_id,
        clip_id,
        count(*) as num_uses,
        min_by(clip_loss, optim_step) as first_loss,
        max_by(clip_loss, optim_step) as last_loss
    from clip_uses
    group by training_id, clip_id
),

steps_of as (
    select training_id, count(distinct optim_step) as num_optim_steps
    from clip_uses
    group by training_id
)

select
    by_clip.training_id,
    count(*) as num_clips,
    count(distinct known_clips.prompt_id) as num_prompts,
    sum(by_clip.num_uses)::bigint as num_uses,
    any_value(steps_of.num_optim_steps) as num_optim_steps,
    sum(by_clip.num_uses * known_clips.clip_tokens)::bigint as num_tokens,
    min(known_clips.policy_version) as min_policy_version,
    max(known_clips.policy_version) as max_policy_version,
    avg(by_clip.first_loss) as first_loss,
    avg(by_clip.last_loss) as last_loss
from by_clip
join steps_of using (training_id)
left join known_clips using (clip_id)
group by by_clip.training_id
order by by_clip.training_id
