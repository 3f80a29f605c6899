-- Groups of several prompts, models or policy versions: a group is of one of each. Expert rollouts aside.
-- cure:    Import the dump again with one group_id for each prompt, model and policy version.
-- grain:   group_id
-- inputs:  rollouts
-- params:  none
-- columns:
--   group_id
--   num_prompts
--   num_models
--   num_versions   policy versions
select
    group_id,
    count(distinct prompt_id) as num_prompts,
    count(distinct model) as num_models,
    count(distinct policy_version) as num_versions
from rollouts
where origin in ('policy', 'trainer')
group by group_id
having num_prompts > 1 or num_models > 1 or num_versions > 1
