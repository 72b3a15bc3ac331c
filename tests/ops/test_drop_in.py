"""``apply_rotary_pos_emb`` against the function of the same name of every kind of model in transformers."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers.tensors import exact_tables, frequencies

from rope_dist import ops
from rope_dist.ops import launch_cache

LAYOUTS = {
    "cat": lambda x: torch.cat((x, x), -1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, -1),
    "half": lambda x: x,
}

# A model's function, rotated dimensions of heads of 64, the layout of its tables, and the options of the drop-in.
STOCK = [
    ("llama", 64, "cat", {}),
    ("gpt_oss", 64, "half", {"table_layout": "half"}),
    ("glm4_moe", 16, "cat", {}),
    ("glm4_moe", 32, "cat", {"table_layout": "cat"}),
    ("glm4_moe", 48, "cat", {}),
    ("glm", 32, "cat", {"table_layout": "cat", "interleaved": True}),
    ("ernie4_5", 64, "cat", {"table_layout": "cat", "interleaved": True}),
    ("cohere", 64, "repeat_interleave", {"table_layout": "repeat_interleave", "interleaved": True}),
]


def problem(device, rotary_dim, layout, axis=1, dtype=torch.float32):
    torch.manual_seed(1)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 99, 999, 9_999, 999_999]], device=device)
    cos, sin = (
        LAYOUTS[layout](x).to(dtype) for x in exact_tables(frequencies(rotary_dim).to(device), positions)
    )
    shapes = [(2, h, 5, 64) if axis == 1 else (2, 5, h, 64) for h in (4, 2)]
    q, k = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, k, cos, sin


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("model", "rotary_dim", "layout", "options"), STOCK)
def test_equals_the_function_of_the_model(backend, device, model, rotary_dim, layout, options, axis):
    pytest.importorskip("transformers")
    stock = importlib.import_module(f"transformers.models.{model}.modeling_{model}").apply_rotary_pos_emb
    q, k, cos, sin = problem(device, rotary_dim, layout, axis)
    want = stock(q, k, cos, sin, unsqueeze_dim=axis)
    got = ops.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=axis, **options)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    weights = [torch.randn_like(x) for x in want]
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k), weights),
        torch.autograd.grad(want, (q, k), weights),
        rtol=1e-6,
        atol=1e-6,
    )
    with torch.no_grad():
        for _ in range(2):  # the second from the launch cache
            again = ops.apply_rotary_pos_emb(q, k, cos, sin, axis, **options)
            only_q = ops.apply_rotary_pos_emb(q, None, cos, sin, axis, **options)
            only_k = ops.apply_rotary_pos_emb(None, k, cos, sin, axis, **options)
            assert only_q[1] is None
            assert only_k[0] is None
            for one, both, expected in zip((only_q[0], only_k[1]), again, want, strict=True):
                assert torch.equal(one, both)
                torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)


def test_a_launch_is_kept_for_every_layout(device):
    if ops.backend_for(torch.empty(0, device=device)) == "reference":
        pytest.skip("the reference keeps none")
    for layout in LAYOUTS:
        launch_cache.clear()
        q, k, cos, sin = problem(device, 64, layout)
        with torch.no_grad():
            ops.apply_rotary_pos_emb(q, k, cos, sin, interleaved=True, table_layout=layout)
        assert len(launch_cache._LAUNCHES) == 1, layout


def test_half_tables_without_a_batch(backend, device):
    q, k, cos, sin = problem(device, 64, "half")
    want = ops.apply_rotary_pos_emb(q[1:], k[1:], cos[1:], sin[1:], table_layout="half")
    got = ops.apply_rotary_pos_emb(q[1], k[1], cos[1], sin[1], unsqueeze_dim=0, table_layout="half")
    torch.testing.assert_close(got, tuple(x[0] for x in want), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"table_layout": "half"}, {"table_layout": "cat", "interleaved": True}])
@pytest.mark.parametrize("one", [None, "q", "k"])
def test_compiles_whole(device, options, one):
    torch.compiler.reset()
    q, k, cos, sin = problem(device, 64, options["table_layout"])
    q, k = (None if one == "k" else q), (None if one == "q" else k)

    def rotate(q, k):
        return ops.apply_rotary_pos_emb(q, k, cos, sin, **options)

    got = torch.compile(rotate, fullgraph=True, backend="aot_eager")(q, k)
    torch.testing.assert_close(got, rotate(q, k), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    _, _, cos, sin = problem("cpu", 8, layout, dtype=torch.float64)
    q, k = (torch.randn(2, h, 5, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    options = {"table_layout": layout, "interleaved": True}
    assert torch.autograd.gradcheck(lambda q, k: ops.apply_rotary_pos_emb(q, k, cos, sin, **options), (q, k))


Q = torch.zeros(2, 4, 5, 64)


@pytest.mark.parametrize(
    ("width", "options", "message"),
    [
        (32, {}, "table_layout='half' .gpt-oss. or table_layout='cat'"),  # rotated half of each head before
        (15, {}, "once give table_layout='half'"),
        (66, {}, "up to the 64 dimensions"),
        (33, {"table_layout": "half"}, "rotate 66 dimensions"),
        (64, {"table_layout": "half"}, "rotate 128 dimensions"),
        (64, {"table_layout": "repeat_interleave"}, "interleaved=True"),
        (64, {"interleaved": True}, "interleaved needs table_layout"),
        (64, {"table_layout": "full"}, "'cat', 'repeat_interleave' or 'half', got 'full'"),
        (64, {"position_ids": torch.zeros(2, 5)}, r"takes no position_ids .*cos\[position_ids\]"),
        (64, {"unsqueeze_dim": torch.zeros(2, 5).long()}, "takes no position_ids"),
        (64, {"unsqueeze_dim": None}, "takes no position_ids"),
        (64, {"q": None, "k": None}, "nothing to rotate"),
        (64, {"q": None, "k": Q[0]}, r"got None and \[4, 5, 64\]"),
        (64, {"k": Q[:, :, :4]}, "one B, S and D"),
        (64, {"sin": torch.zeros(1, 5, 32)}, r"got \[1, 5, 64\] and \[1, 5, 32\]"),
    ],
)
def test_mistakes(width, options, message):
    table = torch.zeros(1, 5, width)
    with pytest.raises(ValueError, match=message):
        ops.apply_rotary_pos_emb(**{"q": Q, "k": Q, "cos": table, "sin": table, **options})


def test_a_call_in_the_order_of_transformers_4():
    table = torch.zeros(1, 5, 64)
    with pytest.raises(ValueError, match="takes no position_ids"):
        ops.apply_rotary_pos_emb(Q, Q, table, table, torch.zeros(2, 5, dtype=torch.long), 1)
