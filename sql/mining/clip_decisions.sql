-- Every group's clips in order, each kept or dropped by the first rule that applies:
-- step_entropy, policy_lag, duplicate, max_clips_per_prompt, max_clips.
-- grain:   group_id, group_rank
-- inputs:  group_clips, twin_contents, rollouts
-- params:  $min_step_entropy (nats), $max_policy_lag (optimizer steps; null: no limit),
--          $policy_version (null: the model's greatest in the snapshot), $max_clips_per_prompt, $max_clips (clips;
--          null: no limit)
-- columns:
--   group_id
--   group_rank       from 0
--   rollout_id
--   prompt_id
--   policy_version   optimizer steps
--   sample_index
--   step_index       from 0
--   num_steps        steps
--   clip_tokens      tokens
--   step_entropy     nats
--   dropped_by       the rule, null if kept
--   clip_rank        from 0 among the kept, null if dropped
with

versions as (
    select model, max(policy_version) as newest_version
    from rollouts
    -- the whole lake is asked only where the answer counts
    where $max_policy_lag is not null and $policy_version is null
        and origin in ('policy', 'trainer')
    group by model
),

ordered as (
    select
        group_clips.* exclude (tokenizer_hash, splitter, steps_hash),
        twin_contents.clip_ids,
        row_number() over (
            order by group_clips.step_entropy desc, group_clips.group_id, group_clips.group_rank
        ) as place,
        case
            when group_clips.step_entropy < $min_step_entropy then 'step_entropy'
            when coalesce($policy_version, versions.newest_version) - group_clips.policy_version
                > $max_policy_lag then 'policy_lag'
        end as refused_by
    from group_clips
    left join twin_contents using (rollout_id)
    left join versions on versions.model is not distinct from group_clips.model
),

-- Of the clips not refused so far, the first of each content; the others are its duplicates.
distinct_clips as (
    select *
    from ordered
    where refused_by is null
    qualify row_number() over (
        -- a clip without a twin is a content of its own
        partition by prompt_id, clip_tokens, clip_ids, case when clip_ids is null then rollout_id end
        order by place
    ) = 1
),

numbered as (
    select
        *,
        row_number() over (partition by prompt_id order by place) as number_of_prompt
    from distinct_clips
),

capped as (
    select
        *,
        $max_clips_per_prompt is not null and number_of_prompt > $max_clips_per_prompt as over_prompt,
        count(*) filter (where $max_clips_per_prompt is null or number_of_prompt <= $max_clips_per_prompt)
            over (order by place) as number_in_all
    from numbered
),

-- Once max_clips is reached nothing is kept: a later clip falls to the prompt's limit only if the prompt's
-- kept clips had reached it.
judged as (
    select
        *,
        count(*) filter (where not over_prompt and ($max_clips is null or number_in_all <= $max_clips))
            over (partition by prompt_id) as kept_of_prompt
    from capped
),

decided as (
    select
        place,
        case
            when over_prompt and kept_of_prompt >= $max_clips_per_prompt then 'max_clips_per_prompt'
            when over_prompt or number_in_all > $max_clips then 'max_clips'
        end as dropped_by
    from judged
),

reasons as (
    select
        ordered.* exclude (clip_ids, refused_by, model),
        case
            when ordered.refused_by is not null then ordered.refused_by
            when decided.place is null then 'duplicate'
            else decided.dropped_by
        end as dropped_by
    from ordered
    left join decided using (place)
)

select
    * exclude (place),
    case when dropped_by is null then
        row_number() over (partition by dropped_by is null order by place) - 1
    end as clip_rank
from reasons
order by place
