-- How old are the EchoClips: how many optimizer steps is the newest policy of their model ahead?
-- grain:   model, policy_lag
-- inputs:  staleness, echo_clips
-- params:  none
-- columns:
--   model
--   policy_lag          optimizer steps
--   num_clips           clips, each once however many minings found it
--   num_tokens          clip tokens
--   mean_step_entropy   nats
with

distinct_clips as (
    select distinct staleness.model, staleness.policy_lag, clip_id, echo_clips.clip_tokens, echo_clips.step_entropy
    from staleness
    join echo_clips using (mining_id, clip_id)
)

select
    model,
    policy_lag,
    count(*) as num_clips,
    sum(clip_tokens)::bigint as num_tokens,
    avg(step_entropy) as mean_step_entropy
from distinct_clips
group by model, policy_lag
order by model, policy_lag
