"""Fixtures shared by the suite: no network, small random models."""

import contextlib
import os
import tempfile
from pathlib import Path

# torch's compiler imports setuptools, which refuses to where the standard library's distutils came first.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

# torch's compiler keeps kernels without regard to this variable: those made with it corrupt memory without, and the
# other way round.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    kept = Path(tempfile.gettempdir()) / f"torchinductor_{capability}_{getattr(os, 'getuid', int)()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))

# Workers share the processors: with all of them each, the threads of one wait for those of another.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

# Nothing in the suite may wait for a hub that is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")


def llama_config(**changes):
    """A LLaMA of two layers, grouped keys and 64 trained tokens."""
    from transformers import LlamaConfig

    values = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**values, **changes})


@pytest.fixture
def stock_again():
    """Whatever a test leaves enabled, the next starts from stock."""
    import rope_dist

    yield
    rope_dist.disable()


@pytest.fixture
def one_thread():
    """For many small models: threads of a pool wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_llama():
    """Random LLaMAs in evaluation mode: ``make_llama(**config_changes)``."""

    def make(**changes):
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(llama_config(**changes)).eval()

    return make


@pytest.fixture
def llama(make_llama):
    return make_llama()


@pytest.fixture
def ids():
    return torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))


def letter_tokenizer():
    """A tokenizer of single ASCII letters: a token a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=chr(2), pad_token=chr(0))


@pytest.fixture
def letters():
    return letter_tokenizer()


@pytest.fixture
def model_directory(letters, tmp_path):
    """A LLaMA of one layer and a tokenizer of single letters, saved as any model is."""
    from transformers import LlamaForCausalLM

    letters.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(num_hidden_layers=1)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def bfloat16_attention():
    """Skip where torch cannot attend in bfloat16.

    With ATEN_CPU_CAPABILITY below what the processor has it still packs for AVX-512, unless oneDNN is held back too.
    """
    x = torch.zeros(1, 1, 128, 16, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    except RuntimeError as error:
        pytest.skip(
            f"torch: {error}: set ONEDNN_MAX_CPU_ISA with ATEN_CPU_CAPABILITY (AVX2, or SSE41 for default)"
        )
