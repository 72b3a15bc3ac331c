"""LongPPL: key tokens against one forward pass a token, what a record keeps, tables and the command."""

import json
import math
import re

import pytest
import torch
from conftest import llama_config
from transformers import LlamaForCausalLM

import rope_dist
from rope_dist.cli import main
from rope_dist.evaluation import (
    Evaluator,
    Passage,
    Record,
    Variant,
    describe,
    key_tokens,
    longppl,
    longppl_tables,
    make_evaluator,
    make_variants,
    measure_longppl,
    paired_difference,
    percent,
    token_nll,
)

STOCK = Variant("stock", None)


@pytest.fixture
def sharp():
    """A LLaMA of large weights: its losses differ by nats with the context."""
    torch.manual_seed(3)
    return LlamaForCausalLM(llama_config(initializer_range=0.5)).eval()


@pytest.fixture
def text():
    return torch.randint(3, 128, (1, 700), generator=torch.Generator().manual_seed(5))


def loss(model, ids, begin, position):
    """Of one token, by one forward pass of stock transformers over the tokens from ``begin`` on."""
    with torch.no_grad():
        logits = model(ids[:, begin:position]).logits[0, -1].double()
    return -logits.log_softmax(-1)[ids[0, position]].item()


def naive_keys(model, ids, window, short, alpha, beta):
    """Key tokens by the definition; contexts begin where the windows of the authors' code do."""
    tokens, long_stride, stride = ids.shape[1], window // 4, short // 4

    def begin(position, context, step):
        last = tokens - context - step  # the last window ends with the text
        steps = max(0, -(-(position + 1 - context - step) // step))
        return min(steps * step, max(last, 0))

    keys = []
    for position in range(1, tokens):
        long = loss(model, ids, begin(position, window - long_stride, long_stride), position)
        brief = loss(model, ids, begin(position, short, stride), position)
        if brief - long > alpha and long < -beta:
            keys.append(position)
    return keys


@pytest.mark.parametrize(("tokens", "window", "short"), [(70, 100, 16), (141, 100, 16), (120, 64, 8)])
def test_key_tokens_are_those_of_the_definition(sharp, text, tokens, window, short):
    ids = text[:, :tokens]
    # Thresholds of a random model, whose losses are high.
    expected = naive_keys(sharp, ids, window, short, 0.5, -6)
    assert 3 < len(expected) < tokens / 2
    found = key_tokens(sharp, ids, Evaluator(STOCK, window, short, 0.5, -6), chunk=50)
    assert found.tolist() == expected
    assert found.min() >= short


def test_a_text_within_the_short_context_has_none(sharp, text):
    assert key_tokens(sharp, text[:, :20], Evaluator(STOCK, 64, 16)).tolist() == []


def test_the_evaluators_defaults(sharp):
    found = make_evaluator(sharp)
    assert (found.variant, found.window, found.short) == (STOCK, 64, 8)
    assert (found.alpha, found.beta) == (2, -2)  # the paper's
    (plan,) = make_variants(sharp, ["pi"], 256)
    assert (make_evaluator(sharp, plan).window, make_evaluator(sharp, plan).short) == (256, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short": 0}, "short context must have at least 1 token"),
        ({"window": 20}, "fewer than the window of 20, got 16"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"beta": 1}, "beta at most 0"),
        ({"alpha": math.nan}, "alpha must be above 0"),
    ],
)
def test_refuses_bad_evaluators(options, message):
    with pytest.raises(ValueError, match=message):
        Evaluator(**{"variant": STOCK, "window": 64, "short": 16, **options})


