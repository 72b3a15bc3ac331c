"""Projections and rotation in one call: which stock sources are rewritten, which are not, and that results stay."""

import ast
from types import FunctionType

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from rope_dist.hf.forms import Form
from rope_dist.hf.fusing import fused, why_separate
from rope_dist.hf.projecting import project_and_rotate
from rope_dist.hf.source import condition

pytestmark = pytest.mark.usefixtures("one_thread")

APPLY = "apply_rotary_pos_emb"
SHAPE = """
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.head_dim)
"""
PROJECT = """
    query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
"""
ROTATE = """
    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
"""
RETURN = """
    return query_states, key_states, value_states
"""
HEAD = "def forward(self, hidden_states, position_embeddings, scale=2.0):"
LLAMA = HEAD + SHAPE + PROJECT + ROTATE + RETURN
UNDER_A_CONDITION = (
    HEAD
    + SHAPE
    + PROJECT
    + """
    if self.use_rope:
        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
"""
    + RETURN
)
IN_STEPS = (
    HEAD
    + """
    bsz, q_len, _ = hidden_states.size()
    query_states = self.q_proj(hidden_states)
    key_states = self.k_proj(hidden_states)
    value_states = self.v_proj(hidden_states)
    query_states = query_states.view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
    key_states = key_states.view(bsz, q_len, self.num_key_value_heads, self.head_dim).transpose(1, 2)
    value_states = value_states.view(bsz, q_len, self.num_key_value_heads, self.head_dim).transpose(1, 2)
"""
    + ROTATE
    + RETURN
)
NOT_TRANSPOSED = LLAMA.replace(".transpose(1, 2)", "").replace("cos, sin)\n", "cos, sin, unsqueeze_dim=2)\n")


def changed(source, *changes):
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    return source


def function_of(source):
    (function,) = ast.parse(source).body
    return function


def fusion(source):
    return fused(function_of(source), APPLY, "stock.py")


REWRITTEN = {
    "llama": LLAMA,
    "under a condition": UNDER_A_CONDITION,
    "under a condition of the tables": changed(
        UNDER_A_CONDITION, ("self.use_rope", "position_embeddings is not None")
    ),
    "in steps": IN_STEPS,
    "not transposed": NOT_TRANSPOSED,
    "reshape": changed(LLAMA, (".view(", ".reshape(")),
    "a starred shape": changed(LLAMA, (".view(hidden_shape)", ".view(*hidden_shape)")),
    "the shape in place": changed(
        LLAMA, (".view(hidden_shape)", ".view(*hidden_states.shape[:-1], -1, self.config.head_dim)")
    ),
    "sizes by method": changed(
        IN_STEPS, ("bsz, q_len, _ = hidden_states.size()", "bsz = hidden_states.size(0)"),
        ("bsz, q_len, self.num", "bsz, -1, self.num"),
    ),
    "values first": HEAD + SHAPE + "\n".join(PROJECT.splitlines()[::-1]) + ROTATE + RETURN,
    "another projection between": changed(
        LLAMA, ("    cos, sin = p", "    gate = self.g_proj(hidden_states)\n    cos, sin = p")
    ),
    "what follows": changed(
        LLAMA, ("    return", "    query_states = self.q_norm(query_states) * scale\n    return")
    ),
    "annotated, with a docstring": changed(
        LLAMA, ("scale=2.0):", '*, scale: float = 2.0) -> "T":\n    """It."""'),
        ("hidden_states, p", "hidden_states: object, p"),
    ),
}  # fmt: skip

Q = "query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)"
K = "key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)"
V = "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)"
TABLES = "cos, sin = position_embeddings"
CALL = "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)"

