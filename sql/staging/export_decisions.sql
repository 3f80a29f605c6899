-- What an export does with each clip of a mining: keeps it at a position, or leaves it out for a reason.
-- grain:   clip_id
-- inputs:  echo_clips, rollouts, prompts, withdrawn, excluded_prompts
-- params:  $mining_id, $max_tokens (tokens of prompt and clip together, null: no limit)
-- columns:
--   clip_id
--   rollout_id
--   prompt_id
--   clip_tokens      tokens
--   step_entropy     nats
--   policy_version   optimizer steps
--   tokenizer_hash
--   drop_reason      withdrawn | excluded_prompt | max_tokens, null if it is kept
--   position         from 0 in clip_rank order, null if it is left out
with

judged as (
    select
        echo_clips.clip_id,
        echo_clips.clip_rank,
        echo_clips.rollout_id,
        echo_clips.prompt_id,
        echo_clips.clip_tokens,
        echo_clips.step_entropy,
        echo_clips.policy_version,
        rollouts.tokenizer_hash,
        case
            when echo_clips.clip_id in (select withdrawn.clip_id from withdrawn) then 'withdrawn'
            when echo_clips.prompt_id in (select excluded_prompts.prompt_id from excluded_prompts)
                or prompts.messages in (select excluded_prompts.messages from excluded_prompts)
                then 'excluded_prompt'
            when len(rollouts.prompt_ids) + echo_clips.clip_tokens > $max_tokens then 'max_tokens'
        end as drop_reason
    from echo_clips
    join rollouts using (rollout_id)
    left join prompts on prompts.prompt_id = echo_clips.prompt_id
    where echo_clips.mining_id = $mining_id
)

select
    clip_id,
    rollout_id,
    prompt_id,
    clip_tokens,
    step_entropy,
    policy_version,
    tokenizer_hash,
    drop_reason,
    case
        when drop_reason is null
            then row_number() over (partition by drop_reason is null order by clip_rank) - 1
    end as position
from judged
