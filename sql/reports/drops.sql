-- What did not become a clip, by reason: what the mining dropped, and the rows that a run lost to quarantine.
-- grain:   stage, reason
-- inputs:  mining_runs, quarantine
-- params:  $mining_id, $run_id, $max_reasons (reasons of quarantine)
-- columns:
--   stage         mining | quarantine
--   reason
--   num_dropped   clips; for unscored: groups; in quarantine: rows
with

mining_drops as (
    select unnest(map_entries(dropped)) as entry
    from mining_runs
    where mining_id = $mining_id
),

quarantined as (
    select reason, count(*) as num_dropped
    from quarantine
    where run_id = $run_id
    group by reason
    order by num_dropped desc, reason
    limit $max_reasons
)

select 'mining' as stage, entry.key as reason, entry.value as num_dropped from mining_drops
union all
select 'quarantine', reason, num_dropped from quarantined
order by stage, num_dropped desc, reason
