"""What people see of a night: the summary table on the terminal, the artifacts in Prefect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from rich.console import Console
from rich.table import Table

from pipeline.mine import Mining
from pipeline.runs import NightRun

BEST_CLIPS = 20


def summary_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A night's key figures as (name, value)."""
    mining, training, facts = result["mining"], result["training"], result["facts"]
    groups = mining["groups"]
    total = sum(groups.values()) or 1
    seconds, tokens = facts.get("generate_seconds", 0.0), facts.get("generated_tokens", 0)
    dropped = mining["dropped"] | result["export_dropped"]
    rows = [("night", f"{result['night']}, model {result['model']}")]
    rows += [(f"groups {name}", f"{n} ({100 * n / total:.0f} %)") for name, n in sorted(groups.items())]
    rows += [
        ("rollouts", f"{result['generated']:,} generated, {result['refused']:,} refused by verification"),
        ("tokens/s", f"{tokens / seconds:,.0f} ({tokens:,} tokens)" if seconds else "nothing generated"),
        *_scoring(facts),
        ("EchoClips", f"{mining['clips']:,}"),
        ("dropped", ", ".join(f"{name} {n}" for name, n in sorted(dropped.items())) or "none"),
        ("EchoClip loss", _before_after(training, "echo_loss", "nats/token before and after training")),
        ("mean reward", _before_after(training, "reward", "in the first and last optimizer step")),
        ("shards", _near(result["shards"])),
        ("checkpoint", _near(str(training.get("checkpoint")))),
        ("report", _near(result["report"])),
    ]
    return rows


def _scoring(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row for nights whose engine told no entropies."""
    if "num_scored" not in facts:
        return []
    return [("entropies", f"{facts['num_scored']:,} rollouts scored in {facts['score_seconds']:.0f} s")]


def _near(path: str) -> str:
    """Relative to where the user stands, if below it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _before_after(training: Mapping[str, Any], name: str, unit: str) -> str:
    before, after = training.get(f"{name}_before"), training.get(f"{name}_after")
    return "not trained" if before is None or after is None else f"{before:.4f} → {after:.4f} {unit}"


def print_summary(result: Mapping[str, Any], console: Console) -> None:
    table = Table(title="One night of rollouts", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary_rows(result):
        table.add_row(name, value)
    console.print(table)
    if result["resumed"] and not result["generated"]:
        console.print("Nothing was generated: every group of this night was in the lake already.")


def publish(run: NightRun, mined: Mining, result: Mapping[str, Any]) -> None:
    """A markdown artifact with the summary and a table artifact with the best clips."""
    lines = [f"# Night {run.night}, model {run.config.model}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_escaped(value)} |" for name, value in summary_rows(result)]
    create_markdown_artifact("\n".join(lines), key="nightly-summary", description=f"run {run.run_id}")
    with run.lake().reader() as reader:
        clips = reader.rows(
            "select clip_rank, step_entropy, step_index, num_steps, clip_tokens, policy_version, prompt_id, "
            "clip_id from echo_clips where mining_id = $mining_id order by clip_rank limit $best",
            {"mining_id": mined.mining_id, "best": BEST_CLIPS},
        )
    create_table_artifact(clips, key="best-echoclips", description=f"mining {mined.mining_id}")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
