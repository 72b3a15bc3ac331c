"""Train an extended model on long texts with the Trainer of transformers, by default as the paper does.

    python examples/finetune.py --quick                     # SmolLM2-135M, 4 steps on 256 tokens, on a CPU
    accelerate launch --config_file examples/fsdp2.yaml examples/finetune.py \\
        --model meta-llama/Llama-2-7b-hf --factor 2 --text pg19/*.txt --output llama2-8k
    ... the same command with --resume                      # goes on from the last whole checkpoint

The paper (Wu et al., EMNLP 2024, section 4.1): AdamW (0.9, 0.999), learning rate 2e-5 held constant, no weight
decay, global batch 64, 1000 steps at twice the length, 500 at four times. Every checkpoint, and the model in the
output folder at the end, is a stock model directory whose config holds the plan.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from command_line import Parser, at_least_one, extension, quieten, run
from torch.utils.data import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed
from transformers.utils import is_flash_attn_2_available

import rope_dist
from rope_dist.evaluation import load_model, load_text
from rope_dist.evaluation.memory import explain_out_of_memory

BATCH = 64
STEPS = {2: 1000, 4: 500}
"""The paper's steps by scale; between and beyond, those of the nearer larger one and of the largest."""


def build_parser() -> Parser:
    parser = Parser("Train an extended model on long texts, by default as the paper does.", strategy="dprope")
    parser.add_argument(
        "--text",
        nargs="+",
        default=["python"],
        metavar="NAME",
        help="corpora or text files, packed one after the other (default: the Python language reference)",
    )
    parser.add_argument("--length", type=at_least_one, help="tokens of a training text (default: the target)")
    parser.add_argument("--steps", type=at_least_one, help="default: 1000 up to 2x, 500 beyond")
    parser.add_argument(
        "--batch", type=at_least_one, help=f"texts a step, over all processes (default: {BATCH})"
    )
    parser.add_argument(
        "--per-device-batch", type=at_least_one, default=1, help="texts at once (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="default: %(default)s")
    parser.add_argument(
        "-o", "--output", default="finetuned", metavar="DIR", help="checkpoints, model (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of texts (default: %(default)s)")
    parser.add_argument(
        "--save-steps", type=at_least_one, default=50, help="steps a checkpoint (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint")
    parser.add_argument("--quick", action="store_true", help="4 steps of 2 texts of 256 tokens")
    return parser


class PackedTexts(Dataset):
    """Long texts, one after the other with an end-of-text token between, cut into pieces of ``length`` tokens.

    ``samples`` items, so that every step has its full batch: the pieces come round again where they are fewer, and
    texts beyond what the run needs are not read.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, names: Iterable[str], length: int, samples: int
    ) -> None:
        texts: list[torch.Tensor] = []
        for name in names:
            ids = tokenizer(load_text(name)[1]).input_ids
            if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
            # The paper's run has half a billion tokens, in each process: as Python's numbers they would be 18 GB.
            texts.append(torch.tensor(ids, dtype=torch.int32))
            if sum(map(len, texts)) >= length * samples:
                break
        tokens = torch.cat(texts)
        if len(tokens) < length:
            raise ValueError(
                f"the texts have {len(tokens)} tokens, a training text has {length}: give more --text, or a smaller "
                "--length"
            )
        self.pieces = tokens[: len(tokens) // length * length].view(-1, length)
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = self.pieces[index % len(self.pieces)].long()
        return {"input_ids": piece, "labels": piece}


def accumulation(batch: int, per_device: int) -> int:
    """Forward passes a step of each process; ``ValueError`` where the batch is no multiple of what runs at once."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1 and torch.cuda.device_count() > 1:
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs but one process: start with accelerate launch or torchrun, or choose "
            "a GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if batch % (processes * per_device):
        raise ValueError(
            f"--batch {batch} is not a multiple of {processes} processes times --per-device-batch {per_device}"
        )
    return batch // (processes * per_device)


def training_arguments(parsed: argparse.Namespace, steps: int, batch: int) -> TrainingArguments:
    # Renamed in transformers 5.18 or later; the older versions have only the second name.
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing"
    if checkpointing not in fields:
        checkpointing = "gradient_checkpointing"
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=parsed.output,
        max_steps=steps,
        per_device_train_batch_size=parsed.per_device_batch,
        gradient_accumulation_steps=accumulation(batch, parsed.per_device_batch),
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        learning_rate=parsed.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        bf16=gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        logging_steps=1,
        save_steps=parsed.save_steps,
        save_total_limit=2,
        report_to="none",
        seed=parsed.seed,
        **{checkpointing: True},
    )


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint: one that was being written when its run was killed has no trainer state yet."""
    found = {}
    for path in output.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and (path / "trainer_state.json").is_file():
            found[int(step[1])] = path
    return found[max(found)] if found else None


def check_same_plan(checkpoint: Path, config: Any) -> None:
    """``ValueError`` unless the checkpoint was trained with the plan that ``config`` holds."""
    saved = AutoConfig.from_pretrained(checkpoint)
    for entry in ("max_position_embeddings", "rope_parameters"):
        if getattr(saved, entry) != getattr(config, entry):
            raise ValueError(
                f"{checkpoint} was trained with another plan ({entry} differs): give its --factor, "
                "--target and --strategy, or another --output"
            )


def main(parsed: argparse.Namespace) -> None:
    quieten()
    if not parsed.learning_rate > 0:
        raise ValueError(f"--learning-rate must be positive, got {parsed.learning_rate:g}")
    output = Path(parsed.output)
    checkpoint = last_checkpoint(output)
    if checkpoint and not parsed.resume:
        raise ValueError(
            f"{checkpoint} is there already: --resume goes on from it; or choose another --output"
        )
    batch = parsed.batch or (2 if parsed.quick else BATCH)
    # Wrong numbers are said before a large model is read.
    accumulation(batch, parsed.per_device_batch)

    set_seed(parsed.seed)
    model, tokenizer = load_model(parsed.model, "cpu")
    plan = rope_dist.enable(model, **extension(parsed)).plan
    if checkpoint:
        check_same_plan(checkpoint, model.config)
    if torch.cuda.is_available() and is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")
    usual = next((steps for scale, steps in STEPS.items() if plan.scale <= scale), STEPS[max(STEPS)])
    steps = parsed.steps or (4 if parsed.quick else usual)
    length = parsed.length or (256 if parsed.quick else plan.target_length)
    if length > plan.target_length:
        raise ValueError(f"--length {length} is more than the target of {plan.target_length}")
    texts = PackedTexts(tokenizer, parsed.text, length, steps * batch)

    arguments = training_arguments(parsed, steps, batch)
    if arguments.process_index == 0:
        print(f"{plan!r}\n{steps} steps of {batch} texts of {length} tokens, from {len(texts.pieces)} pieces")
        print(f"goes on from {checkpoint}" if checkpoint else "begins with the first step", flush=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=texts, processing_class=tokenizer)
    advice = "give a smaller --length or --per-device-batch, or shard over more GPUs (examples/fsdp2.yaml)"
    with explain_out_of_memory(f"training on {length} tokens", advice):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    trainer.save_state()
    if arguments.process_index == 0:
        print(f"mean loss {result.training_loss:.4f}; saved to {output}")
    # gloo's threads need the interpreter to let go of the last tensors they sent: a process that ends or closes the
    # group at that moment aborts or hangs. Waiting for the one that saves gives them the time.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run(main, build_parser())
