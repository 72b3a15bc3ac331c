"""Which strategy is best after training: a small LLaMA is extended 2x and 4x, and trained on as the paper does.

    python -m benchmarks.quality.small_llama FOLDER [--seed 1]  # its first training: the base
    python -m benchmarks.quality.after_training FOLDER [--strategies auto yarn] [--seconds 3600] [--device cuda]
        [--quick]

Every strategy trains on from the same weights, on the same texts in the same order: AdamW with a constant learning
rate, no warm-up, no weight decay, packed texts of the new length (Wu et al. 2024, section 4.1). Before, during and
after it reads held-out text and looks for passkeys of the new length. It resumes where it was stopped, within a
training too. Result: ``quality_after_training.json``, which takes trainings of several bases, a folder each;
``python -m benchmarks.report`` makes the tables and the plot of it.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from benchmarks.benchmark import Parser, positive
from benchmarks.quality import small_llama, training_text
from benchmarks.quality.after_training_summary import RECORD
from benchmarks.quality.small_llama import (
    TOKENS,
    Recipe,
    bfloat16_pays,
    device_option,
    loss_of,
    samples,
    token_losses,
    trained,
)
from rope_dist.defaults import INTERVALS, STRATEGY_NAMES
from rope_dist.evaluation import Record, Variant, describe, load_model, make_cases, make_variants
from rope_dist.evaluation.passkey import Case, answered_key, passkey_prompt
from rope_dist.evaluation.prefix_cache import PrefixCachingModel
from rope_dist.files import new_file
from rope_dist.optional import MissingPackageError

KIND = "after training"
STATE = "after_training.pt"
PAPER_TRAINED = 4096
"""Tokens that the paper's model was trained to, for which it gives its numbers of intervals and dimensions."""
PAPER_SHARE = {2: 80 / 128, 4: 64 / 128}
"""Interpolated dimensions of the paper's plans, by scale."""
PAPER_SHARE_LABEL = "the paper's share of pairs"
OTHERS = ("auto", "yarn", "auto-yarn", "mrrope-pro", "ntk", "pi", "extrapolation")
"""What a study that is stopped should have comes first."""


