"""Every known form of rotation against its definition, and the tables that rotary embeddings make."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, LlamaConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import rope_dist
from rope_dist import ops
from rope_dist.hf.applying import keep_pairs, kept_pairs, replacement, rotate
from rope_dist.hf.forms import Form, Unsupported, known_forms, stock_file
from rope_dist.hf.projecting import project_and_rotate
from rope_dist.hf.rotary_embedding import check_tables

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = [form for form in dict.fromkeys(known_forms().values()) if not form.refused]
BATCH, HEADS, KV_HEADS, TOKENS, PAIRS = 2, 4, 2, 5, 4


def stock_of_two(q, k, cos, sin, unsqueeze_dim=1):
    raise AssertionError("stock was called")


def stock_with_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    raise AssertionError("stock was called")


def stock_of_one(x, cos, sin, unsqueeze_dim=1):
    raise AssertionError("stock was called")


def stock_of_complex(xq, xk, freqs_cis):
    raise AssertionError("stock was called")


def defined(form, x, angles):
    """``x`` [..., D] in float64, each pair a complex number that is multiplied by ``exp(i angle)``, one by one."""
    x, angles = x.double(), angles.double()
    rotary_dim = 2 * angles.shape[-1]
    start = x.shape[-1] - rotary_dim if form.last else 0
    out = list(x.unbind(-1))
    for i in range(rotary_dim // 2):
        neighbours, halves = (2 * i, 2 * i + 1), (i, i + rotary_dim // 2)
        read = halves if form.layout == "half" else neighbours
        written = neighbours if form.layout == "interleaved" else halves
        pair = torch.complex(x[..., start + read[0]], x[..., start + read[1]])
        angle = -angles[..., i] if form.negative else angles[..., i]
        turned = pair * torch.exp(1j * angle)
        out[start + written[0]], out[start + written[1]] = turned.real, turned.imag
    return torch.stack(out, -1)


def tables_of(form, angles):
    if form.tables == "complex":
        return (torch.polar(torch.ones_like(angles), angles),)
    both = {"twice": [angles, angles], "once": [angles]}
    if form.tables == "pairs":
        angles = torch.stack((angles, angles), -1).flatten(-2)
    else:
        angles = torch.cat(both[form.tables], -1)
    return angles.cos(), angles.sin()


def inputs(head_dim, dtype, heads_axis, heads=(HEADS, KV_HEADS)):
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for number in heads:
        x = torch.randn(BATCH, number, TOKENS, head_dim, generator=generator).to(dtype)
        tensors.append((x if heads_axis == 1 else x.transpose(1, 2).contiguous()).requires_grad_())
    return tensors, torch.randn(BATCH, TOKENS, PAIRS, generator=generator) * 3


def check(form, ours, head_dim, dtype, heads_axis, heads=(HEADS, KV_HEADS)):
    """Values and gradients against the definition."""
    tensors, angles = inputs(head_dim, dtype, heads_axis, heads)
    # From the tables that are given, which are rounded.
    tables = tables_of(form, angles)
    found = ours(*tensors, *tables)
    found = found if isinstance(found, tuple) else (found,)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = [defined(form, x, angles.unsqueeze(heads_axis)) for x in exact]
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype) for x in found]
    torch.autograd.backward(found, weights)
    torch.autograd.backward(expected, [w.double() for w in weights])
    limit = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    for x, y, a, b in zip(found, expected, tensors, exact, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, **limit)
        torch.testing.assert_close(a.grad.double(), b.grad, **limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [2 * PAIRS, 2 * PAIRS + 4], ids=["whole", "partial"])
@pytest.mark.parametrize("form", FORMS, ids=str)
class TestForms:
    def test_of_two_tensors(self, form, head_dim, dtype):
        if form.tables == "complex":
            check(form, replacement(form, stock_of_complex), head_dim, dtype, form.heads_axis)
            return
        for stock in (stock_of_two, stock_with_positions):
            ours = replacement(form, stock)
            check(form, ours, head_dim, dtype, 1)
            check(form, lambda *x, ours=ours: ours(*x, unsqueeze_dim=2), head_dim, dtype, 2)

    def test_of_one_tensor(self, form, head_dim, dtype):
        if form.tables == "complex":
            assert "x" not in inspect.signature(stock_of_complex).parameters
            return
        ours = replacement(form, stock_of_one)
        check(form, ours, head_dim, dtype, 1, heads=(HEADS,))
        check(form, lambda *x: ours(*x, unsqueeze_dim=2), head_dim, dtype, 2, heads=(HEADS,))


@pytest.mark.parametrize("sections", [[2, 1, 1], [1, 1, 2], [1, 1, 1, 1]], ids=str)
def test_sections_of_position_axes(sections):
    """Of transformers before 5.17: tables of three axes, one after the other and again."""

    def stock(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
        raise AssertionError("stock was called")

    ours = replacement(Form(), stock)
    (q, k), angles = inputs(2 * PAIRS, torch.float32, 1)
    axes = torch.stack((angles, angles + 1, angles - 2))
    tables = [torch.cat((table, table), -1) for table in (axes.cos(), axes.sin())]
    axis = [i % 3 for i, n in enumerate(sections) for _ in range(n)]
    chosen = torch.stack([axes[a, ..., pair] for pair, a in enumerate(axis)], -1)
    for found, x in zip(ours(q, k, *tables, sections), (q, k), strict=True):
        torch.testing.assert_close(found.double(), defined(Form(), x, chosen[:, None]), rtol=1e-5, atol=1e-5)


def test_other_parameters_are_refused():
    def stock(q, k, sin, cos, unsqueeze_dim=1): ...

    with pytest.raises(Unsupported, match="parameters that are not known: q, k, sin, cos, unsqueeze_dim"):
        replacement(Form(), stock)


LEFT_TO_STOCK = {
    "keys of another length": ((2, 4, 5, 8), (2, 2, 1, 8), (2, 5, 8)),
    "tables of one token": ((2, 4, 5, 8), (2, 2, 5, 8), (1, 1, 8)),
    "queries of three axes": ((4, 5, 8), (2, 2, 5, 8), (1, 5, 8)),
    "keys of three axes": ((1, 2, 5, 8), (2, 5, 8), (1, 5, 8)),
    "tables of four axes": ((2, 4, 5, 8), (2, 2, 5, 8), (3, 1, 5, 8)),
}


class TestLeftToStock:
    """What the kernels do not take."""

    @pytest.fixture(autouse=True)
    def no_kernels(self, monkeypatch):
        def called(*args, **kwargs):
            raise AssertionError("the kernels were called")

        monkeypatch.setattr(ops, "rotary", called)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", LEFT_TO_STOCK)
    def test_shapes(self, name, dtype):
        q, k, table = (torch.randn(shape) for shape in LEFT_TO_STOCK[name])
        q, k = q.to(dtype), k.to(dtype)
        found = replacement(Form(), apply_rotary_pos_emb)(q, k, table.cos(), table.sin())
        expected = apply_rotary_pos_emb(q, k, table.cos().to(dtype), table.sin().to(dtype))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b)

    @pytest.mark.parametrize("positions", [False, True])
    def test_the_axis_of_the_heads(self, positions):
        def with_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
            assert position_ids is None
            return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

        stock = with_positions if positions else apply_rotary_pos_emb
        q, k, table = torch.randn(2, 5, 4, 8), torch.randn(2, 1, 2, 8), torch.randn(2, 5, 8)
        expected = apply_rotary_pos_emb(q, k, table.cos(), table.sin(), unsqueeze_dim=2)
        found = replacement(Form(), stock)(q, k, table.cos(), table.sin(), unsqueeze_dim=2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        found = rotate(Form(), stock, q, k, table.cos(), table.sin(), 2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_in_the_call_that_projects(self):
        def with_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
            return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)

        attention, x = Attention(), torch.randn(2, 5, 8)
        cos = torch.randn(1, 5, 8, requires_grad=True)
        q, k, v = project_and_rotate(Form(), with_positions, False, attention, x, 8, cos, cos)
        stock = [p(x).view(2, 5, -1, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        expected = *apply_rotary_pos_emb(*stock[:2], cos, cos, unsqueeze_dim=2), stock[2]
        assert all(torch.equal(a, b) for a, b in zip((q, k, v), expected, strict=True))

    def test_trained_tables(self):
        q, k, table = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(1, 5, 8)
        gradients = []
        for rotation in (apply_rotary_pos_emb, replacement(Form(), apply_rotary_pos_emb)):
            angles = table.clone().requires_grad_()
            sum(x.square().sum() for x in rotation(q, k, angles.cos(), angles.sin() * 2)).backward()
            gradients.append(angles.grad)
        assert gradients[0].abs().max() > 1
        assert torch.equal(*gradients)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_complex_tables_of_one_token(self, dtype):
        q, k = torch.randn(2, 4, 5, 8).to(dtype), torch.randn(2, 2, 5, 8).to(dtype)
        freqs_cis = torch.polar(torch.ones(1, 1, 4), torch.randn(1, 1, 4))
        form = Form("interleaved", "complex")
        found = replacement(form, apply_rotary_emb)(q, k, freqs_cis)
        for a, b in zip(found, apply_rotary_emb(q, k, freqs_cis), strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b)


class TestKeptTables:
    """What the kernels read of stock's tables, made once a forward pass."""

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_a_copy_of_the_tables_gives_the_same(self, form):
        tensors, angles = inputs(2 * PAIRS, torch.float32, form.heads_axis)
        tables = tables_of(form, angles)
        keep_pairs(form.tables, tables[0] if form.tables == "complex" else tables)
        copies = [table.clone() for table in tables]
        stock = stock_of_complex if form.tables == "complex" else stock_of_two
        ours = replacement(form, stock)
        for a, b in zip(ours(*tensors, *tables), ours(*tensors, *copies), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("tables", ["twice", "pairs"])
    def test_they_are_used(self, tables):
        cos, sin = tables_of(Form(tables=tables), torch.randn(1, TOKENS, PAIRS))
        first = [x.data_ptr() for x in kept_pairs(tables, cos, sin)]
        keep_pairs(tables, (cos, sin))
        kept = kept_pairs(tables, cos, sin)
        assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in kept_pairs(tables, cos, sin)] != first
        assert all(x.is_contiguous() and x.shape == (1, TOKENS, PAIRS) for x in kept)

    @pytest.mark.parametrize(
        "change", [lambda x: x * 2, lambda x: x[:, :3], lambda x: x.to(torch.float64), copy.copy]
    )
    def test_other_tables_are_other_tables(self, change):
        cos, sin = tables_of(Form(), torch.randn(1, TOKENS, PAIRS))
        keep_pairs("twice", (cos, sin))
        for found, table in zip(kept_pairs("twice", change(cos), change(sin)), (cos, sin), strict=True):
            assert torch.equal(found, change(table)[..., :PAIRS])


