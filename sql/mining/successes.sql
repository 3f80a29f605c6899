-- V: the verified successes of the groups in scope, each with its candidate of highest step entropy, the earliest on
-- ties. The newest verdict decides. Of a group that lies in several runs, a mining of one run sees that run's
-- rollouts only: they alone made its class.
-- grain:   rollout_id
-- inputs:  judged_rollouts, group_classes
-- params:  $scope (zero_advantage | any_success), $success_reward, $reward_tolerance (reward), $allow_truncated,
--          $entropy_kind (null: all), $run_id (null: all runs), $first_run, $last_run (between which runs
--          the groups lie; null: any), $min_step_tokens, $max_clip_tokens (tokens; null: no limit)
-- columns:
--   rollout_id
--   group_id
--   prompt_id
--   model
--   policy_version   optimizer steps
--   sample_index
--   tokenizer_hash
--   splitter         given where the steps came with the rollout
--   entropy_kind
--   awaits_scorer    no entropies yet
--   steps_hash       of the ends of the steps up to the candidate's
--   step_index       from 0, null without a candidate
--   num_steps        steps of the whole completion
--   clip_tokens      tokens up to the end of the step, null without a candidate
--   step_entropy     nats, null without a candidate
with

candidates as (
    select
        rollouts.rollout_id,
        rollouts.group_id,
        rollouts.prompt_id,
        rollouts.model,
        rollouts.policy_version,
        rollouts.sample_index,
        rollouts.tokenizer_hash,
        coalesce(rollouts.splitter, 'given') as splitter,
        rollouts.entropy_kind,
        -- null exactly where the entropies are, in a column a twentieth of their size
        rollouts.step_entropies is null as awaits_scorer,
        rollouts.step_ends,
        candidate_entropies(
            rollouts.step_ends, rollouts.step_entropies, $min_step_tokens, $max_clip_tokens
        ) as entropies
    from judged_rollouts as rollouts
    join group_classes using (group_id)
    where rollouts.origin in ('policy', 'trainer')
        and ($run_id is null or rollouts.run_id = $run_id)
        and ($first_run is null or rollouts.run_id between $first_run and $last_run)
        and case $scope
            when 'zero_advantage' then group_classes.group_class = 'all_success'
            else group_classes.group_class <> 'incomplete'
        end
        and rollouts.reward >= $success_reward - $reward_tolerance
        and (rollouts.finish_reason <> 'length' or $allow_truncated)
        and ($entropy_kind is null or rollouts.entropy_kind = $entropy_kind or rollouts.step_entropies is null)
)

select
    * exclude (step_ends, entropies),
    unnest(best_step(step_ends, entropies))
from candidates
