-- Data files that merging wrote and of which no SHA-256 is recorded yet.
-- cure:    Run `echomine maintain`: it goes on where a killed one ended.
-- grain:   path
-- inputs:  files, the catalog
-- params:  none
-- columns:
--   path
--   num_rows   by the catalog
select data.path, data.record_count as num_rows
from __ducklake_metadata_lake.ducklake_data_file as data
join ducklake_current_snapshot('lake') as now
    on data.begin_snapshot <= now.id and coalesce(data.end_snapshot > now.id, true)
where starts_with(parse_filename(data.path), 'ducklake-')
    and parse_filename(data.path) not in (select parse_filename(files.path) from files)
