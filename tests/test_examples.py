"""The examples, run as their users run them, on a small random model."""

import contextlib
import copy
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

from rope_dist.evaluation.models import cache_option

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Processes that are compared with each other all work on the CPU.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def example(monkeypatch):
    """Runs an example within this process, which has torch and transformers already; returns its exit code."""
    from transformers.utils import logging

    monkeypatch.syspath_prepend(EXAMPLES)
    before = logging.get_verbosity()

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return ended.value.code or 0

    yield run
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture
def text(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + int(i)) for i in torch.randint(26, (4000,), generator=generator)))
    return path


def training(model, text, output, *more):
    arguments = ["--model", model, "--text", text, "--batch", 2, "--save-steps", 2, "-o", output, *more]
    return [str(argument) for argument in arguments]


def losses(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def weights(output):
    from safetensors.torch import load_file

    return load_file(output / "model.safetensors")


# --- generate.py -------------------------------------------------------------------------------


def test_generate_reads_past_the_trained_length_and_continues(example, model_directory, text, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rope_dist

    arguments = ("--model", model_directory, "--text", text, "--tokens", 100, "--new-tokens", 12)
    assert example("generate", *arguments, "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "stages: 64, 81, 102, 128" in out
    assert "100 tokens of text.txt; the model was trained on 64" in out
    assert "tokens/s" in out

    model = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    rope_dist.enable(model, factor=2)
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :100]
    for _ in range(12):
        following = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
        if following == model.config.eos_token_id:
            break
    assert tokenizer.decode(ids[0, 100:], skip_special_tokens=True) in out


# --- finetune.py -------------------------------------------------------------------------------

READ_WITHOUT_THE_PACKAGE = """
import sys

sys.modules["rope_dist"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
logits = model(torch.arange(3, 103)[None]).logits
torch.save({"length": model.config.max_position_embeddings, "logits": logits.detach()}, sys.argv[2])
"""


def read_without_the_package(directory, tmp_path):
    subprocess.run(
        [sys.executable, "-c", READ_WITHOUT_THE_PACKAGE, directory, tmp_path / "read.pt"],
        check=True,
        env={**ENVIRONMENT, "PYTHONPATH": ""},
        cwd=tmp_path,
    )
    return torch.load(tmp_path / "read.pt")


def test_a_trained_model_is_read_by_stock_transformers(example, model_directory, text, tmp_path):
    from transformers import AutoModelForCausalLM

    import rope_dist
    from rope_dist import export

    assert example("finetune", *training(model_directory, text, tmp_path / "out", "--steps", 2)) == 0
    read = read_without_the_package(tmp_path / "out", tmp_path)
    assert read["length"] == 128

    strategy = runpy.run_path(str(EXAMPLES / "finetune.py"))["STRATEGY"]
    before = AutoModelForCausalLM.from_pretrained(model_directory)
    assert any(not torch.equal(p, weights(tmp_path / "out")[n]) for n, p in before.named_parameters())
    # The same weights with the plan enabled anew.
    before.load_state_dict(weights(tmp_path / "out"), strict=False)
    rope_dist.enable(before, factor=2, strategy=strategy, dynamic=False)
    torch.testing.assert_close(before.eval()(torch.arange(3, 103)[None]).logits, read["logits"])
    # Its config has the plan in transformers 5's words; the others' are an export away.
    plan = rope_dist.plan(model_directory, factor=2, strategy=strategy)
    assert export.verify(
        export.hf(tmp_path / "out", plan, tmp_path / "exported"), plan, engines=export.ENGINES
    )


def started(count, arguments, log):
    """``finetune.py`` in ``count`` processes, with what torchrun tells each: none outlives a kill of these."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    ranks = [
        {**shared, "LOCAL_WORLD_SIZE": str(count), "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)
    ]
    with log.open("a") as output:
        return [
            subprocess.Popen(
                [sys.executable, EXAMPLES / "finetune.py", *arguments],
                env={**ENVIRONMENT, **(rank if count > 1 else {})},
                stdout=output,
                stderr=output,
            )
            for rank in ranks
        ]


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_training_resumes_to_the_same_end(model_directory, text, tmp_path, count):
    """In one process, and in two over gloo."""
    log, whole, killed = tmp_path / "log", tmp_path / "whole", tmp_path / "killed"

    def train(output, *more):
        arguments = ("--steps", 40, "--seed", 3, *more)
        return started(count, training(model_directory, text, output, *arguments), log)

    processes = train(whole)
    assert [process.wait(300) for process in processes] == [0] * count, log.read_text()

    processes = train(killed)
    while all(p.poll() is None for p in processes) and not list(
        killed.glob("checkpoint-*/trainer_state.json")
    ):
        time.sleep(0.005)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * count, log.read_text()
    assert not (killed / "model.safetensors").exists()
    # What a run leaves that is killed while it writes a checkpoint.
    (killed / "checkpoint-39").mkdir()

    processes = train(killed, "--resume")
    assert [process.wait(300) for process in processes] == [0] * count, log.read_text()
    assert "goes on from" in log.read_text()
    assert losses(killed) == losses(whole)
    assert list(losses(killed)) == list(range(1, 41))
    unbroken = weights(whole)
    assert all(torch.equal(tensor, unbroken[name]) for name, tensor in weights(killed).items())
    assert read_without_the_package(killed, tmp_path)["length"] == 128


ZERO3 = ("accelerate.commands.launch", "--config_file", str(EXAMPLES / "zero3.yaml"), "--num_processes", "2")


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(("torch.distributed.run", "--standalone", "--nproc-per-node", "2"), id="torchrun"),
        pytest.param(
            (*ZERO3, "--mixed_precision", "no"),
            id="zero3",
            marks=pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed"),
        ),
    ],
)
def test_two_processes_train_as_one(model_directory, text, tmp_path, launch):
    arguments, log = ("--steps", 2, "--batch", 4), tmp_path / "log"
    (process,) = started(1, training(model_directory, text, tmp_path / "one", *arguments), log)
    assert process.wait(300) == 0, log.read_text()
    command = [
        *(sys.executable, "-m", *launch),
        EXAMPLES / "finetune.py",
        *training(model_directory, text, tmp_path / "two", *arguments),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begins with the first step") == 1
    two = weights(tmp_path / "two")
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(two[name], tensor, atol=5e-6, rtol=0)


def test_texts_are_packed_and_read_as_far_as_needed(letters, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from finetune import PackedTexts

    names = [str(tmp_path / name) for name in ("a", "b", "not-there")]
    Path(names[0]).write_text("a" * 50)
    Path(names[1]).write_text("b" * 70)
    packed = PackedTexts(letters, names, 20, 6)
    stream = [97] * 50 + [2] + [98] * 70 + [2]  # 2 is the end of a text.
    assert [packed[i]["input_ids"].tolist() for i in range(6)] == [
        stream[i : i + 20] for i in range(0, 120, 20)
    ]
    assert packed[6]["labels"].equal(packed[0]["input_ids"])
    assert packed[0]["labels"].dtype == torch.int64
    with pytest.raises(ValueError, match="neither a text file"):
        PackedTexts(letters, names, 20, 7)


@pytest.mark.parametrize("factor", [2, 4])
def test_the_defaults_are_the_papers(example, model_directory, text, tmp_path, monkeypatch, factor):
    from transformers import Trainer

    seen = []

    def note(trainer, *_, **__):
        seen.append(trainer)
        raise ValueError("noted")

    monkeypatch.setattr(Trainer, "train", note)
    arguments = ("--model", model_directory, "--text", text, "-o", tmp_path / "out", "--factor", factor)
    assert example("finetune", *arguments) == 2
    (trainer,) = seen
    args = trainer.args
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.999, 0.0)
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (2e-5, "constant", 0)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert args.max_steps == {2: 1000, 4: 500}[factor]
    assert len(trainer.train_dataset) == 64 * args.max_steps
    assert {len(trainer.train_dataset[i]["input_ids"]) for i in (0, 1, 999)} == {64 * factor}


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_the_configurations_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"


# --- serve.py ----------------------------------------------------------------------------------

SERVING = ("transformers-4", "vllm", "sglang")


def test_serve_saves_a_stock_model_and_prints_what_serves_it(
    example, model_directory, tmp_path, capsys, monkeypatch
):
    from transformers import AutoConfig, AutoTokenizer

    import rope_dist
    from rope_dist import export

    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    output = tmp_path / "served"
    # Cos and sin are scaled by it, which vLLM and SGLang read in their own way.
    plan = rope_dist.plan(model_directory, factor=4, strategy="yarn")
    extension = ("--factor", 4, "--strategy", "yarn")
    arguments = ("--model", model_directory, *extension, "-o", output, "--port", 9000)
    assert example("serve", *arguments, "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"transformers serve {output} --host localhost --port 9000" in out
    assert f"vllm serve {output} --max-model-len 256" in out
    assert not output.exists()

    output.mkdir()  # An empty folder is no reason to refuse.
    assert example("serve", *arguments) == 0
    assert export.verify(output, plan, engines=SERVING)
    config = AutoConfig.from_pretrained(output)
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["rope_type"] == "yarn"
    assert AutoTokenizer.from_pretrained(output).encode("abc") == [97, 98, 99]


PROMPT = "we promptly judged antique ivory buckles for the next pr"  # 56 of the 64 tokens that are trained


def grown_by_hand(model_directory, *more, new=12):
    """The texts of a conversation, each prompt the whole text before and another of ``more``, with one cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    import rope_dist

    model = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    rope_dist.enable(model, factor=2, dynamic=True)
    cache, text, answers = DynamicCache(config=model.config), "", []
    for message in more:
        text += message
        ids = tokenizer(text, return_tensors="pt").input_ids
        ids = model.generate(ids, max_new_tokens=new, do_sample=False, **cache_option(model, cache))
        answers.append(tokenizer.decode(ids[0, len(text) :]))
        text += answers[-1]
    return answers


def served_in_turns(ask):
    """What ``ask(prompt)`` answers in a conversation that grows past the trained length, then in another."""
    first = ask(PROMPT)
    second = ask(PROMPT + first + " and")
    return first, second, ask(PROMPT[:20])


CACHED = [
    "prompt of 56 tokens, 0 of them in the cache",
    "prompt of 72 tokens, 67 of them in the cache",
    "prompt of 20 tokens, 19 of them in the cache",
]


def test_a_served_conversation_keeps_its_cache(example, model_directory, monkeypatch, capsys, stock_again):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

    answers, stock = [], GenerationMixin.generate

    class Serve:
        """Loads a model and calls ``generate`` as transformers' server does."""

        def __init__(self, directory, host, port):
            assert (host, port) == ("localhost", 9000)
            model = AutoModelForCausalLM.from_pretrained(directory)
            tokenizer = AutoTokenizer.from_pretrained(directory)

            def ask(prompt):
                inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
                config = copy.deepcopy(model.generation_config)
                config.max_new_tokens = 12
                ids = model.generate(**inputs, generation_config=config, tokenizer=tokenizer)
                return tokenizer.decode(ids[0, len(prompt) :])

            answers.extend(served_in_turns(ask))

    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    # Older versions cannot import it without what a server needs.
    monkeypatch.setitem(sys.modules, "transformers.cli.serve", types.SimpleNamespace(Serve=Serve))
    assert example("serve", "--model", model_directory, "--factor", 2, "--dynamic", "--port", 9000) == 0
    out = capsys.readouterr().out
    assert "DynamicPlan(auto, 2x, theta=10000, stages: 64, 81, 102, 128)" in out
    assert [line for line in out.splitlines() if line.startswith("prompt of")] == CACHED
    assert list(answers[:2]) == grown_by_hand(model_directory, PROMPT, " and")
    assert list(answers[2:]) == grown_by_hand(model_directory, PROMPT[:20])
    assert GenerationMixin.generate is stock


@pytest.mark.skipif(not is_serve_available(), reason="pip install 'transformers[serving]'")
def test_transformers_server_serves_a_dynamic_plan(model_directory, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def post(path, **body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def ask(prompt):
        body = {"model": str(model_directory), "prompt": prompt, "max_tokens": 12, "temperature": 0}
        return post("/v1/completions", **body)["choices"][0]["text"]

    log = tmp_path / "log"
    arguments = ("--model", model_directory, "--factor", "2", "--dynamic", "--port", str(port))
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, EXAMPLES / "serve.py", *arguments, "--host", "127.0.0.1"],
            env=ENVIRONMENT,
            stdout=output,
            stderr=output,
        )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                post("/health")
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        answers = served_in_turns(ask)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    assert [line for line in log.read_text().splitlines() if line.startswith("prompt of")] == CACHED
    assert list(answers[:2]) == grown_by_hand(model_directory, PROMPT, " and")


def test_serve_dynamic_prints_its_plan_and_wants_no_output(example, model_directory, tmp_path, capsys):
    arguments = ("--model", model_directory, "--dynamic", "--dry-run")
    assert example("serve", *arguments) == 0
    assert f"would serve {model_directory} at http://localhost:8000/v1" in capsys.readouterr().out
    assert example("serve", *arguments, "-o", tmp_path / "out") == 2
    assert "with --dynamic nothing is exported" in capsys.readouterr().err


# --- growing_chat.py ---------------------------------------------------------------------------


def test_a_growing_chat_is_read_as_by_each_plan(example, model_directory, text, capsys, stock_again):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import rope_dist
    from rope_dist.evaluation import token_nll

    arguments = ("--opening", 40, "--turn", 8, "--tokens", 101, "--device", "cpu")
    assert example("growing_chat", "--model", model_directory, "--text", text, *arguments) == 0
    out = capsys.readouterr().out
    assert "101 tokens of text.txt in turns of 8 after 40; trained on 64" in out
    quality, speed = out.split("tokens read a second")
    rows = [line.split() for line in quality.splitlines() if re.match(r" *\d+ - \d+ ", line)]
    assert [[row[0], row[2]] for row in rows] == [[str(i), str(min(i + 8, 100))] for i in range(40, 100, 8)]
    assert all(float(n) > 0 for line in speed.splitlines()[4:] for n in line.split()[3:])

    ids = AutoTokenizer.from_pretrained(model_directory)(text.read_text(), return_tensors="pt").input_ids
    config = AutoConfig.from_pretrained(model_directory)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    for column, (options, changed) in enumerate(
        [
            (None, None),
            ({"factor": 2, "dynamic": False}, None),
            ({"factor": 2, "dynamic": True}, None),
            (None, config),
        ]
    ):
        model = AutoModelForCausalLM.from_pretrained(model_directory, config=changed).eval()
        if options:
            rope_dist.enable(model, **options)
        nll = token_nll(model, ids[:, :101], chunk=8, first=40)
        for row, start in zip(rows, range(40, 100, 8), strict=True):
            expected = nll[start : min(start + 8, 100)].double().mean().exp().item()
            assert float(row[3 + column]) == pytest.approx(expected, abs=0.011)
    below, past = rows[1], rows[-1]
    assert below[3] == below[5] == below[6]  # up to the trained length as stock
    assert len(set(past[3:])) == 4


# --- help and bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("generate", ["python examples/generate.py --quick", "  -h, --help "]),
        ("serve", ["    python examples/serve.py --dry-run", "  --dynamic "]),
        ("growing_chat", ["python examples/growing_chat.py --quick", "  --opening "]),
        ("finetune", ["    python examples/finetune.py --quick", "  --resume "]),
    ],
)
def test_help_is_the_docstring_with_its_examples(example, capsys, name, lines):
    assert example(name, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: {name}.py [OPTIONS]\n")
    assert all(line in out for line in lines)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("generate", ("--text", "pyhton"), "--text: unknown text 'pyhton', did you mean python?"),
        ("generate", ("--tokens", "120", "--new-tokens", "9"), "more than the target of 128"),
        ("generate", ("--factor", "0.5"), "--factor: must be at least 1"),
        ("generate", ("--model", "no-such-model"), "unknown model 'no-such-model'"),
        ("generate", ("--model", "no-such/model/at-all"), "no such file or directory"),
        ("generate", ("--tokens", "0"), "must be at least 1"),
        ("generate", ("--temperature", "-1"), "must be at least 0"),
        ("generate", ("--token", "9"), "unknown option '--token', did you mean --tokens?"),
        ("finetune", ("--batch", "3", "--per-device-batch", "2"), "not a multiple"),
        ("finetune", ("--learning-rate", "0"), "--learning-rate: must be above 0"),
        ("finetune", ("--length", "129"), "more than the target of 128"),
        ("finetune", ("--factor", "2", "--target", "256"), "give --target or --factor, not both"),
        ("growing_chat", ("--tokens", "129"), "more than the target of 128"),
        ("growing_chat", ("--opening", "40", "--tokens", "41"), "no turn follows an opening of 40 tokens"),
        ("growing_chat", ("--factor", "1"), "past the original length 64"),
        ("serve", ("-o", __file__), "choose another --output"),
        ("serve", ("--strategy", "longrope"), "longrope"),
        ("serve", ("--dynamic", "--target", "64"), "past the original length 64"),
        ("serve", ("--strategy", "linear"), "unknown strategy 'linear'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    example, model_directory, tmp_path, monkeypatch, capsys, name, arguments, message
):
    monkeypatch.chdir(tmp_path)
    # An option that is given twice has its second value.
    assert example(name, "--model", model_directory, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"{name}.py: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "method", "advice"),
    [
        ("finetune", "Trainer.train", "smaller --length"),
        ("generate", "LlamaForCausalLM.generate", "fewer --tokens"),
    ],
)
def test_out_of_memory_says_what_to_do(
    example, model_directory, text, tmp_path, monkeypatch, capsys, name, method, advice
):
    def full(*arguments, **options):
        torch.empty(2**52, dtype=torch.uint8)

    monkeypatch.setattr(f"transformers.{method}", full)
    monkeypatch.chdir(tmp_path)
    arguments = ("--quick",) if name == "finetune" else ("--tokens", 100, "--new-tokens", 2)
    length = ("--length", 100) if name == "finetune" else ()
    assert example(name, "--model", model_directory, "--text", text, *arguments, *length) == 2
    (line,) = [n for n in capsys.readouterr().err.splitlines() if n.startswith(f"{name}.py: error:")]
    assert "out of memory" in line
    assert advice in line


def test_a_training_never_mixes_two_plans(example, model_directory, text, tmp_path, capsys):
    arguments = training(model_directory, text, tmp_path / "out", "--steps", 2)
    assert example("finetune", *arguments) == 0
    capsys.readouterr()
    assert example("finetune", *arguments) == 2
    assert "--resume goes on from it" in capsys.readouterr().err
    assert example("finetune", *arguments, "--resume", "--strategy", "pi") == 2
    assert "was trained with another plan" in capsys.readouterr().err
