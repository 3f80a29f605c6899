-- Which sample of its group each staged row is: the same one may lie in several files, or twice in one.
-- Its index tells, or the dump's name of it with its content, or its content alone: the n-th row of a content in
-- one file is the n-th in another.
-- grain:   nth
-- inputs:  staged_rollouts
-- params:  none
-- columns:
--   nth              the row's number in the import
--   group_id
--   sample           the same for rows of the same sample
--   content          of tokens and reward; null for a refused row, of which nothing is known for sure
--   is_refused
--   is_expert
--   sample_index     as given
--   group_size       as given
--   policy_version   as given
with

contents as (
    select
        *,
        if(is_refused, null, hash(prompt_ids, completion_ids, reward)) as content,
        origin = 'expert' as is_expert
    from staged_rollouts
)

select
    nth,
    group_id,
    coalesce(
        'index ' || sample_index,
        'sample ' || sample_id || coalesce(' ' || content, ''),
        content || ' copy ' || row_number() over (
            partition by group_id, file, content, sample_index, sample_id
            order by nth
        ),
        'refused row ' || nth
    ) as sample,
    content,
    is_refused,
    is_expert,
    sample_index,
    group_size,
    policy_version
from contents
