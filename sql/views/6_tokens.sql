-- Every completion token, for looking inside a rollout: filter by rollout_id, and only its row is taken apart.
-- grain:   rollout_id, position
-- inputs:  rollouts
-- params:  none
-- columns:
--   rollout_id
--   group_id
--   position      from 0
--   token_id
--   logprob       nats, null if the rollout has none
--   entropy       nats, null while the rollout awaits the scorer
--   step_index    from 0, the reasoning step that the token belongs to
--   is_step_end   whether it is the last of its step
with

numbered as (
    select
        rollout_id,
        group_id,
        unnest(range(len(completion_ids))) as position,
        unnest(completion_ids) as token_id,
        unnest(completion_logprobs) as logprob,
        unnest(completion_entropies) as entropy,
        -- [tokens] the step of each token, so that no list is copied for every token
        unnest(flatten(list_transform(
            step_ends,
            lambda step_end, i: list_resize([]::integer[], step_end - coalesce(step_ends[i - 1], 0), i - 1)
        ))) as step_index,
        unnest(flatten(list_transform(
            step_ends,
            lambda step_end, i:
                list_resize([]::boolean[], step_end - coalesce(step_ends[i - 1], 0) - 1, false) || [true]
        ))) as is_step_end
    from rollouts
)

select
    rollout_id, group_id, position::integer as position, token_id, logprob, entropy,
    step_index::integer as step_index, is_step_end
from numbered
