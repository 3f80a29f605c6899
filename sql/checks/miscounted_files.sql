-- Data files of which the catalog and the table files do not say the same: no record, or another number of rows.
-- cure:    Run `echomine doctor` on a backup of the lake, and restore the catalog from the newest that is sound.
-- grain:   path
-- inputs:  files, the catalog
-- params:  none
-- columns:
--   path
--   num_recorded   rows by the table files, null if it does not know the file
--   num_rows       rows by the catalog
select data.path, max(files.num_rows) as num_recorded, any_value(data.record_count) as num_rows
from __ducklake_metadata_lake.ducklake_data_file as data
join ducklake_current_snapshot('lake') as now
    on data.begin_snapshot <= now.id and coalesce(data.end_snapshot > now.id, true)
left join files on parse_filename(files.path) = parse_filename(data.path)
group by data.path
-- what merging wrote is recorded a moment later: see unrecorded_files
having max(files.num_rows) is distinct from any_value(data.record_count)
    and not (max(files.num_rows) is null and starts_with(parse_filename(data.path), 'ducklake-'))
