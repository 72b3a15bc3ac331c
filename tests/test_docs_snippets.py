"""Every block of Python in README.md and docs/*.md runs, or says why not.

How the pages are written for this:

- A block that cannot run here has ``<!-- not run: REASON -->`` on the line before it.
- ``<!-- setup: CODE -->`` on the line before a block is one line of Python that runs first and is not shown.
- The blocks of a page run in order, in one namespace and in an empty folder, on a CPU. It begins with the names of
  ``namespace`` below: ``rope_dist``, ``ops``, ``torch``, a small ``model``, its ``plan``, queries and keys, and so on.
  Before each block models are disabled: what it does to one ends with it.
- A hub id (``"Qwen/Qwen3-8B"``) in the page is a small random model, with the config of that model where
  helpers/published_models.py has it and that of LLaMA 2 elsewhere.
- ``model.generate(...)`` stands for a call with a prompt. Any other ``...`` is Python's.
- A line ``EXPRESSION  # -> TEXT`` is compared: what it prints, or else its ``repr``, is TEXT.
"""

import ast
import contextlib
import io
import os
import re
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import letter_tokenizer
from helpers.published_models import PUBLISHED, save_published

import rope_dist
from rope_dist import ops

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(
    r"(?:^[ ]*<!-- (?P<mark>not run|setup): (?P<text>[^\n]+?) -->\n)?^(?P<indent>[ ]*)```(?:python|py)\b[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
HUB_ID = re.compile(r"""from_pretrained\(\s*["']([\w.-]+/[\w.-]+)["']""")
USUAL = "meta-llama/Llama-2-7b-hf"


def blocks(path):
    """``(line, mark, text of the mark, code)`` of each block of Python."""
    page = path.read_text(encoding="utf-8")
    found = []
    for block in BLOCK.finditer(page):
        line = page.count("\n", 0, block.start("code")) + 1
        found.append((line, block["mark"], block["text"], textwrap.dedent(block["code"])))
    assert len(found) == len(re.findall(r"^ *```(?:python|py)\b", page, re.MULTILINE)), path.name
    return found


RUN = {path.name: blocks(path) for path in PAGES}


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """The hub's cache, with a small model for each id that the pages have."""
    from huggingface_hub import constants

    cache = tmp_path_factory.getbasetemp() / "hub"
    ids = {name for found in RUN.values() for *_, code in found for name in HUB_ID.findall(code)} | {USUAL}
    for name in ids:
        stored = cache / f"models--{name.replace('/', '--')}"
        if not stored.exists():
            save_published(
                name if name in PUBLISHED else USUAL, stored / "snapshots/small", letter_tokenizer()
            )
            (stored / "refs").mkdir()
            (stored / "refs/main").write_text("small")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return lambda name: str(cache / f"models--{name.replace('/', '--')}/snapshots/small")


@pytest.fixture
def namespace(hub):
    """What a block may use without having made it, by the names of the pages."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(hub(USUAL)).eval()
    tokens, heads, kv_heads, head_dim, hidden = 16, 4, 2, 128, 64
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    position_ids = torch.arange(tokens)[None]
    cos, sin = ops.cos_sin(inv_freq, position_ids)
    return {
        "rope_dist": rope_dist,
        "ops": ops,
        "torch": torch,
        "model": model,
        "tokenizer": AutoTokenizer.from_pretrained(hub(USUAL)),
        "model_or_dir": hub(USUAL),
        "plan": rope_dist.plan(model, factor=2),
        "input_ids": torch.arange(3, 19)[None],
        "prompt": torch.arange(3, 19)[None],
        "prompt_tokens": 16,
        "max_new_tokens": 2,
        "q": torch.randn(1, tokens, heads, head_dim),
        "k": torch.randn(1, tokens, kv_heads, head_dim),
        "v": torch.randn(1, tokens, kv_heads, head_dim),
        "cos": cos,
        "sin": sin,
        "inv_freq": inv_freq,
        "position_ids": position_ids,
        "head_dim": head_dim,
        "x": torch.randn(1, tokens, hidden),
        "w_q": torch.randn(heads * head_dim, hidden),
        "w_k": torch.randn(kv_heads * head_dim, hidden),
        "w_v": torch.randn(kv_heads * head_dim, hidden),
        "b_q": torch.randn(heads * head_dim),
        "b_k": torch.randn(kv_heads * head_dim),
        "q_weight": torch.ones(head_dim),
        "k_weight": torch.ones(head_dim),
        "k_cache": torch.zeros(64, kv_heads, head_dim),
        "v_cache": torch.zeros(64, kv_heads, head_dim),
        "slots": torch.arange(tokens),
    }


def expected(code):
    """Line of an expression -> the text after ``# ->`` on its last line."""
    return {
        number: line.partition("# -> ")[2].strip()
        for number, line in enumerate(code.splitlines(), 1)
        if "# -> " in line
    }


def run(code, names, place):
    code = re.sub(r"\.generate\(\.\.\.\)", ".generate(input_ids, max_new_tokens=2, do_sample=False)", code)
    wanted = expected(code)
    for statement in ast.parse(code, place).body:
        text = wanted.pop(statement.end_lineno, None)
        if text is None:
            exec(compile(ast.Module([statement], []), place, "exec"), names)
            continue
        assert isinstance(statement, ast.Expr), f"{place}: # -> follows an expression"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = eval(compile(ast.Expression(statement.value), place, "eval"), names)
        found = printed.getvalue().strip().splitlines()
        assert (found[0] if found else repr(value)) == text, place
    assert not wanted, f"{place}: # -> stands beside no statement"


@pytest.mark.parametrize("page", [name for name, found in RUN.items() if found])
def test_the_blocks_of_a_page_run(page, namespace, tmp_path, monkeypatch, stock_again, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    for line, mark, text, code in RUN[page]:
        if mark == "not run":
            compile(code, f"{page}:{line}", "exec")
            continue
        rope_dist.disable()
        if mark == "setup":
            exec(text, namespace)
        try:
            run(code, namespace, f"{page}:{line}")
        except Exception as error:
            error.add_note(
                f"In {page}, line {line}. What cannot run here has <!-- not run: REASON --> before it."
            )
            raise


def test_a_wrong_block_fails():
    """Of each kind: code that raises, and a text beside an expression that is another."""
    run("1 + 1  # -> 2\nprint('a')  # -> a\n", {}, "page")
    with pytest.raises(AssertionError):
        run("1 + 1  # -> 3\n", {}, "page")
    with pytest.raises(NameError):
        run("unknown\n", {}, "page")