# What is not rewritten: a source above, what is replaced in it, and by what.
CHANGES = {
    # between projections and rotation
    "a norm between": (LLAMA, TABLES, f"query_states = self.q_norm(query_states)\n    {TABLES}"),
    "a norm around": (LLAMA, K, f"key_states = self.k_norm({K.partition(' = ')[2]})"),
    "a multiplier of the keys": (LLAMA, TABLES, f"key_states = key_states * self.multiplier\n    {TABLES}"),
    "a multiplier in place": (LLAMA, TABLES, f"key_states *= self.multiplier\n    {TABLES}"),
    "clamped": (LLAMA, TABLES, f"value_states.clamp_(-1, 1)\n    {TABLES}"),
    "clamped at once": (LLAMA, "self.v_proj(hidden_states)", "self.v_proj(hidden_states).clamp(-1, 1)"),
    "a part set": (LLAMA, TABLES, f"key_states[:, 0] = 0\n    {TABLES}"),
    "queries used": (LLAMA, TABLES, f"gate = self.g_proj(query_states)\n    {TABLES}"),
    "queries under another name": (LLAMA, TABLES, f"unrotated = query_states\n    {TABLES}"),
    "queries captured": (LLAMA, TABLES, f"later = lambda: query_states\n    {TABLES}"),
    "two targets": (LLAMA, K, f"unrotated = {K}"),
    "keys are the queries": (LLAMA, K, "key_states = query_states"),
    "values are the keys": (LLAMA, V, "value_states = key_states"),
    # what the projections read
    "x bound again": (LLAMA, K, f"hidden_states = self.norm(hidden_states)\n    {K}"),
    "x bound again after its shape": (LLAMA, Q, f"hidden_states = hidden_states.mT\n    {Q}"),
    "x added to": (LLAMA, K, f"hidden_states += 1\n    {K}"),
    "x changed in place": (LLAMA, K, f"hidden_states.mul_(scale)\n    {K}"),
    "x set in place": (LLAMA, K, f"hidden_states[0] = 0\n    {K}"),
    "x as output": (LLAMA, K, f"torch.mul(hidden_states, scale, out=hidden_states)\n    {K}"),
    "x deleted": (LLAMA, TABLES, f"del hidden_states\n    {TABLES}"),
    "two of x": (LLAMA, "self.k_proj(hidden_states)", "self.k_proj(encoder_hidden_states)"),
    "an attribute set": (LLAMA, TABLES, f"self.head_dim = 4\n    {TABLES}"),
    "a weight changed": (LLAMA, TABLES, f"self.k_proj.weight.mul_(2)\n    {TABLES}"),
    # projections
    "one projection": (LLAMA, PROJECT, """
    qkv = self.qkv_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    query_states, key_states, value_states = qkv.chunk(3, dim=1)
"""),
    "a projection cut in two": (LLAMA, "q_proj(hidden_states)", "q_proj(hidden_states).chunk(2)[0]"),
    "a projection of another name": (LLAMA, "self.q_proj", "self.wq"),
    "a projection of a part": (LLAMA, "self.q_proj", "self.inner.q_proj"),
    "a projection with an option": (LLAMA, "self.q_proj(hidden_states)", "self.q_proj(hidden_states, scale)"),
    "a projection of an expression": (LLAMA, "v_proj(hidden_states)", "v_proj(hidden_states * scale)"),
    "keys projected as queries": (LLAMA, "self.k_proj", "self.q_proj"),
    "values after the rotation": (LLAMA, f"    {V}\n{ROTATE}", f"{ROTATE}    {V}\n"),
    "values twice": (LLAMA, TABLES, f"gate = self.v_proj(hidden_states).view(hidden_shape)\n    {TABLES}"),
    "values after other values": (LLAMA, V, f"value_states = self.first(hidden_states)\n    {V}"),
    "values under a condition": (LLAMA, V, f"if scale:\n        {V}"),
    "values in a with": (LLAMA, V, f"with torch.no_grad():\n        {V}"),
    # heads
    "another head size": (LLAMA, V, V.replace("hidden_shape", "*input_shape, -1, self.v_head_dim")),
    "a head size that is computed": (LLAMA, "self.head_dim)", "self.head_dim // 2)"),
    "a head size that is a variable": (LLAMA, "self.head_dim)", "head_dim)"),
    "another last axis": (LLAMA, "-1, self.head_dim)", "self.head_dim, -1)"),
    "four axes": (LLAMA, "-1, self.head_dim)", "2, -1, self.head_dim)"),
    "three axes": (LLAMA, "-1, self.head_dim)", "self.head_dim)"),
    "no axis of tokens": (LLAMA, "-1, self.head_dim)", "*self.head_dims)"),
    "heads before tokens": (
        NOT_TRANSPOSED, "*input_shape, -1, self", "hidden_states.shape[0], -1, hidden_states.shape[1], self"
    ),
    "half the tokens": (IN_STEPS, "bsz, q_len, self.num_heads", "bsz, q_len // 2, self.num_heads"),
    "batch and tokens exchanged": (IN_STEPS, "bsz, q_len, _ =", "q_len, bsz, _ ="),
    "the shape of another tensor": (LLAMA, "hidden_states.shape", "encoder_hidden_states.shape"),
    "a shape that depends": (LLAMA, Q, f"if scale:\n        hidden_shape = (*input_shape, -1, 4)\n    {Q}"),
    "a shape that changes": (LLAMA, K, f"input_shape = (1, 10)\n    {K}"),
    "a walrus in the shape": (LLAMA, K, K.replace("hidden_shape", "n := hidden_shape")),
    "transposed differently": (LLAMA, Q, Q.replace("(1, 2)", "(0, 1)")),
    "one not transposed": (LLAMA, V, V.replace(".transpose(1, 2)", "")),
    "transposed twice": (LLAMA, ".transpose(1, 2)", ".transpose(1, 2).transpose(1, 2)"),
    "permuted": (LLAMA, ".transpose(1, 2)", ".permute(0, 2, 1, 3)"),
    "viewed twice": (LLAMA, ".view(hidden_shape)", ".view(hidden_shape).view(hidden_shape)"),
    "repeated": (LLAMA, K, f"{K}.repeat(1, 2, 1, 1)"),
    # the rotation
    "two rotations": (LLAMA, ROTATE, ROTATE + ROTATE),
    "another use of the function": (LLAMA, TABLES, f"rotate = apply_rotary_pos_emb\n    {TABLES}"),
    "no rotation": (LLAMA, ROTATE, ""),
    "tokens' axis": (LLAMA, "cos, sin)", "cos, sin, unsqueeze_dim=2)"),
    "heads' axis, not transposed": (NOT_TRANSPOSED, ", unsqueeze_dim=2", ""),
    "an axis that is computed": (NOT_TRANSPOSED, "unsqueeze_dim=2", "unsqueeze_dim=self.axis"),
    "an axis by position": (NOT_TRANSPOSED, "unsqueeze_dim=2", "2"),
    "tables by keyword": (LLAMA, "cos, sin)", "cos=cos, sin=sin)"),
    "tables as one": (LLAMA, "cos, sin)", "*position_embeddings)"),
    "tables as expressions": (LLAMA, "cos, sin)", "cos.float(), sin)"),
    "queries as an expression": (LLAMA, "emb(query_states", "emb(query_states.contiguous()"),
    "keys as queries": (LLAMA, "emb(query_states, key_states", "emb(key_states, query_states"),
    "other names": (LLAMA, "query_states, key_states = apply", "query, key = apply"),
    "queries alone": (LLAMA, CALL, "query_states = apply_rotary_pos_emb(query_states, cos, sin)"),
    "two targets of the rotation": (LLAMA, CALL, f"both = {CALL}"),
    "two targets of the rotation, turned": (LLAMA, " = apply", " = both = apply"),
    # conditions
    "an else": (UNDER_A_CONDITION, "    return", "    else:\n        query_states = scale\n    return"),
    "a norm under it": (
        UNDER_A_CONDITION, TABLES, f"query_states = self.q_norm(query_states)\n        {TABLES}"
    ),
    "x bound again under it": (
        UNDER_A_CONDITION, TABLES, f"hidden_states = hidden_states * scale\n        {TABLES}"
    ),
    "a condition of the keys": (UNDER_A_CONDITION, "self.use_rope", "key_states.shape[1] > 1"),
    "a condition within": (UNDER_A_CONDITION, CALL, f"if scale:\n            {CALL}"),
    "a loop": (UNDER_A_CONDITION, "if self.use_rope:", "for _ in range(2):"),
    # outside of its class
    "super()": (LLAMA, TABLES, f"super().prepare(hidden_states)\n    {TABLES}"),
    "the class by name": (LLAMA, TABLES, f"kind = __class__\n    {TABLES}"),
    "a private name": (LLAMA, TABLES, f"scale = self.__scale\n    {TABLES}"),
}  # fmt: skip
NOT_REWRITTEN = {name: changed(source, (old, new)) for name, (source, old, new) in CHANGES.items()}
NOT_REWRITTEN["queries under the name of x"] = changed(
    LLAMA, ("query_states = self.q", "hidden_states = self.q"), ("query_states", "hidden_states")
)


