-- The place of each staged rollout in its group, and how large the group was.
-- A row without an index is told from others by the dump's name of the sample and by its content, over all files
-- of the import; the n-th row of a content is what the lake holds as the n-th. A rollout that is there twice is one,
-- and one that was refused, or whose index another content has, is one that was lost.
-- grain:   nth
-- inputs:  staged_rollouts, rollouts
-- params:  none
-- columns:
--   nth              the row's number in the import
--   group_nth        that of its group's first row
--   sample_index     as given, or as in the lake, otherwise counted past those in the order of the rows
--   group_size       as given, otherwise the number of the group's rollouts, experts aside
--   policy_version   as given; without an index the group's, as it is in the lake or as its first row says
with

contents as (
    select
        * exclude (prompt_ids, completion_ids, reward),
        -- of a refused row nothing is known for sure
        if(is_refused, null, hash(prompt_ids, completion_ids, reward)) as content
    from staged_rollouts
),

samples as (
    select
        *,
        coalesce(
            'index ' || sample_index,
            coalesce(content || ' ', '') || 'sample ' || sample_id,
            -- which one, none can tell
            if(is_refused, 'row ' || nth, content || ' copy ' || row_number() over (
                partition by group_id, file, content, sample_index, sample_id
                order by nth
            ))
        ) as place
    from contents
),

places as (
    select
        group_id,
        place,
        sample_index,
        min(content) as content,
        min(nth) as first_nth,
        count(distinct content) filter (where origin <> 'expert') as num_accepted,
        greatest(num_accepted, max((origin <> 'expert')::integer)) as num_rollouts
    from samples
    group by group_id, place, sample_index
),

held as (
    select
        group_id,
        sample_index,
        group_size,
        policy_version,
        origin,
        hash(prompt_ids, completion_ids, reward) as content
    from rollouts
    where group_id in (select places.group_id from places where places.sample_index is null)
),

held_copies as (
    select
        *,
        row_number() over (partition by group_id, content order by sample_index) as copy
    from held
),

held_groups as (
    select
        group_id,
        max(sample_index) as last_index,
        count(*) filter (where origin <> 'expert') as num_rollouts,
        max(group_size) filter (where origin <> 'expert') as group_size,
        any_value(policy_version) filter (where origin <> 'expert') as policy_version
    from held
    group by group_id
),

copies as (
    select
        *,
        row_number() over (partition by group_id, content, sample_index is null order by first_nth) as copy,
        max(sample_index) over (partition by group_id) as last_index
    from places
),

found as (
    select
        copies.*,
        coalesce(copies.sample_index, held_copies.sample_index) as found_index,
        greatest(copies.last_index, held_groups.last_index, -1) as last_found
    from copies
    left join held_copies
        on copies.group_id = held_copies.group_id
        and copies.content = held_copies.content
        and copies.copy = held_copies.copy
        and copies.sample_index is null
    left join held_groups on copies.group_id = held_groups.group_id
),

numbered as (
    select
        group_id,
        place,
        num_accepted,
        num_rollouts,
        coalesce(
            found_index,
            -- behind the greatest index that there is, counting starts anew
            (last_found + row_number() over (
                partition by group_id, found_index is null
                order by first_nth
            )) % 2147483648
        )::integer as sample_index
    from found
),

-- What is new is lost to neither side: the lake knows of those it lost, the import of those that it loses.
sizes as (
    select
        numbered.group_id,
        greatest(
            coalesce(any_value(held_groups.group_size), 0)
            + sum(if(held.group_id is null, numbered.num_accepted, 0)),
            coalesce(any_value(held_groups.num_rollouts), 0)
            + sum(numbered.num_rollouts - (held.group_id is not null)::integer),
            1
        ) as num_rollouts,
        any_value(held_groups.policy_version) as policy_version
    from numbered
    left join held_groups on numbered.group_id = held_groups.group_id
    left join held on numbered.group_id = held.group_id and numbered.sample_index = held.sample_index
    group by numbered.group_id
),

first_versions as (
    select
        group_id,
        arg_min(policy_version, nth) as policy_version
    from samples
    where not is_refused and sample_index is null and origin <> 'expert'
    group by group_id
)

select
    samples.nth,
    min(samples.nth) over (partition by samples.group_id) as group_nth,
    numbered.sample_index,
    coalesce(samples.group_size, sizes.num_rollouts)::integer as group_size,
    case
        when samples.sample_index is null and samples.origin <> 'expert'
        then coalesce(sizes.policy_version, first_versions.policy_version)
        else samples.policy_version
    end as policy_version
from samples
join numbered on samples.group_id = numbered.group_id and samples.place = numbered.place
join sizes on samples.group_id = sizes.group_id
left join first_versions on samples.group_id = first_versions.group_id
where not samples.is_refused
order by group_nth, samples.nth
