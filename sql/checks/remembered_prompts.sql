-- Forgotten prompts that are in the lake all the same.
-- cure:    Forget them again: `echomine forget --prompt ID --yes`.
-- grain:   prompt_id
-- inputs:  rollouts, prompts, forgotten_prompts
-- params:  none
-- columns:
--   prompt_id
with

held as (
    select prompt_id from rollouts
    union
    select prompt_id from prompts
)

select prompt_id
from held
where prompt_id in (select forgotten_prompts.fingerprint from forgotten_prompts)
