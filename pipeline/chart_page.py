"""Pages with charts: one file with Vega's script in it, which its policy allows and nothing else."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import altair as alt
import vl_convert
from markupsafe import Markup

from pipeline.pages import page_template

# Draws every specification of the page. `ast` keeps Vega from compiling code: the page forbids it.
_DRAW = """
for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
  window.vegaEmbed(place, spec, {mode: "vega-lite", renderer: "svg", actions: false, ast: true})
    .catch((error) => { console.error(error); place.textContent = "This chart could not be drawn."; });
}
"""


def chart_page(template: str, **values: Any) -> str:
    """A page of `templates/` with what draws the charts on it."""
    # Altair says "v6.4.1" where vl-convert says "6.4".
    vega_lite = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    # Without a snippet the bundle sets window.vegaEmbed; vl-convert's stub forgot that it may be left out.
    bundle = vl_convert.javascript_bundle(vl_version=vega_lite)  # type: ignore[call-arg]
    # A browser reads "\r\n" as "\n", and hashes what it read.
    script = (bundle + _DRAW).replace("\r\n", "\n").replace("</script", "<\\/script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page_template(template).render(
        **values,
        script=Markup(script),  # noqa: S704 - ours and the library's, no text of the lake
        script_hash=f"sha256-{digest}",
    )
