-- The place of each staged rollout in its group, and how large the group was.
-- A rollout that is there twice is one; one that was refused without a valid index is one that was lost.
-- grain:   nth
-- inputs:  staged_rollouts
-- params:  none
-- columns:
--   nth            the row's number in the import
--   group_nth      that of its group's first row
--   sample_index   as given, otherwise counted in the order of the file
--   group_size     as given, otherwise the number of the group's rollouts, experts aside
with

numbered as (
    select
        *,
        row_number() over (partition by group_id, file order by nth) - 1 as nth_of_group
    from staged_rollouts
),

sizes as (
    select
        group_id,
        count(distinct coalesce('sample ' || sample_index, 'row ' || nth_of_group)) as num_rollouts
    from numbered
    where origin <> 'expert'
    group by group_id
)

select
    numbered.nth,
    min(numbered.nth) over (partition by group_id) as group_nth,
    coalesce(numbered.sample_index, numbered.nth_of_group)::integer as sample_index,
    coalesce(numbered.group_size, sizes.num_rollouts, 1)::integer as group_size
from numbered
left join sizes using (group_id)
where not numbered.is_refused
order by group_nth, nth
