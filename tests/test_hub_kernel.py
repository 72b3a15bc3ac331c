"""The kernel for the hub (tools/hub_kernel): its files, and its layers in the place of every stock function."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import subprocess
import sys
import tomllib

import pytest
import torch
import transformers
from helpers import hub_kernel as hub
from helpers.tiny_models import NOT_BUILT, ROTARY_TYPES, model_class, tiny_model
from transformers.utils.import_utils import is_kernels_available

import rope_dist
from rope_dist import ops
from rope_dist.hf import forms
from tools import hub_kernel

pytestmark = [
    pytest.mark.usefixtures("stock_again", "one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning:transformers"),
]

TWO, ONE = ["q", "k", "cos", "sin", "unsqueeze_dim"], ["x", "cos", "sin", "unsqueeze_dim"]
FUNCTIONS = {f.model: f for f in hub.stock_functions(TWO)}
SINGLE = {f.model: f for f in hub.stock_functions(ONE)}
LAYOUTS = {"twice": "cat", "pairs": "repeat_interleave", "once": "half"}


def layer(count=2):
    layers = hub.kernel().layers
    return layers.apply_rotary_transformers if count == 2 else layers.apply_rotary_transformers_single


def replaced():
    return sys.modules[f"{hub.kernel().__name__}.replaced"]


# --- files ---------------------------------------------------------------------------------------


def test_repository():
    root = hub.repository()
    build = tomllib.loads((root / "build.toml").read_text())
    assert build["general"]["edition"] == 5
    assert "torch-noarch" in build
    # kernel-builder writes _ops.py itself, and refuses to overwrite one.
    package = root / "torch-ext" / build["general"]["name"].replace("-", "_")
    assert not (package / "_ops.py").exists()
    for name in (
        "CARD.md",
        "LICENSE",
        "flake.nix",
        "benchmarks/benchmark.py",
        "tests/test_rope_dist_rotary.py",
    ):
        assert (root / name).is_file(), name
    for backend in build["general"]["backends"]:
        variant = root / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["name"] == build["general"]["name"]
        assert metadata["id"].isidentifier()
        assert metadata["backend"] == {"type": backend}
        assert set(metadata["digest"]["files"]) == {p.name for p in package.iterdir()} | {"_ops.py"}


def test_imports_stay_within_torch_triton_and_the_kernel():
    for path in (hub.repository() / "torch-ext").rglob("*.py"):
        # Nothing newer than the Python that the kernels library asks for.
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(m == "_ops" or path.with_name(f"{m}.py").exists() for m in modules), path
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                allowed = {*sys.stdlib_module_names, "torch", "triton"}
                assert {name.partition(".")[0] for name in names} <= allowed, path


def test_copies_are_the_package_s_own():
    for name in hub_kernel.VENDORED:
        copied = (hub.repository() / "torch-ext" / hub_kernel.PACKAGE / f"{name}.py").read_text()
        assert copied.endswith((hub_kernel.ROOT / "rope_dist" / "ops" / f"{name}.py").read_text())


def test_repository_of_the_hub(tmp_path):
    hub_kernel.write(tmp_path / "out", repo_id="someone/rotary")
    build = tomllib.loads((tmp_path / "out" / "build.toml").read_text())
    assert build["general"]["hub"] == {"repo-id": "someone/rotary"}
    with pytest.raises(ValueError, match="exists"):
        hub_kernel.write(tmp_path / "out")
    with pytest.raises(ValueError, match="OWNER/NAME"):
        hub_kernel.write(tmp_path / "other", repo_id="rotary")
    assert not (tmp_path / "other").exists()


def test_loads_without_this_package(tmp_path):
    variant = hub.variant(hub.repository())
    script = f"""
