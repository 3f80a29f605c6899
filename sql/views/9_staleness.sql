-- How far each mined EchoClip is behind the newest policy of its model.
-- grain:   mining_id, clip_id
-- inputs:  clips, rollouts
-- params:  none
-- columns:
--   mining_id
--   clip_id
--   clip_rank        from 0
--   model
--   night            that sampled it
--   policy_version   optimizer steps
--   newest_version   optimizer steps, the model's greatest
--   policy_lag       optimizer steps
with

versions as (
    select model, max(policy_version) as newest_version
    from rollouts
    where origin in ('policy', 'trainer')
    group by model
)

select
    clips.mining_id,
    clips.clip_id,
    clips.clip_rank,
    clips.model,
    clips.night,
    clips.policy_version,
    versions.newest_version,
    versions.newest_version - clips.policy_version as policy_lag
from clips
join versions on versions.model is not distinct from clips.model
