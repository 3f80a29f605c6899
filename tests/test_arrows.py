"""Which part of the project may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
FILES = sorted(path for part in ("pipeline", "trainer", "flows") for path in (PROJECT / part).rglob("*.py"))


def imports(tree: ast.AST, typing_only: bool = False) -> Iterator[tuple[str, bool]]:
    """Every imported module, wherever it stands, and whether only type checkers see it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, typing_only) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, typing_only
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from imports(ast.Module(node.body, []), True)
            yield from imports(ast.Module(node.orelse, []), typing_only)
        else:
            yield from imports(node, typing_only)


def importers(package: str) -> set[str]:
    """The files that import `package`; with a `?` those where only type checkers see it."""
    found = set()
    for path in FILES:
        for module, typing_only in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if module.split(".")[0] == package:
                found.add(str(path.relative_to(PROJECT)) + ("?" if typing_only else ""))
    return found


def test_prefect_is_imported_in_flows_only() -> None:
    assert importers("prefect")
    assert all(path.startswith("flows/") for path in importers("prefect"))


def test_duckdb_is_imported_by_the_lake_only() -> None:
    lake = {
        "pipeline/catalog.py",
        "pipeline/catalog_postgres.py",
        "pipeline/lake.py",
        "pipeline/lake_query.py",
        "pipeline/lake_reader.py",
        "pipeline/lake_upkeep.py",
        "pipeline/lake_writer.py",
    }
    assert importers("duckdb") - {"pipeline/query.py?"} == lake
    assert importers("duckdb_extensions") == {"pipeline/catalog.py"}


def test_vllm_is_imported_in_engines_only() -> None:
    assert all(path.startswith("pipeline/engines/") for path in importers("vllm"))


def test_trl_is_imported_by_its_adapter_only() -> None:
    assert importers("trl") == {"trainer/adapters/trl.py"}


def test_verl_is_imported_by_its_adapter_only() -> None:
    assert importers("verl") == {"trainer/adapters/verl.py"}


@pytest.mark.parametrize(
    ("above", "below"), [("trainer", "pipeline/"), ("flows", "pipeline/"), ("flows", "trainer/")]
)
def test_nothing_imports_what_stands_above_it(above: str, below: str) -> None:
    assert importers(above)
    assert not [path for path in importers(above) if path.startswith(below)]


def test_relative_imports_hide_nothing_from_these_tests() -> None:
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), path
