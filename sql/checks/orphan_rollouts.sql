-- Rollouts whose prompt the lake does not hold, although it holds others of their run. A prompt that is known by its
-- tokens only has no row in `prompts`, and a name made of these tokens or by the dump; this is no loss.
-- cure:    Generate or import the run again: known rollouts are not doubled, and lost prompts come back.
-- grain:   rollout_id
-- inputs:  rollouts, prompts
-- params:  none
-- columns:
--   rollout_id
--   prompt_id
--   run_id
with

known_runs as (
    select distinct rollouts.run_id
    from rollouts
    join prompts using (prompt_id)
),

unheld as (
    select prompt_id, any_value(prompt_ids) as prompt_ids
    from rollouts
    semi join known_runs using (run_id)
    anti join prompts on prompts.prompt_id = rollouts.prompt_id
    where regexp_full_match(prompt_id, '[0-9a-f]{32}')
    group by prompt_id
),

-- what content_id('tokens', prompt_ids) of pipeline/hashing.py hashes: heads, a zero byte, little-endian int32
hashed as (
    select
        prompt_id,
        ('json 8'::blob || '\x00'::blob || '"tokens"'::blob)
        || (encode('array <i4 (' || len(prompt_ids) || ',)') || '\x00'::blob)
        || unhex(array_to_string(list_transform(prompt_ids, lambda id: printf(
            '%02x%02x%02x%02x', id & 255, (id >> 8) & 255, (id >> 16) & 255, (id >> 24) & 255
        )), '')) as content
    from unheld
),

lost as (
    select prompt_id
    from hashed
    where sha256(content)[:32] != prompt_id
)

select rollouts.rollout_id, rollouts.prompt_id, rollouts.run_id
from rollouts
semi join known_runs using (run_id)
semi join lost using (prompt_id)
