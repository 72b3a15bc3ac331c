"""The study of training after an extension, on a model and texts of seconds."""

import argparse
import itertools
import json
import math
import random
import re
import statistics
from dataclasses import replace

import pytest
import torch

import rope_dist
from benchmarks.quality import after_training, small_llama, training_text
from benchmarks.quality import after_training_summary as summary
from benchmarks.quality.after_training import Study
from benchmarks.quality.small_llama import Recipe
from benchmarks.quality.training_text import Remember
from rope_dist.evaluation import describe as describe_model
from rope_dist.evaluation import load_model, passkey, token_nll
from rope_dist.machine import describe

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 128
RECIPE = Recipe(
    hidden=64, layers=2, heads=1, mlp=96, vocabulary=512, length=LENGTH, batch=2, steps=6, warmup=2
)
STUDY = Study((2,), (0, 1), (0, 1, 3), (0, 3), batch=512, held_out=512, depths=(0.5,), trials=1)


def text(words, seed):
    """Random words of an alphabet that no other text has."""
    draw = random.Random(seed)
    letters = "abcdefgh" if seed % 2 else "stuvwxyz"
    return " ".join("".join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(words))


# The words of passkey prompts become tokens, so that a prompt fits into twice the trained length.
PROMPTS = " ".join([passkey.TASK, passkey.FILLER, passkey.NEEDLE.format(key=12345), passkey.QUESTION] * 40)
TRAINING, HELD_OUT = [text(6000, 1), PROMPTS], {"a": text(3000, 2), "b": text(3000, 4)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a finished first training."""
    folder = tmp_path_factory.mktemp("base")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert small_llama.train(folder, RECIPE, texts=TRAINING, held_out=HELD_OUT)
    finally:
        torch.set_num_threads(threads)
    return folder


def fingerprint_of(folder):
    """The fingerprint of the model in a folder."""
    model, _ = load_model(str(small_llama.trained(folder)))
    return describe_model(model, "")["fingerprint"]


class Clock:
    """Time in calls: a run is stopped after a few of them."""

    def __init__(self):
        self.calls = itertools.count()

    def monotonic(self):
        return next(self.calls)


class TestFirstTraining:
    def test_goes_on_to_the_same_weights(self, base, tmp_path, monkeypatch):
        clock, sessions = Clock(), 0
        monkeypatch.setattr(small_llama, "time", clock)
        done = False
        while not done:
            sessions += 1
            done = small_llama.train(tmp_path, RECIPE, seconds=1, texts=TRAINING, held_out=HELD_OUT)
        assert sessions > 2
        whole, stopped = (load_model(str(small_llama.trained(f)))[0].state_dict() for f in (base, tmp_path))
        assert all(torch.equal(whole[name], stopped[name]) for name in whole)
        losses = [json.loads((f / small_llama.LOSSES).read_text()) for f in (base, tmp_path)]
        assert losses[0] == losses[1]
        assert set(losses[0]["held_out"]) == set(HELD_OUT)

    def test_a_longer_training_shares_the_constant_part(self):
        short, long = Recipe(steps=1000), Recipe(steps=2000)
        assert [short.rate(step) for step in range(700)] == [long.rate(step) for step in range(700)]
        assert short.rate(0) == pytest.approx(short.learning_rate / 100)
        assert short.rate(850) == pytest.approx(short.learning_rate / 2)
        small_llama.same_beginning(short, long, 700)
        for wanted, step in ((long, 701), (Recipe(steps=1000, seed=1), 10)):
            with pytest.raises(ValueError, match="another training"):
                small_llama.same_beginning(short, wanted, step)

    def test_the_slowest_pair_turns_as_often_as_that_of_llama2(self):
        recipe = Recipe()
        dims = recipe.hidden // recipe.heads
        periods = recipe.length * recipe.theta ** (2 / dims - 1)
        assert periods == pytest.approx(4096 * 10000 ** (2 / 128 - 1), rel=0.06)

    def test_without_a_training_the_command_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"no trained model in .*benchmarks\.quality\.small_llama"):
            small_llama.trained(tmp_path)

    def test_a_device_that_is_not_there_is_refused(self):
        assert small_llama.device_option("cpu") == torch.device("cpu")
        with pytest.raises(argparse.ArgumentTypeError, match="there is no device cuda:99"):
            small_llama.device_option("cuda:99")

    def test_a_finished_training_is_not_taken_for_another(self, base):
        assert small_llama.train(base, RECIPE)
        with pytest.raises(ValueError, match="has another training"):
            small_llama.train(base, Recipe(steps=1500))

    def test_every_sample_comes_before_one_comes_again(self):
        starts = small_llama.samples(torch.zeros(1000), 100, 25, 0).tolist()
        assert sorted(starts[:10]) == list(range(0, 1000, 100)) == sorted(starts[10:20])
        assert starts[:10] != starts[10:20]

    def test_numbers_are_told_before_they_are_asked_for_at_every_distance(self, base):
        tokenizer, _ = small_llama.prepare(base, RECIPE)
        stream = training_text.tokenize(tokenizer, TRAINING[:1])  # no passkeys but those that are made
        remember, draw = Remember(tokenizer, 400, stream), random.Random(0)
        distances = []
        for _ in range(60):
            ids = remember.document(draw)
            assert len(ids) == 400
            made = tokenizer.decode(ids)
            for asked in re.finditer(r"What is the (?:pass )?key.*? key(?: of the \w+)? is (\d{5})\.", made):
                told = made.index(asked[1])
                assert told < asked.start()
                distances.append((asked.end() - told) / len(made))
        assert min(distances) < 0.3
        assert max(distances) > 0.7  # the rest of a passkey prompt is its task


class TestHeldOut:
    def test_is_never_trained_on(self, monkeypatch):
        """Every line of every corpus is another: none of the held-out ones is in the training text."""
        names = {training_text.WIKIPEDIA, *training_text.NOVELS, *training_text.HELD_OUT}
        assert names >= {"persuasion", "state-of-the-union", "moby-dick", "python", "emma"}
        corpora = {name: "".join(f"{name} line {i}\n" for i in range(1000)) for name in names}
        monkeypatch.setattr(training_text, "install_corpus", lambda name: None)
        monkeypatch.setattr(training_text, "load_text", lambda name: (name, corpora[name]))
        trained = training_text.training_texts()
        held_out = training_text.held_out_texts()
        assert set(held_out) > {"persuasion", "state-of-the-union", "moby-dick", "python"}
        lines = set("".join(trained).splitlines())
        # The line in which enwik8 is cut is in neither as a whole.
        assert not lines & {line for part in held_out.values() for line in part.splitlines() if line}
        (rest,) = (part for name, part in held_out.items() if name.startswith("enwik8"))
        assert trained[0] + rest == corpora["enwik8"]
        assert len(rest) == pytest.approx(0.05 * len(corpora["enwik8"]), abs=1)

    def test_no_run_of_tokens_is_in_the_training_tokens(self, base):
        tokenizer, stream = small_llama.prepare(base, RECIPE)
        trained = {tuple(run) for run in stream.unfold(0, 12, 1).tolist()}
        for content in HELD_OUT.values():
            ids = small_llama.held_out_samples(tokenizer, content, 2 * LENGTH, 2)
            assert ids.shape == (2, 2 * LENGTH)
            assert not {tuple(run) for row in ids for run in row.unfold(0, 12, 1).tolist()} & trained
        own = small_llama.held_out_samples(tokenizer, TRAINING[0], 2 * LENGTH, 1)
        assert tuple(own[0, 100:112].tolist()) in trained  # what the test looks for is found where it is


class TestStudy:
    @pytest.fixture(autouse=True)
    def _two_strategies(self, monkeypatch):
        named = {"dprope": "dprope:threshold=paper-2x,intervals=11", "yarn": "yarn"}
        monkeypatch.setattr(after_training, "strategies", lambda *_: named)
        monkeypatch.setattr(after_training, "bfloat16_pays", lambda device: False)

    @staticmethod
    def measured(folder):
        record = json.loads((folder / summary.RECORD).read_text())
        found = {json.dumps(m["what"], sort_keys=True): m["result"] for m in record["measurements"]}
        for result in found.values():
            del result["seconds"]
        return record, found

    def test_a_stopped_run_goes_on_to_the_same_result(self, base, tmp_path, monkeypatch):
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        whole.mkdir()
        stopped.mkdir()
        lines = list(after_training.measure(base, whole, STUDY, texts=HELD_OUT))
        assert len(lines) == 2 * (1 + 2 * 2)  # step 0 once, steps 1 and 3 by seed
        monkeypatch.setattr(after_training, "time", Clock())
        for sessions in range(1, 30):  # noqa: B007
            after_training.time.calls = itertools.count()
            list(after_training.measure(base, stopped, STUDY, deadline=2, texts=HELD_OUT))
            record, found = self.measured(stopped)
            if len(found) == len(lines):
                break
        assert sessions > 4
        assert found == self.measured(whole)[1]
        assert record["model"]["name"] == small_llama.MODEL
        # The seeds are other orders: they differ after the first step, and training changes what is read.
        (scale,) = summary.scales(record)
        assert scale.steps == (0, 1, 3)
        assert scale.trainings == [(fingerprint_of(base), seed) for seed in (0, 1)]
        first, second = scale.loss("dprope", 3)
        assert first != second
        assert scale.loss("dprope", 0)[0] > max(first, second)

    def test_chosen_strategies(self, base, tmp_path):
        study = replace(STUDY, seeds=(0,))
        lines = list(after_training.measure(base, tmp_path, study, texts=HELD_OUT, labels=["yarn"]))
        assert [line.split(", ")[2] for line in lines] == ["yarn"] * 3
        with pytest.raises(ValueError, match="no strategy is called nope; there are dprope, yarn"):
            list(after_training.measure(base, tmp_path, study, texts=HELD_OUT, labels=["yarn", "nope"]))

    def test_step_0_is_the_untrained_extended_model(self, base, tmp_path):
        list(after_training.measure(base, tmp_path, STUDY, texts=HELD_OUT))
        record, _ = self.measured(tmp_path)
        model, tokenizer = load_model(str(small_llama.trained(base)))
        untrained = [m for m in record["measurements"] if m["what"]["step"] == 0]
        assert {m["what"]["variant"] for m in untrained} == {"dprope", "yarn"}
        for m in untrained:
            settings = {"threshold": "paper-2x", "intervals": 11} if m["what"]["variant"] == "dprope" else {}
            with rope_dist.enable(model, strategy=m["what"]["variant"], target_length=2 * LENGTH, **settings):
                for title, content in HELD_OUT.items():
                    ids = small_llama.held_out_samples(tokenizer, content, 2 * LENGTH, 2)
                    for row, samples in zip(m["result"]["nll"][title], ids, strict=True):
                        nll = token_nll(model, samples)
                        wanted = [nll[: LENGTH - 1].mean().item(), nll[LENGTH - 1 :].mean().item()]
                        assert row == pytest.approx(wanted, abs=3e-4)

    def test_command(self, base, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(training_text, "held_out_texts", lambda: HELD_OUT)
        command = ["after_training", str(base), "--quick", "--output", str(tmp_path)]
        monkeypatch.setattr("sys.argv", command)
        after_training.main()
        first, *_, last = capsys.readouterr().out.splitlines()
        assert re.fullmatch(
            r"2x, seed 0, dprope, step 0: perplexity past 128 \d+\.\d+, passkeys [01] and [01] of 1, \d+ s",
            first,
        )
        assert last == "all there are"
        after_training.main()
        assert capsys.readouterr().out == "all there are\n"
        monkeypatch.setattr("sys.argv", [*command[:1], str(tmp_path), *command[2:]])
        with pytest.raises(SystemExit) as stopped:
            after_training.main()
        assert stopped.value.code == 2
        assert "there is no trained model in" in capsys.readouterr().err


def test_strategies_are_the_papers_at_its_lengths():
    for scale, dims, threshold in ((2, 80, "paper-2x"), (4, 64, "paper-4x")):
        labels = after_training.strategies(scale, 4096, 128)
        assert labels["dprope"] == f"dprope:threshold={threshold},intervals=360"
        assert labels["dprope:the paper's share of pairs"] == f"dprope:interpolated_dims={dims},intervals=360"
        assert {"pi", "ntk", "yarn", "auto", "auto-yarn"} <= set(labels)
    assert after_training.strategies(2, 256, 64)["dprope:threshold=0"] == "dprope:threshold=0,intervals=22"


class TestSummary:
    """A record with known numbers."""

    @pytest.fixture
    def folder(self, tmp_path):
        past = {
            # label: loss past the trained length at steps 0, 10 and 100
            "auto": (2.0, 1.9, 1.8),
            "dprope": (2.5, 1.95, 1.8 + math.log(1.02)),
            "dprope:threshold=0": (2.5, 2.0, 1.8 + math.log(1.03)),
            "pi": (3.0, 1.9 + math.log(1.005), 1.8 + math.log(1.005)),
        }
        measurements = []
        for (label, losses), seed in itertools.product(past.items(), (0, 1)):
            for step, loss in zip((0, 10, 100), losses, strict=True):
                what = {
                    "base": "b",
                    "scale": 2,
                    "tokens": 512,
                    "step": step,
                    "variant": label,
                    "seed": seed if step else None,
                    "frequencies": f"of {label}",
                }
                # Samples differ by 0.5; the differences between strategies are the same in each.
                nll = {"a": [[1.0, loss - 0.25], [1.0, loss + 0.25]]}
                result = {"nll": nll, "greedy": [0, 1], "decoys": [1, int(step > 0)]}
                if step or not seed:
                    what |= {"batch": 2048, "rate": 2e-4}
                    measurements.append({"what": what, "result": result})
        # A training that is not finished does not count.
        measurements.append({"what": measurements[-1]["what"] | {"variant": "ntk"}, "result": result})
        # Nor does one by an earlier plan of a label, of one more seed.
        earlier = [
            m["what"] | {"frequencies": "earlier", "seed": 2 if m["what"]["seed"] == 1 else None}
            for m in measurements
        ]
        measurements = [*({"what": what, "result": result} for what in earlier), *measurements]
        machine = describe()
        record = {
            "model": {"name": "m"},
            "machines": [machine],
            "measurements": measurements,
        }
        (tmp_path / summary.RECORD).write_text(json.dumps(record))
        return tmp_path

    @pytest.fixture
    def scale(self, folder):
        (scale,) = summary.scales(json.loads((folder / summary.RECORD).read_text()))
        return scale

    def test_numbers(self, scale):
        assert (scale.trained, scale.trainings) == (256, [("b", 0), ("b", 1)])
        assert set(scale.results) == {"auto", "dprope", "dprope:threshold=0", "pi"}
        assert statistics.fmean(scale.loss("pi", 0)) == pytest.approx(3.0)
        assert statistics.fmean(scale.loss("pi", 0, past=False)) == pytest.approx(1.0)
        mean, error = scale.difference("dprope", "auto", 100)
        assert (math.exp(mean), error) == (pytest.approx(1.02), pytest.approx(0, abs=1e-9))
        assert summary.meeting(scale, "pi", "auto") == 10
        assert summary.meeting(scale, "dprope", "auto") is None
        assert scale.passkeys("auto", 0, "decoys") == "2/4"
        assert scale.passkeys("auto", 100, "decoys") == "4/4"

    def test_the_error_has_samples_and_seeds(self, scale):
        for label, step, seed in itertools.product(("dprope",), (100,), (0, 1)):
            results = scale.results[label]["b", seed]
            rows = results[step]["nll"]["a"]
            # +-0.02 by sample, +-0.01 by seed
            changed = [[1.0, row[1] + 0.02 * (-1) ** i + 0.01 * (-1) ** seed] for i, row in enumerate(rows)]
            results[step] = {"nll": {"a": changed}}
        mean, error = scale.difference("dprope", "auto", 100)
        assert math.exp(mean) == pytest.approx(1.02)
        assert error == pytest.approx(
            math.hypot(0.02, 0.01)
        )  # s / sqrt(2) of two values is half their distance

    def test_strategies_are_compared_on_the_bases_that_both_have(self, folder):
        record = json.loads((folder / summary.RECORD).read_text())
        for m in list(record["measurements"]):
            if (
                m["what"]["frequencies"] == "earlier"
                or m["what"]["variant"] == "pi"
                or m["what"]["seed"] == 1
            ):
                continue
            # A base of twice the loss, on which dprope is 4 % behind at the end, not 2.
            ahead = math.log(1.02) if m["what"]["variant"] == "dprope" else 0
            rows = [[below, past + 2 + ahead] for below, past in m["result"]["nll"]["a"]]
            result = m["result"] | {"nll": {"a": rows}}
            record["measurements"].append({"what": m["what"] | {"base": "a"}, "result": result})
        (scale,) = summary.scales(record)
        assert scale.trainings == [("a", 0), ("b", 0), ("b", 1)]
        mean, error = scale.difference("dprope", "auto", 100)
        apart = [math.log(1.0404), math.log(1.02), math.log(1.02)]
        assert mean == pytest.approx(statistics.fmean(apart))
        assert error == pytest.approx(statistics.stdev(apart) / math.sqrt(3))
        mean, _ = scale.difference("dprope", "auto", 0)  # of two bases
        assert mean == pytest.approx((0.5 + 0.5 + math.log(1.02)) / 2)
        assert scale.difference("pi", "auto", 100)[0] == pytest.approx(math.log(1.005))
        del scale.results["pi"]["b", 0], scale.results["auto"]["b", 1]
        assert scale.difference("pi", "auto", 100) is None
        assert "`pi`" not in summary.table(scale) + summary.sentences(scale)
        assert [curve.label for curve in summary.curves(scale)] == ["auto", "dprope:threshold=0", "dprope"]

    def test_block(self, folder):
        content, machine = summary.block(folder)
        content = re.sub(" +", " ", content)
        assert "torch" in machine
        assert (
            "| `dprope` | 2 | +64.87 ± 0.00 % | +5.13 ± 0.00 % | +2.00 ± 0.00 % | +0.00 ± 0.00 % | 2/4, 4/4 |"
            in content
        )
        assert "| `auto` | 2 | 7.39 | 6.69 | 6.05 | 2.72 | 2/4, 4/4 |" in content
        assert "Extended 2x, to 512 tokens (2 trainings of 1 base), perplexity" in content
        assert "After 100 steps `auto` has the lowest perplexity past 256." in content
        assert "`dprope` is behind the best other, `auto` (+2.00 ± 0.00 %)" in content
        assert "`dprope:threshold=0` has +0.98 ± 0.00 % against `dprope`." in content
        assert "Within 1 % of it: `pi` from step 10 on; not within 100 steps: `dprope`" in content
        assert "](../benchmarks/plots/after_training.svg)" in content

    def test_without_a_record(self, tmp_path):
        content, machine = summary.block(tmp_path)
        assert "python -m benchmarks.quality.after_training" in content
        assert machine == ""

    def test_plot(self, folder, scale, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        drawn = tmp_path / "after_training.svg"
        summary.draw(drawn, [scale], "made from these")
        assert "made from these" in drawn.read_text(encoding="utf-8")
        (curve,) = (c for c in summary.curves(scale) if c.label == "auto")
        assert curve.perplexity == pytest.approx([math.exp(loss) for loss in (2.0, 1.9, 1.8)])
