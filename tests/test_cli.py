"""The command line: what it prints, and one line with exit code 2 for bad input."""

import json
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import llama_config
from transformers import MistralConfig

import rope_dist
from rope_dist import defaults
from rope_dist.cli import main
from rope_dist.comparison import COMPARED
from rope_dist.defaults import DEFAULT_STRATEGY
from rope_dist.presets import PRESETS


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
        data = json.loads(out("plan", *numbers, "--strategy", "dprope", "--json"))
        made = rope_dist.plan(
            theta=500000.0, head_dim=128, original_length=8192, target_length=32768, strategy="dprope"
        )
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
        ],
    )
    def test_interpolated_dimensions(self, out, arguments, dims):
        printed = out("plan", "llama2-7b", "--strategy", "dprope", *arguments, "--json")
        assert json.loads(printed)["interpolated_dims"] == dims

    def test_n_and_threshold_pick_the_same(self, out):
        by_n, by_t = (
            json.loads(out("plan", "llama2-7b", "--strategy", "dprope", "--target", 8192, *knob, "--json"))[
                "factors"
            ]
            for knob in (("--interpolated-dims", 80), ("--threshold", "5e-4"))
        )
        assert by_n == by_t

    def test_a_directory_a_file_and_a_plot(self, out, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        llama_config().save_pretrained(tmp_path)
        plan, plot = tmp_path / "plan.json", tmp_path / "plan.png"
        printed = out("plan", tmp_path, "--factor", 2, "-o", plan, "--plot", plot)
        assert printed.startswith("RopePlan(auto, 64 -> 128 (2x)")
        assert rope_dist.RopePlan.load(plan) == rope_dist.plan(tmp_path, factor=2, strategy="auto")
        assert plot.read_bytes().startswith(b"\x89PNG")

    def test_candidates(self, out):
        candidates = ("--strategy", "dprope", "--candidates", "extrapolation", "pi", "yarn")
        data = json.loads(out("plan", "llama2-7b", "--target", 8192, *candidates, "--json"))
        assert data["settings"]["candidates"] == ["extrapolation", "pi", "yarn"]

    def test_a_setting_may_have_the_name_of_an_argument(self, out):
        arguments = (
            "plan",
            "llama2-7b",
            "--target",
            65536,
            "--strategy",
            "llama3",
            "--set",
            "factor=8",
            "--json",
        )
        data = json.loads(out(*arguments))
        assert data["settings"]["factor"] == 8
        # 16 times the length, and slow pairs are divided by 8, as Llama 3.1's own.
        assert (data["factors"][0], data["factors"][-1]) == (1, 8)

    def test_a_plot_that_cannot_be_drawn_leaves_no_plan(self, capsys, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        output = ("-o", tmp_path / "plan.json", "--plot", tmp_path / "plan.xyz")
        assert run(capsys, "plan", "llama2-7b", "--factor", 2, *output)[0] == 2
        assert os.listdir(tmp_path) == []


def auto_factors(scale):
    """The factors of ``auto`` for LLaMA2 by docs/strategies.md: ``s ** x``, x from 0 at 32 periods to 1 at one."""
    factors = []
    for i in range(64):
        periods = 4096 * 10000 ** (-i / 64) / (2 * math.pi)
        factors.append(scale ** min(max(math.log(32 / periods) / math.log(32), 0), 1))
    return factors


class TestDefaultStrategy:
    """The strategy that the documentation advises, wherever none is named."""

    def test_plan(self, out):
        data = json.loads(out("plan", "llama2-7b", "--factor", 2, "--json"))
        assert data["strategy"] == "auto"
        assert data["factors"] == pytest.approx(auto_factors(2), rel=1e-5)
        assert data["attention_scaling"] == pytest.approx(math.sqrt(1 + math.log(2) / math.log(4096)))

    def test_export(self, out, make_llama, tmp_path):
        # The rotary embedding of LLaMA2, on a model that is small.
        model = make_llama(head_dim=128, max_position_embeddings=4096)
        model.save_pretrained(tmp_path / "model")
        out("export", "hf", tmp_path / "model", "--factor", 2, "-o", tmp_path / "long")
        config = json.loads((tmp_path / "long" / "config.json").read_text())
        assert config["rope_dist"]["strategy"] == "auto"
        assert config["rope_parameters"]["long_factor"] == pytest.approx(auto_factors(2), rel=1e-5)

    def test_compare_and_eval_have_it_among_others(self):
        assert {"dprope", "auto"} < set(COMPARED)
        assert DEFAULT_STRATEGY in defaults.EVALUATED_STRATEGIES
        assert DEFAULT_STRATEGY in defaults.QUICK_STRATEGIES


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

    def test_a_disturbance_that_means_more_than_its_size_is_explained(self, out):
        text = out("compare", "llama2-7b", "--target", 8192, "--strategies", "pi", "ntk")
        # 269.81 * 64 = 8895.3 + 63 * 132.90; 2 pi * 10000 ** (3 / 64) * 2 ** (3 / 63) is a period of 10.0003 tokens.
        assert "ntk, 8192: pair 3 has 8895.26, 360 -> 101 intervals; the mean of the others is 132.90" in text
        assert "pi, 8192" not in text
        assert "Pairs above" not in out(
            "compare", "llama2-7b", "--target", 8192, "--strategies", "pi", "auto"
        )


NUMBERS = ("plan", "--theta", "10000", "--head-dim", "128", "--original", "4096")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*NUMBERS, "--target", "4095"), "below the original length"),
        ((*NUMBERS, "--target", "8192", "--strategy", "longrope", "--set", "factors=[1, 2]"), "64 numbers"),
        (
            (*NUMBERS, "--target", "8192", "--strategy", "yarn", "--set", "beta_fast=-1"),
            "beta_fast > beta_slow",
        ),
        ((*NUMBERS, "--target", "8192", "--plot", "plan.xyz"), "ending must be one of"),
        (("compare", "llama2-7b", "--target", "100"), "below the original length"),
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
    assert not list(tmp_path.iterdir())


