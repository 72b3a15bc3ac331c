"""The command line's arguments: help and errors come without torch, and the parsers' names are the objects'."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import rope_dist
from rope_dist import defaults
from rope_dist.cli import app
from rope_dist.presets import PRESETS
from rope_dist.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("plan", "compare", "export", "export hf", "export gguf", "export flags", "export vllm", "verify"),
    *("eval", "eval perplexity", "eval longppl", "eval passkey", "eval synthetic", "eval tasks"),
    *("bench", "demo", "info", "run", "doctor"),
)

LLAMA = ("plan", "llama2-7b", "--target", "8192")
DPROPE = (*LLAMA, "--strategy", "dprope")

AT_ONCE = [
    ((), 0, "Usage: rope-dist"),
    (("--version",), 0, f"rope-dist {rope_dist.__version__}"),
    *(((*verb.split(), "--help"), 0, f"Usage: rope-dist {verb}") for verb in COMMANDS),
    (("fly",), 2, "unknown command 'fly'; known: plan, compare"),
    (("paln",), 2, "unknown command 'paln', did you mean plan?"),
    (("eval",), 2, "give a command: perplexity, passkey, longppl, synthetic, tasks"),
    (("eval", "tasks"), 2, "give --tasks: "),
    (("export", "onnx"), 2, "unknown command 'onnx'; known: hf, gguf, flags, vllm"),
    (("--vresion",), 2, "rope-dist: error: unknown option '--vresion', did you mean --version?"),
    (
        (*LLAMA, "--treshold", "0"),
        2,
        "rope-dist plan: error: unknown option '--treshold', did you mean --threshold?",
    ),
    (("plan", "llama2-7b", "--targ", "8192"), 2, "unknown option '--targ', did you mean --target?"),
    (("info", "--theta", "3"), 2, "unknown option '--theta' (see rope-dist info --help)"),
    (("plan", "-x"), 2, "unknown option '-x'"),
    ((*LLAMA, "more"), 2, "unexpected extra argument"),
    ((*LLAMA, "--json=yes"), 2, "does not take a value"),
    ((*LLAMA, "-o"), 2, "--output: a value is missing"),
    ((*LLAMA, "-o", "--json"), 2, "--output: a value is missing"),
    (("eval", "passkey", "--scoring", "luck"), 2, "known: generate, decoys"),
    (("eval", "synthetic", "--tasks", "multikey"), 2, "unknown value 'multikey', did you mean multi-key?"),
    (("eval", "longppl", "--alpha", "0"), 2, "--alpha: must be above 0, got 0"),
    (("eval", "longppl", "--beta", "1"), 2, "--beta: must be at most 0, got 1"),
    (("eval", "longppl", "--evaluator", "stok"), 2, "unknown strategy 'stok'"),
    (("eval", "passkey", "--depths", "1.5"), 2, "--depths: must be from 0 to 1, got 1.5"),
    (("eval", "passkey", "--depths", "1", "-.5"), 2, "--depths: must be from 0 to 1, got -.5"),
    (("eval", "perplexity", "--target", "9000", "--factor", "2"), 2, "give --target or --factor, not both"),
    (("eval", "perplexity", "--strategies", "yran"), 2, "unknown strategy 'yran', did you mean yarn?"),
    (("eval", "perplexity", "--strategies", "yarn:betafast=3"), 2, "yarn has no setting 'betafast'"),
    (
        ("eval", "perplexity", "--strategies", "yarn:target_length=5"),
        2,
        "yarn has no setting 'target_length'",
    ),
    (("eval", "perplexity", "--strategies", "dprope:threshold"), 2, "not KEY=VALUE"),
    (
        ("eval", "perplexity", "--strategies", "yran+dynamic"),
        2,
        "unknown strategy 'yran', did you mean yarn?",
    ),
    (("eval", "perplexity", "--strategies", "stock+dynamic"), 2, "unknown strategy 'stock'"),
    (("eval", "perplexity", "--strategies", "yarn+dynamic:betafast=3"), 2, "yarn has no setting 'betafast'"),
    (("eval", "perplexity", "--strategies", "none.json"), 2, "cannot read none.json: No such file"),
    (("eval", "perplexity", "--text", "pyhton"), 2, "did you mean python?"),
    (("eval", "perplexity", "--model", "smollm-135m"), 2, "did you mean smollm2-135m?"),
    (
        ("eval", "perplexity", "--model", "llama2-7b"),
        2,
        "give a directory or the hub id meta-llama/Llama-2-7b-hf",
    ),
    (("plan", "llama2-7b"), 2, "give --target or --factor"),
    (("plan", "llama2-7b", "--target", "8192", "--factor", "2"), 2, "give --target or --factor, not both"),
    *(
        (("plan", "llama2-7b", "--factor", value), 2, message)
        for value, message in {
            "0": "at least 1",
            "-1": "at least 1",
            "0.5": "at least 1",
            "nan": "finite",
            "inf": "finite",
            "1e400": "finite",
            "x": "must be a number",
            "": "must be a number",
        }.items()
    ),
    *(
        (("plan", "llama2-7b", "--target", value), 2, message)
        for value, message in {
            "x": "whole number",
            "8192.5": "whole number",
            "-8192": "at least 2",
            "1": "at least 2",
            "9" * 30: "below 2^63",
            "9" * 9999: "whole number",
        }.items()
    ),
    ((*LLAMA, "--strategy", "yran"), 2, "unknown strategy 'yran', did you mean yarn?"),
    ((*LLAMA, "--strategy", "magic"), 2, "unknown strategy 'magic'; known: extrapolation"),
    (("plan", "lama2-7b", "--target", "8192"), 2, "unknown model 'lama2-7b', did you mean llama2-7b?"),
    (("plan", "", "--target", "8192"), 2, "unknown model ''"),
    (("plan", "./nowhere", "--target", "8192"), 2, "no such file or directory: ./nowhere"),
    (("plan", "a/b/c", "--target", "8192"), 2, "no such file or directory: a/b/c"),
    (("plan", "x" * 5000, "--target", "8192"), 2, "unknown model 'xxx"),
    (("info", "lama2-7b"), 2, "did you mean llama2-7b?"),
    (("plan", "llama2-7b", "--theta", "3", "--target", "8192"), 2, "not both: --theta"),
    (("plan", "--head-dim", "128", "--target", "99"), 2, "missing: --theta, --original"),
    (("plan", "--theta", "1e4", "--head-dim", "127", "--original", "64", "--target", "99"), 2, "even"),
    (("plan", "--theta", "1", "--head-dim", "128", "--original", "64", "--target", "99"), 2, "above 1"),
    ((*LLAMA, "--intervals", "1"), 2, "at least 2"),
    ((*LLAMA, "--divergence", "kl"), 2, "known: pretrained-extended"),
    ((*DPROPE, "--threshold", "some"), 2, "paper-2x, paper-4x"),
    ((*DPROPE, "--threshold", "-1"), 2, "at least 0"),
    ((*DPROPE, "--threshold", "0", "--interpolated-dims", "80"), 2, "not both"),
    ((*DPROPE, "--threshold", "0", "--set", "threshold=1"), 2, "threshold is given twice"),
    ((*DPROPE, "--candidates", "pi", "yran"), 2, "did you mean yarn?"),
    ((*DPROPE, "--set", 'candidates=["pi", "yran"]'), 2, "did you mean yarn?"),
    (("plan", "llama2-7b", "--dynamic"), 2, "give --target or --factor"),
    (("plan", "llama2-7b", "--stages", "8192"), 2, "--stages are of a dynamic plan: give --dynamic too"),
    (
        ("plan", "llama2-7b", "--dynamic", "--stages", "5120,x"),
        2,
        "--stages: must be a whole number, got 'x'",
    ),
    (("plan", "llama2-7b", "--dynamic", "--stages", "5120,"), 2, "--stages: must be a whole number, got ''"),
    ((*LLAMA, "--threshold", "0"), 2, "the strategy is auto: give --strategy dprope"),
    ((*LLAMA, "--set", "threshold"), 2, "not KEY=VALUE"),
    ((*LLAMA, "--set", "beta_fast=16"), 2, "auto has no setting 'beta_fast'; it has fast_periods"),
    ((*LLAMA, "--strategy", "pi", "--set", "beta_fast=16"), 2, "pi has no setting 'beta_fast'; it has none"),
    *(
        (
            (*LLAMA, "--strategy", "yarn", "--set", f"beta_fast={value}"),
            2,
            "beta_fast of yarn must be a number",
        )
        for value in ("abc", "null", "[1]", "true", "NaN", "1e400", "1" + "0" * 400, "{}", "", "[" * 99999)
    ),
    ((*LLAMA, "--strategy", "yarn", "--set", "truncate=1"), 2, "truncate of yarn must be true or false"),
    (
        (*LLAMA, "--strategy", "longrope", "--set", "factors=2"),
        2,
        "factors of longrope must be a list of numbers",
    ),
    ((*LLAMA, "--strategy", "longrope", "--set", "factors=[NaN]"), 2, "must be a list of numbers"),
    *(
        ((*LLAMA, "--strategy", strategy, "--set", f"{name}=5"), 2, message)
        for strategy in ("yarn", "dprope")
        for name, message in {
            "target_length": "has no setting 'target_length'",
            "theta": "has no setting 'theta'",
            "rope": "has no setting 'rope'",
            "source": "has no setting 'source'",
            "strategy": "has no setting 'strategy'",
            "intervals": "give --intervals",
        }.items()
    ),
    ((*LLAMA, "-o", "/nowhere/plan.json"), 2, "there is no directory /nowhere"),
    ((*LLAMA, "-o", "/"), 2, "it is a directory"),
    (("compare", "llama2-7b"), 2, "give --target: "),
    (("compare", "llama2-7b", "--target", "8192", "--strategies", "magic"), 2, "unknown strategy"),
    (("compare", "llama2-7b", "--target", "8192", "--divergence", "kl"), 2, "pretrained-extended"),
    (("demo", "--tokens", "1"), 2, "at least 2"),
    (("demo", "--text", "no-such-text"), 2, "unknown text 'no-such-text'; known: python"),
    (("demo", "--strategies", "yran"), 2, "did you mean yarn?"),
    (("demo", "--minutes", "0"), 2, "above 0"),
    (("demo", "--device", "xyz"), 2, "unknown device 'xyz'; known: cpu, cuda"),
    (("demo", "--device", "meta"), 2, "unknown device 'meta'"),
    (("bench", "--seconds", "0"), 2, "above 0"),
    (("bench", "--tokens", "0"), 2, "at least 1"),
    (("export", "hf", "."), 2, "give --output: "),
    (("export", "hf", ".", "-o", "x"), 2, "give --plan or --target or --factor"),
    (
        ("export", "hf", ".", "-o", "x", "--plan", __file__, "--factor", "2"),
        2,
        "give --plan or --factor, not both",
    ),
    (("export", "hf", "--factor", "2", "-o", "x"), 2, "give DIR: "),
    (("export", "hf", ".", "--factor", "2"), 2, "--output"),
    (("export", "hf", ".", "--plan", "none.json", "-o", "x"), 2, "cannot read none.json: No such file"),
    (("export", "hf", ".", "--plan", "/", "-o", "x"), 2, "cannot read /: Is a directory"),
    (("export", "hf", ".", "--factor", "2", "-o", "x", "--engine", "vlm"), 2, "did you mean vllm?"),
    (("export", "vllm", "--factor", "2"), 2, "give a MODEL to plan from"),
    (("export", "vllm", "--plan", __file__, "--strategy", "pi"), 2, "--strategy goes with"),
    (("export", "vllm", "--plan", __file__, "--set", "a=1"), 2, "--set goes with"),
    (("verify", "x", "--plan", "none.json"), 2, "cannot read none.json: No such file"),
    (("run",), 2, "give SCRIPT [ARGS]...: "),
    (("run", "--factor", "2"), 2, "give SCRIPT [ARGS]...: "),
    (("run", "--facto", "2", "x.py"), 2, "unknown option '--facto', did you mean --factor?"),
    (("run", "none.py", "--factor", "0"), 2, "there is no script none.py"),
    (("run", "-m", "no_such_module.part", "--factor"), 2, "there is no module no_such_module"),
    (("run", "--factor", "2", "--target", "128", __file__), 2, "give --target or --factor, not both"),
    (("run", "--factor", "0.5", __file__), 2, "--factor: must be at least 1"),
    (("run", "--strategy", "pi", __file__), 2, "give --target or --factor with --strategy"),
    (("run", "--plan", __file__, "--set", "a=1", __file__), 2, "give --target or --factor with --set"),
    (("run", "--tables", "bf16", __file__), 2, "unknown value 'bf16'; known: float32, model"),
]


def parse(arguments):
    """The values that the command gets, without a run of it; files that examples name count as being there."""
    files = ("plan.json", "book.txt", "my-model.gguf", "./my-model", "FILE")
    command, rest = typer.main.get_command(app), [__file__ if a in files else a for a in arguments]
    while isinstance(command, typer.core.TyperGroup):
        command = command.commands[rest.pop(0)]
    values = command.make_context("rope-dist", rest).params
    # Older typers make lists of tuples only when they call the command.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# Runs every command line of standard input in one process in which importing these packages is an error.
WITHOUT_TORCH = """
import contextlib, io, json, sys