@dataclass(frozen=True)
class Study:
    """What is measured.

    Attributes:
        scales: times the trained length.
        seeds: of the order of the training text.
        evaluate_at: steps; the last ends a training.
        passkeys_at: those of them at which it looks for passkeys too, which takes as long as reading.
        batch: tokens a step.
        rate: learning rate. The paper's, 2e-5, is a fifteenth of the highest of LLaMA2's first training.
        held_out: tokens read of each held-out text.
        depths, trials: of the passkeys, whose prompts have the extended length.
    """

    scales: tuple[int, ...] = (2, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluate_at: tuple[int, ...] = (0, 10, 30, 100, 300)
    passkeys_at: tuple[int, ...] = (0, 30, 300)
    batch: int = 2048
    rate: float = Recipe.learning_rate / 15
    held_out: int = 8192
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 4
    others: tuple[str, ...] = OTHERS


QUICK = Study((2,), (0,), (0, 1, 2), (0, 2), batch=512, held_out=512, depths=(0.5,), trials=1, others=("pi",))


def strategies(scale: int, length: int, head_dim: int, others: Sequence[str] = OTHERS) -> dict[str, str]:
    """Label -> strategy with its settings.

    The paper's 360 intervals are for 4096 positions. A histogram of so many intervals has next to nothing in each at
    a few hundred positions: their number falls with the trained length, the threshold is then in the same units.
    """
    intervals = f"intervals={max(round(INTERVALS * length / PAPER_TRAINED), 2)}"
    dimensions = 2 * round(PAPER_SHARE[scale] * head_dim / 2)
    return {
        "dprope": f"dprope:threshold=paper-{scale}x,{intervals}",
        "dprope:threshold=0": f"dprope:threshold=0,{intervals}",
        f"dprope:{PAPER_SHARE_LABEL}": f"dprope:interpolated_dims={dimensions},{intervals}",
        **{name: name for name in others if name in STRATEGY_NAMES},
    }


@dataclass(frozen=True)
class Run:
    """One training: of a base, with its fingerprint, by a strategy, a scale and a seed."""

    study: Study
    base: str
    scale: int
    length: int
    seed: int
    variant: Variant
    settings: str

    def what(self, step: int) -> dict[str, Any]:
        """The key of the measurement after ``step`` steps; before the first it is the same for every seed."""
        study = self.study
        what: dict[str, Any] = {"base": self.base, "scale": self.scale, "tokens": self.length, "step": step}
        what |= {"seed": self.seed, "batch": study.batch, "rate": study.rate} if step else {"seed": None}
        what |= {"held_out": study.held_out, "depths": list(study.depths), "trials": study.trials}
        return what | {"settings": self.settings, **self.variant.identity}


def runs(study: Study, model: LlamaForCausalLM, base: str, labels: Sequence[str] | None = None) -> list[Run]:
    """Trainings of a model with the fingerprint ``base``, by the strategies with these labels (None: all).

    Those of the first seed come first.

    Raises:
        ValueError: a label that no strategy has.
    """
    trained_length, head_dim = model.config.max_position_embeddings, model.config.head_dim
    made = []
    for seed in study.seeds:
        for scale in study.scales:
            length = scale * trained_length
            known = strategies(scale, trained_length, head_dim, study.others)
            if unknown := [label for label in labels or () if label not in known]:
                raise ValueError(f"no strategy is called {', '.join(unknown)}; there are {', '.join(known)}")
            for label, settings in known.items():
                if labels is not None and label not in labels:
                    continue
                (variant,) = make_variants(model, [settings], length)
                made.append(Run(study, base, scale, length, seed, Variant(label, variant.plan), settings))
    return made


@dataclass(frozen=True)
class Reader:
    """What a model is evaluated on: held-out samples ``[N, S]`` by title, and passkeys."""

    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, torch.Tensor]
    cases: tuple[Case, ...]
    trained_length: int

    def evaluate(self, model: LlamaForCausalLM, passkeys: bool) -> dict[str, Any]:
        """``nll``: by text, a list a sample, the mean of every ``trained_length`` positions; and ``passkeys``."""
        nll = {}
        for title, ids in self.texts.items():
            losses = token_losses(model, ids, bfloat16_pays(model.device), batch=4)
            # The first position has no prediction.
            parts = losses.split(
                [self.trained_length - 1, *[self.trained_length] * (ids.shape[1] // self.trained_length - 1)],
                1,
            )
            nll[title] = [
                [round(v, 4) for v in row] for row in torch.stack([p.mean(1) for p in parts], 1).tolist()
            ]
        greedy, decoys = self._passkeys(model) if passkeys else ([], [])
        return {"nll": nll, "greedy": greedy, "decoys": decoys}

    def _passkeys(self, model: LlamaForCausalLM) -> tuple[list[int], list[int]]:
        model.eval()
        cached = PrefixCachingModel(model, self.tokenizer, chunk=4096)
        greedy, decoys = [], []
        for case in self.cases:
            prompt = passkey_prompt(self.tokenizer, case)
            key, *others = cached.log_probabilities(prompt, [case.key, *case.decoys])
            decoys.append(int(key > max(others)))
            greedy.append(int(answered_key(cached.generate(prompt, len(case.key) + 3)) == case.key))
        model.train()
        return greedy, decoys


def reader(study: Study, tokenizer: Any, texts: dict[str, str], scale: int, trained_length: int) -> Reader:
    """Of a scale: every strategy and seed reads the same tokens."""
    length = scale * trained_length
    count = max(study.held_out // length, 1)
    ids = {
        title: small_llama.held_out_samples(tokenizer, text, length, count) for title, text in texts.items()
    }
    cases = make_cases([length], study.depths, trials=study.trials)
    cases.sort(key=lambda case: (-case.depth, case.trial))  # prompts then share the filler before their keys
    return Reader(tokenizer, ids, tuple(cases), trained_length)


def train_on(
    run: Run,
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    read: Reader,
    record: Record,
    state_file: Path,
    deadline: float,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Train ``model``, which has the weights of the first training, and evaluate it on the way.

    Yields:
        Step and result, which is in the record. Ends early at the deadline, with the state in ``state_file``.
    """
    study = run.study
    optimizer = torch.optim.AdamW(model.parameters(), lr=study.rate, weight_decay=0.0, fused=True)
    step, losses, identity = 0, [], run.what(-1)
    bfloat16 = bfloat16_pays(model.device)
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        if state["run"] == identity:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, losses = state["step"], state["losses"]
    rows, last = study.batch // run.length, study.evaluate_at[-1]
    starts = samples(stream, run.length, last * rows, 1000 + run.seed).view(last, rows)

    def save() -> None:
        state = {"run": identity, "step": step, "losses": losses}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with new_file(state_file, force=True) as temporary:
            torch.save(state, temporary)

    model.train()
    with run.variant.applied(model):
        while True:
            if step in study.evaluate_at and record.get(run.what(step)) is None:
                began = time.monotonic()
                result = read.evaluate(model, step in study.passkeys_at)
                result |= {
                    "training": [round(v, 3) for v in losses],
                    "seconds": round(time.monotonic() - began, 1),
                }
                record.put(run.what(step), result, run.variant)
                if step:
                    save()
                yield step, result
            if step == last:
                return
            if time.monotonic() > deadline:
                save()
                return
            ids = torch.stack([stream[s : s + run.length] for s in starts[step].tolist()]).long()
            loss = loss_of(model, ids.to(model.device), bfloat16)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses = [*losses, loss.item()][-10:]
            step += 1


def measure(
    base: Path,
    output: Path,
    study: Study,
    *,
    deadline: float = math.inf,
    texts: dict[str, str] | None = None,
    device: torch.device | str = "cpu",
    labels: Sequence[str] | None = None,
) -> Iterator[str]:
    """Run what is not on record; yields a line a measurement.

    Args:
        base: folder of :mod:`benchmarks.quality.small_llama`, with a finished training.
        output: folder of the record.
        study: what is measured.
        deadline: of ``time.monotonic()``; a training stops within a step of it.
        texts: held-out texts by title; None: those of :mod:`benchmarks.quality.training_text`.
        device: of the model.
        labels: of the strategies; None: all.
    """
    directory = trained(base)
    model, tokenizer = load_model(str(directory), device, "float32")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.load(base / TOKENS, weights_only=True)
    identity = describe(model, str(directory))
    # One file has the trainings of every base, and of every device.
    record = Record(output / RECORD, KIND, {key: identity[key] for key in ("name", "dtype")})
    texts = texts or training_text.held_out_texts()
    readers: dict[int, Reader] = {}
    for run in runs(study, model, identity["fingerprint"], labels):
        if all(record.get(run.what(step)) for step in study.evaluate_at):
            continue
        if time.monotonic() > deadline:
            return
        if run.scale not in readers:
            readers[run.scale] = reader(
                study, tokenizer, texts, run.scale, model.config.max_position_embeddings
            )
        model.load_state_dict(weights)
        began = time.monotonic()
        for step, result in train_on(run, model, stream, readers[run.scale], record, base / STATE, deadline):
            name = f"{run.scale}x, seed {run.seed}, {run.variant.label}, step {step}"
            past = [v for rows in result["nll"].values() for row in rows for v in row[1:]]
            line = f"{name}: perplexity past {run.length // run.scale} {math.exp(sum(past) / len(past)):.3f}"
            if prompts := len(result["greedy"]):
                line += f", passkeys {sum(result['greedy'])} and {sum(result['decoys'])} of {prompts}"
            yield f"{line}, {time.monotonic() - began:.0f} s"


def main() -> None:
    """Run what is not yet on record."""
    parser = Parser("python -m benchmarks.quality.after_training", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="of the first training (benchmarks.quality.small_llama)")
    add(
        "--seconds",
        type=positive(float),
        default=math.inf,
        help="stop after this time; the same command goes on",
    )
    add("--strategies", nargs="+", metavar="NAME", help="only these (default: all)")
    add("--device", type=device_option, default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--scales", type=int, nargs="+", choices=(2, 4), default=Study.scales, help="(default: 2 4)")
    add("--quick", action="store_true", help="two steps of one strategy and dprope: does the study run?")
    add("--output", type=Path, help="folder (default: benchmarks/results; with --quick rope-dist-eval)")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    study = QUICK if arguments.quick else Study(scales=tuple(arguments.scales))
    output = arguments.output or Path("rope-dist-eval" if arguments.quick else "benchmarks/results")
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.seconds
    try:
        options = {"deadline": deadline, "device": arguments.device, "labels": arguments.strategies}
        for line in measure(arguments.folder, output, study, **options):
            print(line, flush=True)
    except (ValueError, MissingPackageError) as error:
        parser.error(str(error))
    print("the same command goes on" if time.monotonic() > deadline else "all there are")


if __name__ == "__main__":
    main()