import importlib.util, sys
sys.modules["rope_dist"] = None
spec = importlib.util.spec_from_file_location("_a_kernel", {str(variant / "__init__.py")!r})
module = sys.modules["_a_kernel"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
x, angles = torch.randn(1, 2, 3, 8), torch.rand(1, 3, 4).repeat(1, 1, 2)
cos, sin = angles.cos(), angles.sin()
for found in module.apply_rotary_pos_emb(x, x, cos, sin):
    torch.testing.assert_close(found, x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_beside_this_package():
    q, k, cos, sin = tensors(torch.float32)
    for found, expected in zip(
        hub.kernel().apply_rotary_pos_emb(q, k, cos, sin),
        ops.apply_rotary_pos_emb(q, k, cos, sin),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert library().NAME.partition("::")[0] != "rope_dist"


# --- layers in the place of stock functions ------------------------------------------------------


def library():
    return sys.modules[f"{hub.kernel().__name__}.library"]


def tensors(dtype, heads=(4, 2), head_dim=16, width=None, twice=True, interleaved=False):
    generator = torch.Generator().manual_seed(3)
    width = width or head_dim
    q, k = (torch.randn(2, h, 5, head_dim, generator=generator, dtype=torch.float64) for h in heads)
    angles = torch.rand(1, 5, width // 2 if twice else width, generator=generator, dtype=torch.float64) * 9
    if twice:
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return q.to(dtype), k.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def outcome(function, heads, cos, sin):
    """Values and gradients, or the kind of the error."""
    heads = [x.detach().clone().requires_grad_() for x in heads]
    try:
        out = function(*heads, cos, sin)
    except Exception as error:
        return type(error)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    torch.autograd.backward(out, [torch.cos(torch.arange(x.numel())).view_as(x).to(x) for x in out])
    return out, [x.grad for x in heads]


def assert_same(function, count, *arguments):
    """The layer's values and gradients are the function's, or it fails as the function does."""
    *heads, cos, sin = arguments
    expected = outcome(function, heads[:count], cos, sin)
    found = outcome(hub.kernelized(function, layer(count)), heads[:count], cos, sin)
    if isinstance(expected, type):
        assert found is expected
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # some compute in float32
    return expected


def tables_of(stock):
    """Tables for a whole head of 16, and for half of it, as the models of a function make them."""
    if stock.form.tables == "once":
        return [{"width": 8, "twice": False}, {"width": 4, "twice": False}]
    return [{"width": width, "interleaved": stock.form.tables == "pairs"} for width in (16, 8)]


@pytest.mark.parametrize("model", FUNCTIONS)
def test_layer_is_the_stock_function(model):
    stock = FUNCTIONS[model]
    whole, part = tables_of(stock)
    assert not isinstance(assert_same(stock.function, 2, *tensors(torch.float64, **whole)), type)
    assert_same(stock.function, 2, *tensors(torch.float64, **part))
    assert_same(stock.function, 2, *tensors(torch.float64, heads=(4, 1), **whole))
    if stock.is_slot:  # the kernel rotates, not the function
        form = replaced()._known(type(hub.kernelized(stock.function, layer())), 2, 16, whole["width"])
        wanted = (stock.form.layout == "interleaved", LAYOUTS[stock.form.tables], stock.form.negative)
        assert form[:3] == wanted


@pytest.mark.parametrize("model", SINGLE)
def test_layer_of_one_tensor(model):
    stock = SINGLE[model]
    for options in tables_of(stock):
        assert_same(stock.function, 1, *tensors(torch.float64, **options))


def test_function_that_is_no_rotation_stays(caplog):
    def scaled(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return 2 * q * cos + q.roll(1, -1) * sin, k * cos

    assert_same(scaled, 2, *tensors(torch.float64))
    assert "stays as it is" in caplog.text


def llama():
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    return forms.stock_file(module.__name__).function(hub.FUNCTION)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q, k, cos[:, :1], sin[:, :1]),  # one token's tables for all
        lambda q, k, cos, sin: (q, k[:, :, :1], cos, sin),
        lambda q, k, cos, sin: (q, k.float(), cos, sin),
        lambda q, k, cos, sin: (q.float(), k.float(), cos, sin),  # wider tables widen the heads
        lambda q, k, cos, sin: (q, k, cos.requires_grad_(), sin),
        lambda q, k, cos, sin: (q[..., :8], k, cos, sin),
        lambda q, k, cos, sin: (q[:, None], k[:, None], cos[:, None], sin[:, None]),
    ],
)  # fmt: skip
def test_what_the_kernel_does_not_take_stays_with_the_function(change):
    arguments = change(*tensors(torch.float64))
    expected, found = (
        outcome(f, arguments[:2], *arguments[2:]) for f in (llama(), hub.kernelized(llama(), layer()))
    )
    if isinstance(expected, type):
        assert found is expected
        return
    assert [x.dtype for x in found[0]] == [x.dtype for x in expected[0]]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_autocast_keeps_the_narrow_dtype():
    q, k, cos, sin = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hub.kernelized(llama(), layer())(q.bfloat16(), k.bfloat16(), cos, sin)
    expected = llama()(q.bfloat16(), k.bfloat16(), cos, sin)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(found, expected, strict=True))


def test_bfloat16_is_rounded_once():
    q, k, cos, sin = tensors(torch.bfloat16)
    exact = llama()(q.double(), k.double(), cos.double(), sin.double())
    for found, wide in zip(hub.kernelized(llama(), layer())(q, k, cos, sin), exact, strict=True):
        assert torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize("model", [model for model, stock in FUNCTIONS.items() if stock.is_slot])
def test_compiles_without_graph_breaks(model):
    function = FUNCTIONS[model].function
    q, k, cos, sin = tensors(torch.float64, **tables_of(FUNCTIONS[model])[0])
    torch.compiler.reset()
    module = hub.kernelized(function, layer())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    found, expected = outcome(compiled, (q, k), cos, sin), outcome(function, (q, k), cos, sin)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
    assert any("rope_dist_rotary" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("has_k", [True, False])
def test_operator(flags, has_k):
    q, k, cos, sin = tensors(torch.float64, width=4, twice=False)
    q, k = (x.transpose(1, 2).requires_grad_() for x in (q, k))
    operator = getattr(torch.ops, library().NAME.partition("::")[0]).rotate
    torch.library.opcheck(operator.default, (q, k if has_k else None, cos, sin, *flags))


def test_transforms():
    q, k, cos, sin = tensors(torch.float64)
    rotate = hub.kernel().apply_rotary_pos_emb
    weights = torch.randn_like(q)

    def loss(function):
        return lambda q: (function(q, k, cos, sin)[0] * weights).sum()

    torch.testing.assert_close(torch.func.grad(loss(rotate))(q), torch.func.grad(loss(llama()))(q))
    many = torch.stack((q, 2 * q))
    torch.testing.assert_close(
        torch.func.vmap(lambda q: rotate(q, k, cos, sin)[0])(many), torch.stack((llama()(q, k, cos, sin)[0],) * 2)
        * torch.tensor([1.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1, 1),
    )  # fmt: skip
    torch.testing.assert_close(
        torch.func.grad(loss(hub.kernelized(llama(), layer())))(q), torch.func.grad(loss(llama()))(q)
    )


def test_layer_by_itself():
    q, k, cos, sin = tensors(torch.float64)
    torch.testing.assert_close(layer()()(q, k, cos, sin), llama()(q, k, cos, sin))
    torch.testing.assert_close(layer(1)()(q, cos, sin), llama()(q, k, cos, sin)[0])
    with pytest.raises(ValueError, match="table_layout"):  # half of the head, or each value once?
        layer()()(q, k, cos[..., :8], sin[..., :8])


# --- models --------------------------------------------------------------------------------------

SLOTS = hub.slots()
TYPES = [name for name in ROTARY_TYPES if name not in NOT_BUILT and model_class(name).__module__ in SLOTS]
IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))


def slot_model(name):
    """A tiny model that calls the function: latent attention calls another one for interleaved pairs."""
    model = tiny_model(name)
    if getattr(model.config, "rope_interleave", False):
        model.config.rope_interleave = False
    return model


def logits_and_gradients(model):
    model.train()
    model.zero_grad()
    torch.manual_seed(5)
    output = model(IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    return output.logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TYPES)
def test_models(name, monkeypatch):
    """Each model whose file has the slot, as it calls the function and with its own tables."""
    model = slot_model(name)
    expected = logits_and_gradients(model)
    module = importlib.import_module(model_class(name).__module__)
    stock, calls = forms.stock_file(module.__name__).function(hub.FUNCTION), []

    def watched(*args, **kwargs):
        calls.append(args)
        return stock(*args, **kwargs)

    monkeypatch.setattr(module, hub.FUNCTION, hub.kernelized(watched, layer()))
    found = logits_and_gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # The function was tried on the CPU's numbers, and never asked for the model's.
    assert calls
    assert all(x.dtype == torch.float64 or x.shape[0] == 1 for x, *_ in calls)


# --- the kernels library -------------------------------------------------------------------------

KERNELS = is_kernels_available()
needs_kernels = pytest.mark.skipif(
    not KERNELS,
    reason=f"transformers {transformers.__version__} finds no kernels that it takes: nox -s kernels installs both",
)
# Of each kind one. DeepSeek's function has the slot, but no module is told of it: kernelize() does not reach it.
KERNELIZED = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "phi", "gpt_oss", "nanochat", "olmo2")
KERNELIZED = [name for name in KERNELIZED if name in TYPES]


