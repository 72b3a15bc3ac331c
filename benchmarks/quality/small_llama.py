"""A small LLaMA trained from nothing on real text, for studies that need a model's first training.

    nice python -m benchmarks.quality.small_llama FOLDER [--seconds 3600] [--device cuda] [--quick]

Goes on where it was stopped, to the bit. FOLDER becomes a Hugging Face directory with a tokenizer, and
``losses.json`` beside it has the losses of training and, by position, of held-out text.

The number of periods that the slowest pair makes over the trained length is that of LLaMA2 (theta 10000 at 4096
tokens): theta = 10000 * 256 / 4096. With LLaMA2's own theta more than half of the pairs of so short a model would never
make one period.
"""

import argparse
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from benchmarks.benchmark import Parser, positive
from benchmarks.quality import training_text
from benchmarks.quality.training_text import REMEMBER_SHARE, Remember
from rope_dist.evaluation import describe
from rope_dist.evaluation.models import check_device
from rope_dist.files import new_directory, new_file, write_text
from rope_dist.optional import MissingPackageError

CHECKPOINT_SECONDS = 120
STATE, TOKENS, LOSSES, MODEL = "state.pt", "tokens.pt", "losses.json", "small-llama"
HELD_OUT_SAMPLES = 256
"""Of each text, for the loss by position."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on, beside the training text.

    The learning rate rises over ``warmup`` steps, is constant, and falls linearly to zero over the last ``decay`` of
    the steps: a longer training shares all steps before that with a shorter one.
    """

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    mlp: int = 704
    vocabulary: int = training_text.VOCABULARY
    length: int = 256
    batch: int = 16
    steps: int = 4000
    learning_rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.3
    weight_decay: float = 0.1
    seed: int = 0

    @property
    def theta(self) -> float:
        """Of the rotary embedding."""
        return 10000 * self.length / 4096

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.learning_rate * min((step + 1) / self.warmup, left, 1.0)


QUICK = Recipe(hidden=64, layers=2, heads=1, mlp=96, vocabulary=512, batch=2, steps=6, warmup=2)
QUICK_CHARACTERS = 200_000
"""Of each training text."""


