-- The rollouts that a model is to score: those without entropies, and with $rescore those that another scored.
-- grain:   rollout_id
-- inputs:  rollouts, scorings
-- params:  $run_id (null: all), $rescore (also rollouts with entropies, unless $weights_hash gave them),
--          $weights_hash, $tokenizer_hash, $context (tokens)
-- columns:
--   rollout_id
--   max_token_id   the greatest of its token ids, null if it has none
--   obstacle       other_tokenizer | unreadable (no prompt, or longer than the context), null if none
with

scored as (
    select rollout_id
    from scorings
    group by rollout_id
    having arg_max(weights_hash, scored_at) = $weights_hash
)

select
    rollout_id,
    greatest(list_max(prompt_ids), list_max(completion_ids)) as max_token_id,
    case
        when coalesce(tokenizer_hash, '') <> $tokenizer_hash then 'other_tokenizer'
        when len(prompt_ids) = 0 or len(prompt_ids) + len(completion_ids) > $context then 'unreadable'
    end as obstacle
from rollouts
where ($run_id is null or run_id = $run_id)
    and (
        completion_entropies is null
        or ($rescore and rollout_id not in (select scored.rollout_id from scored))
    )
