-- Where do two versions of a verifier judge the same completion of the same prompt differently?
-- grain:   verifier, earlier_version, later_version
-- inputs:  rollouts, verdicts
-- params:  none
-- columns:
--   verifier
--   earlier_version      by name
--   later_version
--   num_completions      completions that both judged
--   num_disagreements    completions
--   disagreement_share   of the completions that both judged
--   example_rollout_id   of a disagreement, null if there is none
with

judged as (
    select verifier, verifier_version, prompt_id, completion, reward, rollout_id
    from rollouts
    union all
    select verdicts.verifier, verdicts.verifier_version, prompt_id, completion, verdicts.reward, rollout_id
    from verdicts
    join rollouts using (rollout_id)
),

by_version as (
    select
        verifier,
        verifier_version,
        prompt_id,
        completion,
        avg(reward) as reward,
        min(rollout_id) as rollout_id
    from judged
    where verifier_version is not null and completion is not null
    group by verifier, verifier_version, prompt_id, completion
),

pairs as (
    select
        earlier.verifier,
        earlier.verifier_version as earlier_version,
        later.verifier_version as later_version,
        later.rollout_id,
        abs(earlier.reward - later.reward) > 1e-6 as disagree
    from by_version as earlier
    join by_version as later
        on later.verifier = earlier.verifier
        and later.prompt_id = earlier.prompt_id
        and later.completion = earlier.completion
        and later.verifier_version > earlier.verifier_version
)

select
    verifier,
    earlier_version,
    later_version,
    count(*) as num_completions,
    count(*) filter (where disagree) as num_disagreements,
    num_disagreements / num_completions as disagreement_share,
    min(rollout_id) filter (where disagree) as example_rollout_id
from pairs
group by verifier, earlier_version, later_version
order by disagreement_share desc, verifier, earlier_version, later_version