def build(recipe: Recipe, end: int) -> LlamaForCausalLM:
    """The model with the weights of the seed; ``end`` is the end-of-text token."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.mlp,
        vocab_size=recipe.vocabulary,
        max_position_embeddings=recipe.length,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.theta},
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    return LlamaForCausalLM(config)


def optimizer_of(model: LlamaForCausalLM, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def bfloat16_pays(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32 there: a CPU with AMX, or a GPU."""
    return device.type != "cpu" or bool(torch.cpu._is_amx_tile_supported())


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, bfloat16: bool) -> torch.Tensor:
    """Mean loss of the predictions of ``ids [B, S]``."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.inference_mode()
def token_losses(model: LlamaForCausalLM, ids: torch.Tensor, bfloat16: bool, batch: int = 16) -> torch.Tensor:
    """Loss of every predicted token: ``ids [N, S]`` -> ``[N, S - 1]`` float32, on the CPU."""
    model.eval()
    result = []
    for part in ids.to(model.device).split(batch):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        result.append(F.cross_entropy(logits.float().transpose(1, 2), part[:, 1:], reduction="none"))
    model.train()
    return torch.cat(result).cpu()


def samples(stream: torch.Tensor, length: int, count: int, seed: int) -> torch.Tensor:
    """Where ``count`` samples of ``length`` tokens begin in the stream: every piece once, in the seed's order."""
    pieces = len(stream) // length
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(pieces, generator=generator) for _ in range(-(-count // pieces))]
    return torch.cat(rounds)[:count] * length


def held_out_samples(tokenizer: PreTrainedTokenizerFast, text: str, length: int, count: int) -> torch.Tensor:
    """``count`` samples ``[count, length]`` at equal distances over the whole text."""
    share = len(text) // count
    pieces = [text[i * share : i * share + 8 * length] for i in range(count)]
    ids = [tokenizer(piece, verbose=False).input_ids[:length] for piece in pieces]
    if min(map(len, ids)) < length:
        raise ValueError(f"the text is too short for {count} samples of {length} tokens")
    return torch.tensor(ids)


def prepare(folder: Path, recipe: Recipe, texts: list[str] | None = None) -> tuple[Any, torch.Tensor]:
    """The tokenizer and the training text as tokens, made once and kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / TOKENS).exists():
        texts = texts or training_text.training_texts()
        tokenizer = training_text.train_tokenizer(texts, recipe.vocabulary)
        tokenizer.model_max_length = recipe.length
        with new_directory(folder / "tokenizer", force=True) as temporary:
            tokenizer.save_pretrained(temporary)
        stream = training_text.tokenize(tokenizer, texts)
        with new_file(folder / TOKENS) as temporary:
            torch.save(stream, temporary)
    return (
        PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        torch.load(folder / TOKENS, weights_only=True),
    )


def train(
    folder: Path,
    recipe: Recipe,
    *,
    seconds: float = math.inf,
    texts: list[str] | None = None,
    held_out: dict[str, str] | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    compiled: bool = False,
    device: torch.device | str = "cpu",
) -> bool:
    """Train until the last step or for ``seconds``; returns whether the model is finished, in ``folder / MODEL``."""
    if (folder / MODEL).exists():
        found = Recipe(**json.loads((folder / LOSSES).read_text(encoding="utf-8"))["recipe"])
        if found != recipe:
            raise ValueError(f"the folder has another training ({found}): give another folder")
        return True
    began = saved = time.monotonic()
    tokenizer, stream = prepare(folder, recipe, texts)
    remember = Remember(tokenizer, recipe.length, stream)
    model = build(recipe, tokenizer.eos_token_id).to(device).train()
    optimizer = optimizer_of(model, recipe.learning_rate, recipe.weight_decay)
    step, losses, used = 0, [], 0.0
    if (folder / STATE).exists():
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        same_beginning(Recipe(**state["recipe"]), recipe, state["step"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, losses, used = state["step"], state["losses"], state["seconds"]
    starts = samples(stream, recipe.length, recipe.steps * recipe.batch, recipe.seed)
    bfloat16, first = bfloat16_pays(model.device), step
    step_loss = torch.compile(loss_of) if compiled else loss_of

    def save() -> None:
        state = {
            "recipe": asdict(recipe),
            "step": step,
            "losses": losses,
            "seconds": used + time.monotonic() - began,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        with new_file(folder / STATE, force=True) as temporary:
            torch.save(state, temporary)

    while step < recipe.steps:
        ids = batch_of(recipe, step, starts, stream, remember).to(device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = step_loss(model, ids, bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 4))
        step += 1
        now = time.monotonic()
        if now - saved > checkpoint_seconds or now - began > seconds or step == recipe.steps:
            save()
            saved = now
            pace = (step - first) * recipe.batch * recipe.length / (now - began)
            recent = sum(losses[-100:]) / len(losses[-100:])
            left = (recipe.steps - step) * recipe.batch * recipe.length / pace / 60
            line = (
                f"step {step} of {recipe.steps}, loss {recent:.3f}, {pace:.0f} tokens/s, {left:.0f} min left"
            )
            print(line, file=sys.stderr, flush=True)
        if now - began > seconds and step < recipe.steps:
            return False
    finish(folder, recipe, model, tokenizer, losses, held_out or training_text.held_out_texts())
    return True


def same_beginning(found: Recipe, wanted: Recipe, step: int) -> None:
    """``ValueError`` unless the first ``step`` steps of both recipes are the same."""
    common = replace(found, steps=wanted.steps)
    constant = all((1 - r.decay) * r.steps >= step for r in (found, wanted))
    if common != wanted or not (found == wanted or constant):
        raise ValueError(f"the folder has step {step} of another training ({found}): give another folder")


def batch_of(
    recipe: Recipe, step: int, starts: torch.Tensor, stream: torch.Tensor, remember: Remember
) -> torch.Tensor:
    """Token ids ``[batch, length]`` of a step, which depend on the seed and the step alone."""
    draw = random.Random(f"{recipe.seed} {step}")
    rows = []
    for start in starts[step * recipe.batch : (step + 1) * recipe.batch].tolist():
        piece = stream[start : start + recipe.length].long()
        made = draw.random() < REMEMBER_SHARE
        rows.append(torch.tensor(remember.document(draw)) if made else piece)
    return torch.stack(rows)


def finish(
    folder: Path, recipe: Recipe, model: Any, tokenizer: Any, losses: list[float], held_out: dict[str, str]
) -> None:
    """Write the model's directory, and the loss of held-out text by position."""
    by_position, width = {}, max(recipe.length // 8, 1)
    for title, text in held_out.items():
        count = max(min(HELD_OUT_SAMPLES, len(text) // (8 * recipe.length)), 1)
        ids = held_out_samples(tokenizer, text, recipe.length, count)
        nll = token_losses(model, ids, False).mean(0)
        by_position[title] = [round(part.mean().item(), 4) for part in nll.split(width)]
    result = {"recipe": asdict(recipe), "width": width, "held_out": by_position, "training": losses}
    write_text(folder / LOSSES, json.dumps(result, indent=1) + "\n")
    with new_directory(folder / MODEL) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def device_option(text: str) -> torch.device:
    """A device of the command line that is there; an error of argparse otherwise."""
    try:
        check_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return torch.device(text)


def trained(folder: str | Path) -> Path:
    """The Hugging Face directory, with tokenizer, of a finished training in ``folder``; ``ValueError`` if it is not."""
    directory = Path(folder) / MODEL
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"there is no trained model in {folder}: python -m benchmarks.quality.small_llama {folder}"
        )
    return directory


def main() -> None:
    """Train, or go on."""
    parser = Parser("python -m benchmarks.quality.small_llama", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="of the checkpoint and the model")
    add(
        "--seconds",
        type=positive(float),
        default=math.inf,
        help="stop after this time; the same command goes on",
    )
    add(
        "--steps",
        type=positive(int),
        default=Recipe.steps,
        help="of the whole training (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of weights and order")
    add("--device", type=device_option, default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--quick", action="store_true", help="a tiny model, a few steps: does it run?")
    add("--compile", action="store_true", help="torch.compile the step: 1.3 times as fast, other roundings")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    recipe = QUICK if arguments.quick else Recipe(steps=arguments.steps, seed=arguments.seed)
    options = {"seconds": arguments.seconds, "compiled": arguments.compile, "device": arguments.device}
    try:
        if arguments.quick:
            options["texts"] = [text[:QUICK_CHARACTERS] for text in training_text.training_texts()]
        finished = train(arguments.folder, recipe, **options)
    except (ValueError, MissingPackageError) as error:
        parser.error(str(error))
    if not finished:
        print("the same command goes on")
        return
    directory = trained(arguments.folder)
    model = LlamaForCausalLM.from_pretrained(directory)
    print(f"{directory}: {describe(model, str(directory))}")
    found = json.loads((arguments.folder / LOSSES).read_text(encoding="utf-8"))
    for title, by_position in found["held_out"].items():
        print(f"{title}, loss of every {found['width']} positions: {by_position}")


if __name__ == "__main__":
    main()
