-- Which prompts were solved for the first time, after every rollout of earlier policy versions had failed?
-- grain:   prompt_id, model
-- inputs:  prompt_history, prompts
-- params:  none
-- columns:
--   question              of the prompt's last message
--   model
--   policy_version        optimizer steps, the first with a success
--   first_night           the first that sampled it under this version
--   num_successes         rollouts
--   num_rollouts          rollouts
--   num_failures_before   rollouts of earlier versions
--   prompt_id
with

numbered as (
    select
        *,
        sum(num_successes) over earlier as num_successes_before,
        sum(num_rollouts) over earlier as num_rollouts_before
    from prompt_history
    window earlier as (
        partition by prompt_id, model order by policy_version
        rows between unbounded preceding and 1 preceding
    )
)

select
    question(prompts.messages) as question,
    numbered.model,
    numbered.policy_version,
    numbered.first_night,
    numbered.num_successes,
    numbered.num_rollouts,
    numbered.num_rollouts_before::bigint as num_failures_before,
    numbered.prompt_id
from numbered
left join prompts using (prompt_id)
where numbered.num_successes > 0 and numbered.num_successes_before = 0
order by numbered.policy_version desc, num_failures_before desc, numbered.prompt_id