class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "transformers", "numpy", "triton", "matplotlib"):
            raise AssertionError(f"imports {name}")

sys.meta_path.insert(0, Refuse())
from rope_dist.cli import main

results = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except AssertionError as refused:
            code, _ = None, err.write(str(refused))
    results.append((code, out.getvalue(), err.getvalue()))
assert "rich" not in sys.modules
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def without_torch():
    """(exit code, output, errors) of every command line of :data:`AT_ONCE`, run where torch cannot be imported."""
    lines = [list(arguments) for arguments, *_ in AT_ONCE]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "index", range(len(AT_ONCE)), ids=lambda i: " ".join(AT_ONCE[i][0])[:60].strip() or "no arguments"
)
def test_help_and_bad_arguments_come_without_torch(without_torch, index):
    (_, code, text), (found, out, error) = AT_ONCE[index], without_torch[index]
    assert found == code, error
    if code == 0:
        assert text in out
        assert error == ""
    else:
        assert text in error
        assert error.count("\n") == 1
        assert out == ""


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_help_has_an_example_that_parses(without_torch, verb):
    (index,) = (i for i, line in enumerate(AT_ONCE) if line[0] == (*verb.split(), "--help"))
    examples = re.findall(r"^    rope-dist (.*)$", without_torch[index][1], re.MULTILINE)
    assert examples
    for example in examples:
        arguments = shlex.split(example)
        assert arguments[: len(verb.split())] == verb.split()
        parse(arguments)


