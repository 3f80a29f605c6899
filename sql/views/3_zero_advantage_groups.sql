-- Groups whose rollouts all earned the same reward: every advantage is 0, the prompt taught nothing.
-- grain:   group_id
-- inputs:  groups
-- params:  none
-- columns:
--   group_id
--   prompt_id
--   run_id
--   night
--   origin
--   model
--   policy_version   optimizer steps
--   group_class      all_success | all_fail | all_equal
--   num_rollouts     rollouts
--   group_size       rollouts asked for
--   mean_reward      the shared reward
--   num_tokens       completion tokens
from groups
where group_class in ('all_success', 'all_fail', 'all_equal')
