"""The report, written from real lakes and opened in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from sample_lake import LakeBuilder

from pipeline.config import MiningConfig
from pipeline.errors import LakeError, MiningError
from pipeline.mine import mine
from pipeline.quarantine import Refused
from pipeline.records import Prompt
from pipeline.report import write_report
from pipeline.report_charts import CLASS_COLOURS, classes_charts
from pipeline.report_clips import clip_views
from pipeline.report_text import embedded_json, number, percent, printable, with_newlines_marked
from pipeline.rollouts import prompt_table
from pipeline.training_charts import night_charts

TAKE = "document.title='taken'"
HOSTILE = (
    f'</script><script>{TAKE}</script><img src=x onerror="{TAKE}"><svg onload={TAKE}>{{{{ 6*7777 }}}}'
    f"{{% raw %}}'\"&lt;\u2028\u202e\ufeff\x00\x07\x1b\x7f\u0085]]><!--\n</div></main>`${{{TAKE}}}`\n#42"
)
HOSTILE_NAME = HOSTILE.replace("\x00", "")  # names are paths or come from files, which hold no NUL
METRICS = [
    {"optim_step": 0, "rl_loss": 0.2, "echo_loss": 0.9, "reward_mean": 0.5, "grad_norm": 1.5},
    {"optim_step": 1, "rl_loss": -0.1, "echo_loss": None, "reward_mean": 0.6, "grad_norm": float("nan")},
]


@dataclass(frozen=True)
class Page:
    """A page after its scripts ran: its DOM as text, and what the browser wrote to the console."""

    dom: str
    console: list[str]

    @property
    def title(self) -> str:
        found = re.search(r"<title>(.*?)</title>", self.dom, re.DOTALL)
        return found[1] if found else ""

    @property
    def num_drawn(self) -> int:
        return len(re.findall(r'<svg [^>]*class="marks"', self.dom))


def opened(chromium: Path, page: Path, profile: Path) -> Page:
    run = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", "--window-size=1280,2000",
            "--virtual-time-budget=8000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    return Page(run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line])


class Links(HTMLParser):
    """Collects everything in a page that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fetching = {"src", "href", "xlink:href", "srcset", "action", "poster", "data", "background"}
        self.found += [value or "" for name, value in attrs if name in fetching]
        self.found += [value for name, value in attrs if name == "style" and value and "url(" in value]


def links_of(page: str) -> list[str]:
    parser = Links()
    parser.feed(page)
    return [link for link in parser.found if not link.startswith("#")]


@pytest.fixture
def report_of(sample_lake, tmp_path):
    def write(**changes) -> Path:
        timings = changes.pop("timings", {"generate_seconds": 2.0, "train_seconds": 31.0})
        facts = {"run_id": sample_lake.run_id, "mining_id": sample_lake.mining_id} | changes
        path = tmp_path / "reports" / "report.html"
        return write_report(
            sample_lake.lake, tokenizer=sample_lake.tokenizer, path=path, timings=timings, **facts
        )

    return write


@pytest.fixture
def hostile_report(tmp_path) -> Path:
    """A night whose model, prompts, completions, data source, refusal and names all attack the page."""
    builder = LakeBuilder(tmp_path / "lake")
    facts = {"question": HOSTILE, "model": HOSTILE_NAME, "run_id": HOSTILE_NAME}
    builder.add_group([HOSTILE, HOSTILE], [1.0, 1.0], **facts)
    builder.add_group([HOSTILE, "#1"], [1.0, 0.0], **facts)
    builder.prompts = [
        Prompt(({"role": HOSTILE, "content": HOSTILE},), None, HOSTILE),
        Prompt(builder.prompts[0].messages, None, HOSTILE),
    ]
    lake = builder.commit([Refused(f"the verifier raised {HOSTILE}", "somewhere", {"run_id": HOSTILE_NAME})])
    mining = mine(lake, MiningConfig())
    timings = {"generate_seconds": 1.0, HOSTILE: 1.0}
    path = tmp_path / "report.html"
    return write_report(
        lake, HOSTILE_NAME, mining.mining_id, builder.tokenizer, path, timings, {"metrics": METRICS}
    )


def test_every_chart_is_drawn_and_the_console_stays_empty(chromium, report_of, tmp_path):
    page = opened(chromium, report_of(training={"metrics": METRICS}), tmp_path / "profile")
    assert page.console == []
    assert page.num_drawn == 9  # five cards, four measures of the training
    assert page.title == "2026-03-02 · small · EchoMine"


