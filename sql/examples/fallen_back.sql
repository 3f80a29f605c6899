-- Which prompts are solved less often under the newest policy version that met them than they once were?
-- grain:   prompt_id, model
-- inputs:  prompt_history, prompts
-- params:  none
-- columns:
--   question              of the prompt's last message
--   model
--   best_version          optimizer steps, the last at which it went best
--   best_success_rate     share of the rollouts
--   newest_version        optimizer steps
--   newest_success_rate   share of the rollouts
--   prompt_id
with

rated as (
    select *, max(success_rate) over (partition by prompt_id, model) as best_success_rate
    from prompt_history
),

by_prompt as (
    select
        prompt_id,
        model,
        max(policy_version) filter (where success_rate = best_success_rate) as best_version,
        max(success_rate) as best_success_rate,
        max(policy_version) as newest_version,
        max_by(success_rate, policy_version) as newest_success_rate
    from rated
    group by prompt_id, model
)

select
    question(prompts.messages) as question,
    by_prompt.model,
    by_prompt.best_version,
    by_prompt.best_success_rate,
    by_prompt.newest_version,
    by_prompt.newest_success_rate,
    by_prompt.prompt_id
from by_prompt
left join prompts using (prompt_id)
where by_prompt.newest_success_rate < by_prompt.best_success_rate
order by by_prompt.best_success_rate - by_prompt.newest_success_rate desc, by_prompt.prompt_id, by_prompt.model
