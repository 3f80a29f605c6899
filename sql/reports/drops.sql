-- What did not become a clip in a shard, by reason: what the mining dropped, what the export left out, and the
-- rows that a run lost to quarantine.
-- grain:   stage, reason
-- inputs:  mining_runs, export_drops, quarantine
-- params:  $mining_id, $run_id, $max_reasons (reasons of quarantine)
-- columns:
--   stage         mining | export | quarantine
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
select 'export', reason, num_dropped from export_drops
union all
select 'quarantine', reason, num_dropped from quarantined
order by stage, num_dropped desc, reason
