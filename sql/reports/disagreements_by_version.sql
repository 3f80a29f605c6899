-- How often which version of a verifier contradicted which that judged before.
-- grain:   stored_verifier, stored_verifier_version, verifier, verifier_version
-- inputs:  disagreements
-- params:  none
-- columns:
--   stored_verifier           unknown if the rollouts do not say
--   stored_verifier_version
--   verifier
--   verifier_version
--   num_lower                 rollouts whose reward fell
--   num_higher                rollouts whose reward rose
select
    coalesce(stored_verifier, 'unknown') as stored_verifier,
    coalesce(stored_verifier_version, 'unknown') as stored_verifier_version,
    verifier,
    verifier_version,
    count(distinct rollout_id) filter (where reward < stored_reward) as num_lower,
    count(distinct rollout_id) filter (where reward > stored_reward) as num_higher
from disagreements
group by all
order by all
