-- The tokens of the clips that can be copies.
-- grain:   rollout_id
-- inputs:  twin_clips, rollouts
-- params:  $few_twins (their rollouts, where that is a short list; null: join them all), $first_run, $last_run
--          (between which runs they lie; null: any)
-- columns:
--   rollout_id
--   clip_ids
select rollouts.rollout_id, rollouts.completion_ids[:twin_clips.clip_tokens] as clip_ids
from rollouts
join twin_clips using (rollout_id)
-- a list of constants is compared before any tokens are read, a join's other side is not
where ($few_twins is null or list_contains($few_twins, rollouts.rollout_id))
    and ($first_run is null or rollouts.run_id between $first_run and $last_run)
