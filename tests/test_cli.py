"""The command line: what it prints, and one line with exit code 2 for bad input."""

import json
import os
import subprocess
import sys

import pytest
from conftest import llama_config

import rope_dist
from rope_dist.cli import main
from rope_dist.comparison import COMPARED


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def out(capsys):
    def ok(*arguments):
        code, printed, error = run(capsys, *arguments)
        assert code == 0, error
        return printed

    return ok


class TestPlan:
    def test_plain_numbers_as_json(self, out):
        numbers = ("--theta", 500000, "--head-dim", 128, "--original", 8192, "--target", 32768)
        data = json.loads(out("plan", *numbers, "--json"))
        made = rope_dist.plan(theta=500000.0, head_dim=128, original_length=8192, target_length=32768)
        assert rope_dist.RopePlan.from_dict(data) == made
        assert data["threshold"] == 2e-3
        assert len(data["factors"]) == 64

    @pytest.mark.parametrize(
        ("arguments", "dims"),
        [
            (("--target", 8192, "--threshold", 0), 94),
            (("--target", 16384, "--threshold", 0), 84),
            (("--target", 8192), 80),
            (("--target", 16384), 64),
            (("--factor", 4), 64),
            (("--target", 8192, "--interpolated-dims", 80), 80),
            (("--target", 8192, "--threshold", "5e-4"), 80),
            (("--target", 16384, "--threshold", "2e-3"), 64),
            (("--target", 16384, "--threshold", "paper-4x"), 64),
            (("--target", 8192, "--set", "threshold=0"), 94),
            (("--target", 8192, "--strategy", "pi"), 128),
        ],
    )
    def test_interpolated_dimensions(self, out, arguments, dims):
        assert json.loads(out("plan", "llama2-7b", *arguments, "--json"))["interpolated_dims"] == dims

    def test_n_and_threshold_pick_the_same(self, out):
        by_n, by_t = (
            json.loads(out("plan", "llama2-7b", "--target", 8192, *knob, "--json"))["factors"]
            for knob in (("--interpolated-dims", 80), ("--threshold", "5e-4"))
        )
        assert by_n == by_t

    def test_a_directory_a_file_and_a_plot(self, out, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        llama_config().save_pretrained(tmp_path)
        plan, plot = tmp_path / "plan.json", tmp_path / "plan.png"
        printed = out("plan", tmp_path, "--factor", 2, "-o", plan, "--plot", plot)
        assert printed.startswith("RopePlan(dprope, 64 -> 128 (2x)")
        assert rope_dist.RopePlan.load(plan) == rope_dist.plan(tmp_path, factor=2)
        assert plot.read_bytes().startswith(b"\x89PNG")

    def test_candidates(self, out):
        data = json.loads(
            out(
                "plan", "llama2-7b", "--target", 8192, "--candidates", "extrapolation", "pi", "yarn", "--json"
            )
        )
        assert data["settings"]["candidates"] == ["extrapolation", "pi", "yarn"]


class TestCompare:
    def test_table_3(self, out):
        plans = json.loads(out("compare", "llama2-7b", "--target", 8192, 16384, "--json"))
        found = {(p["strategy"], p["target_length"]): p for p in plans}
        assert set(found) == {(s, n) for s in COMPARED for n in (8192, 16384)}
        for (strategy, length), expected in {
            ("pi", 8192): 24.08,
            ("pi", 16384): 33.68,
            ("yarn", 8192): 25.62,
            ("yarn", 16384): 35.45,
            ("dprope", 8192): 6.71,
            ("dprope", 16384): 22.93,
        }.items():
            assert found[strategy, length]["disturbance"] * 1e3 == pytest.approx(expected, abs=0.02)
        assert found["dprope", 8192]["interpolated_dims"] == 94
        assert len(found["yarn", 8192]["factors"]) == 64

    def test_the_other_direction(self, out):
        arguments = ("compare", "llama2-7b", "--target", 8192, "--strategies", "pi", "--json")
        printed = json.loads(out(*arguments, "--divergence", "extended-pretrained"))
        assert printed[0]["disturbance"] * 1e3 == pytest.approx(184.5, abs=0.5)

    def test_float64(self, out):
        arguments = ("compare", "llama2-7b", "--target", 8192, "--strategies", "pi", "--json")
        printed = json.loads(out(*arguments, "--dtype", "float64"))[0]
        assert printed["dtype"] == "float64"
        assert printed["disturbance"] * 1e3 == pytest.approx(24.08, abs=0.3)

    def test_text_says_which_threshold(self, out):
        text = out("compare", "llama2-7b", "--target", 8192)
        assert "24.08" in text
        assert "dprope with threshold 0, as in the paper's Table 3" in text
        assert "dprope with threshold 0.0005." in out(
            "compare", "llama2-7b", "--target", 8192, "--threshold", "paper-2x"
        )

    def test_plot(self, out, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        out("compare", "llama2-7b", "--target", 8192, 16384, "--plot", tmp_path / "c.svg")
        assert "<svg" in (tmp_path / "c.svg").read_text()
        assert os.listdir(tmp_path) == ["c.svg"]


NUMBERS = ("plan", "--theta", "10000", "--head-dim", "128", "--original", "4096")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*NUMBERS, "--target", "4095"), "below the original length"),
        ((*NUMBERS, "--factor", "0"), "factor must be a positive number"),
        ((*NUMBERS, "--factor", "nan"), "factor must be a positive number"),
        (
            (*NUMBERS, "--target", "8192", "--strategy", "magic"),
            "unknown strategy 'magic'; known: extrapolation",
        ),
        ((*NUMBERS, "--target", "8192", "--threshold", "0", "--interpolated-dims", "80"), "not both"),
        ((*NUMBERS, "--target", "8192", "--intervals", "1"), "intervals"),
        ((*NUMBERS, "--target", "8192", "--threshold", "some"), "paper-2x, paper-4x"),
        ((*NUMBERS, "--target", "8192", "--strategy", "longrope", "--set", "factors=[NaN]"), "64 numbers"),
        ((*NUMBERS, "--target", "8192", "-o", "/nowhere/plan.json"), "No such file or directory"),
        ((*NUMBERS, "--target", "8192", "--plot", "plan.xyz"), "ending must be one of"),
        (("plan", "--theta", "1e4", "--head-dim", "127", "--original", "64", "--target", "99"), "even"),
        (("plan", "--head-dim", "128", "--target", "99"), "missing: theta, original_length"),
        (("plan", "llama2-8b", "--target", "8192"), "unknown model 'llama2-8b'"),
        (("plan", "llama2-7b", "--theta", "3", "--target", "8192"), "not both"),
        (("compare", "llama2-7b", "--target", "100"), "below the original length"),
        (("compare", "llama2-7b", "--target", "8192", "--strategies", "magic"), "unknown strategy"),
        (("demo", "--tokens", "1"), "tokens must be at least 2"),
        (("demo", "--text", "no-such-text", "-o", "OUT"), "neither a text file nor a corpus"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "plan.xyz" in arguments:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("plan", "llama2-7b"),
        ("plan", "llama2-7b", "--target", "x"),
        ("plan", "llama2-7b", "--target", "8192", "--factor", "2"),
        ("plan", "llama2-7b", "--target", "8192", "--set", "threshold"),
        ("compare", "llama2-7b"),
        ("compare", "llama2-7b", "--target", "8192", "--divergence", "kl"),
        ("eval",),
        ("eval", "tasks"),
        ("eval", "passkey", "--scoring", "luck"),
        ("eval", "perplexity", "--target", "9000", "--factor", "2"),
        ("fly",),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--help" in error


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m rope_dist compare llama2-7b --target 8192 --json | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[\n"
    assert done.stderr == ""
    assert done.returncode == 0


def test_planning_a_preset_does_not_wait_for_transformers():
    code = "import sys, rope_dist; rope_dist.plan('llama2-7b', factor=2); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_info_says_what_is_built_and_used(out):
    printed = out("info")
    data = json.loads(out("info", "--json"))
    assert list(data) == ["versions", "machine", "built", "used", "measured", "models"]
    assert set(data["built"]) == {"CPU library", "CUDA library"}
    assert data["used"]["cpu"].startswith(("native for float32", "reference for float32"))
    assert all(value in printed for section in data.values() for value in section.values())


def test_info_lists_what_was_measured(out, tmp_path, monkeypatch):
    from rope_dist.ops import tuning

    monkeypatch.setenv("ROPE_DIST_CACHE", str(tmp_path))
    assert "nothing yet" in out("info")
    problem = tuning.Problem("Some GPU", "bfloat16", 8192, 4096, (4096, 1024, 1024), 128, 128, "bias")
    tuning.choices().put(problem, {"separate": 2.0, "descriptors": 1.5})
    assert "descriptors (separate 2 ms, descriptors 1.5 ms)" in out("info")
