-- V with the steps of the mining's own delimiter instead of the stored ones.
-- grain:   rollout_id
-- inputs:  successes, new_steps
-- params:  $splitter (the rule that split them)
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
--   awaits_scorer    no entropies yet, and the stored steps
--   step_ends        tokens, exclusive
--   step_entropies   nats
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
    coalesce(new_steps.step_ends, successes.step_ends) as step_ends,
    new_steps.step_entropies
from successes
left join new_steps using (rollout_id)
