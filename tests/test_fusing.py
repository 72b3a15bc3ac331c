"""Projections and rotation in one call: which stock sources are rewritten, which are not, and that results stay."""

import ast
from types import FunctionType
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from rope_dist import ops
from rope_dist.hf.forms import Form
from rope_dist.hf.fusing import fused, why_separate
from rope_dist.hf.norm_calls import NormCalls
from rope_dist.hf.norm_forms import OF_TORCH
from rope_dist.hf.projecting import one_call, project_and_rotate
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
        ("a norm between", Form(), "normalised by OtherNorm, which is not a known RMS norm"),
        ("a multiplier of the keys", Form(), "computes with queries, keys or values before"),
        ("clamped", Form(last=True), "do not rotate in the model's form"),
        ("two rotations", Form(), "rotated one after the other"),
    ],
)
def test_the_reason(name, form, reason):
    unknown = {"q_norm": "OtherNorm", "input_norm": "Another"}
    assert reason in why_separate(function_of(NOT_REWRITTEN[name]), APPLY, [form], unknown)


# Norms of queries and keys, in the places where models have them.
QN, KN = "self.q_norm(query_states)", "self.k_norm(key_states)"
BOTH = f"query_states = {QN}\n    key_states = {KN}"
ON_HEADS = changed(
    LLAMA,
    (".transpose(1, 2)", ""),
    (
        TABLES,
        f"""query_states = {QN}.transpose(1, 2)
    key_states = {KN}.transpose(1, 2)
    value_states = value_states.transpose(1, 2)
    {TABLES}""",
    ),
)
TRANSPOSED = changed(LLAMA, (TABLES, f"{BOTH}\n    {TABLES}"))
AROUND = changed(
    LLAMA,
    (Q, "query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)"),
    (K, "key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)"),
)
JOINT = changed(
    IN_STEPS,
    ("self.q_proj(hidden_states)", "self.q_all(self.q_proj(hidden_states))"),
    ("self.k_proj(hidden_states)", "self.k_all(self.k_proj(hidden_states))"),
)
AFTER = changed(LLAMA, ("    return", f"    {BOTH}\n    return"))
IF_NORMS = changed(
    ON_HEADS,
    (
        f"query_states = {QN}.transpose(1, 2)\n    key_states = {KN}.transpose(1, 2)",
        f"""if self.use_qk_norm:
        query_states = {QN}
        key_states = {KN}
    query_states = query_states.transpose(1, 2)
    key_states = key_states.transpose(1, 2)""",
    ),
)
IF_ROTATED = changed(UNDER_A_CONDITION, ("    if self.use_rope", f"    {BOTH}\n    if self.use_rope"))
GATED = changed(
    AROUND,
    ("self.q_proj(hidden_states).view(hidden_shape)", "queries.view(hidden_shape)"),
    (
        "    query_states = self.q_n",
        """    queries, gate = torch.chunk(
        self.wide_proj(hidden_states).view(*input_shape, -1, self.head_dim * 2), 2, dim=-1
    )
    query_states = self.q_n""",
    ),
)
NORMED = {
    "on heads": (ON_HEADS, NormCalls("q_norm", "k_norm", "heads"), True),
    "transposed": (TRANSPOSED, NormCalls("q_norm", "k_norm", "transposed"), True),
    "around the heads": (AROUND, NormCalls("q_norm", "k_norm", "heads"), True),
    "around the projection": (JOINT, NormCalls("q_all", "k_all", "projection"), True),
    "after the rotation": (AFTER, NormCalls("q_norm", "k_norm", "transposed", after=True), True),
    "keys first": (
        changed(AFTER, (BOTH, f"key_states = {KN}\n    query_states = {QN}")),
        NormCalls("q_norm", "k_norm", "transposed", after=True), True,
    ),
    "under a condition": (IF_NORMS, NormCalls("q_norm", "k_norm", "heads", test="self.use_qk_norm"), True),
    "a rotation under a condition": (IF_ROTATED, NormCalls("q_norm", "k_norm", "transposed"), True),
    "around the projection, rotation under a condition": (
        changed(JOINT, (ROTATE, UNDER_A_CONDITION.partition(PROJECT)[2].removesuffix(RETURN))),
        NormCalls("q_all", "k_all", "projection"), True,
    ),
    "not transposed": (
        changed(NOT_TRANSPOSED, (TABLES, f"{BOTH}\n    {TABLES}")), NormCalls("q_norm", "k_norm", "heads"), True
    ),
    "norms exchanged": (
        changed(TRANSPOSED, ("self.q_norm", "self.n"), ("self.k_norm", "self.q_norm"), ("self.n(", "self.k_norm(")),
        NormCalls("k_norm", "q_norm", "transposed"), True,
    ),
    "one norm for both": (
        changed(TRANSPOSED, ("self.k_norm", "self.q_norm")), NormCalls("q_norm", "q_norm", "transposed"), True
    ),
    # without the projections
    "a gate": (GATED, NormCalls("q_norm", "k_norm", "heads"), False),
    "normalised twice": (
        changed(TRANSPOSED, (QN, "self.q_norm(self.k_norm(query_states))")),
        NormCalls("q_norm", "k_norm", "transposed"), False,
    ),
    "a norm of the values": (
        changed(TRANSPOSED, (TABLES, f"value_states = self.q_norm(value_states)\n    {TABLES}")),
        NormCalls("q_norm", "k_norm", "transposed"), False,
    ),
    "clipped before": (
        changed(TRANSPOSED, (f"    {BOTH}", f"    query_states = query_states.clamp(-1, 1)\n    {BOTH}")),
        NormCalls("q_norm", "k_norm", "transposed"), False,
    ),
    "an expression": (
        changed(TRANSPOSED, (QN, "self.q_norm(query_states * 2)")), NormCalls("q_norm", "k_norm", "transposed"), False
    ),
    "tables of expressions": (
        changed(TRANSPOSED, ("cos, sin)\n", "cos[..., :8], sin[..., :8])\n")),
        NormCalls("q_norm", "k_norm", "transposed"), False,
    ),
}  # fmt: skip

