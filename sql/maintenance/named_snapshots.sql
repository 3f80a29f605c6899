-- Snapshots of the lake that recent minings mined and recent trainings got their clips from.
-- grain:   snapshot, named_by
-- inputs:  mining_runs, clip_uses, echo_clips
-- params:  $named_since (time)
-- columns:
--   snapshot
--   named_by   a mining_id or training_id
with

trainings as (
    select training_id, clip_id
    from clip_uses
    where created_at >= $named_since
    group by training_id, clip_id
)

select snapshot, mining_id as named_by
from mining_runs
where created_at >= $named_since
union
select mining_runs.snapshot, trainings.training_id as named_by
from trainings
join echo_clips using (clip_id)
join mining_runs using (mining_id)
