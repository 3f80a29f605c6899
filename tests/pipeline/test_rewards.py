import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import VerifyConfig
from pipeline.errors import VerifierError
from pipeline.prompts import read_prompts
from pipeline.records import Group, Prompt, Sample
from pipeline.rewards import VerifierPool
from pipeline.verifier_worker import refuse_reaching_out
from pipeline.verifiers import exact, last_line

HERE = str(Path(__file__).parent)
IDS = np.zeros(1, dtype=np.int32)


def make_prompt(truth: str | None = "12", **facts) -> Prompt:
    return Prompt(({"role": "user", "content": "7+5?"},), truth, **facts)


def make_group(prompt: Prompt, size: int) -> Group:
    return Group(prompt, IDS, tuple(Sample(i, i, IDS, None, None, "stop") for i in range(size)))


def judge(pool: VerifierPool, prompt: Prompt, *completions: str):
    return pool.judge([make_group(prompt, len(completions))], [completions])[0]


def rewards(name: str, prompt: Prompt, *completions: str) -> list[float | None]:
    with VerifierPool(VerifyConfig(verifier=name)) as pool:
        return [judgement.reward for judgement in judge(pool, prompt, *completions)]


@pytest.fixture
def own_verifiers(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture
def troubled(own_verifiers):
    config = VerifyConfig(verifier="verifiers_for_tests:troubled", timeout_seconds=1.0, workers=2)
    with VerifierPool(config) as pool:
        yield pool


@pytest.mark.parametrize(
    ("completion", "truth", "reward"),
    [
        ("7+5\n=10+2\n#12", "12", 1.0),
        ("#12\n\n  \n", "12", 1.0),
        ("#012\r\n", "12", 1.0),
        ("#+12", "12", 1.0),
        ("#-0", "0", 1.0),
        ("#-12", "12", 0.0),
        ("#" + "9" * 5000, "9" * 5000, 1.0),  # Python's int refuses to read so many digits
        ("#12\nmore", "12", 0.0),
        ("12", "12", 0.0),
        ("# 12", "12", 0.0),
        ("#12.0", "12", 0.0),
        ("#1_2", "12", 0.0),
        ("#١٢", "12", 0.0),  # Arabic digits, which Python's int would read as 12
        ("#1²", "12", 0.0),
        ("", "12", 0.0),
    ],
)
def test_exact_wants_a_last_line_of_a_hash_and_the_ascii_integer(completion, truth, reward):
    assert exact(completion, make_prompt(truth)) == reward


def test_exact_refuses_a_ground_truth_that_is_no_integer():
    assert last_line("a\n b \n\n") == "b"
    with VerifierPool(VerifyConfig(verifier="exact")) as pool:
        for truth in ("1/2", None):
            (judgement,) = judge(pool, make_prompt(truth), "#1")
            assert judgement.reward is None
            assert "is no integer, which `exact` needs" in judgement.error


def test_math_compares_values_and_not_their_spelling():
    half = rewards(
        "math",
        make_prompt(r"\frac{1}{2}"),
        "so it is $0.5$",
        r"\boxed{\frac{2}{4}}",
        "The answer is 1/2",
        r"\boxed{\frac{1}{3}}",
        "no number here",
    )
    assert half == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert rewards("math", make_prompt("-4"), "The answer is -4.", "The answer is 4.") == [1.0, 0.0]
    assert rewards("math", make_prompt("$x^2+2x+1$"), "$(x+1)^2$") == [1.0]


def test_reasoning_gym_scores_by_the_task_itself():
    prompt = read_prompts("reasoning_gym:chain_sum?size=1&seed=1")[0]
    truth = prompt.ground_truth
    assert rewards(
        "reasoning_gym",
        prompt,
        f"so\n<answer>{truth}</answer> done",
        f"<answer>999</answer> no: <answer> {truth} </answer>",
        f"it is\n{truth}\n",
        "<answer>999</answer>",
    ) == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        # many answers are right, and only the metadata tells
        ("graph_color?size=1&seed=1&num_colors=3", '{"0": 1}'),
        # the grid in the entry is a tuple of tuples, which JSON cannot say
        ("rearc?size=1&seed=1", "1 2"),
        # right with the task's default parameters, and not with the prompt's own: 3 and 1 are too small
        ("puzzle24?size=1&seed=1&min_value=4", "8*3*1*1"),
    ],
)
def test_reasoning_gym_scorers_that_need_more_than_the_answer(task, wrong):
    prompt = read_prompts(f"reasoning_gym:{task}")[0]
    right = prompt.ground_truth or json.dumps(prompt.extra_info["metadata"]["possible_answer"])
    good, bad = rewards("reasoning_gym", prompt, f"<answer>{right}</answer>", f"<answer>{wrong}</answer>")
    assert good == 1.0
    assert bad < 0.5