# Where norms are left as they are: a source above, what is replaced in it, and by what.
NORMS_LEFT = {
    "another module": (TRANSPOSED, "self.q_norm", "self.other"),
    "of a part": (TRANSPOSED, "self.q_norm", "self.inner.q_norm"),
    "of keys alone": (TRANSPOSED, f"    query_states = {QN}\n", ""),
    "scaled": (TRANSPOSED, QN, f"{QN} * scale"),
    "negated": (TRANSPOSED, QN, f"-{QN}"),
    "clipped": (TRANSPOSED, TABLES, f"query_states = query_states.clamp(-1, 1)\n    {TABLES}"),
    "clipped in place": (TRANSPOSED, TABLES, f"query_states.clamp_(-1, 1)\n    {TABLES}"),
    "clipped at once": (TRANSPOSED, QN, f"{QN}.clamp(-1, 1)"),
    "a part set": (TRANSPOSED, TABLES, f"query_states[:, 0] = 0\n    {TABLES}"),
    "used": (TRANSPOSED, TABLES, f"gate = self.g_proj(query_states)\n    {TABLES}"),
    "values of the keys": (TRANSPOSED, TABLES, f"value_states = key_states\n    {TABLES}"),
    "another name": (TRANSPOSED, TABLES, f"unrotated = query_states\n    {TABLES}"),
    "its weight changed": (TRANSPOSED, TABLES, f"self.q_norm.weight.mul_(2)\n    {TABLES}"),
    "what it is given changed": (
        TRANSPOSED, f"{QN}\n", "self.q_norm(hidden_states)\n    hidden_states.mul_(2)\n"
    ),
    "an option": (TRANSPOSED, QN, "self.q_norm(query_states, scale)"),
    "an option by name": (TRANSPOSED, QN, "self.q_norm(x=query_states)"),
    "two targets": (TRANSPOSED, f"query_states = {QN}", f"query_states = normed = {QN}"),
    "at once": (TRANSPOSED, BOTH, f"query_states, key_states = {QN}, {KN}"),
    "a walrus": (TRANSPOSED, QN, "self.q_norm(y := query_states)"),
    "queries transposed before, keys after": (
        ON_HEADS, f"{QN}.transpose(1, 2)", "self.q_norm(query_states.transpose(1, 2))"
    ),
    "permuted after it": (ON_HEADS, f"{QN}.transpose(1, 2)", f"{QN}.permute(0, 2, 1, 3)"),
    "transposed twice after it": (TRANSPOSED, QN, f"{QN}.transpose(1, 2).transpose(1, 2)"),
    "of a part of the tokens": (TRANSPOSED, QN, f"{QN}[:, :, :5]"),
    "heads seen as others": (
        ON_HEADS, f"{QN}.transpose(1, 2)", f"{QN}.view(*input_shape, -1, self.head_dim).transpose(1, 2)"
    ),
    "rows of heads": (
        JOINT, "self.q_all(self.q_proj(hidden_states))",
        "self.q_norm(self.q_proj(hidden_states).reshape(-1, self.num_heads, self.head_dim))",
    ),
    "all heads together, without a projection": (
        JOINT, "self.q_all(self.q_proj(hidden_states))", "self.q_all(self.q_proj(hidden_states).relu())"
    ),
    "all heads together, otherwise viewed": (
        JOINT, "query_states.view(bsz, q_len, self.num_heads", "query_states.view(bsz, q_len // 2, self.num_heads"
    ),
    # conditions
    "a condition of the call": (IF_NORMS, "self.use_qk_norm", "scale"),
    "a condition and an else": (IF_NORMS, f"key_states = {KN}\n", f"key_states = {KN}\n    else:\n        scale = 3\n"),
    "more under the condition": (IF_NORMS, f"key_states = {KN}\n", f"key_states = {KN}\n        scale = 3\n"),
    "keys alone under the condition": (IF_NORMS, f"        query_states = {QN}\n", ""),
    "a norm and a condition": (
        IF_NORMS, "query_states = query_states.transpose", "query_states = self.q_norm(query_states).transpose"
    ),
    "a loop": (IF_NORMS, "if self.use_qk_norm:", "for _ in range(2):"),
    "a condition of the keys": (IF_ROTATED, "self.use_rope", "key_states.shape[1] > 1"),
    "queries used under the condition": (
        IF_ROTATED, "cos, sin = position", "unrotated = query_states\n        cos, sin = position"
    ),
    "a gate and a rotation under a condition": (
        GATED, ROTATE, UNDER_A_CONDITION.partition(PROJECT)[2].removesuffix(RETURN)
    ),
    # after the rotation
    "something before them": (AFTER, f"    {BOTH}", f"    gate = query_states\n    {BOTH}"),
    "something between them": (AFTER, "    key_states = self.k_norm", "    scale = 3\n    key_states = self.k_norm"),
    "scaled after the rotation": (AFTER, QN, f"{QN} * scale"),
    "keys' norm of the queries": (AFTER, KN, "self.k_norm(query_states)"),
    "after a rotation under a condition": (
        IF_ROTATED, f"    {BOTH}\n    if self.use_rope", "    if self.use_rope"
    ),
}  # fmt: skip
NORMS_LEFT = {name: changed(source, (old, new)) for name, (source, old, new) in NORMS_LEFT.items()}
NORMS_LEFT["after a rotation under a condition"] = changed(
    NORMS_LEFT["after a rotation under a condition"], ("    return", f"    {BOTH}\n    return")
)
NORMS = ("q_norm", "k_norm", "q_all", "k_all")