@pytest.fixture
def kernelize():
    """``kernelize(model, mode)`` with the local repository; afterwards every function is stock's again."""
    import kernels

    repository = kernels.LocalLayerRepository(hub.repository(), layer_name=layer().__name__)
    mapping = {"rotary_pos_emb": {"cpu": repository}}
    functions = set()

    def run(model, mode):
        function = vars(sys.modules[type(model).__module__])[hub.FUNCTION]
        functions.add(function)
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            kernels.kernelize(model, mode=mode, device="cpu", use_fallback=True)
        assert function.forward.__func__.__qualname__.startswith(layer().__name__)

    yield run
    for function in functions:
        del function.forward


@needs_kernels
def test_kernels_accepts_the_repository():
    import kernels
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    assert len(Build.open(hub.repository()).general.backends) == 3
    for variant in (hub.repository() / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    module = kernels.get_local_kernel(hub.repository())
    q, k, cos, sin = tensors(torch.float64)
    torch.testing.assert_close(module.apply_rotary_pos_emb(q, k, cos, sin), llama()(q, k, cos, sin))


@needs_kernels
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", KERNELIZED)
def test_kernelized_for_training(name, compiled, kernelize):
    from kernels import Mode

    model = slot_model(name)
    expected = logits_and_gradients(model)
    kernelize(model, Mode.TRAINING | Mode.TORCH_COMPILE if compiled else Mode.TRAINING)
    torch.testing.assert_close(logits_and_gradients(model), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("name", KERNELIZED)
def test_kernelized_for_inference(name, kernelize):
    from kernels import Mode

    model = slot_model(name).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        expected, tokens = model(IDS).logits, model.generate(IDS, **options)
        kernelize(model, Mode.INFERENCE)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(IDS, **options), tokens)


@needs_kernels
def test_kernelized_and_compiled(kernelize):
    from kernels import Mode

    model = slot_model("llama").eval()
    with torch.no_grad():
        expected = model(IDS).logits
        kernelize(model, Mode.INFERENCE | Mode.TORCH_COMPILE)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("enabled_first", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_kernelized_and_enabled(name, enabled_first, kernelize):
    from kernels import Mode

    model = slot_model(name)
    expected = logits_and_gradients(copy.deepcopy(model))
    if enabled_first:
        rope_dist.enable(model)
    kernelize(model, Mode.TRAINING)
    if not enabled_first:
        rope_dist.enable(model)
    torch.testing.assert_close(logits_and_gradients(model), expected, rtol=1e-5, atol=1e-5)
    rope_dist.disable(model)
    torch.testing.assert_close(logits_and_gradients(model), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_use_kernels():
    """As ``from_pretrained(use_kernels=True)`` ends; a KernelConfig takes no CPU."""
    import kernels

    model = slot_model("llama")
    expected = logits_and_gradients(model)
    repository = kernels.LocalLayerRepository(hub.repository(), layer_name=layer().__name__)
    function = vars(sys.modules[type(model).__module__])[hub.FUNCTION]
    try:
        with kernels.use_kernel_mapping({"rotary_pos_emb": {"cpu": repository}}):
            model.set_use_kernels(True)
        assert function.forward.__func__.__qualname__.startswith(layer().__name__)
        torch.testing.assert_close(logits_and_gradients(model), expected, rtol=1e-5, atol=1e-5)
    finally:
        vars(function).pop("forward", None)