def test_the_commands_of_the_documentation_parse():
    # Those of the recipes are run, with the files that they name: test_docs_recipes.py.
    pages = [ROOT / "README.md", *(page for page in ROOT.glob("docs/*.md") if page.name != "recipes.md")]
    commands = [
        c for page in pages for c in re.findall(r"^ *rope-dist (.*)$", page.read_text(), re.MULTILINE)
    ]
    assert commands
    for command in commands:
        parse(shlex.split(command, comments=True))


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["plan", "--help"], ["paln"]])
def test_it_starts_at_once(arguments):
    code = "import sys, time; from rope_dist.cli import main; main(sys.argv[1:]); print(time.process_time())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    # Python's own start is in it: 0.1 s in all. torch alone takes more than a second.
    assert float(done.stdout.split()[-1]) < 0.5


@pytest.mark.parametrize(
    "variant",
    [
        "stock",
        "dprope:threshold=0,intervals=36",
        "refined:dtype=float64",
        "yarn:beta-fast=16",
        "auto:slow_periods=0.5",
        "auto+dynamic",
        "yarn+dynamic:beta_fast=16",
    ],
)
def test_eval_takes_strategies_with_their_settings(variant):
    assert parse(["eval", "perplexity", "--strategies", variant])["strategies"] == [variant]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("compare llama2-7b --target 8192 16384", "target", [8192, 16384]),
        ("compare --target 8192 16384 --json llama2-7b", "target", [8192, 16384]),
        ("compare --target=8192 llama2-7b", "target", [8192]),
        ("compare --target 8192 16384 --target 32768 -- llama2-7b", "target", [8192, 16384, 32768]),
        ("verify --engine vllm my-model --plan FILE", "engine", ["vllm"]),
        ("verify my-model --engine vllm --engine sglang --plan FILE", "engine", ["vllm", "sglang"]),
        ("plan llama2-7b --target 8192 --set a=-1 --set b=[2]", "settings", [("a", -1), ("b", [2])]),
        ("plan llama2-7b --factor 2 -oplan.json", "output", "plan.json"),
        ("plan llama2-7b --dynamic --stages 5120,6144 8192", "stages", [(5120, 6144), (8192,)]),
        ("eval passkey --depths 0 1 --seed -3", "seed", -3),
        ("eval passkey --depths 0 1 --seed -3", "depths", [0, 1]),
        ("bench", "tokens", [8192, 16384]),
    ],
)
def test_options_with_several_values(arguments, name, value):
    assert parse(arguments.split())[name] == value


