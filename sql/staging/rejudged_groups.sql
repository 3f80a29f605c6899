-- Groups of which a rollout was verified again since a snapshot, and counts for another reward now than it did then.
-- grain:   group_id, run_id
-- inputs:  rollouts, verdicts, current_verdicts
-- params:  $since (snapshot)
-- columns:
--   group_id
--   run_id
with

verdicts_then as (
    select rollout_id, reward
    from verdicts
    where reward is not null and snapshot_id <= $since
    qualify row_number() over (partition by rollout_id order by judged_at desc, verifier, verifier_version) = 1
),

rejudged as (
    select distinct rollouts.group_id
    from rollouts
    join current_verdicts using (rollout_id)
    left join verdicts_then using (rollout_id)
    where coalesce(verdicts_then.reward, rollouts.reward) <> current_verdicts.reward
)

select distinct rollouts.group_id, rollouts.run_id
from rollouts
semi join rejudged using (group_id)
