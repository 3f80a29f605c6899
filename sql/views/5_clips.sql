-- Every mined EchoClip with its tokens and where it came from, but for the withdrawn: see withdrawn_clips.
-- grain:   mining_id, clip_id
-- inputs:  echo_clips, rollouts, withdrawn_clips
-- params:  none
-- columns:
--   mining_id
--   clip_id
--   clip_rank        from 0
--   group_id
--   rollout_id
--   prompt_id
--   run_id
--   night
--   model
--   policy_version   optimizer steps
--   step_index       from 0
--   num_steps        steps of the whole completion
--   clip_tokens      tokens
--   step_entropy     nats
--   prompt_ids
--   clip_ids
select
    echo_clips.mining_id,
    echo_clips.clip_id,
    echo_clips.clip_rank,
    echo_clips.group_id,
    echo_clips.rollout_id,
    echo_clips.prompt_id,
    rollouts.run_id,
    rollouts.night,
    rollouts.model,
    echo_clips.policy_version,
    echo_clips.step_index,
    echo_clips.num_steps,
    echo_clips.clip_tokens,
    echo_clips.step_entropy,
    rollouts.prompt_ids,
    rollouts.completion_ids[:echo_clips.clip_tokens] as clip_ids
from echo_clips
join rollouts using (rollout_id)
anti join withdrawn_clips
    on withdrawn_clips.mining_id = echo_clips.mining_id and withdrawn_clips.clip_id = echo_clips.clip_id
