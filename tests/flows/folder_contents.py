"""What is in folders, to see that nothing changed."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Any


def contents(*folders: Path) -> dict[str, Any]:
    """Every file's hash, and of a catalog its newest snapshot; locks and SQLite's journals say nothing."""
    found: dict[str, Any] = {}
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        if path.name.endswith((".lock", "-wal", "-shm")):
            continue
        found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.name == "catalog.sqlite":
            try:
                with sqlite3.connect(path) as catalog:
                    found[str(path)] = catalog.execute(
                        "select max(snapshot_id) from ducklake_snapshot"
                    ).fetchone()
            except sqlite3.DatabaseError:
                pass  # a damaged one keeps its hash
    return found
