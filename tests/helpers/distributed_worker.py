"""One process of those that ``test_distributed.py`` starts: trains a model in one way, stock and enabled.

``python distributed_worker.py WAY FOLDER`` with torchrun's environment variables (``RANK``, ``MASTER_PORT``, ...)
writes ``FOLDER/RANK.json``: for each run its losses and, where it was enabled, what the layers did.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from model_families import model_of
from transformers import LlamaForCausalLM

import rope_dist
from rope_dist import ops
from rope_dist.hf import enabled_modules

STEPS = 4
LEARNING_RATE = 0.5


def batch(step: int, seed: int) -> torch.Tensor:
    """Tokens ``[2, 24]`` of a step; ranks that share a batch give the same seed."""
    return torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1000 * seed + step))


def train(model, seed: int) -> list[float]:
    """The losses, averaged over the ranks, of a few steps with plain gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        ids = batch(step, seed)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(averaged(loss))
    return losses


def averaged(loss: torch.Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def outcome(model, losses: list[float]) -> dict:
    return {
        "losses": losses,
        "enabled": len(list(enabled_modules(model))),
        "report": [[layer.path, layer.reason] for layer in rope_dist.report(model)],
    }


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp(folder: Path) -> dict:
    runs = {}
    for when in ("stock", "before", "after"):
        model = model_of("Llama").train()
        if when == "before":
            rope_dist.enable(model)
        shard(model)
        if when == "after":
            rope_dist.enable(model)
        runs[when] = outcome(model, train(model, seed=dist.get_rank()))
    return runs


def fsdp_fused(folder: Path) -> dict:
    """Projection and rotation as one, of the weights that FSDP2 has gathered."""
    launches, fused = [], ops.qkv_rotary

    def counted(*arguments, **options):
        launches.append(1)
        return fused(*arguments, **options)

    # The layers choose as on a GPU; the operator computes by its definition, which is quick on a CPU.
    ops.qkv_rotary, ops.backend_for = counted, lambda x: "triton"
    runs = {}
    for when in ("stock", "after"):
        model = shard(model_of("Llama", dtype=torch.bfloat16).train())
        if when == "after":
            rope_dist.enable(model)
        runs[when] = outcome(model, train(model, seed=dist.get_rank()))
        runs[when]["launches"] = len(launches)
    return runs


def tensor_parallel(folder: Path) -> dict:
    from transformers.distributed import DistributedConfig

    runs = {}
    split = {"distributed_config": DistributedConfig(tp_plan="auto")}
    for when in ("stock", "before", "after"):
        if when == "before":
            rope_dist.enable()
        model = LlamaForCausalLM.from_pretrained(folder / "model", **split).train()
        if when == "after":
            rope_dist.enable(model)
        # Every rank holds a part of each layer and reads the same tokens.
        runs[when] = outcome(model, train(model, seed=0))
        heads = model.model.layers[0].self_attn.q_proj
        runs[when]["split"] = list(getattr(heads.weight, "_local_tensor", heads.weight).shape)
        rope_dist.disable()
    return runs


def zero3(folder: Path) -> dict:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    # Its own all-reduce for CPUs would be compiled now; gloo's is as good.
    # (As an attribute, deepspeed.comm.torch is torch itself.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    runs = {}
    for when in ("stock", "before", "after", "partitioned"):
        partitioned = None
        if when == "partitioned":
            # As the Trainer does it: weights are partitioned while the model is loaded.
            partitioned = HfDeepSpeedConfig(settings)
            model = LlamaForCausalLM.from_pretrained(folder / "model").train()
        else:
            model = model_of("Llama").train()
        if when in ("before", "partitioned"):
            rope_dist.enable(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        if when == "after":
            rope_dist.enable(engine)
        losses = []
        for step in range(STEPS):
            ids = batch(step, dist.get_rank())
            loss = engine(ids, labels=ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            losses.append(averaged(loss))
        runs[when] = outcome(engine, losses)
        engine.destroy()
        del partitioned
    return runs


WAYS = {way.__name__: way for way in (fsdp, fsdp_fused, tensor_parallel, zero3)}


def main() -> None:
    way, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    runs = WAYS[way](folder)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(runs))
    dist.barrier()
    # Without destructors: what drops the last reference to a gloo group (a mesh, a model) joins gloo's threads while
    # they wait for the interpreter, and the process hangs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
