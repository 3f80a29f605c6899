-- The place of each staged rollout in its group, how large the group was, and of which policy it is.
-- Rollouts without an index may join a group that the lake holds: it grows by them, and keeps what it had lost.
-- grain:   nth
-- inputs:  staged_samples, held_rollouts, sample_places
-- params:  none
-- columns:
--   nth              the row's number in the import
--   group_nth        that of its group's first row
--   sample_index
--   group_size       as given, otherwise the number of the group's rollouts, refused ones too, experts aside
--   policy_version   as given; where samples have no index the group's in the lake, or else its oldest
with

held_groups as (
    select
        group_id,
        count(*) as num_rollouts,
        max(group_size) as group_size,
        any_value(policy_version) as policy_version
    from held_rollouts
    where not is_expert
    group by group_id
),

staged_groups as (
    select
        group_id,
        sum(num_rollouts) as num_rollouts,
        sum(if(is_held, 0, num_rollouts)) as num_new,
        sum(if(is_held, 0, num_accepted)) as num_joining
    from sample_places
    group by group_id
),

oldest_versions as (
    select group_id, min(policy_version) as policy_version
    from staged_samples
    where sample_index is null and not is_refused and not is_expert
    group by group_id
),

sizes as (
    select
        staged_groups.group_id,
        greatest(
            -- the lake knows what it lost earlier, the import what it loses now
            held_groups.group_size + staged_groups.num_joining,
            held_groups.num_rollouts + staged_groups.num_new,
            staged_groups.num_rollouts,
            1
        ) as group_size,
        coalesce(held_groups.policy_version, oldest_versions.policy_version) as policy_version
    from staged_groups
    left join held_groups using (group_id)
    left join oldest_versions using (group_id)
)

select
    samples.nth,
    min(samples.nth) over (partition by samples.group_id) as group_nth,
    places.sample_index,
    coalesce(samples.group_size, sizes.group_size)::integer as group_size,
    if(
        samples.sample_index is null and not samples.is_expert, sizes.policy_version, samples.policy_version
    ) as policy_version
from staged_samples as samples
join sample_places as places on samples.group_id = places.group_id and samples.sample = places.sample
join sizes on samples.group_id = sizes.group_id
where not samples.is_refused
order by group_nth, samples.nth
