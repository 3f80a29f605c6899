"""A prompt to be forgotten, and all that the files of a lake hold."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.lake import Lake
from pipeline.records import Prompt

SECRET, WRITTEN = "zzz Quokka 7141 zzz", "aaa Wombat 9253 aaa"  # the last and the first of their columns
SECRET_PROMPT = Prompt(({"role": "user", "content": SECRET},), None, "sums")
SAME_QUESTION = Prompt(SECRET_PROMPT.messages, "another truth")


def everything(folder: Path) -> str:
    """All that the files of a lake hold: their bytes, their Parquet values, and the catalog's rows."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        found.append(path.read_bytes().decode("utf-8", "replace"))
        if path.suffix == ".parquet":
            found.append(str(pq.read_table(path).to_pylist()))
            found.append(str(pq.read_metadata(path).to_dict()))
        if path.name == "catalog.sqlite":
            with sqlite3.connect(path) as catalog:
                found.append("\n".join(catalog.iterdump()))
            catalog.close()
    return "\n".join(found)


def lake_rows(lake: Lake, table: str):
    with lake.reader() as reader:
        return reader.table(f"select * from lake.{table}")
