-- Minings that recorded another number of clips than there are; forgetting prompts lowers what is recorded.
-- cure:    Mine it again as it was mined, which brings lost clips back, or with other options, and export that mining.
-- grain:   mining_id
-- inputs:  mining_runs, echo_clips
-- params:  none
-- columns:
--   mining_id
--   num_recorded   clips
--   num_clips      clips
with

counted as (
    select mining_id, count(*) as num_clips
    from echo_clips
    group by mining_id
)

select
    mining_runs.mining_id,
    mining_runs.num_clips as num_recorded,
    coalesce(counted.num_clips, 0) as num_clips
from mining_runs
left join counted using (mining_id)
where coalesce(counted.num_clips, 0) != mining_runs.num_clips