def test_a_prompt_without_an_entry_cannot_be_scored_by_reasoning_gym():
    with VerifierPool(VerifyConfig(verifier="reasoning_gym")) as pool:
        (judgement,) = judge(pool, make_prompt(data_source="gsm8k"), "12")
    assert judgement.reward is None
    assert "of `gsm8k` carries no reasoning_gym entry" in judgement.error


def test_an_answer_that_a_scorer_evaluates_cannot_write_files(tmp_path):
    victim = tmp_path / "written"
    prompt = read_prompts("reasoning_gym:n_queens?size=1&seed=1")[0]
    rewards("reasoning_gym", prompt, f"<answer>[open({str(victim)!r}, 'w').write('x')]</answer>")
    assert not victim.exists()
    # that it is the guard which stops it, and that reading stays allowed
    with pytest.raises(PermissionError, match="tried open"):
        refuse_reaching_out("open", (str(victim), "w", os.O_WRONLY | os.O_CREAT))
    with pytest.raises(PermissionError, match=re.escape("tried os.system")):
        refuse_reaching_out("os.system", ("true",))
    refuse_reaching_out("open", (str(victim), "r", os.O_RDONLY))


def test_a_function_of_ones_own_gets_completion_and_prompt(own_verifiers):
    assert rewards("verifiers_for_tests:length", make_prompt("4"), "", "ab", "abcd") == [0.0, 0.5, 1.0]


def test_named_numbers_become_parts(own_verifiers):
    with VerifierPool(VerifyConfig(verifier="verifiers_for_tests:in_parts")) as pool:
        (judgement,) = judge(pool, make_prompt(extra_info={"bonus": 0.25}), "x")
    assert judgement.reward == 1.0
    assert judgement.parts == {"format": 0.5, "task": 0.25}
    assert judgement.error == ""


def test_the_nesting_and_order_of_the_groups_is_kept(own_verifiers):
    texts = [["a" * (i + j) for j in range(3)] for i in range(20)]
    groups = [make_group(make_prompt(str(i + 1)), 3) for i in range(20)]
    with VerifierPool(VerifyConfig(verifier="verifiers_for_tests:length")) as pool:
        judged = pool.judge(groups, texts)
        with pytest.raises(ValueError, match="2 completions for a group of 3 samples"):
            pool.judge(groups[:1], [["a", "b"]])
    expected = [[(i + j) / (i + 1) for j in range(3)] for i in range(20)]
    assert [[j.reward for j in row] for row in judged] == expected


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        ("hang", "timed out after 1 s"),
        ("hang deaf", "timed out after 1 s"),
        ("exit 0", "died with exit code 0"),
        ("exit 3", "died with exit code 3"),
        ("segfault", "died with exit code -11 (SIGSEGV)"),
        ("sys.exit", "raised SystemExit: 4"),
        ("raise", "raised ValueError: invalid literal for int() with base 10: 'two\\nlines'"),
        ("nan", "returned nan as `reward`"),
        ("infinite", "returned inf as `reward`"),
        ("text", "returned str as `reward`, not a number"),
        ("nothing", "returned NoneType as `reward`, not a number"),
        ("no reward", "returned a dict without `reward`, with ['score']"),
        ("nan part", "returned nan as `style`"),
    ],
)
def test_a_bad_verification_costs_its_own_rollout_only(troubled, completion, error):
    judged = judge(troubled, make_prompt(), "a", "b", completion, *"cdefghij")
    assert [j.reward for j in judged] == [1.0, 1.0, None, *[1.0] * 8]
    assert judged[2].error == error
    assert all(j.error == "" for j in judged if j.reward is not None)


def test_hangs_and_deaths_among_many_rollouts_each_cost_one(troubled):
    completions = ["ok"] * 200
    for index, deed in {
        3: "hang",
        4: "exit 3",
        5: "exit 3",
        60: "segfault",
        61: "nan",
        199: "exit 0",
    }.items():
        completions[index] = deed
    judged = judge(troubled, make_prompt(), *completions)
    assert [i for i, j in enumerate(judged) if j.reward is None] == [3, 4, 5, 60, 61, 199]


def test_a_hanging_verifier_holds_up_only_its_own_process(troubled):
    judge(troubled, make_prompt(), "warm", "up")
    start = time.monotonic()
    judged = judge(troubled, make_prompt(), "hang deaf", *["ok"] * 500)
    # one time limit of a second, and not one for each of the 500 rollouts behind it
    assert time.monotonic() - start < 100
    assert sum(j.reward == 1.0 for j in judged) == 500


def test_a_process_that_dies_after_its_reply_takes_no_later_rollout_with_it(troubled):
    assert [j.reward for j in judge(troubled, make_prompt(), "die later", "die later")] == [1.0, 1.0]
    time.sleep(0.5)
    assert [j.reward for j in judge(troubled, make_prompt(), *["ok"] * 20)] == [1.0] * 20


