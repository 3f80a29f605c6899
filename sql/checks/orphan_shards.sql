-- Exported files of a mining that is not recorded.
-- cure:    Mine and export again (`echomine mine`, `echomine export shards`), and train on the new export.
-- grain:   path, sha256
-- inputs:  shards, mining_runs
-- params:  none
-- columns:
--   path
--   sha256
--   mining_id
select shards.path, shards.sha256, shards.mining_id
from shards
anti join mining_runs using (mining_id)
