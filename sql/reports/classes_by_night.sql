-- Sampled groups of each class in the last nights of one model.
-- grain:   night, group_class
-- inputs:  groups, group_classes
-- params:  $model, $night (the last one), $max_nights (nights)
-- columns:
--   night
--   group_class   all_success | all_fail | all_equal | mixed | incomplete
--   num_groups    groups
--   night_share   of the night's groups
select
    groups.night,
    group_classes.group_class,
    count(*) as num_groups,
    count(*) / sum(count(*)) over (partition by groups.night) as night_share
from groups
join group_classes using (group_id)
where groups.model is not distinct from $model
    and groups.night <= $night
    and groups.origin = 'policy'
group by groups.night, group_classes.group_class
qualify dense_rank() over (order by groups.night desc) <= $max_nights
order by groups.night, group_classes.group_class
