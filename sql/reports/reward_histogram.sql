-- How often each reward was earned in a run, in bins of equal width over [0, 1] or wider.
-- grain:   bin_start, group_class
-- inputs:  judged_rollouts, group_classes
-- params:  $run_id, $num_bins (bins)
-- columns:
--   bin_start      reward
--   bin_end        reward, exclusive but for the last bin's
--   group_class    all_success | all_fail | all_equal | mixed | incomplete
--   num_rollouts   rollouts
with

rewarded as (
    select judged_rollouts.reward, group_classes.group_class
    from judged_rollouts
    join group_classes using (group_id)
    where judged_rollouts.run_id = $run_id and judged_rollouts.origin in ('policy', 'trainer')
        and isfinite(judged_rollouts.reward)
),

bounds as (
    select least(min(reward), 0) as low, greatest(max(reward), 1) as high
    from rewarded
),

binned as (
    select
        rewarded.group_class,
        bounds.low,
        (bounds.high - bounds.low) / $num_bins as width,
        least(floor((rewarded.reward - bounds.low) * $num_bins / (bounds.high - bounds.low)), $num_bins - 1) as bin
    from rewarded
    cross join bounds
)

select
    low + bin * width as bin_start,
    low + (bin + 1) * width as bin_end,
    group_class,
    count(*) as num_rollouts
from binned
group by low, width, bin, group_class
order by bin_start, group_class
