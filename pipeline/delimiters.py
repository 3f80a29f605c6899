"""Which delimiters may end a reasoning step, and how they are written where white space would be lost."""

from __future__ import annotations

import re

_ESCAPED = re.compile(r"\\[nrtfv]|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}")


def written_delimiter(text: str | None) -> str | None:
    r"""A delimiter as the splitter takes it, from the character itself or from its escape, such as `\n`.

    Steps end in the white space between two words, so nothing else can be one.

    Raises:
        ValueError: it is not one white-space character.
    """
    if text is None:
        return None
    character = text.encode("ascii").decode("unicode_escape") if _ESCAPED.fullmatch(text) else text
    if len(character) != 1 or not character.isspace():
        raise ValueError(r"steps end at one white-space character, such as \n, \t or \x20 (a space)")
    return character
