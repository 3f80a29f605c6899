-- The rollouts of some prompts, under whatever name: the same prompt tokens are the same prompt.
-- grain:   rollout_id
-- inputs:  rollouts, named
-- params:  none
-- columns:
--   rollout_id
--   group_id
--   run_id
--   prompt_id
--   prompt_ids
with

named_tokens as (
    select distinct rollouts.prompt_ids
    from rollouts
    join named using (prompt_id)
    where len(rollouts.prompt_ids) > 0
)

select rollout_id, group_id, run_id, prompt_id, prompt_ids
from rollouts
where prompt_id in (select named.prompt_id from named)
    or prompt_ids in (select named_tokens.prompt_ids from named_tokens)
