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

import dataclasses
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed
from transformers.utils import is_flash_attn_2_available

import rope_dist
from rope_dist.cli import options, values
from rope_dist.cli.options import flag, option
from rope_dist.cli.runner import quieten, run_script
from rope_dist.defaults import PACKAGED_MODEL_NAMES
from rope_dist.evaluation import load_model, load_text
from rope_dist.evaluation.memory import explain_out_of_memory

STRATEGY = "dprope"
"""The paper's own. ``python -m benchmarks.quality.after_training`` compares strategies after training."""
BATCH = 64
STEPS = {2: 1000, 4: 500}
"""The paper's steps by scale; between and beyond, those of the nearer larger one and of the largest."""


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


def training_arguments(steps: int, batch: int, per_device: int, **settings: Any) -> TrainingArguments:
    # Renamed in transformers 5.18 or later; the older versions have only the second name.
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing"
    if checkpointing not in fields:
        checkpointing = "gradient_checkpointing"
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        max_steps=steps,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation(batch, per_device),
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        bf16=gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        logging_steps=1,
        save_total_limit=2,
        report_to="none",
        **{checkpointing: True},
        **settings,
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


def main(
    model: options.Weights = PACKAGED_MODEL_NAMES[0],
    factor: options.Factor = None,
    target: options.Target = None,
    strategy: options.Strategy = STRATEGY,
    text: options.Texts = options.DEFAULT_TEXTS,
    length: Annotated[
        int | None, option(values.whole(1), "N", "Tokens of a sample (default: target).")
    ] = None,
    steps: Annotated[int | None, option(values.whole(1), "N", "Default: 1000 up to 2x, 500 beyond.")] = None,
    batch: Annotated[
        int | None, option(values.whole(1), "N", f"Samples per step, over all processes (default: {BATCH}).")
    ] = None,
    per_device_batch: Annotated[int, option(values.whole(1), "N", "Samples per forward pass.")] = 1,
    learning_rate: Annotated[float, option(values.positive, "LR", "Learning rate, constant.")] = 2e-5,
    output: Annotated[
        str, option(str, "DIR", "Folder for checkpoints and model.", "-o", "--output")
    ] = "finetuned",
    seed: Annotated[int, option(values.seed, "N", "Seed of the order of the samples.")] = 0,
    save_steps: Annotated[int, option(values.whole(1), "N", "Steps per checkpoint.")] = 50,
    resume: Annotated[bool, flag("--resume", "Resume from the last whole checkpoint.")] = False,
    quick: Annotated[bool, flag("--quick", "4 steps of 2 samples of 256 tokens.")] = False,
) -> None:
    quieten()
    extension = options.extension(target, factor, strategy)
    checkpoint = last_checkpoint(Path(output))
    if checkpoint and not resume:
        raise ValueError(
            f"{checkpoint} is there already: --resume goes on from it; or choose another --output"
        )
    batch = batch or (2 if quick else BATCH)
    # Wrong numbers are refused before a large model is loaded.
    accumulation(batch, per_device_batch)

    set_seed(seed)
    loaded, tokenizer = load_model(model, "cpu")
    plan = rope_dist.enable(loaded, dynamic=False, **extension).plan  # every text has the target length
    if checkpoint:
        check_same_plan(checkpoint, loaded.config)
    if torch.cuda.is_available() and is_flash_attn_2_available():
        loaded.set_attn_implementation("flash_attention_2")
    usual = next((steps for scale, steps in STEPS.items() if plan.scale <= scale), STEPS[max(STEPS)])
    steps = steps or (4 if quick else usual)
    length = length or (256 if quick else plan.target_length)
    if length > plan.target_length:
        raise ValueError(f"--length {length} is more than the target of {plan.target_length}")
    texts = PackedTexts(tokenizer, text, length, steps * batch)

    settings = {"output_dir": output, "learning_rate": learning_rate, "save_steps": save_steps, "seed": seed}
    arguments = training_arguments(steps, batch, per_device_batch, **settings)
    if arguments.process_index == 0:
        print(f"{plan!r}\n{steps} steps of {batch} texts of {length} tokens, from {len(texts.pieces)} pieces")
        print(f"goes on from {checkpoint}" if checkpoint else "begins with the first step", flush=True)
    trainer = Trainer(model=loaded, args=arguments, train_dataset=texts, processing_class=tokenizer)
    advice = "give a smaller --length or --per-device-batch, or shard over more GPUs (examples/fsdp2.yaml)"
    with explain_out_of_memory(f"training on {length} tokens", advice):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    trainer.save_state()
    if arguments.process_index == 0:
        print(f"mean loss {result.training_loss:.4f}; saved to {output}")
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    # DistributedDataParallel must not outlive the group: the last reference to a gloo group, if it is dropped by the
    # model, joins gloo's threads while they wait for the interpreter, and the process hangs.
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_script(main))