def test_a_script_in_model_text_never_runs(chromium, hostile_report, tmp_path):
    page = opened(chromium, hostile_report, tmp_path / "profile")
    assert page.console == []
    assert page.num_drawn == 9
    assert page.title.startswith("2026-03-01 · &lt;/script&gt;&lt;script&gt;document.title=")
    assert "{{ 6*7777 }}" in page.dom
    assert "46662" not in page.dom
    assert page.dom.count("<script") == 10  # the nine charts' data and the page's own script


def test_an_error_on_the_console_would_be_seen(chromium, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<title>a</title><script>document.title='b'; console.error('c'); throw Error('d')</script>"
    )
    seen = opened(chromium, page, tmp_path / "profile")
    assert seen.title == "b"
    assert len(seen.console) == 2


def test_model_text_that_escaped_would_still_not_run(chromium, report_of, tmp_path):
    path = report_of()
    page = path.read_text().replace("<main>", f"<main><script>{TAKE}</script><img src=x onerror={TAKE}>")
    path.write_text(page)
    seen = opened(chromium, path, tmp_path / "profile")
    assert seen.title == "2026-03-02 · small · EchoMine"
    assert any("Content Security Policy" in line for line in seen.console)


def test_the_page_asks_the_network_for_nothing(report_of, hostile_report):
    for path in (report_of(), hostile_report):
        page = path.read_text()
        assert links_of(page) == []
        assert "default-src 'none'" in page
        assert "@import" not in page
    assert links_of('<img src="https://a/b"><a href="#c">') == ["https://a/b"]


def test_the_bundled_javascript_is_in_the_page_once(report_of):
    assert report_of().read_text().count("window.vegaEmbed=") == 1


def test_no_hidden_character_of_model_text_reaches_the_page(hostile_report):
    page = re.sub(r'<script type="module">.*</script>', "", hostile_report.read_text(), flags=re.DOTALL)
    assert page == printable(page)
    assert "␀␇␛␡" in re.sub("<[^>]*>", "", page)


def test_the_key_figures_are_those_of_the_run(report_of, sample_lake):
    figures = dict(re.findall(r"<dt>(.*?)<small>.*?</dt><dd>(.*?)</dd>", report_of().read_text()))
    with sample_lake.lake.reader() as reader:
        rows = reader.rows("select * from groups where run_id = 'run-2' and origin = 'policy'")
        clips = reader.rows(
            "select count(*) as n from echo_clips where mining_id = $id", {"id": sample_lake.mining_id}
        )[0]["n"]
    tokens = sum(row["num_tokens"] for row in rows)
    untaught = sum(row["num_tokens"] for row in rows if row["group_class"] not in ("mixed", "incomplete"))
    assert figures["groups"] == "6"
    assert figures["rollouts"] == str(sum(row["num_rollouts"] for row in rows)) == "12"
    assert figures["tokens"] == str(tokens)
    assert figures["tokens that taught nothing"] == f"{100 * untaught / tokens:.1f} %"
    assert figures["EchoClips"] == str(clips)
    assert figures["tokens / s"] == f"{tokens / 2:,.0f}"


def test_the_chosen_step_ends_the_clip_and_the_rest_is_faded(sample_lake):
    with sample_lake.lake.reader() as reader:
        query = (Path(__file__).parents[2] / "sql/reports/best_clips.sql").read_text()
        rows = reader.rows(query, {"mining_id": sample_lake.mining_id, "num_clips": 20})
    views = clip_views(rows, sample_lake.tokenizer)
    assert len(views.clips) == len(rows) > 4
    for row, clip in zip(rows, views.clips, strict=True):
        places = [step.place for step in clip.steps]
        assert places.count("chosen") == 1
        assert places == sorted(places, key=["clip", "chosen", "after"].index)
        in_clip = [token for step in clip.steps if step.place != "after" for token in step.tokens]
        assert len(in_clip) == row["clip_tokens"]
        chosen = clip.steps[row["step_index"]]
        assert chosen.entropy == row["step_entropy"] == max(step.entropy for step in clip.steps)
        assert len([token for step in clip.steps for token in step.tokens]) == len(row["completion_ids"])


def test_a_token_tells_its_entropy_and_logprob_and_is_shaded_by_its_entropy(sample_lake):
    row = {
        "completion_ids": sample_lake.tokenizer("a\n")["input_ids"],
        "completion_entropies": [0.0, 1.25],
        "completion_logprobs": [-0.5, -2.0],
        "step_ends": [2], "step_entropies": [0.625], "step_index": 0, "delimiter": None,
        "tokenizer_hash": None, "messages": None, "prompt_ids": sample_lake.tokenizer("b<")["input_ids"],
    }  # fmt: skip
    clip = clip_views([row], sample_lake.tokenizer).clips[0]
    sure, unsure = clip.steps[0].tokens
    assert (sure.text, sure.shade, sure.hint) == ("a", 0, "entropy 0.000 nats, logprob -0.500")
    assert (unsure.text, unsure.shade) == ('<i class="nl"></i>\n', 10)
    assert unsure.hint == "entropy 1.250 nats, logprob -2.000"
    assert clip.messages == (("prompt", "b&lt;"),)