def test_what_a_verifier_prints_or_reads_does_not_reach_the_pool(troubled):
    assert [j.reward for j in judge(troubled, make_prompt(), "print", "read", "ok")] == [1.0, 1.0, 1.0]


def test_a_killed_verifiers_children_die_with_it(own_verifiers, tmp_path, monkeypatch):
    child_file = tmp_path / "child"
    monkeypatch.setenv("CHILD_FILE", str(child_file))
    config = VerifyConfig(verifier="verifiers_for_tests:troubled", timeout_seconds=1.0, workers=1)
    with VerifierPool(config) as pool:
        (judged,) = judge(pool, make_prompt(), "child")
    assert judged.error == "timed out after 1 s"
    # a zombie until somebody reaps it, but running no more
    status = Path(f"/proc/{child_file.read_text()}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.02)
    pytest.fail("the verifier's child still runs")


def test_closing_the_pool_leaves_no_process(own_verifiers):
    with VerifierPool(VerifyConfig(verifier="verifiers_for_tests:troubled", workers=2)) as pool:
        judge(pool, make_prompt(), *["ok"] * 50)
        ids = [worker._process.pid for worker in pool._workers if worker._process is not None]
    assert ids
    for process_id in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def test_workers_do_not_import_torch_though_the_main_module_did(own_verifiers, tmp_path):
    # and the script has no main guard, which multiprocessing's spawn would need
    script = tmp_path / "night.py"
    script.write_text(
        "import numpy as np, torch\n"
        "from pipeline.config import VerifyConfig\n"
        "from pipeline.records import Group, Prompt, Sample\n"
        "from pipeline.rewards import VerifierPool\n"
        "ids = np.zeros(1, dtype=np.int32)\n"
        "samples = tuple(Sample(i, i, ids, None, None, 'stop') for i in range(2))\n"
        "group = Group(Prompt(({'role': 'user', 'content': '?'},)), ids, samples)\n"
        "with VerifierPool(VerifyConfig(verifier='verifiers_for_tests:troubled')) as pool:\n"
        "    print([j.reward for j in pool.judge([group], [['torch', 'ok']])[0]])\n"
    )
    path = os.pathsep.join([HERE, *sys.path])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout == "[0.0, 1.0]\n", done.stderr


def test_a_night_of_exact_verifications_loses_none():
    with VerifierPool(VerifyConfig(verifier="exact")) as pool:
        judge(pool, make_prompt(), "#1", "#2")
        groups, texts = [make_group(make_prompt(), 8)] * 128, [["7+5\n=12\n#12"] * 7 + ["#13"]] * 128
        judged = pool.judge(groups, texts)
    assert sum(j.reward for row in judged for j in row) == 896


def test_the_version_follows_the_verifiers_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    versions = []
    for source in ("def f(c, p): return 1\n", "def f(c, p): return 0.0\n"):
        (tmp_path / "scorer_of_mine.py").write_text(source)
        with VerifierPool(VerifyConfig(verifier="scorer_of_mine:f")) as pool:
            assert pool.name == "scorer_of_mine:f"
            versions.append(pool.version)
    assert re.fullmatch(r"[0-9a-f]{32}", versions[0])
    assert versions[0] != versions[1]
    for name, expected in (("exact", "1"), ("math", version("math-verify"))):
        with VerifierPool(VerifyConfig(verifier=name)) as pool:
            assert pool.version == expected


def test_a_verifier_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "lies_here.py").write_text("def f(completion, prompt): return 0.5\n")
    monkeypatch.chdir(tmp_path)
    assert rewards("lies_here:f", make_prompt(), "x") == [0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", "Unknown verifier `exakt`: did you mean `exact`? Your own is named `module:function`."),
        ("a b:c", "Unknown verifier `a b:c`: valid names: exact, math, reasoning_gym"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken_module:f", "The module of verifier `broken_module:f` cannot be imported: ZeroDivisionError"),
        ("quits:f", "cannot be imported: SystemExit: 3."),
        ("dies:f", "The process of verifier `dies:f` died with exit code 7 while importing it."),
        ("verifiers_for_tests:lenght", "There is no function `lenght` for verifier"),
        ("verifiers_for_tests:lenght", "did you mean `length`?"),
        ("verifiers_for_tests:not_a_function", "is a int, not a function of (completion, prompt)."),
    ],
)
def test_a_verifier_that_cannot_be_had_is_said_in_one_line(
    name, message, own_verifiers, tmp_path, monkeypatch
):
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "quits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "dies.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(VerifierError, match=re.escape(message)) as caught:
        VerifierPool(VerifyConfig(verifier=name))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
