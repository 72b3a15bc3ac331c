"""The course of benchmarks/gpu_check.sh, with a Python and a compute-sanitizer that only note what they were asked."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
PARTS = ("tests", "rotary", "projection", "models", "compile", "baselines", "sanitizer")

PYTHON = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING> $*" >>"$LOG"
case "$*" in
    *cuda.is_available*) exit "${NO_GPU:-0}" ;;
    *native.load*) exit "${BUILT:-0}" ;;
    *build_ext*) exit "${BUILD:-0}" ;;
    *"-m pytest "*) echo "7 passed"; sleep "${SLEEP:-0}"; exit "${TESTS:-0}" ;;
    "-m benchmarks "*)
        while [ "$1" != --output ]; do shift; done
        echo "{}" >"$2/cuda.jsonl"
        echo "{}" >"$ROPE_DIST_CACHE/choices-torch_2.11.0+cu130-NVIDIA H100.json"
        sleep "${SLEEP:-0}"
        exit "${BENCHMARKS:-0}" ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING> compute-sanitizer $*" >>"$LOG"
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def check(tmp_path):
    """Runs a part in a folder whose name has a space; gives the process and what was asked of the stand-ins."""
    tools = tmp_path / "the tools"
    tools.mkdir()

    def run(*parts, sanitizer=True, **more):
        for name, script in {"python": PYTHON, "compute-sanitizer": SANITIZER}.items():
            (tools / name).write_text(script)
            (tools / name).chmod(0o755)
        if not sanitizer:
            (tools / "compute-sanitizer").unlink()
        log = tmp_path / "log"
        log.write_text("")
        done = subprocess.run(
            [SCRIPT, *parts],
            env={
                "OUT": str(tmp_path / "the results"),
                "PY": str(tools / "python"),
                "PATH": f"{tools}:/usr/bin:/bin",
                "LOG": str(log),
                **more,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done, log.read_text().splitlines()

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "the results"


def names(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_without_a_part_they_are_listed_in_order(check, out):
    done, log = check()
    assert done.returncode == 0
    assert re.findall(r"^  (\w+) ", done.stdout, re.MULTILINE) == list(PARTS)
    assert (log, out.exists()) == ([], False)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["rotory"], "no part 'rotory'"), (["rotary", "baselines"], "one part a call")]
)
def test_an_unknown_part_is_one_line(check, arguments, message):
    done, log = check(*arguments)
    assert (done.returncode, log) == (2, [])
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [SCRIPT, "rotary"],
        env={"OUT": str(tmp_path), "PY": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr == "no GPU that torch can use\n"


@pytest.mark.parametrize(
    ("part", "folder", "asked"),
    [
        (
            "rotary",
            "",
            "rotary norm_rotary attention_rest rerotate cache_write decode -- --baselines torch.compile",
        ),
        ("projection", "", "projection -- --baselines torch.compile"),
        ("models", "", "model_prefill model_decode attention_block window model_train_step -- --baselines"),
        ("compile", "compile/", "model_prefill model_train_step -- --baselines torch.compile --lengths 8192"),
        ("baselines", "baselines/", "rotary norm_rotary cache_write projection attention_block"),
    ],
)
def test_a_part_of_benchmarks(check, out, part, folder, asked):
    done, log = check(part)
    assert done.returncode == 0
    assert len([line for line in log if "-m benchmarks" in line]) == 1
    seconds, rest = re.fullmatch(
        rf"> -m benchmarks --device cuda --output {re.escape(str(out / folder).rstrip('/'))} "
        r"--seconds (\d+) --only (.*)",
        log[-1],
    ).groups()
    assert rest == asked
    # With what comes before and after it, a call ends within ten minutes.
    assert 500 < int(seconds) <= 550
    # Names that any file system and any transfer takes, and few of them.
    assert names(out) == sorted([f"choices-{part}.json", f"{folder}cuda.jsonl", f"{part}.txt"])


def test_the_suite_knows_what_the_parts_ask_of_it():
    """Of the benchmarks and of each one's own options."""
    from benchmarks.benchmark import find, names

    on_a_gpu = {name for name in names() if "cuda" in find(name).share}
    asked = re.findall(r'measure "\$OUT\S* (.*)', SCRIPT.read_text())
    assert len(asked) == 5
    everything = set()
    for line in asked:
        chosen, _, options = line.partition(" -- ")
        for name in chosen.split():
            parsed = find(name).parser().parse_args(options.split())
            assert set(parsed.baselines or ()) <= set(find(name).baselines)
        everything |= set(chosen.split())
    assert everything == on_a_gpu


def test_tests_and_native_library(check, out):
    done, log = check("tests")
    assert done.returncode == 0
    assert "7 passed" in done.stdout
    assert "tests/ops tests/test_native.py" in log[-1]
    assert not any("build_ext" in line for line in log)
    assert names(out) == ["tests.txt"]
    done, log = check("tests", BUILT="1", BUILD="5", TESTS="3")
    assert done.returncode == 5, "the status of the first step that failed"
    assert "native failed with status 5" in done.stdout
    assert "tests failed with status 3" in done.stdout
    assert names(out) == ["native.txt", "tests.txt"]


def test_the_sanitizer_sees_the_bounds_of_every_tensor(check, out):
    done, log = check("sanitizer")
    assert done.returncode == 0
    asked = log[-1]
    assert asked.startswith("1> compute-sanitizer --error-exitcode 1 --report-api-errors no ")
    assert "tests/ops/test_projection.py tests/ops/test_decode.py " in asked
    assert names(out) == ["sanitizer.txt"]
    done, log = check("sanitizer", sanitizer=False)
    assert done.returncode == 0
    if shutil.which("compute-sanitizer", path="/usr/bin:/bin") is None:
        assert "compute-sanitizer is not installed" in done.stdout


def test_what_the_sanitizer_selects_is_there():
    """A test that is renamed must not silently leave the run under compute-sanitizer."""
    (selected,) = re.findall(r'-k "(.*)"', SCRIPT.read_text())
    files = re.findall(r"tests/ops/test_\w+\.py", SCRIPT.read_text())
    tests = "".join((ROOT / file).read_text() for file in files)
    for name in selected.split(" or "):
        assert re.search(rf"def test_\w*{name}", tests), name


def test_what_needs_no_gpu_is_not_run(check):
    for part in PARTS:
        _, log = check(part)
        assert not any("static_gate" in line for line in log)


@pytest.mark.parametrize("part", ["models", "tests"])
def test_a_part_ends_at_its_limit_and_leaves_what_there_is(check, out, part):
    began = time.monotonic()
    done, _ = check(part, LIMIT="2", SLEEP="250")
    assert time.monotonic() - began < 200
    assert done.returncode == 124
    assert f"{part} failed with status 124" in done.stdout
    left = {"models": ["choices-models.json", "cuda.jsonl", "models.txt"], "tests": ["tests.txt"]}
    assert names(out) == left[part]


def test_a_failure_is_the_status(check):
    assert check("rotary", BENCHMARKS="4")[0].returncode == 4


def test_in_bash_and_in_order():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
