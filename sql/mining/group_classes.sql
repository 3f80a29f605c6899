-- Every group in the mining's reach with its class. Expert rollouts never count. A rollout that was verified again
-- has the reward of its newest verdict. With $run_id a group is what that run holds of it: the rest may be incomplete.
-- grain:   group_id
-- inputs:  judged_rollouts, touched_groups
-- params:  $incremental (only touched_groups), $first_run, $last_run (between which runs those lie; null: any),
--          $run_id (null: all runs), $reward_tolerance, $success_reward, $fail_reward (reward),
--          $min_group_size (rollouts), $allow_partial
-- columns:
--   group_id
--   group_class    all_success | all_fail | all_equal | mixed | incomplete
--   num_rollouts   rollouts
--   min_reward     reward
--   max_reward     reward
with

gathered as (
    select
        group_id,
        count(*) as num_rollouts,
        max(group_size) as group_size,
        min(reward) as min_reward,
        max(reward) as max_reward
    from judged_rollouts
    where origin in ('policy', 'trainer')
        and ($run_id is null or run_id = $run_id)
        and ($first_run is null or run_id between $first_run and $last_run)
        and (not $incremental or group_id in (select touched_groups.group_id from touched_groups))
    group by group_id
)

select
    group_id,
    group_class(
        num_rollouts, group_size, min_reward, max_reward,
        reward_tolerance := $reward_tolerance, success_reward := $success_reward,
        fail_reward := $fail_reward, min_group_size := $min_group_size, allow_partial := $allow_partial
    ) as group_class,
    num_rollouts,
    min_reward,
    max_reward
from gathered
