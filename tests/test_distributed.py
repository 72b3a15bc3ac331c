"""Two processes on a CPU (gloo): an enabled model that is sharded or split trains as stock does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.model_families import model_of

import rope_dist

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

RANKS = 2
WORKER = Path(__file__).parent / "helpers/distributed_worker.py"


@pytest.fixture
def start(tmp_path):
    """Run a way of the worker in two processes; what each rank's runs gave."""

    def start(way: str) -> list[dict]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        package = str(Path(rope_dist.__file__).parents[1])
        shared = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        logs = [tmp_path / f"{rank}.log" for rank in range(RANKS)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                with log.open("w") as output:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, WORKER, way, tmp_path],
                            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                            stdout=output,
                            stderr=subprocess.STDOUT,
                        )
                    )
            for process in processes:
                process.wait(timeout=240)
        finally:
            # One that waits for a dead one would wait for long.
            for process in processes:
                process.kill()
        for process, log in zip(processes, logs, strict=True):
            assert process.returncode == 0, log.read_text()[-3000:]
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]

    return start


@pytest.fixture
def saved(tmp_path):
    """The model of the other ways as a folder, beside what the workers write."""
    model_of("Llama").save_pretrained(tmp_path / "model")


def assert_as_stock(ranks: list[dict], rel: float = 1e-5) -> None:
    for runs in ranks:
        expected = runs["stock"]["losses"]
        assert runs["stock"]["enabled"] == 0
        assert len(set(expected)) == len(expected) > 1
        for when, run in runs.items():
            assert run["losses"] == pytest.approx(expected, rel=rel), when
            if when != "stock":
                assert run["enabled"] == 3, when
                assert {does for does, _ in run["report"]} == {"rotary"}, when


def test_fsdp2(start):
    assert_as_stock(start("fsdp"))


def test_fsdp2_projects_and_rotates_at_once(start):
    ranks = start("fsdp_fused")
    # bfloat16: stock rounds cos and sin.
    assert_as_stock(ranks, rel=2e-3)
    for runs in ranks:
        assert runs["stock"]["launches"] == 0
        assert runs["after"]["launches"] == 2 * len(runs["after"]["losses"])


def test_tensor_parallel(start, saved):
    ranks = start("tensor_parallel")
    assert_as_stock(ranks)
    for runs in ranks:
        assert {tuple(run["split"]) for run in runs.values()} == {(24, 48)}  # two of four heads


def test_deepspeed_zero3(start, saved):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    assert_as_stock(start("zero3"))
