-- Who judged the rollouts that are to be verified again, when they were stored.
-- grain:   verifier
-- inputs:  rollouts
-- params:  $run_id, $night, $prompt_id (null: all)
-- columns:
--   verifier       unknown if the rollouts do not say
--   num_rollouts   rollouts
select coalesce(verifier, 'unknown') as verifier, count(*) as num_rollouts
from rollouts
where ($run_id is null or run_id = $run_id)
    and ($night is null or night = $night)
    and ($prompt_id is null or prompt_id = $prompt_id)
group by all
order by all
