-- Macros that the mining and users' queries share. Each rule stands here once.

-- Whether a reward is that of a success.
create or replace temp macro is_success(reward, success_reward := 1.0, reward_tolerance := 1e-6) as
    reward >= success_reward - reward_tolerance;

-- How far the rewards of a group lie apart; 0 in a zero-advantage group.
create or replace temp macro reward_spread(rewards) as list_max(rewards) - list_min(rewards);

-- The class of a whole group, by its lowest and highest reward. A zero-advantage test by standard deviation is
-- wrong on equal fractional rewards, so the spread is compared with a tolerance.
create or replace temp macro reward_class(
    min_reward, max_reward, reward_tolerance, success_reward := 1.0, fail_reward := 0.0
) as case
    when max_reward - min_reward > reward_tolerance then 'mixed'
    when is_success(min_reward, success_reward, reward_tolerance) then 'all_success'
    when max_reward <= fail_reward + reward_tolerance then 'all_fail'
    else 'all_equal'
end;

-- The class of a group of rollouts that may have lost some, or of a list of rewards.
create or replace temp macro group_class
(
    num_rollouts, group_size, min_reward, max_reward,
    reward_tolerance := 1e-6, success_reward := 1.0, fail_reward := 0.0,
    min_group_size := 2, allow_partial := false
) as case
    when num_rollouts < min_group_size or (num_rollouts < group_size and not allow_partial) then 'incomplete'
    else reward_class(
        min_reward, max_reward, reward_tolerance,
        success_reward := success_reward, fail_reward := fail_reward
    )
end,
(rewards, tolerance := 1e-6) as case
    when len(rewards) < 2 then 'incomplete'
    else reward_class(list_min(rewards), list_max(rewards), tolerance)
end;

-- The mean entropy of each step that may end a clip, null of the others.
create or replace temp macro candidate_entropies(step_ends, step_entropies, min_step_tokens, max_clip_tokens) as
case
    -- a third of the time where nothing is asked of steps
    when min_step_tokens <= 1 and max_clip_tokens is null then step_entropies
    else list_transform(
        step_entropies,
        lambda entropy, i: case
            when step_ends[i] - coalesce(step_ends[i - 1], 0) >= min_step_tokens
                and (max_clip_tokens is null or step_ends[i] <= max_clip_tokens)
            then entropy
        end
    )
end;

-- The step of highest entropy, the earliest on ties (list_position finds the first), and its clip.
create or replace temp macro best_step(step_ends, entropies) as {
    'steps_hash': hash(step_ends[:list_position(entropies, list_max(entropies))]),
    'step_index': (list_position(entropies, list_max(entropies)) - 1)::integer,
    'num_steps': len(step_ends)::integer,
    'clip_tokens': step_ends[list_position(entropies, list_max(entropies))],
    'step_entropy': list_max(entropies)
};

-- The tokens of a completion's prefix that ends with step `step_index` (from 0): its EchoClip.
create or replace temp macro clip_ids(completion_ids, step_ends, step_index) as
    completion_ids[:step_ends[step_index + 1]];

-- The mean entropy of step `step_index` (from 0) in nats, from the token entropies: what `step_entropies` holds.
create or replace temp macro entropy_at(completion_entropies, step_ends, step_index) as
    list_avg(completion_entropies[coalesce(step_ends[step_index], 0) + 1:step_ends[step_index + 1]]);

-- The fewest groups that hold the share `p` of all groups' reward variance, the most varied first: the groups
-- that a training learns from. RAGEN-2's SNR-aware filtering (arXiv 2604.06268), by sample variance; groups of
-- equal rewards have none.
-- columns: group_id, prompt_id, policy_version (optimizer steps), num_rollouts, reward_variance,
--          cumulative_share (of all groups' variance, this group's included)
create or replace temp macro variance_top_p(p) as table
with

gathered as (
    select
        group_id,
        any_value(prompt_id) as prompt_id,
        max(policy_version) as policy_version,
        count(*) as num_rollouts,
        var_samp(reward) as reward_variance
    from judged_rollouts
    where origin in ('policy', 'trainer')
    group by group_id
    having max(reward) > min(reward)
),

ranked as (
    select
        *,
        sum(reward_variance) over (order by reward_variance desc, group_id) as mass,
        sum(reward_variance) over () as total_mass
    from gathered
)

select group_id, prompt_id, policy_version, num_rollouts, reward_variance, mass / total_mass as cumulative_share
from ranked
-- the groups before it do not reach the share; sums differ in their last digits
where mass - reward_variance < p * total_mass * (1 - 1e-12)
order by reward_variance desc, group_id;

-- What a prompt asks: the text of its last message, which `prompts.messages` holds as JSON.
create or replace temp macro question(messages) as json_extract_string(messages, '$[#-1].content');
