-- The rollouts of a dump by their rewards: of several rows in one place of a group, the first.
-- grain:   group_id, sample_index
-- inputs:  dump_rows
-- params:  none
-- columns:
--   group_id
--   sample_index   as the dump gives it; where it gives none, the row's number among those
--   reward         the task reward
--   num_tokens     completion tokens, null where the dump does not tell
--   group_size     rollouts asked for, null where the dump does not tell
--   origin         policy | trainer | expert
--   run_id         null: a dump is one run
with

placed as (
    select
        group_id,
        coalesce(sample_index, row_number() over (partition by group_id order by nth_row)) as sample_index,
        reward,
        num_tokens,
        group_size,
        origin,
        nth_row
    from dump_rows
)

select
    group_id,
    sample_index,
    reward,
    num_tokens,
    group_size,
    origin,
    null::varchar as run_id
from placed
qualify row_number() over (partition by group_id, sample_index order by nth_row) = 1
