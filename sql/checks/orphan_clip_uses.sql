-- Clips of shards that a training consumed and the lake does not hold, although it holds others of that training.
-- cure:    Keep the training's shards beside its checkpoint: they alone still say what it learned from.
-- grain:   training_id, clip_id
-- inputs:  clip_uses, echo_clips
-- params:  none
-- columns:
--   training_id
--   clip_id
--   num_uses   optimizer steps
with

known_trainings as (
    select distinct clip_uses.training_id
    from clip_uses
    join echo_clips using (clip_id)
)

select clip_uses.training_id, clip_uses.clip_id, count(*) as num_uses
from clip_uses
semi join known_trainings using (training_id)
anti join echo_clips on echo_clips.clip_id = clip_uses.clip_id
-- those that a training found in its own rollouts were never mined
where clip_uses.clip_id not like 'online-%'
group by clip_uses.training_id, clip_uses.clip_id
