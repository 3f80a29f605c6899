-- V with the steps of the mining's own delimiter instead of the stored ones; those that await the scorer have none.
-- grain:   rollout_id
-- inputs:  successes, new_steps
-- params:  $splitter (the rule that split them), $min_step_tokens, $max_clip_tokens (tokens; null: no limit)
-- columns:
--   rollout_id
--   group_id
--   prompt_id
--   model
--   policy_version   optimizer steps
--   sample_index
--   tokenizer_hash
--   splitter
--   entropy_kind
--   awaits_scorer    no entropies yet
--   steps_hash       of the ends of the steps up to the candidate's
--   step_index       from 0, null without a candidate
--   num_steps        steps of the whole completion
--   clip_tokens      tokens up to the end of the step, null without a candidate
--   step_entropy     nats, null without a candidate
with

candidates as (
    select
        successes.rollout_id,
        successes.group_id,
        successes.prompt_id,
        successes.model,
        successes.policy_version,
        successes.sample_index,
        successes.tokenizer_hash,
        $splitter as splitter,
        successes.entropy_kind,
        successes.awaits_scorer,
        new_steps.step_ends,
        candidate_entropies(
            new_steps.step_ends, new_steps.step_entropies, $min_step_tokens, $max_clip_tokens
        ) as entropies
    from successes
    left join new_steps using (rollout_id)
)

select
    * exclude (step_ends, entropies),
    unnest(best_step(step_ends, entropies))
from candidates
