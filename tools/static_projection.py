"""Cases of the static gate: the fused projection in every configuration, with and without norms, and decoding."""

from __future__ import annotations

import torch

from rope_dist.ops import configurations, triton_decode, triton_projection
from rope_dist.ops.arguments import Norms, Projections
from rope_dist.ops.configurations import Configuration

from .static_case import Case, angles, meta


def _projections(heads: tuple[int, ...], head_dim: int, bias: bool) -> Projections:
    weights = [meta(h * head_dim, 4096) for h in heads]
    biases = [meta(w.shape[0]) if bias else None for w in weights]
    left_out = [None] * (3 - len(heads))
    return Projections(*weights, *left_out, *biases, *left_out, head_dim)


def _projection(  # noqa: PLR0913  (each a form of the kernel)
    heads, head_dim, *, rotary_dim=None, table=False, bias=False, interleaved=False, tma=True, batch=1, axes=0,
    configuration=None, norm=None,
):  # fmt: skip
    def call(arch: str) -> None:
        projections = _projections(heads, head_dim, bias)
        turn = angles(8192 // batch, rotary_dim or head_dim, table, axes, interleaved=interleaved)
        norms = None if norm is None else Norms(meta(head_dim), meta(head_dim), norm_after=norm == "after")
        outputs = [meta(batch, 8192 // batch, h, head_dim) for h in heads]
        x = meta(batch, 8192 // batch, 4096)
        how = {"tma": tma, "configuration": configuration, "arch": arch, "num_programs": 132}
        triton_projection.launch(x, projections, turn, outputs, norms, **how)

    return call


def _decode(
    q_heads, k_heads, head_dim, *, bias=False, slots=False, tokens=16, configuration=configurations.DECODE
):
    def call(arch: str) -> None:
        projections = _projections((q_heads, k_heads, k_heads), head_dim, bias)
        q = meta(1, tokens, q_heads, head_dim)
        others = [meta(*((tokens,) if slots else (1, tokens)), k_heads, head_dim) for _ in range(2)]
        turn = angles(tokens, head_dim, False)
        entries = meta(tokens, dtype=torch.int64) if slots else None
        triton_decode.launch(
            meta(1, tokens, 4096), projections, turn, [q, *others], entries,
            configuration=configuration, arch=arch,
        )  # fmt: skip

    return call


HOPPER = {
    "registers": 192,
    "stack": 0,
    "instructions": 1_200,
    "serialized": 0,
    "convert_layout": 0,
    "shared accesses": 0,
    "narrow stores": 0,
    "wide stores": 0,
}
TENSOR = {"HGMMA.64x256x16": 4, "UTMALDG": 6, "UTMASTG": 1}
TABLE = {"shared accesses": 32}
BIAS = {"instructions": 1_500, "convert_layout": 1, "shared accesses": 32}
INTERLEAVED = {"instructions": 1_250}
# Heads as wide as a tile hold twice the angles a thread. One program fills a multiprocessor whatever its
# registers: what counts is that none is spilled.
WIDE_HEAD = {"registers": 255, "instructions": 1_600}
AMPERE = {"registers": 200, "stack": 0, "narrow copies": 0, "narrow stores": 0}
DECODE = {"registers": 80, "stack": 0, "shared": 76_800, "narrow copies": 0}
# Held to 80 registers it spills there. Shared memory lets two programs on a multiprocessor, so 96 cost nothing.
DECODE_SM80 = {**DECODE, "registers": 96}
ASYNC = {"HMMA": 16, "LDGSTS": 8}

# The other configurations of the projection. That of two halves is held to no 192 registers (one program fills a
# multiprocessor whatever they are), and its second store takes 70 instructions more, with a bias one more conversion.
HALVES = {**HOPPER, "registers": 224, "instructions": 1_300}
HALVES_BIAS = {**HALVES, "instructions": 1_600, "convert_layout": 2, "shared accesses": 32}
HALVES_WIDE_HEAD = {**HALVES, "registers": 255, "instructions": 1_700}
# Of 64 x 128 a multiprocessor takes two programs, of 128 x 128 and 64 x 256 one.
FEW_ROWS = {**HOPPER, "registers": 168}
# Pointers on Hopper: the angles of a table are laid out as the accumulator is by way of shared memory, and the tile
# as rows of 16 bytes.
POINTERS = {
    "registers": 192,
    "stack": 0,
    "narrow copies": 0,
    "narrow stores": 0,
    "convert_layout": 3,
    "shared accesses": 90,
}
POINTERS_WIDE_HEAD = {**POINTERS, "shared accesses": 160}
NARROW_DECODE = {"registers": 72, "stack": 0, "shared": 81_920, "narrow copies": 0}


def _configured(configuration: Configuration, most: dict[str, int], bias_most: dict[str, int]) -> list[Case]:
    """The descriptor kernel of one configuration."""
    name, least = f"projection {configuration.name}", {**TENSOR, "UTMALDG": 2 * configuration.num_stages}
    if configuration.halves:
        least["UTMASTG"] = 2
    if configuration.columns < 256:
        least = {("HGMMA.64x128x16" if key == "HGMMA.64x256x16" else key): n for key, n in least.items()}
    how, hopper = {"configuration": configuration}, ("sm_90",)
    table = {**least, "UTMALDG": least["UTMALDG"] + 2}
    return [
        Case(f"{name} 8B", _projection((32, 8, 8), 128, **how), hopper, most, least),
        Case(f"{name} head 64", _projection((32, 8, 8), 64, **how), hopper, most, least),
        Case(f"{name} partial", _projection((32, 8, 8), 128, rotary_dim=64, **how), hopper, most, least),
        Case(
            f"{name} table", _projection((32, 8, 8), 128, table=True, **how), hopper, {**most, **TABLE}, table
        ),
        Case(f"{name} bias", _projection((32, 8, 8), 128, bias=True, **how), hopper, bias_most, least),
    ]


# A norm takes 8 exchanges between neighbours for each head of a row, a factor for each column, which a thread loads
# for itself (4 or 8 bytes at a time, from the first level of cache), and with both up to 450 instructions. Tiles of 64
# rows load the factors once and spread them through shared memory.
NORM = {"shuffles": 16}
WHOLE_NORM = {**HOPPER, **NORM, "registers": 240, "instructions": 1_750}
HALVES_NORM = {**HALVES, **NORM, "registers": 240, "instructions": 1_850}
FEW_ROWS_NORM = {
    **FEW_ROWS,
    **NORM,
    "registers": 192,
    "instructions": 1_400,
    "convert_layout": 2,
    "shared accesses": 16,
}
WIDE_NORM = {**HALVES_NORM, "convert_layout": 2, "shared accesses": 16}
WIDE_HEAD_NORM = {
    **HALVES_WIDE_HEAD,
    **NORM,
    "instructions": 2_000,
    "convert_layout": 2,
    "shared accesses": 32,
}


def _with_norm(configuration: Configuration, most: dict[str, int]) -> list[Case]:
    """The descriptor kernel of one configuration with a norm of each head."""
    name, how = f"projection norm {configuration.name}", {"configuration": configuration, "norm": "before"}
    least, biased = (
        {"HGMMA": 4, "UTMALDG": 6, "UTMASTG": 1},
        {**most, "instructions": most["instructions"] + 300},
    )
    biased.update({key: most[key] + more for key, more in (("convert_layout", 2), ("shared accesses", 32))})
    table = {**most, "shared accesses": most["shared accesses"] + 32}
    return [
        Case(f"{name} 8B", _projection((32, 8, 8), 128, **how), ("sm_90",), most, least),
        Case(f"{name} head 64", _projection((32, 8, 8), 64, **how), ("sm_90",), most, least),
        Case(f"{name} partial", _projection((32, 8, 8), 128, rotary_dim=64, **how), ("sm_90",), most, least),
        Case(f"{name} table", _projection((32, 8, 8), 128, table=True, **how), ("sm_90",), table, least),
        Case(f"{name} bias", _projection((32, 8, 8), 128, bias=True, **how), ("sm_90",), biased, least),
    ]


CASES = (
    Case("projection 7B", _projection((32, 32, 32), 128), ("sm_90",), HOPPER, TENSOR),
    Case("projection 8B", _projection((32, 8, 8), 128), ("sm_90",), HOPPER, TENSOR),
    Case("projection two weights", _projection((32, 8), 128), ("sm_90",), HOPPER, TENSOR),
    Case("projection head 64", _projection((32, 8, 8), 64), ("sm_90",), HOPPER, TENSOR),
    Case("projection partial", _projection((32, 32, 32), 128, rotary_dim=64), ("sm_90",), HOPPER, TENSOR),
    Case(
        "projection table",
        _projection((32, 8, 8), 128, table=True),
        ("sm_90",),
        {**HOPPER, **TABLE},
        {**TENSOR, "UTMALDG": 8},
    ),
    Case("projection bias", _projection((32, 8, 8), 128, bias=True), ("sm_90",), {**HOPPER, **BIAS}, TENSOR),
    Case(
        "projection table of batches",
        _projection((32, 8, 8), 128, table=True, batch=4),
        ("sm_90",),
        {**HOPPER, **TABLE},
        {**TENSOR, "UTMALDG": 8},
    ),
    Case("projection head 256", _projection((16, 8, 8), 256), ("sm_90",), {**HOPPER, **WIDE_HEAD}, TENSOR),
    Case(
        "projection interleaved",
        _projection((32, 8, 8), 128, interleaved=True),
        ("sm_90",),
        {**HOPPER, **INTERLEAVED},
        TENSOR,
    ),
    Case(
        "projection 8B", _projection((32, 8, 8), 128), ("sm_100",), {"stack": 0}, {"UTCHMMA": 4, "UTMASTG": 1}
    ),
    Case(
        "projection 8B",
        _projection((32, 8, 8), 128, tma=False),
        ("sm_80", "sm_89"),
        AMPERE,
        ASYNC,
    ),
    Case(
        "projection bias",
        _projection((32, 32, 32), 128, bias=True, tma=False),
        ("sm_80",),
        AMPERE,
        ASYNC,
    ),
    Case(
        "projection table",
        _projection((32, 8, 8), 128, table=True, tma=False),
        ("sm_80",),
        AMPERE,
        ASYNC,
    ),
    Case("projection head 256", _projection((16, 8, 8), 256, tma=False), ("sm_80",), AMPERE, ASYNC),
    Case("projection 8B", _projection((32, 8, 8), 128, tma=False), ("gfx942",), {"stack": 0}),
    *_with_norm(configurations.WHOLE._replace(maxnreg=None), WHOLE_NORM),
    *_with_norm(configurations.HALVES, HALVES_NORM),
    *_with_norm(configurations.SMALL, FEW_ROWS_NORM),
    *_with_norm(configurations.WIDE, WIDE_NORM),
    *_with_norm(configurations.SQUARE, FEW_ROWS_NORM),
    Case("projection norm after", _projection((32, 8, 8), 128, norm="after"), ("sm_90",), WHOLE_NORM, TENSOR),
    Case(
        "projection norm 8B",
        _projection((32, 8, 8), 128, norm="before"),
        ("sm_100",),
        {"stack": 0},
        {"UTCHMMA": 4},
    ),
    *(
        Case(
            f"projection norm {configuration.name} head 256",
            _projection((16, 8, 8), 256, configuration=configuration, norm="before"),
            ("sm_90",),
            WIDE_HEAD_NORM,
            TENSOR,
        )
        for configuration in configurations.every("triton_tma", "sm_90", 256, norm=True)
    ),
    *(
        Case(
            f"projection norm pointers {configuration.name} {name}",
            _projection((32, 8, 8), 128, tma=False, configuration=configuration, norm="before", **form),
            ("sm_80", "sm_89", "sm_90"),
            AMPERE,
            {"LDGSTS": 8},
        )
        for configuration in configurations.every("triton", "sm_90", 128, norm=True)
        for name, form in (("8B", {}), ("table", {"table": True}), ("bias", {"bias": True}))
    ),
    Case(
        "projection norm pointers head 256",
        _projection((16, 8, 8), 256, tma=False, norm="before"),
        ("sm_80", "sm_89", "sm_90"),
        AMPERE,
        {"LDGSTS": 8},
    ),
    Case(
        "projection norm 8B",
        _projection((32, 8, 8), 128, tma=False, norm="before"),
        ("gfx942",),
        {"stack": 0},
    ),
    Case(
        "projection norm 256",
        _projection((16, 8, 8), 256, tma=False, norm="before"),
        ("gfx942",),
        {"stack": 0},
    ),
    Case(
        "projection three axes",
        _projection((32, 8, 8), 128, axes=3),
        ("sm_90",),
        {**HOPPER, "registers": 255, "instructions": 1_900},
        TENSOR,
    ),
    *_configured(configurations.HALVES, HALVES, HALVES_BIAS),
    *_configured(configurations.SMALL, FEW_ROWS, {**FEW_ROWS, "convert_layout": 1, "shared accesses": 16}),
    *_configured(configurations.WIDE, HALVES, {**HALVES, "instructions": 1_600, "convert_layout": 1}),
    *_configured(configurations.SQUARE, FEW_ROWS, FEW_ROWS),
    Case(
        "projection 128x256x64/4g16 8B",
        _projection((32, 8, 8), 128, configuration=configurations.HALVES_16),
        ("sm_90",),
        HALVES,
        {**TENSOR, "UTMALDG": 8, "UTMASTG": 2},
    ),
    *(
        Case(
            f"projection {configuration.name} head 256",
            _projection((16, 8, 8), 256, configuration=configuration),
            ("sm_90",),
            HALVES_WIDE_HEAD,
            TENSOR,
        )
        for configuration in configurations.every("triton_tma", "sm_90", 256)
    ),
    *(
        Case(
            f"projection {configuration.name} {name}",
            _projection((32, 8, 8), 128, configuration=configuration, **form),
            ("sm_100",),
            {"stack": 0},
            {"UTCHMMA": 4, "UTMASTG": 1},
        )
        for configuration in configurations.every("triton_tma", "sm_100", 128)
        for name, form in (("8B", {}), ("table", {"table": True}), ("bias", {"bias": True}))
    ),
    *(
        Case(
            f"projection pointers {configuration.name} {name}",
            _projection((32, 8, 8), 128, tma=False, configuration=configuration, **form),
            ("sm_90",),
            POINTERS,
            {"HGMMA": 2, "LDGSTS": 8},
        )
        for configuration in configurations.every("triton", "sm_90", 128)
        for name, form in (("8B", {}), ("table", {"table": True}), ("bias", {"bias": True}))
    ),
    Case(
        "projection pointers head 256",
        _projection((16, 8, 8), 256, tma=False),
        ("sm_90",),
        POINTERS_WIDE_HEAD,
        {"HGMMA": 2, "LDGSTS": 8},
    ),
    *(
        Case(
            f"projection pointers 64x128x64/4 {name}",
            _projection((32, 8, 8), 128, tma=False, configuration=configurations.POINTERS_SMALL, **form),
            ("sm_80", "sm_89"),
            AMPERE,
            ASYNC,
        )
        for name, form in (("8B", {}), ("table", {"table": True}), ("bias", {"bias": True}))
    ),
    *(
        Case(
            f"decode 8 pairs {name}",
            _decode(8, 1, head_dim, configuration=configurations.DECODE_NARROW, **form),
            ("sm_80", "sm_89", "sm_90", "sm_100"),
            NARROW_DECODE,
            ASYNC,
        )
        for name, head_dim, form in (
            ("70B of 8", 128, {}),
            ("bias cache", 128, {"bias": True, "slots": True}),
            ("head 80", 80, {}),
        )
    ),
    Case("decode 7B", _decode(32, 32, 128, tokens=1), ("sm_90", "sm_100"), DECODE, ASYNC),
    Case("decode 7B", _decode(32, 32, 128, tokens=1), ("sm_80",), DECODE_SM80, ASYNC),
    Case(
        "decode 8B bias cache", _decode(32, 8, 128, bias=True, slots=True), ("sm_90", "sm_100"), DECODE, ASYNC
    ),
    Case("decode 8B bias cache", _decode(32, 8, 128, bias=True, slots=True), ("sm_80",), DECODE_SM80, ASYNC),
    Case("decode head 80", _decode(32, 32, 80), ("sm_90",), DECODE, ASYNC),
)
