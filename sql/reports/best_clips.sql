-- The best clips of a mining with the whole completion they were cut from, but for the withdrawn.
-- grain:   clip_id
-- inputs:  echo_clips, mining_runs, withdrawn_clips, judged_rollouts, prompts
-- params:  $mining_id, $num_clips (clips)
-- columns:
--   clip_id
--   clip_rank              from 0
--   group_id
--   sample_index
--   model
--   tokenizer_hash
--   policy_version         optimizer steps
--   step_index             from 0, the chosen step
--   num_steps              steps
--   clip_tokens            tokens
--   step_entropy           nats
--   reward                 reward
--   data_source            where the prompt is from, null if the lake does not hold it
--   messages               JSON, null if the lake does not hold the prompt
--   prompt_ids
--   completion_ids
--   completion_entropies   nats
--   completion_logprobs    nats
--   delimiter              that the mining split steps at; null: its steps are the stored ones
--   step_ends              tokens, exclusive
--   step_entropies         nats
select
    echo_clips.clip_id,
    echo_clips.clip_rank,
    echo_clips.group_id,
    echo_clips.sample_index,
    judged_rollouts.model,
    judged_rollouts.tokenizer_hash,
    echo_clips.policy_version,
    echo_clips.step_index,
    echo_clips.num_steps,
    echo_clips.clip_tokens,
    echo_clips.step_entropy,
    judged_rollouts.reward,
    prompts.data_source,
    prompts.messages,
    judged_rollouts.prompt_ids,
    judged_rollouts.completion_ids,
    judged_rollouts.completion_entropies,
    judged_rollouts.completion_logprobs,
    mining_runs.config ->> 'delimiter' as delimiter,
    judged_rollouts.step_ends,
    judged_rollouts.step_entropies
from echo_clips
join mining_runs using (mining_id)
join judged_rollouts using (rollout_id)
left join prompts on prompts.prompt_id = echo_clips.prompt_id
anti join withdrawn_clips
    on withdrawn_clips.mining_id = echo_clips.mining_id and withdrawn_clips.clip_id = echo_clips.clip_id
where echo_clips.mining_id = $mining_id and echo_clips.clip_rank < $num_clips
order by echo_clips.clip_rank
