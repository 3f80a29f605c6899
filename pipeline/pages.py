"""HTML pages: made from the templates, every value escaped, written complete or not at all."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

import jinja2

from pipeline.errors import LakeError
from pipeline.report_text import embedded_json, finalize, number, percent, phantom

TEMPLATES = Path(__file__).resolve().parent / "templates"


def page_template(name: str) -> jinja2.Template:
    """A template of `templates/`, with the filters of `report_text`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"number": number, "percent": percent, "phantom": phantom, "embedded_json": embedded_json}
    environment.filters |= filters
    return environment.get_template(name)


def write_page(page: str, path: Path) -> Path:
    """Writes beside `path`, then renames. Returns `path`.

    Raises:
        LakeError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(page.encode())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):  # its folder may be what is wrong
            partial.unlink()
        raise LakeError(
            f"Cannot write the report {path}: {error.strerror or error}. Free space or mend the permissions, "
            "then run the command again."
        ) from error
    return path
