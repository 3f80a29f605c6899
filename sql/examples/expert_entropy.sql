-- Where is the model less sure of an expert's completion than of its own? Prompts that both completed.
-- grain:   prompt_id, model, entropy_kind
-- inputs:  rollouts, prompts
-- params:  none
-- columns:
--   question              of the prompt's last message
--   model
--   entropy_kind          kinds do not compare
--   expert_entropy        nats, mean over the tokens
--   policy_entropy        nats, mean over the tokens
--   num_expert_rollouts   rollouts
--   num_policy_rollouts   rollouts
--   prompt_id
with

summed as (
    select
        prompt_id,
        model,
        entropy_kind,
        origin = 'expert' as is_expert,
        list_sum(completion_entropies) as total_entropy,
        len(completion_entropies) as num_tokens
    from rollouts
    where len(completion_entropies) > 0
)

select
    question(any_value(prompts.messages)) as question,
    summed.model,
    summed.entropy_kind,
    sum(total_entropy) filter (where is_expert) / sum(num_tokens) filter (where is_expert) as expert_entropy,
    sum(total_entropy) filter (where not is_expert) / sum(num_tokens) filter (where not is_expert) as policy_entropy,
    count(*) filter (where is_expert) as num_expert_rollouts,
    count(*) filter (where not is_expert) as num_policy_rollouts,
    summed.prompt_id
from summed
left join prompts using (prompt_id)
group by summed.prompt_id, summed.model, summed.entropy_kind
having num_expert_rollouts > 0 and num_policy_rollouts > 0
order by expert_entropy - policy_entropy desc, summed.prompt_id, summed.model, summed.entropy_kind