class TestNames:
    """The names that the parsers have without torch are those of the objects."""

    def test_strategies_and_their_settings(self):
        assert tuple(STRATEGIES) == defaults.STRATEGY_NAMES
        for name, function in STRATEGIES.items():
            parameters = inspect.signature(function).parameters
            assert set(defaults.STRATEGY_SETTINGS[name]) == set(parameters) - {"rope", "target_length"}, name

    @pytest.mark.parametrize("strategy", defaults.STRATEGY_NAMES)
    def test_every_setting_takes_its_own_default_and_kind(self, strategy):
        from rope_dist.cli.values import check_setting

        parameters = inspect.signature(STRATEGIES[strategy]).parameters
        for name in defaults.STRATEGY_SETTINGS[strategy]:
            default = parameters[name].default
            if default is not None and name != "dtype":
                check_setting(strategy, name, list(default) if isinstance(default, tuple) else default)

    def test_presets(self):
        assert list(PRESETS) == list(defaults.PRESETS)

    def test_the_measure(self):
        from rope_dist.distribution import DEFAULT_INTERVALS, DIVERGENCES, check_dtype
        from rope_dist.strategies import DPROPE_THRESHOLDS

        assert defaults.INTERVALS == DEFAULT_INTERVALS
        assert defaults.DIVERGENCE_NAMES == DIVERGENCES
        assert [str(check_dtype(name)) for name in defaults.MEASURE_DTYPES] == [
            "torch.float32",
            "torch.float64",
        ]
        assert tuple(DPROPE_THRESHOLDS) == defaults.THRESHOLD_NAMES

    def test_engines_texts_models_and_tasks(self):
        from rope_dist.evaluation import (
            CORPORA,
            PACKAGED_MODELS,
            STOCK,
            SYNTHETIC_TASKS,
            TASK_SETS,
            passkey,
            perplexity,
        )
        from rope_dist.export import ENGINES

        assert tuple(ENGINES) == defaults.ENGINE_NAMES
        assert tuple(CORPORA) == defaults.CORPUS_NAMES
        assert tuple(PACKAGED_MODELS) == defaults.PACKAGED_MODEL_NAMES
        assert tuple(TASK_SETS) == defaults.TASK_SET_NAMES
        assert tuple(SYNTHETIC_TASKS) == defaults.SYNTHETIC_TASK_NAMES
        assert set(defaults.QUICK_SYNTHETIC_TASKS) < set(SYNTHETIC_TASKS)
        assert defaults.METHODS == perplexity.METHODS
        assert (defaults.SCORINGS, defaults.DEPTHS) == (passkey.SCORINGS, passkey.DEPTHS)
        for names in (defaults.EVALUATED_STRATEGIES, defaults.QUICK_STRATEGIES, defaults.DEMO_STRATEGIES):
            assert set(names) <= {STOCK, *STRATEGIES}
