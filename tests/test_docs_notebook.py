"""examples/quickstart.ipynb: its cells run one after the other, on the packaged model and few tokens."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = json.loads((ROOT / "examples/quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_of_plain_python():
    """No magic of IPython, and the keys of nbformat 4.5, which a reader of GitHub needs."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        assert {"cell_type", "id", "metadata", "source"} <= cell.keys()
        assert cell["cell_type"] == "markdown" or {"execution_count", "outputs"} <= cell.keys()
    for source in CODE:
        ast.parse(source)


@pytest.fixture
def two_layers(monkeypatch):
    """The packaged model with two of its thirty layers: what the cells do takes seconds."""
    from rope_dist import evaluation

    load = evaluation.load_model

    def load_two(name):
        model, tokenizer = load(name)
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        return model, tokenizer

    monkeypatch.setattr(evaluation, "load_model", load_two)


def test_its_cells_run(monkeypatch, capsys, tmp_path, two_layers, stock_again, one_thread):
    from rope_dist.evaluation import PACKAGED_MODELS

    packaged = PACKAGED_MODELS["smollm2-135m"]
    if find_spec(packaged.package) is None:
        pytest.skip(f"the packaged model is not installed: {packaged.install}")
    for name in ("matplotlib", "gguf", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import matplotlib.pyplot as plt
    from transformers.utils import logging

    plt.switch_backend("Agg")
    monkeypatch.setenv("QUICKSTART", "quick")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, names = logging.get_verbosity(), {}
    try:
        for source in CODE:
            exec(compile(source, "quickstart.ipynb", "exec"), names)
        assert len(plt.get_fignums()) == 2
    finally:
        plt.close("all")
        logging.set_verbosity(before)
    out = capsys.readouterr().out
    assert "trained to 8192 tokens" in out
    assert "RopePlan(auto, 8192 -> 16384 (2x)" in out
    assert "stages: 8192, 10321, 13004, 16384" in out
    assert out.endswith("16384 tokens\nTrue\n")
    assert [result.label for result in names["results"]] == ["stock", "yarn", "auto"]
    # What is saved is stock's, and what is exported the plan's.
    assert names["model"].config.max_position_embeddings == 8192
