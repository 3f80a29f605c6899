"""What a reader of a dump gives: rows in the words of the table `rollouts`, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pipeline.errors import FormatError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One rollout of a dump, or what is left of it.

    Attributes:
        source: file name and line (or row) from 1: `dump.jsonl:17`.
        values: columns of `rollouts` by name. The prompt is `prompt_ids`, or `messages` (a list of
            {"role", "content"}, rendered with the chat template; `prompt` is the text of one user message),
            or `prompt_text` (what the model read, tokenized as it stands). The completion is
            `completion_ids`, or the text in `completion`. `ground_truth` and `data_source` go to the prompt.
            What a dump does not say is left out; without a `sample_index` the rows of a group are numbered
            as they come, over all files of an import.
        problem: why the row cannot be read as a rollout; then `values` is what goes to quarantine, and its
            `group_id`, `sample_index` and `origin` still count in the size of the group.
        assumed: what the reader had to assume because the dump does not say it, as one sentence. The user
            is told each such sentence once.
        sample_id: what the dump calls the sample, if it gives names instead of a `sample_index`: rows of a
            group with the same name and content are one sample, in however many files they are.
    """

    source: str
    values: Mapping[str, Any]
    problem: str | None = None
    assumed: str | None = None
    sample_id: str | None = None


class Format(Protocol):
    """One kind of dump. A module with these names is one."""

    NAME: str

    def recognizes(self, path: Path) -> bool:
        """Whether the file's first row looks like this format. Never raises for a file of another kind."""

    def read(self, path: Path) -> Iterator[SourceRow]:
        """Every rollout of one file, with bounded memory where the format allows it.

        Raises:
            FormatError: the file is missing, cut off, or of another kind: nothing of it can be read.
        """


@runtime_checkable
class ColumnarFormat(Protocol):
    """A format that can give whole columns of some files, which is an order of magnitude faster."""

    def tables(self, path: Path) -> Iterator[tuple[pa.Table, pa.Array]] | None:
        """The rows of `read` as tables of bounded size; None if rows are all that this file has.

        Columns are named as in `SourceRow.values`. With each table come the `problem`s of its rows, null for
        those that have none: not as a column, since a dump may have one of that name. The n-th row is the
        source `file:n`.
        """


def check_file(path: Path) -> None:
    """Raises FormatError if there is no such file, or none whose name Arrow and the lake can hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise FormatError(f"The name of {str(path)!r} is no valid UTF-8. Rename it.") from None
    if path.is_dir():
        raise FormatError(f"{path} is a folder. Give the files in it, such as {path}/*.jsonl.")
    if not path.is_file():
        raise FormatError(f"There is no file {path}. Check the path.")
