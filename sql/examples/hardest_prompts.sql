-- Which prompts fail every time, and cost the most tokens?
-- grain:   prompt_id, model
-- inputs:  groups, prompts
-- params:  none
-- columns:
--   question         of the prompt's last message
--   model
--   num_groups       groups, all of them all_fail
--   num_rollouts     rollouts
--   num_versions     policy versions that tried
--   newest_version   optimizer steps
--   num_tokens       completion tokens
--   prompt_id
select
    question(any_value(prompts.messages)) as question,
    groups.model,
    count(*) as num_groups,
    sum(groups.num_rollouts)::bigint as num_rollouts,
    count(distinct groups.policy_version) as num_versions,
    max(groups.policy_version) as newest_version,
    sum(groups.num_tokens)::bigint as num_tokens,
    groups.prompt_id
from groups
left join prompts using (prompt_id)
group by groups.prompt_id, groups.model
having bool_and(groups.group_class = 'all_fail')
order by num_tokens desc, groups.prompt_id, groups.model
