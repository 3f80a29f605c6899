-- The rollouts that a verifier has not judged again, or not since another one did, with what it needs to know.
-- grain:   rollout_id
-- inputs:  rollouts, verdicts, current_verdicts, prompts
-- params:  $run_id, $night, $prompt_id, $stored_verifier (null: all), $verifier, $verifier_version
-- columns:
--   rollout_id
--   completion     text
--   messages       JSON, null if the lake does not hold the prompt
--   ground_truth
--   data_source
--   extra_info     JSON
--   last_error     what went wrong when this verifier was last asked, null if nothing did
with

last_verdicts as (
    select rollout_id, error
    from verdicts
    where verifier = $verifier and verifier_version = $verifier_version
    qualify row_number() over (partition by rollout_id order by judged_at desc, error) = 1
)

select
    rollouts.rollout_id,
    rollouts.completion,
    prompts.messages,
    prompts.ground_truth,
    prompts.data_source,
    prompts.extra_info,
    last_verdicts.error as last_error
from rollouts
left join current_verdicts using (rollout_id)
left join last_verdicts on last_verdicts.rollout_id = rollouts.rollout_id
left join prompts on prompts.prompt_id = rollouts.prompt_id
where ($run_id is null or rollouts.run_id = $run_id)
    and ($night is null or rollouts.night = $night)
    and ($prompt_id is null or rollouts.prompt_id = $prompt_id)
    and ($stored_verifier is null or rollouts.verifier = $stored_verifier)
    and (current_verdicts.verifier, current_verdicts.verifier_version)
        is distinct from ($verifier, $verifier_version)