class Attention(nn.Module):
    head_dim, num_heads, num_key_value_heads = 8, 4, 2

    def __init__(self, use_rope):
        super().__init__()
        self.use_rope = use_rope
        self.config = self
        self.q_proj, self.g_proj = nn.Linear(24, 32), nn.Linear(24, 3)
        self.k_proj, self.v_proj = nn.Linear(24, 16), nn.Linear(24, 16, bias=False)
        self.q_norm = nn.LayerNorm(8)


def tables():
    from transformers import LlamaConfig

    rotary = LlamaRotaryEmbedding(LlamaConfig(head_dim=8, hidden_size=32, num_attention_heads=4))
    return rotary(torch.zeros(1), torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]))


@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten_it_computes_the_same(name, use_rope):
    source = REWRITTEN[name]
    found = fusion(source)
    assert found is not None
    assert (found.call, found.transposed) == (f"project_and_{APPLY}", name != "not transposed")
    torch.manual_seed(0)
    attention, x = Attention(use_rope), torch.randn(2, 5, 24)
    stock = {APPLY: apply_rotary_pos_emb}
    exec(source, stock)
    calls = []

    def project(*arguments):
        calls.append(arguments)
        return project_and_rotate(Form(), apply_rotary_pos_emb, found.transposed, *arguments)

    rewritten = FunctionType(found.code, {found.call: project}, "forward", (2.0,))
    rewritten.__kwdefaults__ = stock["forward"].__kwdefaults__
    expected = stock["forward"](attention, x, tables())
    results = rewritten(attention, x, tables())
    assert len(calls) == (0 if "if self.use_rope" in source and not use_rope else 1)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
        assert a.shape == b.shape


