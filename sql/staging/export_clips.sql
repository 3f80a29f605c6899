-- The tokens and facts of the clips that an export keeps, of some positions, in their order.
-- grain:   position
-- inputs:  export_decisions, rollouts, current_verdicts, prompts
-- params:  $first (position), $last (position, exclusive)
-- columns:
--   position         from 0
--   clip_id
--   prompt_id
--   messages         JSON, null for prompts known by their tokens only
--   ground_truth
--   data_source
--   prompt_ids
--   clip_ids
--   is_whole         whether the clip is the whole completion
--   step_entropy     nats
--   reward           the task reward, by the newest verdict
--   policy_version   optimizer steps
--   tokenizer_hash
--   weight           1.0
select
    export_decisions.position,
    export_decisions.clip_id,
    export_decisions.prompt_id,
    prompts.messages,
    prompts.ground_truth,
    prompts.data_source,
    rollouts.prompt_ids,
    rollouts.completion_ids[:export_decisions.clip_tokens] as clip_ids,
    export_decisions.clip_tokens = len(rollouts.completion_ids) as is_whole,
    export_decisions.step_entropy,
    coalesce(current_verdicts.reward, rollouts.reward) as reward,
    export_decisions.policy_version,
    export_decisions.tokenizer_hash,
    1.0 as weight
from export_decisions
join rollouts using (rollout_id)
left join current_verdicts using (rollout_id)
left join prompts on prompts.prompt_id = export_decisions.prompt_id
where export_decisions.position >= $first and export_decisions.position < $last
order by export_decisions.position
