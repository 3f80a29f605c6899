-- The rollouts of a dump by their rewards: of several rows in one place of a group, the first.
-- grain:   group_id, sample_index
-- inputs:  dump_rows
-- params:  none
-- columns:
--   group_id
--   sample_index   as the dump gives it; where it gives none, counted past those in the order of the rows
--   reward         the task reward
--   num_tokens     completion tokens, null where the dump does not tell
--   group_size     rollouts asked for, null where the dump does not tell
--   origin         policy | trainer | expert
--   run_id         null: a dump is one run
with

samples as (
    select
        *,
        coalesce(
            'index ' || sample_index,
            -- the same sample may lie in several files
            'sample ' || sample_id || ' ' || reward,
            'row ' || nth_row
        ) as place
    from dump_rows
),

placed as (
    select
        *,
        min(nth_row) over (partition by group_id, place) as first_row,
        coalesce(max(sample_index) over (partition by group_id), -1) as last_index
    from samples
),

numbered as (
    select
        * replace (
            coalesce(sample_index, last_index + row_number() over (
                partition by group_id, sample_index is null
                order by nth_row
            )) as sample_index
        )
    from placed
    where nth_row = first_row
)

select
    group_id,
    sample_index,
    reward,
    num_tokens,
    group_size,
    origin,
    null::varchar as run_id
from numbered