class PairsOfTwoAngles(LlamaRotaryEmbedding):
    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        half = cos.shape[-1] // 2
        # The second of each pair is one position on, as by sections across whole heads.
        later = super().forward(x, position_ids + 1)
        return [torch.cat((a[..., :half], b[..., half:]), -1) for a, b in zip((cos, sin), later, strict=True)]


class NoAngles(LlamaRotaryEmbedding):
    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq
        freqs = torch.cat((freqs, freqs), -1)
        return freqs, 1 - freqs


class NoTables(LlamaRotaryEmbedding):
    def forward(self, x, position_ids):
        raise RuntimeError


class TestTables:
    CONFIG = LlamaConfig(hidden_size=32, num_attention_heads=4)

    def test_of_stock(self):
        check_tables(LlamaRotaryEmbedding(self.CONFIG), Form())

    @pytest.mark.parametrize("tables", ["pairs"])
    def test_of_another_form(self, tables):
        with pytest.raises(
            Unsupported, match="LlamaRotaryEmbedding gives the two dimensions of a pair different"
        ):
            check_tables(LlamaRotaryEmbedding(self.CONFIG), Form(tables=tables))

    @pytest.mark.parametrize(
        ("rotary", "reason"),
        [
            (PairsOfTwoAngles, "gives the two dimensions of a pair different angles"),
            (NoAngles, "are not cos and sin of an angle"),
            (NoTables, "makes no tables from positions"),
        ],
    )
    def test_refused(self, rotary, reason):
        with pytest.raises(Unsupported, match=f"{rotary.__name__}.* {reason}"):
            check_tables(rotary(self.CONFIG), Form())

    def test_hunyuan_vl_gives_a_pair_two_positions(self):
        """Its sections go over the whole head: of three axes that differ the pairs get two."""
        stock = pytest.importorskip("transformers.models.hunyuan_vl.modeling_hunyuan_vl")
        config = stock.HunYuanVLTextConfig(
            hidden_size=64, num_attention_heads=4, head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]},
        )  # fmt: skip
        rotary = stock.HunYuanVLRotaryEmbedding(config)
        tokens = torch.arange(3) + 1
        cos, _ = rotary(torch.zeros(1), torch.stack([tokens * (axis + 1) for axis in range(4)])[:, None])
        assert not torch.equal(cos[..., :8], cos[..., 8:])
        with pytest.raises(Unsupported, match="different angles"):
            check_tables(rotary, Form())
        assert rope_dist.supported("hunyuan_vl")["hunyuan_vl"].path == "refused"

    @pytest.mark.parametrize(
        ("model_type", "class_name"),
        [
            ("qwen2_vl", "Qwen2VLRotaryEmbedding"),
            ("qwen2_5_vl", "Qwen2_5_VLRotaryEmbedding"),
            ("qwen3_vl", "Qwen3VLTextRotaryEmbedding"),
            ("qwen3_5", "Qwen3_5TextRotaryEmbedding"),
            ("glm4v", "Glm4vTextRotaryEmbedding"),
        ],
    )
    def test_of_several_position_axes(self, model_type, class_name):
        module = pytest.importorskip(f"transformers.models.{model_type}.modeling_{model_type}")
        config = CONFIG_MAPPING[f"{model_type}_text"]()
        pairs = getattr(module, class_name)(config).inv_freq.numel()
        config.rope_parameters["mrope_section"] = [pairs // 2, pairs // 4, pairs // 4]
        rotary = getattr(module, class_name)(config)
        file = stock_file(module.__name__)
        (name,) = {"apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb"} & file.functions.keys()
        check_tables(rotary, file.form(name))
        # They do use the axes.
        tokens = torch.arange(4)
        one, three = (
            rotary(torch.zeros(1), torch.stack([tokens, tokens * scale, tokens * scale])[:, None])[0]
            for scale in (1, 2)
        )
        assert not torch.equal(one, three)
