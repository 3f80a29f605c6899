-- The clips of one mining as shard rows, in rank order.
-- grain:   clip_id
-- inputs:  clips, rollouts, current_verdicts, prompts
-- params:  $mining_id
-- columns:
--   clip_id
--   prompt_id
--   messages         JSON, null for prompts known by their tokens only
--   prompt_ids
--   clip_ids
--   step_entropy     nats
--   reward           the task reward, by the newest verdict
--   policy_version   optimizer steps
--   tokenizer_hash
--   weight           1.0
select
    clips.clip_id,
    clips.prompt_id,
    prompts.messages,
    clips.prompt_ids,
    clips.clip_ids,
    clips.step_entropy,
    coalesce(current_verdicts.reward, rollouts.reward) as reward,
    clips.policy_version,
    rollouts.tokenizer_hash,
    1.0 as weight
from clips
join rollouts using (rollout_id)
left join current_verdicts using (rollout_id)
left join prompts on prompts.prompt_id = clips.prompt_id
where clips.mining_id = $mining_id
order by clips.clip_rank
