-- What experts wrote for the prompts of a training.
-- grain:   rollout_id
-- inputs:  judged_rollouts, named
-- params:  none
-- columns:
--   rollout_id
--   prompt_id
--   tokenizer_hash
--   completion_ids
--   reward
select
    rollout_id,
    prompt_id,
    tokenizer_hash,
    completion_ids,
    reward
from judged_rollouts
where origin = 'expert' and len(completion_ids) > 0 and prompt_id in (select named.prompt_id from named)
order by rollout_id
