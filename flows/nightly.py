"""One night: generate, verify, commit, mine, export, train on, report.

Annotations here are no strings: Prefect reads them to validate the parameters of a scheduled run.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect import flow, runtime

from flows import tasks
from flows.progress import bar, console
from pipeline.config import NightlyConfig
from pipeline.errors import BusyError
from pipeline.generate import stop_generating
from pipeline.ingest import Ingested
from pipeline.lake import Lake
from pipeline.runs import NightRun, facts, finish


@dataclass(frozen=True)
class NightlyResult:
    """What a night did.

    Attributes:
        generated: rollouts this call generated and committed; 0 when all were there.
    """

    run_id: str
    night: str
    model: str
    resumed: bool
    generated: int
    refused: int
    mining: dict[str, Any]
    shards: str
    export_dropped: dict[str, int]
    training: dict[str, Any]
    report: str
    facts: dict[str, Any] = field(default_factory=dict)


def flow_run_name() -> str:
    """`nightly 2026-05-31 arith`: the night and the model, as the config has them."""
    config = NightlyConfig.model_validate(runtime.flow_run.parameters["config"])
    night = config.night or runtime.flow_run.scheduled_start_time.date()
    return f"nightly {night} {config.model}"


@flow(name="nightly", flow_run_name=flow_run_name, persist_result=False)
def nightly(config: NightlyConfig, lake: Path) -> NightlyResult:
    """Generate, verify, commit, mine, export, train on and report one night of rollouts."""
    lock = _one_night_at_a_time(config, lake)
    try:
        run = tasks.open_run(config, lake)
        done = _generate(run)
        mined = tasks.mine(run)
        exported = tasks.export(run, mined)
        training = tasks.train(run, exported)
        report = tasks.report(run, mined, exported, training)
        finish(run)
        result = NightlyResult(
            run_id=run.run_id,
            night=run.night.isoformat(),
            model=config.model,
            resumed=run.resumed,
            generated=done.written,
            refused=done.refused,
            mining=mined.as_dict(),
            shards=str(exported.folder),
            export_dropped=dict(exported.dropped),
            training=training,
            report=str(report),
            facts=facts(run),
        )
        tasks.publish(run, mined, result.__dict__)
        return result
    finally:
        lock.release()


def _generate(run: NightRun) -> Ingested:
    """Commits batch after batch while the engine samples on; then scores what came without entropies."""
    done = Ingested()
    missing = tasks.missing_groups(run)
    try:
        with bar("generating rollouts", len(missing) * run.config.sampling.group_size) as update:
            while (staged := tasks.generate(run)) is not None:
                done += tasks.commit(run, tasks.verify(run, staged))
                update(done.written + done.known + done.refused)
    finally:
        stop_generating(run)
    # Whatever engine ends the night: servers, which tell no entropies, may have begun it.
    for remark in tasks.score(run).remarks(run.config.model):
        console.print(remark, soft_wrap=True, markup=False)
    return done


def _one_night_at_a_time(config: NightlyConfig, lake: Path) -> FileLock:
    """Waits for a night that runs on the same lake, or refuses, as `on_overlap` says."""
    folder = Lake.create(lake).folder
    lock = FileLock(folder / "nightly.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if config.on_overlap == "refuse":
            raise BusyError(
                f'Another night is running on the lake in {folder}. Wait for it, or set on_overlap = "wait".'
            ) from None
        console.print(f"Another night is running on the lake in {folder}; waiting for it.")
        lock.acquire()
    return lock
