-- How often a prompt was solved under each policy version. It was learned where every rollout succeeds and under the
-- version before not every one did; forgotten where every one did, and now not.
-- grain:   prompt_id, model, policy_version
-- inputs:  judged_rollouts
-- params:  none
-- columns:
--   prompt_id
--   model
--   policy_version          optimizer steps
--   first_night             the first that sampled it under this version
--   num_rollouts            rollouts
--   num_successes           rollouts
--   success_rate            share of the rollouts
--   previous_success_rate   under the version before, null if there is none
--   change                  first | learned | forgotten | better | worse | same
with

by_version as (
    select
        prompt_id,
        model,
        policy_version,
        min(night) as first_night,
        count(*) as num_rollouts,
        count(*) filter (where is_success(reward)) as num_successes
    from judged_rollouts
    where origin in ('policy', 'trainer')
    group by prompt_id, model, policy_version
),

compared as (
    select
        *,
        num_successes / num_rollouts as success_rate,
        lag(num_successes / num_rollouts) over (
            partition by prompt_id, model order by policy_version
        ) as previous_success_rate
    from by_version
)

select
    prompt_id,
    model,
    policy_version,
    first_night,
    num_rollouts,
    num_successes,
    success_rate,
    previous_success_rate,
    case
        when previous_success_rate is null then 'first'
        when success_rate = previous_success_rate then 'same'
        when success_rate = 1 then 'learned'
        when previous_success_rate = 1 then 'forgotten'
        when success_rate > previous_success_rate then 'better'
        else 'worse'
    end as change
from compared