@pytest.mark.parametrize("name", NOT_REWRITTEN)
def test_not_rewritten(name):
    assert fusion(NOT_REWRITTEN[name]) is None


def test_the_source_is_left_as_it_is():
    function = function_of(UNDER_A_CONDITION)
    before = ast.dump(function)
    assert fused(function, APPLY, "stock.py") is not None
    assert ast.dump(function) == before


def test_the_rewritten_code_names_file_and_line():
    source = changed(LLAMA, (HEAD, "\n\n\n" + HEAD))
    code = fusion(source).code
    assert (code.co_filename, code.co_name) == ("stock.py", "forward")
    lines = source.splitlines()
    assert lines[code.co_firstlineno - 1] == HEAD
    assert {line for _, _, line in code.co_lines() if line} >= {
        number + 1 for number, line in enumerate(lines) if "cos, sin = position" in line or "return" in line
    }


class TestCondition:
    """What tells whether a layer has a rotary embedding at all."""

    @pytest.mark.parametrize("use_rope", [True, False])
    def test_of_the_layer(self, use_rope):
        code = condition(function_of(UNDER_A_CONDITION), APPLY)
        assert eval(code, {"self": Attention(use_rope)}) is use_rope

    @pytest.mark.parametrize(
        "test",
        ["position_embeddings is not None", "self.use_rope and scale", "self.use_rope and self.training"],
    )
    def test_none_where_it_is_known_in_the_call_only(self, test):
        assert condition(function_of(changed(UNDER_A_CONDITION, ("self.use_rope", test))), APPLY) is None

    def test_none_without_one(self):
        assert condition(function_of(LLAMA), APPLY) is None


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("one projection", Form(), "not three projections"),
        ("a norm between", Form(), "normalised before"),
        ("a multiplier of the keys", Form(), "computes with queries, keys or values before"),
        ("clamped", Form(last=True), "do not rotate in the model's form"),
    ],
)
def test_the_reason(name, form, reason):
    assert reason in why_separate(function_of(NOT_REWRITTEN[name]), [form])


def test_every_case_is_another():
    sources = [*REWRITTEN.values(), *NOT_REWRITTEN.values()]
    assert len(set(sources)) == len(sources)
    for source in sources:
        compile(source, "stock.py", "exec")
