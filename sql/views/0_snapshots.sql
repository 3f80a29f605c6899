-- The lake's history: `--snapshot N` goes back to any of them.
-- grain:   snapshot
-- inputs:  the catalog
-- params:  none
-- columns:
--   snapshot
--   created_at
--   changes      what it changed, by kind
select snapshot_id as snapshot, snapshot_time as created_at, changes
from ducklake_snapshots('lake')
