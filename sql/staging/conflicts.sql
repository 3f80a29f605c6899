-- Incoming rollouts that contradict their group, as it is in the lake or as earlier incoming rows made it.
-- A group is of one prompt, model and policy version (experts aside), and a place in it of one content.
-- grain:   nth
-- inputs:  incoming_rollouts, rollouts
-- params:  none
-- columns:
--   nth              the row's number among the incoming
--   conflict         policy | content
--   prompt_id        the group's
--   model            the group's
--   policy_version   the group's
with

claims as (
    select nth, rollout_id, group_id, sample_index, reward, origin, prompt_id, model, policy_version
    from incoming_rollouts
    union all
    -- what is in the lake was there first
    select -1, rollout_id, group_id, sample_index, reward, origin, prompt_id, model, policy_version
    from rollouts
    where group_id in (select incoming_rollouts.group_id from incoming_rollouts)
),

policies as (
    select
        group_id,
        arg_min({prompt_id: prompt_id, model: model, policy_version: policy_version}, nth) as policy
    from claims
    where origin is distinct from 'expert'
    group by group_id
),

compared as (
    select
        claims.*,
        policies.policy,
        claims.origin is distinct from 'expert'
        and policies.policy is distinct from {
            prompt_id: claims.prompt_id, model: claims.model, policy_version: claims.policy_version
        } as is_stranger
    from claims
    left join policies using (group_id)
),

contents as (
    select
        group_id,
        sample_index,
        arg_min({rollout_id: rollout_id, reward: reward}, nth) as content
    from compared
    where not is_stranger
    group by group_id, sample_index
)

select
    compared.nth,
    if(compared.is_stranger, 'policy', 'content') as conflict,
    compared.policy.prompt_id as prompt_id,
    compared.policy.model as model,
    compared.policy.policy_version as policy_version
from compared
left join contents using (group_id, sample_index)
where compared.nth >= 0
    and (
        compared.is_stranger
        or contents.content is distinct from {rollout_id: compared.rollout_id, reward: compared.reward}
    )
order by compared.nth
