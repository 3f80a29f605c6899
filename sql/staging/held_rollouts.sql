-- What the lake holds of the groups in which staged samples have no index.
-- grain:   group_id, sample_index
-- inputs:  staged_samples, rollouts
-- params:  none
-- columns:
--   group_id
--   sample_index
--   content          of tokens and reward
--   is_expert
--   group_size
--   policy_version
select
    group_id,
    sample_index,
    hash(prompt_ids, completion_ids, reward) as content,
    origin = 'expert' as is_expert,
    group_size,
    policy_version
from rollouts
where group_id in (select staged_samples.group_id from staged_samples where staged_samples.sample_index is null)