def test_rollouts_of_another_tokenizer_are_shown_as_ids(sample_lake):
    row = {
        "completion_ids": [70_001, 5], "completion_entropies": [0.1, 0.2], "completion_logprobs": None,
        "step_ends": [2], "step_entropies": [0.15], "step_index": 0, "delimiter": None,
        "messages": None, "prompt_ids": [9, 8],
    }  # fmt: skip
    for known_as in ("another", None):  # None: not recorded, but no token of this tokenizer has such an id
        clip = clip_views([row | {"tokenizer_hash": known_as}], sample_lake.tokenizer).clips[0]
        assert not clip.decoded
        assert [token.text for token in clip.steps[0].tokens] == ["70001 ", "5 "]
        assert clip.messages == (("prompt", "9 8"),)


def test_a_night_without_clips_training_or_history_is_reported(chromium, tmp_path):
    builder = LakeBuilder(tmp_path / "lake")
    builder.add_group(["#1", "#2"], [0.0, 0.0], completion_entropies=None, entropy_kind=None, model=None)
    lake = builder.commit()
    mining = mine(lake, MiningConfig())
    path = write_report(lake, "run-1", mining.mining_id, builder.tokenizer, tmp_path / "report.html", {})
    page = opened(chromium, path, tmp_path / "profile")
    assert page.console == []
    assert page.num_drawn == 3
    for words in (
        "This mining kept no clip.",
        "No entropies in this run.",
        "Nothing was dropped.",
        "unnamed model",
    ):
        assert words in page.dom
    assert "<h2>Training</h2>" not in page.dom


def test_a_training_without_a_finite_value_of_a_measure_has_no_chart_of_it():
    charts = night_charts([{"optim_step": 0, "rl_loss": 0.1, "grad_norm": float("inf"), "echo_loss": None}])
    assert [chart.title for chart in charts] == ["RL loss"]
    assert night_charts([]) == []


def test_a_class_has_the_same_colour_whichever_classes_a_night_has():
    rows = pl.DataFrame(
        {"night": [date(2026, 3, 1)], "group_class": ["mixed"], "num_groups": [3], "night_share": [1.0]}
    )
    versions = rows.rename({"night": "policy_version", "night_share": "version_share"})
    spec = classes_charts(rows, versions)[0].spec
    assert spec is not None
    scale = spec["encoding"]["color"]["scale"]
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == CLASS_COLOURS


def test_text_is_made_harmless_and_visible():
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x00\x1f\x7f\x9b\u2028\ud800") == "␀␟␡⟨U+009B⟩⟨U+2028⟩⟨U+D800⟩"
    assert with_newlines_marked("<\n") == '&lt;<i class="nl"></i>\n'
    hostile = {"</script>": "<!-- & \u2028 \ud800"}
    text = embedded_json(hostile)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == hostile


def test_figures_are_readable_and_unknown_ones_a_dash():
    assert [number(value) for value in (None, float("nan"), 0, 12_345, 1_234_567)] == [
        "–",
        "–",
        "0",
        "12,345",
        "1.23 M",
    ]
    assert number(0.125, 2) == "0.12"
    assert (percent(1, 8), percent(0, 0)) == ("12.5 %", "–")


def test_the_prompt_s_messages_are_shown_by_role(tmp_path):
    builder = LakeBuilder(tmp_path / "lake")
    builder.add_group(["#1", "#1"], [1.0, 1.0], question="one?")
    lake = builder.commit()
    prompt = Prompt(({"role": "system", "content": "be brief"}, {"role": "user", "content": "two?"}))
    lake.commit({"prompts": prompt_table([prompt])})
    mining = mine(lake, MiningConfig())
    path = write_report(lake, "run-1", mining.mining_id, builder.tokenizer, tmp_path / "report.html", {})
    assert re.findall(r"<small>(\w+)</small>([^<]*)</div>", path.read_text()) == [("user", "one?")]


def test_a_run_or_mining_that_is_not_there_is_refused_in_one_line(report_of):
    with pytest.raises(LakeError, match="no rollouts of run nothing") as refused:
        report_of(run_id="nothing")
    assert "\n" not in str(refused.value)
    with pytest.raises(MiningError, match="holds no mining nothing"):
        report_of(mining_id="nothing")


def test_a_report_that_cannot_be_written_leaves_nothing(report_of, tmp_path):
    (tmp_path / "reports" / "report.html").mkdir(parents=True)
    with pytest.raises(LakeError, match="Cannot write the report"):
        report_of()
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["report.html"]
