"""What the export tests share: another process with transformers alone, a GGUF converter, llama.cpp."""

import json
import os
import subprocess
import sys

import numpy as np
import torch

_LOAD = """
import json, sys
sys.modules["rope_dist"] = None  # even where it is installed
import torch, transformers
source, ids, out, start = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
ids = torch.load(ids)
positions = torch.arange(int(start), int(start) + ids.shape[1])[None]
with torch.no_grad():
    logits = model(ids, position_ids=positions).logits
rotary = model.model.rotary_emb
torch.save(
    {
        "logits": logits[:, -32:],
        "inv_freq": rotary.inv_freq,
        "scaling": rotary.attention_scaling,
        "class": type(rotary).__module__,
        "version": transformers.__version__,
    },
    out,
)
"""


def stock_run(directory, ids, tmp_path, path="", start=0):
    """What stock transformers makes of ``ids`` from position ``start`` on, in a process without this package."""
    torch.save(ids, tmp_path / "ids.pt")
    environment = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    files = (directory, tmp_path / "ids.pt", tmp_path / "out.pt")
    command = [sys.executable, "-c", _LOAD, *map(str, files), str(start)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "out.pt")


def write_gguf(model, path, **fields):
    """A LLaMA as an F32 GGUF with a vocabulary of plain words, as the stock converter writes it: no factors.

    ``arch`` names another architecture for it; by default that of the model (Qwen2, Qwen3 and Gemma too). ``factors``
    ``[R/2]`` become its ``rope_freqs.weight``, as of Llama 3.
    """
    import gguf

    config, factors = model.config, fields.pop("factors", None)
    writer = gguf.GGUFWriter(path, fields.pop("arch", config.model_type))
    writer.add_context_length(fields.pop("context_length", config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = model.model.layers[0].self_attn.head_dim
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        [b"<unk>", b"<s>", b"</s>", *(f"w{i} ".encode() for i in range(3, config.vocab_size))]
    )
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3, *[1] * (config.vocab_size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if "alignment" in fields:
        writer.add_custom_alignment(fields.pop("alignment"))
    for key, value_and_types in fields.items():
        writer.add_key_value(key.replace("__", "."), *value_and_types)
    for name, tensor in _gguf_tensors(model):
        writer.add_tensor(name, np.ascontiguousarray(tensor.detach().float().numpy()))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_tensors(model):
    config, decoder = model.config, model.model
    gemma = config.model_type == "gemma"

    def adjacent(weight, heads):
        # llama.cpp rotates neighbours where Hugging Face rotates halves, in this architecture.
        if config.model_type != "llama":
            return weight
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    yield "token_embd.weight", decoder.embed_tokens.weight
    yield "output_norm.weight", decoder.norm.weight + gemma
    if not gemma:
        yield "output.weight", model.lm_head.weight
    for i, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"blk.{i}.attn_q.weight", adjacent(attention.q_proj.weight, config.num_attention_heads)
        yield f"blk.{i}.attn_k.weight", adjacent(attention.k_proj.weight, config.num_key_value_heads)
        yield f"blk.{i}.attn_v.weight", attention.v_proj.weight
        yield f"blk.{i}.attn_output.weight", attention.o_proj.weight
        yield f"blk.{i}.ffn_gate.weight", mlp.gate_proj.weight
        yield f"blk.{i}.ffn_up.weight", mlp.up_proj.weight
        yield f"blk.{i}.ffn_down.weight", mlp.down_proj.weight
        yield f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight + gemma
        yield f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight + gemma
        for name in ("q", "k", "v"):
            bias = getattr(attention, f"{name}_proj").bias
            if bias is not None:
                yield f"blk.{i}.attn_{name}.bias", bias
        for name in ("q", "k"):
            norm = getattr(attention, f"{name}_norm", None)
            if norm is not None:
                yield f"blk.{i}.attn_{name}_norm.weight", norm.weight


class LlamaCpp:
    """llama.cpp with float32 caches on one thread: greedy tokens and log-probabilities of token ids."""

    def __init__(self, path, n_ctx, threads=1, flags=()):
        import xllamacpp

        p = xllamacpp.CommonParams()
        p.model.path = str(path)
        p.n_ctx, p.n_parallel, p.warmup, p.verbosity = n_ctx, 1, False, -1
        p.fit_params, p.cache_ram_mib, p.n_ctx_checkpoints = False, 0, 0
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            # As common/arg.cpp sets them.
            if flag == "--rope-scaling":
                kind = f"LLAMA_ROPE_SCALING_TYPE_{value.upper()}"
                p.rope_scaling_type = getattr(xllamacpp.llama_rope_scaling_type, kind)
            elif flag == "--rope-scale":
                p.rope_freq_scale = 1 / float(value)
            elif flag == "--yarn-orig-ctx":
                p.yarn_orig_ctx = int(value)
            else:
                name = flag.removeprefix("--").replace("-", "_")
                assert hasattr(p, name), flag
                setattr(p, name, float(value))
        self.server = xllamacpp.Server(p)

    def greedy(self, ids, count, forbidden=()):
        """``count`` tokens after ``ids`` and the log-probability of each."""
        return self._ask(ids, n_predict=count, logit_bias=[[token, False] for token in forbidden])

    def log_probability(self, ids, token):
        """Of ``token`` after ``ids``: it is forced, and its log-probability is that before the forcing."""
        tokens, values = self._ask(ids, n_predict=1, logit_bias=[[token, 1000.0]])
        assert tokens == [token]
        return values[0]

    def _ask(self, ids, **options):
        request = {"prompt": ids, "temperature": 0.0, "n_probs": 1, "cache_prompt": True, **options}
        answer = self.server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        assert "choices" in answer, answer
        entries = answer["choices"][0]["logprobs"]["content"]
        return [e["id"] for e in entries], [e["logprob"] for e in entries]
