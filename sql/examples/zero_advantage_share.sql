-- What share of each night's groups taught nothing? Their rollouts all earned the same reward.
-- grain:   night, model
-- inputs:  nights
-- params:  none
-- columns:
--   night
--   model
--   num_groups                  groups
--   num_zero_advantage_groups   groups
--   zero_advantage_share        of the night's groups
select
    night,
    model,
    num_groups,
    num_zero_advantage_groups,
    num_zero_advantage_groups / num_groups as zero_advantage_share
from nights
order by model, night
