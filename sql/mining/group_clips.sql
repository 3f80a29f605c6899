-- The best clips of each group. A group with a success that still awaits the scorer yields none.
-- grain:   group_id, group_rank
-- inputs:  successes
-- params:  $clips_per_group (clips)
-- columns:
--   group_id
--   group_rank       from 0
--   rollout_id
--   prompt_id
--   model
--   policy_version   optimizer steps
--   sample_index
--   tokenizer_hash
--   splitter         given where the steps came with the rollout
--   steps_hash       of the ends of the steps up to the clip's end
--   step_index       from 0
--   num_steps        steps
--   clip_tokens      tokens
--   step_entropy     nats
select
    group_id,
    row_number() over (partition by group_id order by step_entropy desc, sample_index) - 1 as group_rank,
    rollout_id,
    prompt_id,
    model,
    policy_version,
    sample_index,
    tokenizer_hash,
    splitter,
    steps_hash,
    step_index,
    num_steps,
    clip_tokens,
    step_entropy
from successes
where step_entropy is not null
    and group_id not in (select successes.group_id from successes where successes.awaits_scorer)
qualify group_rank < $clips_per_group
