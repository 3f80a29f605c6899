-- What a query may be made of: the words that the prompt completes.
-- grain:   word
-- inputs:  the catalog
-- params:  none
-- columns:
--   word
--   kind   relation | column | macro | keyword | function
with

named as (
    select table_name as word, 1 as place, 'relation' as kind from duckdb_tables() where database_name = 'lake'
    union all
    select view_name, 1, 'relation' from duckdb_views() where temporary and not internal
    union all
    select column_name, 2, 'column' from duckdb_columns() where database_name in ('lake', 'temp') and not internal
    union all
    select function_name, 3, 'macro' from duckdb_functions() where function_type like '%macro' and not internal
    union all
    select keyword_name, 4, 'keyword' from duckdb_keywords() where keyword_category <> 'unreserved'
    union all
    select function_name, 5, 'function' from duckdb_functions() where internal
)

select word, min_by(kind, place) as kind
from named
where regexp_full_match(word, '[a-z][a-z0-9_]*')
group by word
order by word
