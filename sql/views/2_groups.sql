-- Every group with its class under the default thresholds. Expert rollouts never count, newest verdicts do.
-- grain:   group_id
-- inputs:  judged_rollouts
-- params:  none
-- columns:
--   group_id
--   prompt_id
--   run_id
--   night
--   origin
--   model
--   policy_version   optimizer steps
--   group_class      all_success | all_fail | all_equal | mixed | incomplete
--   num_rollouts     rollouts
--   group_size       rollouts asked for
--   mean_reward      reward
--   num_tokens       completion tokens
with

gathered as (
    select
        group_id,
        any_value(prompt_id) as prompt_id,
        any_value(run_id) as run_id,
        any_value(night) as night,
        any_value(origin) as origin,
        any_value(model) as model,
        max(policy_version) as policy_version,
        count(*) as num_rollouts,
        max(group_size) as group_size,
        min(reward) as min_reward,
        max(reward) as max_reward,
        avg(reward) as mean_reward,
        sum(len(completion_ids))::bigint as num_tokens
    from judged_rollouts
    where origin in ('policy', 'trainer')
    group by group_id
)

select
    group_id,
    prompt_id,
    run_id,
    night,
    origin,
    model,
    policy_version,
    group_class(num_rollouts, group_size, min_reward, max_reward) as group_class,
    num_rollouts,
    group_size,
    mean_reward,
    num_tokens
from gathered
