-- Macros that the mining and users' queries share. Each rule stands here once.

-- The class of a group of rollouts. A zero-advantage test by standard deviation is wrong on equal
-- fractional rewards, so the spread is compared with a tolerance.
create or replace temp macro group_class(
    num_rollouts, group_size, min_reward, max_reward,
    reward_tolerance := 1e-6, success_reward := 1.0, fail_reward := 0.0,
    min_group_size := 2, allow_partial := false
) as case
    when num_rollouts < min_group_size or (num_rollouts < group_size and not allow_partial) then 'incomplete'
    when max_reward - min_reward > reward_tolerance then 'mixed'
    when min_reward >= success_reward - reward_tolerance then 'all_success'
    when max_reward <= fail_reward + reward_tolerance then 'all_fail'
    else 'all_equal'
end;

-- The tokens of a completion's prefix that ends with step `step_index` (from 0): its EchoClip.
create or replace temp macro clip_ids(completion_ids, step_ends, step_index) as
    completion_ids[:step_ends[step_index + 1]];
