-- How many tokens of each night were sampled for nothing, and in groups of which class?
-- grain:   night, model
-- inputs:  groups
-- params:  none
-- columns:
--   night
--   model
--   num_tokens           completion tokens
--   all_success_tokens   completion tokens
--   all_fail_tokens      completion tokens
--   all_equal_tokens     completion tokens
--   wasted_tokens        completion tokens of the three classes
--   wasted_share         of the night's completion tokens
with

by_class as (
    select
        night,
        model,
        sum(num_tokens)::bigint as num_tokens,
        coalesce(sum(num_tokens) filter (where group_class = 'all_success'), 0)::bigint as all_success_tokens,
        coalesce(sum(num_tokens) filter (where group_class = 'all_fail'), 0)::bigint as all_fail_tokens,
        coalesce(sum(num_tokens) filter (where group_class = 'all_equal'), 0)::bigint as all_equal_tokens
    from groups
    where origin = 'policy'
    group by night, model
)

select
    *,
    all_success_tokens + all_fail_tokens + all_equal_tokens as wasted_tokens,
    wasted_tokens / num_tokens as wasted_share
from by_class
order by model, night
