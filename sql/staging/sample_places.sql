-- The index of each staged sample in its group. One that is in the lake keeps the index that it has there, so that
-- a dump can be imported again; others without an index are counted in their order, past every index that there is.
-- grain:   group_id, sample
-- inputs:  staged_samples, held_rollouts
-- params:  none
-- columns:
--   group_id
--   sample
--   sample_index
--   is_held        whether it was found in the lake; always false where the dump gives the index
--   num_rollouts   experts aside; two contents with one index are two, of which one will be lost
--   num_accepted   rollouts of these that were not refused
with

samples as (
    select
        group_id,
        sample,
        sample_index,
        min(content) as content,
        min(nth) as first_nth,
        count(distinct content) filter (where not is_expert) as num_accepted,
        greatest(num_accepted, max((not is_expert)::integer)) as num_rollouts
    from staged_samples
    group by group_id, sample, sample_index
),

copies as (
    select
        *,
        row_number() over (partition by group_id, content, sample_index is null order by first_nth) as copy
    from samples
),

held as (
    select
        *,
        row_number() over (partition by group_id, content order by sample_index) as copy
    from held_rollouts
),

last_indices as (
    select group_id, max(sample_index) as last_index
    from (
        select group_id, sample_index from samples
        union all
        select group_id, sample_index from held
    )
    group by group_id
),

found as (
    select copies.*, held.sample_index as held_index
    from copies
    left join held
        on copies.group_id = held.group_id
        and copies.content = held.content
        and copies.copy = held.copy
        and copies.sample_index is null
)

select
    found.group_id,
    found.sample,
    coalesce(
        found.sample_index,
        found.held_index,
        -- past the greatest integer counting starts anew
        (coalesce(last_indices.last_index, -1) + row_number() over (
            partition by found.group_id, coalesce(found.sample_index, found.held_index) is null
            order by found.first_nth
        )) % 2147483648
    )::integer as sample_index,
    found.held_index is not null as is_held,
    found.num_rollouts,
    found.num_accepted
from found
join last_indices using (group_id)
