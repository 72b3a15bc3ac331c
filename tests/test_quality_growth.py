"""The study of growing texts: it resumes, its records name no path of a machine, and its tables pair what was read."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import llama_config
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rope_dist
from benchmarks.quality import growth, growth_passkeys, growth_summary, readings
from benchmarks.quality.answers import answers_table, passkey_answers
from rope_dist.evaluation import Variant, token_nll


def test_the_study_resumes_and_names_no_path(
    model_directory, tmp_path, monkeypatch, capsys, bfloat16_attention
):
    monkeypatch.setattr(growth, "MODEL", str(model_directory))
    monkeypatch.setattr(growth, "TRAINED", 64)

    def readings(model):
        plan = growth.dynamic(model, 128)
        variants = (Variant("grown", plan), growth.Stale("stale", plan), Variant("static", plan.at(128)))
        return [growth.Reading("grown", 100, ("python",), variants)]

    monkeypatch.setattr(growth, "readings", readings)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["growth", "--output", str(tmp_path / "results"), *arguments])
        growth.main()
        return capsys.readouterr().out

    assert "the same command goes on" in main("--seconds", "1e-9")
    assert main().count(": on record") == 1
    assert main().count(": on record") == 3
    text = (tmp_path / "results" / "quality_growth.json").read_text(encoding="utf-8")
    plans = json.loads(text)["plans"].values()
    sources = {stage["source"] for plan in plans for stage in plan.get("stages", [plan])}
    assert sources == {json.loads(text)["model"]["name"]}
    assert not any(source.startswith("/") for source in sources)


def test_keys_that_are_not_corrected_are_another_reading():
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(initializer_range=0.2)).eval()  # trained to 64 tokens
    plan = rope_dist.dynamic_plan(model, factor=2, strategy="pi")
    ids = torch.randint(3, 128, (1, 120), generator=torch.Generator().manual_seed(1))
    nll = {}
    for variant in (Variant("grown", plan), growth.Stale("stale", plan)):
        with variant.applied(model):
            nll[variant.label] = token_nll(model, ids, chunk=8, first=64)
    own = token_nll(model, ids[:, :64])
    for losses in nll.values():
        torch.testing.assert_close(losses[:63], own, rtol=0, atol=1e-5)
    assert (nll["grown"][64:] - nll["stale"][64:]).abs().mean() > 1e-2
    assert growth.Stale("stale", plan).fingerprint != Variant("grown", plan).fingerprint


def test_differences_are_paired():
    texts, others = [[[1.0, 1.1, 1.4, 1.2]]], [[[0.9, 1.0, 1.1, 1.3]]]
    pairs = [1.4 - 1.1, 1.2 - 1.3]
    mean, error = statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(2)
    expected = f"{100 * (math.exp(mean) - 1):+.2f} ± {100 * math.exp(mean) * error:.2f} %"
    assert growth_summary.difference(texts, others, 512, 1024) == expected
    assert readings.perplexity(readings.span(texts, 0, 512)) == pytest.approx(math.exp(1.05))


def test_a_static_plan_by_other_constants_is_not_compared(tmp_path):
    """The study's ``auto`` may have been measured anew since the dynamic plan, whose last stage it was."""

    def plan(factor, target):
        return {"factors": [1.0, factor], "attention_scaling": 1.0, "target_length": target}

    def reading(label, frequencies, text="a"):
        what = {"variant": label, "frequencies": frequencies, "tokens": 16384, "text": text}
        return {"what": what, "result": {"nll_by_position": [1.0] * 64}}

    dynamic = {"stages": [plan(1.0, 8192), plan(2.0, 16384)]}
    growing = [reading(growth.GROWN, "outdated", "b"), reading(growth.GROWN, "dynamic")]
    grown = {
        "plans": {"dynamic": dynamic, "outdated": {"stages": [plan(5.0, 16384)]}},
        "measurements": growing,
    }
    static = {
        "plans": {"stage": plan(2.0, 16384), "new": plan(3.0, 16384)},
        "measurements": [reading("auto", "stage"), reading("auto", "new"), reading("auto", "new", "b")],
    }
    for kind, record in (("growth", grown), ("perplexity", static)):
        (tmp_path / f"quality_{kind}.json").write_text(json.dumps(record))
    found = growth_summary.readings(tmp_path, 16384)
    assert {label: list(texts) for label, texts in found.items()} == {
        "auto for 16384": ["a"],
        growth.GROWN: ["a"],
    }


def test_stages_are_those_of_the_plan():
    plan = rope_dist.dynamic_plan("smollm2-135m", factor=4)
    for tokens in (8192, 8193, 12288, 16384, 24576, 32768):
        assert growth_summary.stage_of(tokens) == plan.at(tokens).target_length


def test_passkeys_are_counted_where_every_prompt_was_answered(tmp_path):
    prompts = [(depth, trial) for depth in growth_passkeys.DEPTHS for trial in range(growth_passkeys.TRIALS)]
    assert len(prompts) >= 20

    def answers(variant, length, scoring, correct, of=None, frequencies="f"):
        return [
            {
                "what": {"length": length, "variant": variant, "scoring": scoring, "depth": d, "trial": t}
                | {"seed": 0, "frequencies": frequencies},
                "result": {"correct": i < correct},
            }
            for i, (d, t) in enumerate(prompts[:of])
        ]

    measurements = [
        *answers(growth.GROWN, 8192, "generate", 17, frequencies="of an earlier plan"),
        *answers(growth.GROWN, 12288, "generate", 17),
        *answers(growth.GROWN, 12288, "decoys", 19),
        *answers("auto for 32768", 12288, "generate", 3),
        *answers("auto for 32768", 12288, "decoys", 4, of=7),
    ]
    (tmp_path / "quality_growth_passkey.json").write_text(json.dumps({"measurements": measurements}))
    found = passkey_answers(tmp_path, "growth_passkey")
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in answers_table(found, growth_summary.NAMES, "passkeys found").splitlines()
    ]
    assert rows[0] == ["passkeys found", "12288 tokens"]
    assert ["dynamic", f"17/{len(prompts)}, 19/{len(prompts)}"] in rows
    assert ["static, for 32768", ""] not in rows  # a row without a cell is left out
    assert len(rows) == 3  # with the line below the head


def test_the_passkeys_resume(model_directory, tmp_path, monkeypatch, capsys, bfloat16_attention):
    monkeypatch.setattr(growth_passkeys, "MODEL", str(model_directory))
    monkeypatch.setattr(growth_passkeys, "DEPTHS", (0.5,))
    monkeypatch.setattr(growth_passkeys, "TRIALS", 1)
    plan = rope_dist.dynamic_plan(str(model_directory), target_length=1024, strategy="pi")
    asked = [(700, (Variant("stock", None), Variant("grown", plan)))]
    monkeypatch.setattr(growth_passkeys, "parts", lambda model: asked)
    monkeypatch.setattr(sys, "argv", ["growth_passkeys", "--output", str(tmp_path)])
    for again in (False, True):
        growth_passkeys.main()
        out = capsys.readouterr().out.splitlines()
        assert out[-1] == "all there are"
        assert [line.endswith("on record") for line in out[:-1]] == [again] * 4  # by two scorings
    measured = json.loads((tmp_path / "quality_growth_passkey.json").read_text())["measurements"]
    assert {m["what"]["length"] for m in measured} == {700}