class NormedAttention(Attention):
    norm_forms: ClassVar = {nn.RMSNorm: (OF_TORCH, nn.RMSNorm.forward)}
    _rope_dist_rounded = False  # as of EnabledAttention

    def __init__(self, use_rope, use_qk_norm, norms):
        super().__init__(use_rope)
        self.use_qk_norm, self.norms = use_qk_norm, norms
        self.wide_proj = nn.Linear(24, 64)
        for name, size in {"q_norm": 8, "k_norm": 8, "q_all": 32, "k_all": 16}.items():
            norm = nn.RMSNorm(size, eps=0.1)
            nn.init.normal_(norm.weight)
            setattr(self, name, norm)


@pytest.mark.parametrize("hooked", [False, True], ids=["kernel", "modules"])
@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("name", NORMED)
def test_with_norms_it_computes_the_same(name, condition, hooked, monkeypatch):
    source, norms, projects = NORMED[name]
    found = fused(function_of(source), APPLY, "stock.py", NORMS)
    assert found is not None
    assert (found.norms, found.projects) == (norms, projects)
    assert found.call == f"{'project_' if projects else ''}normalise_and_{APPLY}"
    torch.manual_seed(0)
    attention, x = NormedAttention(condition, condition, norms), torch.randn(2, 5, 24)
    stock = {APPLY: apply_rotary_pos_emb, "torch": torch}
    exec(source, stock)
    rewritten = FunctionType(
        found.code,
        {found.call: one_call(found, Form(), apply_rotary_pos_emb), "torch": torch},
        "forward",
        (2.0,),
    )
    calls, inputs, norm_rotary = [], [], ops.norm_rotary
    monkeypatch.setattr(
        ops, "norm_rotary", lambda *args, **options: calls.append(args) or norm_rotary(*args, **options)
    )
    if hooked:
        getattr(attention, norms.k).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        expected = stock["forward"](attention, x, tables())
        seen_by_stock, inputs[:] = inputs[:], []
        results = rewritten(attention, x, tables())
    in_one = not hooked and (condition or "condition" not in name)
    assert len(calls) == in_one
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 * in_one, atol=1e-5 * in_one)
        assert a.shape == b.shape
    assert sorted(str(x) for x in inputs) == sorted(str(x) for x in seen_by_stock)


@pytest.mark.parametrize("name", [*NORMS_LEFT, "a norm between", "a norm around", "a norm under it"])
def test_norms_that_are_left(name):
    function = function_of({**NOT_REWRITTEN, **NORMS_LEFT}[name])
    found, plain = fused(function, APPLY, "stock.py", NORMS), fused(function, APPLY, "stock.py")
    assert (found is None) == (plain is None)
    assert found is None or found.norms is None


def test_every_case_is_another():
    sources = [*REWRITTEN.values(), *NOT_REWRITTEN.values(), *NORMS_LEFT.values()]
    sources += [source for source, _, _ in NORMED.values()]
    assert len(set(sources)) == len(sources)
    for source in sources:
        compile(source, "stock.py", "exec")
