-- A mining in numbers.
-- grain:   mining_id
-- inputs:  mining_runs
-- params:  $mining_id
-- columns:
--   mining_id
--   snapshot           of the rollouts that were mined
--   config             JSON
--   num_clips          clips
--   seconds
--   clips_per_second   null if it took no time
select
    mining_id,
    snapshot,
    config,
    num_clips,
    seconds,
    num_clips / nullif(seconds, 0) as clips_per_second
from mining_runs
where mining_id = $mining_id
