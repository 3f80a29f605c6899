"""What vouches for an export: `manifest.json` beside its files, and `latest.json` that names the newest.

`clips.json` beside them names the clip of each row of each file, also where the form has no room for it.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.hashing import file_sha256

EXPORT_VERSION = 1
CLIPS = "clips.json"
_NEEDED = {"schema_version", "clips", "tokenizer_hash", "dropped"}
_NEEDED_OF_A_FILE = {"file", "sha256", "clips", "tokens"}


def read_manifest(path: Path) -> dict[str, Any]:
    """An export's manifest.

    Raises:
        FormatError: missing, damaged, or of a newer format.
    """
    manifest = read_json(path)
    version = manifest.get("schema_version")
    if isinstance(version, int) and version > EXPORT_VERSION:
        raise FormatError(f"{path} has format {version}. Update EchoMine to read it.")
    files = manifest.get("files")
    complete = (
        manifest.keys() >= _NEEDED
        and isinstance(files, list)
        and all(isinstance(file, dict) and file.keys() >= _NEEDED_OF_A_FILE for file in files)
    )
    if not complete:
        raise FormatError(f"{path} is no manifest of an export. Export the clips again.")
    return manifest


def newest_manifest(folder: Path) -> Path:
    """The manifest of an export, or of the newest one of a folder of exports.

    Raises:
        FormatError: neither is there.
    """
    if (folder / "manifest.json").is_file():
        return folder / "manifest.json"
    if (folder / "latest.json").is_file():
        manifest = folder / Path(str(read_json(folder / "latest.json").get("export"))).name / "manifest.json"
        if manifest.is_file():
            return manifest
    raise FormatError(
        f"{folder} holds no shards (no manifest.json or latest.json). Run `echomine export shards`."
    )


def clip_ids(path: Path) -> set[str] | None:
    """Those of an exported file; None if nothing beside it says them."""
    try:
        ids = read_json(path.with_name(CLIPS)).get(path.name)
    except FormatError:
        return None
    return set(map(str, ids)) if isinstance(ids, list) else None


def damaged_file(folder: Path, manifest: Mapping[str, Any]) -> Path | None:
    """The first file of an export that is missing or not as it was written, if there is one."""
    for file in manifest["files"]:
        path = folder / Path(file["file"]).name
        if not path.is_file() or file_sha256(path) != file["sha256"]:
            return path
    return None


def is_complete(folder: Path) -> bool:
    """Whether an export is there with all its files as they were written."""
    try:
        return damaged_file(folder, read_manifest(folder / "manifest.json")) is None
    except (FormatError, OSError):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Raises FormatError for what is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is no JSON: {error}. Export the clips again.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} is no JSON object. Export the clips again.")
    return content


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes beside `path`, then renames: a reader sees the old content or the new."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(partial, path)
