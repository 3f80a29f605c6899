-- How many groups would be solved if the reward tolerance or the group size were other?
-- grain:   group_size, reward_tolerance
-- inputs:  judged_rollouts
-- params:  none
-- columns:
--   group_size             rollouts: the first so many samples of the groups that have them
--   reward_tolerance       reward; 1e-6 is the mining's default
--   num_groups             groups of at least this size
--   num_all_success        groups; each yields one EchoClip, or --clips-per-group of them
--   num_all_fail           groups
--   num_all_equal          groups
--   zero_advantage_share   of the groups
with

sizes as (select unnest([2, 4, 8, 16, 32, 64, 128]) as group_size),

tolerances as (select unnest([1e-6, 0.01, 0.1, 0.25, 0.5]) as reward_tolerance),

cut as (
    select sizes.group_size, judged_rollouts.group_id, list(judged_rollouts.reward) as rewards
    from judged_rollouts
    join sizes on judged_rollouts.sample_index < sizes.group_size
    where judged_rollouts.origin in ('policy', 'trainer')
    group by sizes.group_size, judged_rollouts.group_id
    having count(*) = sizes.group_size
),

classed as (
    select cut.group_size, reward_tolerance, group_class(cut.rewards, reward_tolerance) as group_class
    from cut
    cross join tolerances
)

select
    group_size,
    reward_tolerance::double as reward_tolerance,
    count(*) as num_groups,
    count(*) filter (where group_class = 'all_success') as num_all_success,
    count(*) filter (where group_class = 'all_fail') as num_all_fail,
    count(*) filter (where group_class = 'all_equal') as num_all_equal,
    1 - count(*) filter (where group_class = 'mixed') / count(*) as zero_advantage_share
from classed
group by group_size, reward_tolerance
order by group_size, reward_tolerance
