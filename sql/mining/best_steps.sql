-- Each success's candidate of highest step entropy, the earliest on ties.
-- grain:   rollout_id
-- inputs:  successes
-- params:  $min_step_tokens, $max_clip_tokens (tokens; null: no limit)
-- columns:
--   rollout_id
--   group_id
--   prompt_id
--   model
--   policy_version   optimizer steps
--   sample_index
--   tokenizer_hash
--   splitter         given where the steps came with the rollout
--   steps_hash       of the ends of the steps up to this one
--   step_index       from 0
--   num_steps        steps of the whole completion
--   clip_tokens      tokens up to the end of the step
--   step_entropy     nats
with

candidates as (
    select
        *,
        case
            -- a third of the time where nothing is asked of steps
            when $min_step_tokens <= 1 and $max_clip_tokens is null then step_entropies
            else list_transform(
                step_entropies,
                lambda entropy, i: case
                    when step_ends[i] - coalesce(step_ends[i - 1], 0) >= $min_step_tokens
                        and ($max_clip_tokens is null or step_ends[i] <= $max_clip_tokens)
                    then entropy
                end
            )
        end as candidate_entropies
    from successes
    where not awaits_scorer
),

best as (
    select
        *,
        list_max(candidate_entropies) as step_entropy,
        -- list_position finds the first
        list_position(candidate_entropies, list_max(candidate_entropies)) as position
    from candidates
)

select
    rollout_id,
    group_id,
    prompt_id,
    model,
    policy_version,
    sample_index,
    tokenizer_hash,
    splitter,
    hash(step_ends[:position]) as steps_hash,
    (position - 1)::integer as step_index,
    len(step_ends)::integer as num_steps,
    step_ends[position] as clip_tokens,
    step_entropy
from best
where step_entropy is not null