COMMAND = f"{shlex.quote(sys.executable)} -m rope_dist"


def test_a_closed_pipe_is_no_error():
    command = f"{COMMAND} compare llama2-7b --target 8192 --json | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[\n"
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["", "--help", "--version", "plan --help", "plan llama2-7b --factor 2"])
def test_output_that_cannot_be_written_is_an_error_of_one_line(arguments, unbuffered):
    done = subprocess.run(
        ["bash", "-c", f"{COMMAND} {arguments} >/dev/full"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    assert done.returncode == 2
    assert done.stderr == "rope-dist: error: No space left on device\n"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("--version >&-", 0),
        ("plan llama2-7b --factor 2 >&-", 0),
        ("plan llama2-7b --factor 2 >&- 2>&-", 0),
        ("plan llama2-7b --factor 0 2>&-", 2),
        ("plan llama2-7b --target 100 2>&-", 2),
        ("plan --help | true", 0),
    ],
)
def test_closed_streams_are_no_traceback(command, code):
    script = f"{COMMAND} {command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert done.stdout == done.stderr == ""


def test_an_interrupt_is_one_line_and_exit_code_130(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rope_dist.info.info", interrupted)
    assert run(capsys, "info") == (130, "", "rope-dist: interrupted\n")


def test_a_warning_is_one_line(tmp_path):
    MistralConfig(sliding_window=4096).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "rope_dist", "plan", str(tmp_path), "--target", "262144"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert re.fullmatch(r"rope-dist: warning: there is nothing to extend: .*\n", done.stderr), done.stderr


def test_names_that_the_terminal_cannot_print(tmp_path):
    model = tmp_path / "modèle"
    llama_config().save_pretrained(model)
    done = subprocess.run(
        [sys.executable, "-m", "rope_dist", "compare", str(model), "--target", "128", "--strategies", "pi"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert "mod\\xe8le: theta 10000" in done.stdout


def test_planning_a_preset_does_not_wait_for_transformers():
    code = "import sys, rope_dist; rope_dist.plan('llama2-7b', factor=2); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_info_says_what_is_built_and_used(out):
    printed = out("info")
    data = json.loads(out("info", "--json"))
    assert list(data) == [
        "versions", "machine", "native libraries", "backends", "autotune cache"
    ]  # fmt: skip
    assert set(data["native libraries"]) == {"CPU library", "CUDA library"}
    assert data["backends"]["cpu"].startswith(("native for float32", "reference for float32"))
    assert "not triton: " in data["backends"]["cpu"]
    assert all(value in printed for section in data.values() for value in section.values())


def test_info_lists_what_was_measured(out, tmp_path, monkeypatch):
    from rope_dist.ops import autotune

    monkeypatch.setenv("ROPE_DIST_CACHE", str(tmp_path))
    assert f"nothing yet: the first call on a GPU measures, and keeps the result in {tmp_path}" in out("info")
    problem = autotune.AutotuneKey("Some GPU", "bfloat16", 8192, 4096, (4096, 1024, 1024), 128, 128, "bias")
    autotune.cache().put(problem, {"separate": 2.0, "triton_tma": 1.5})
    assert "triton_tma (separate 2 ms, triton_tma 1.5 ms)" in out("info")


@pytest.mark.parametrize("preset", PRESETS)
def test_info_takes_presets(out, preset):
    data = json.loads(out("info", preset, "--json"))[preset]
    rope = PRESETS[preset]
    assert data["repository"] == defaults.PRESETS[preset][0]
    assert (
        f"theta {rope.theta:g}, head_dim {rope.rotary_dim}, {rope.length} tokens" in data["rotary embedding"]
    )
    layers = next(value for key, value in data.items() if key.startswith("bfloat16 on"))
    assert layers.startswith("model.layers.0.self_attn: ")
    assert "not enabled" not in layers


def test_info_takes_the_composite_models_that_enable_takes(out, tmp_path):
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlavaConfig(text_config=llama_config().to_dict(), vision_config=vision.to_dict()).save_pretrained(
        tmp_path
    )
    assert "model.language_model.layers.0.self_attn to model.language_model.layers.1.self_attn" in out(
        "info", tmp_path
    )


def test_a_model_without_a_tokenizer_is_refused_with_the_reason(capsys, llama, tmp_path):
    llama.save_pretrained(tmp_path)
    capsys.readouterr()
    code, _, error = run(capsys, "eval", "perplexity", "--model", tmp_path, "-o", tmp_path / "out")
    assert code == 2
    assert "has no tokenizer that can be loaded" in error
    assert not error.rstrip().endswith((":", "from one of"))
    assert error.count("\n") == 1
    assert len(error) < 1000


def test_a_long_message_of_another_library_is_cut_after_a_sentence():
    from rope_dist.messages import LONGEST, one_line

    listing = "Unrecognized configuration class LlavaConfig. " + "Model type should be one of\n" + "X, " * 900
    assert one_line(ValueError(listing)) == "Unrecognized configuration class LlavaConfig."
    dump = one_line(ValueError("0.5" * 900))
    assert dump.startswith("0.50.50.5")
    assert dump.endswith(" ...")
    assert len(dump) <= LONGEST
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert (
        one_line(FileNotFoundError(2, "No such file or directory", "x.json")) == "No such file or directory"
    )
