"""Text and data on their way into a page: model text is hostile, and some of it cannot be seen."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from markupsafe import Markup, escape

# Control characters, line and paragraph separators, marks that reorder or hide text, lone surrogates (which
# no file can hold), and what HTML forbids. Tab and newline stay.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` with every character that cannot be seen, or that a file cannot hold, replaced by its name."""
    return _UNSEEN.sub(lambda match: _name(ord(match[0])), text)


def _name(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures: ␀ … ␟
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def finalize(value: Any) -> Any:
    """What the template does to every value before it escapes it."""
    return printable(value) if type(value) is str else value


def with_newlines_marked(text: str) -> Markup:
    """`text`, escaped, with a mark before each newline."""
    return Markup('<i class="nl"></i>\n').join(escape(printable(part)) for part in text.split("\n"))


def embedded_json(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`: ASCII, and nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "&<>":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - no character of it means anything to HTML


def number(value: Any, digits: int = 0) -> str:
    """A figure for readers: `12,345`, `1.23 M`, and a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.{digits}f}"


def percent(part: float, whole: float) -> str:
    return "–" if not whole else f"{100 * part / whole:.1f} %"


def phantom(advantage: float | None) -> str:
    """An advantage that should be 0, for readers: three digits, or a dash if it is not known."""
    return "–" if advantage is None else f"{advantage:.3g}"