class TestRuns:
    def measure(self, model, text, path, names=("stock", "pi"), **options):
        record = Record(path, "longppl", describe(model, "tiny"))
        variants = make_variants(model, names, 256)
        evaluator = make_evaluator(model, **{"short": 32, "alpha": 0.5, "beta": -6.0, **options})
        texts = [Passage("a", 0, text[:, :350]), Passage("b", 0, text[:, 350:])]
        return measure_longppl(model, texts, variants, record, evaluator=evaluator)

    def test_losses_of_key_tokens_are_those_of_a_reading(self, sharp, text, tmp_path):
        found = [m for _, m, _ in self.measure(sharp, text, tmp_path / "l.json")]
        assert [m["what"]["measure"] for m in found] == ["key tokens"] * 2 + ["longppl"] * 4
        positions = found[0]["result"]["positions"]
        assert (
            positions
            == key_tokens(sharp, text[:, :350], make_evaluator(sharp, short=32, alpha=0.5, beta=-6)).tolist()
        )
        with rope_dist.enable(sharp, target_length=256, strategy="pi"):
            nll = token_nll(sharp, text[:, :350])
        (pi,) = (
            m
            for m in found
            if (m["what"]["variant"], m["what"]["text"]) == ("pi", "a") and "keys" in m["what"]
        )
        expected = [nll[position - 1].item() for position in positions]
        assert pi["result"]["key_nll"] == pytest.approx(expected, abs=1e-4)
        assert pi["result"]["nll"] == pytest.approx(nll.double().mean().item(), abs=1e-6)

    def test_tables(self, sharp, text, tmp_path):
        found = [m for _, m, _ in self.measure(sharp, text, tmp_path / "l.json")]
        keys = {m["what"]["text"]: m["result"]["positions"] for m in found[:2]}
        losses = {}
        for m in found[2:]:
            rows = zip(keys[m["what"]["text"]], m["result"]["key_nll"], strict=True)
            losses.setdefault(m["what"]["variant"], []).extend((m["what"]["text"], p, x) for p, x in rows)
        table = longppl_tables(found, 64, 256)
        for label, rows in losses.items():
            means = [sum(x) / len(x) for x in ([x for *_, x in rows], [x for _, p, x in rows if p < 256])]
            assert re.search(rf"{label} +{math.exp(means[0]):.2f} +{math.exp(means[1]):.2f} ", table)
        assert re.search(rf"key tokens +{sum(map(len, keys.values()))} ", table)
        # Past 64 there is one whole part a text: 256-350. Its difference is over the key tokens.
        pairs = {name: {} for name in losses}
        for label, rows in losses.items():
            for name, p, x in rows:
                if p >= 256:
                    pairs[label].setdefault(name, []).append(x)
        means = {label: [sum(x) / len(x) for x in of.values()] for label, of in pairs.items()}
        weights = [len(x) for x in pairs["pi"].values()]
        assert percent(*paired_difference(means["pi"], means["stock"], weights)) in table
        assert "64-350* against stock" in table
        assert "stock found the key tokens" in table
        with pytest.raises(ValueError, match="'yarn' is not one of stock, pi"):
            longppl_tables(found, 64, 256, "yarn")

    def test_a_stopped_run_goes_on_and_reads_nothing_twice(self, sharp, text, tmp_path, monkeypatch):
        unbroken = [m for _, m, _ in self.measure(sharp, text, tmp_path / "whole.json")]
        run = self.measure(sharp, text, tmp_path / "l.json")
        for _ in range(3):
            next(run)
        run.close()
        read = []
        original = longppl.token_nll
        monkeypatch.setattr(longppl, "key_tokens", lambda *a, **k: pytest.fail("key tokens found again"))
        monkeypatch.setattr(longppl, "token_nll", lambda *a, **k: read.append(1) or original(*a, **k))
        resumed = list(self.measure(sharp, text, tmp_path / "l.json"))
        assert [finished for *_, finished in resumed] == [True] * 3 + [False] * 3
        assert len(read) == 3
        for (_, m, _), whole in zip(resumed, unbroken, strict=True):
            assert m["what"] == whole["what"]
            assert m["result"] | {"seconds": 0} == whole["result"] | {"seconds": 0}

    def test_other_key_tokens_are_other_measurements(self, sharp, text, tmp_path):
        first = list(self.measure(sharp, text, tmp_path / "l.json"))
        changed = list(self.measure(sharp, text, tmp_path / "l.json", beta=-5.0))
        same = []
        for (_, old, _), (_, new, finished) in zip(first, changed, strict=True):
            if new["what"]["measure"] == "key tokens":
                assert not finished
                same.append(new["result"]["positions"] == old["result"]["positions"])
            else:  # text by text, two variants each
                assert finished == same[new["what"]["text"] == "b"]
        assert not all(same)

    def test_texts_without_key_tokens_are_refused_before_they_are_read(
        self, sharp, text, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(longppl, "_losses", lambda *a: pytest.fail("a text was read"))
        with pytest.raises(
            ValueError, match=r"no token of these texts gains more than 90 nats .* a lower alpha"
        ):
            list(self.measure(sharp, text, tmp_path / "l.json", alpha=90.0))


class TestCommand:
    @pytest.fixture
    def command(self, model_directory, tmp_path, capsys):
        torch.manual_seed(3)
        LlamaForCausalLM(llama_config(initializer_range=0.5)).save_pretrained(model_directory)
        capsys.readouterr()  # bars of transformers

        def run(*arguments):
            common = ["--model", model_directory, "-o", tmp_path / "out", "--strategies", "stock", "pi"]
            code = main([str(a) for a in ("eval", "longppl", *common, "--lengths", "200", *arguments)])
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        return run

    def test_table_and_record(self, command, tmp_path):
        options = ("--alpha", "0.3", "--beta", "-20", "--short", "4", "--against", "pi")
        code, out, error = command(*options)
        assert (code, error.count("\n")) == (0, 1)  # the estimated time
        assert "64-200* against pi" in out
        record = json.loads((tmp_path / "out" / "longppl.json").read_text())
        assert len(record["measurements"]) == 3
        code, out, _ = command(*options)
        assert out.count("(on record)") == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--short", "60"), "fewer than the window of 64, got 60"),
            (("--alpha", "80"), "no token of these texts gains more than 80 nats"),
            (("--against", "yarn"), "'yarn' is not one of stock, pi"),
            (("--evaluator", "nowhere.json"), "nowhere.json"),
            (("--bucket", "100"), "multiple of 256"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, command, arguments, message):
        code, _, error = command(*arguments)
        assert code == 2
        assert message in error
        assert [line for line in error.splitlines() if "takes about" not in line] == [error.splitlines()[-1]]
