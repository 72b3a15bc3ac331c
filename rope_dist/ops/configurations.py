"""How the kernels of a projection are compiled: tiles, warps and stages, by architecture and number of tokens.

A path of ``dispatch_projection.PATHS`` has several configurations; which is fastest is measured with the path
(``autotune.py``). The static gate checks each. Nothing here needs Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Configuration(NamedTuple):
    """A tile and the pipeline over the depth.

    Attributes:
        rows, columns, depth: of a tile: tokens, weight rows (of ``"decode"``, pairs of a head), and how much of the
            depth a stage has.
        group: rows of tiles that share the weights in the cache before the next columns.
        halves: the tile is stored in two halves through half the shared memory.
        maxnreg: registers a thread that the compiler is held to in the plain form; None leaves it alone. Wide heads,
            norms and positions of several axes take more.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    group: int = 8
    halves: bool = False
    maxnreg: int | None = None

    @property
    def name(self) -> str:
        """As in ``"triton_tma:128x256x64/4"``: the tile and the stages, and the group where that is not 8."""
        group = f"g{self.group}" if self.group != 8 else ""
        return f"{self.rows}x{self.columns}x{self.depth}/{self.num_stages}{group}"

    def compiled(self) -> dict[str, Any]:
        """The options of the compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


# One program fills a multiprocessor, whatever its registers. Left alone the compiler takes up to 212 for a longer
# schedule; at 192 it spills nothing either.
WHOLE = Configuration(128, 256, 64, 8, 3, maxnreg=192)
# Not held to 192: with a bias Triton 3.6 would spill 8 bytes there.
HALVES = Configuration(128, 256, 64, 8, 4, halves=True)
# More rows share a weight: of a long prompt less is read again from memory that does not fit the cache.
WHOLE_16, HALVES_16 = WHOLE._replace(group=16), HALVES._replace(group=16)
# For few rows, where tiles of 128 x 256 are fewer than multiprocessors.
SMALL = Configuration(64, 128, 64, 4, 4)
WIDE = Configuration(64, 256, 64, 4, 4)
SQUARE = Configuration(128, 128, 64, 8, 4)


POINTERS = Configuration(128, 128, 32, 8, 4)
POINTERS_SMALL = Configuration(64, 128, 64, 4, 4)
POINTERS_WIDE_HEAD = Configuration(64, 256, 32, 8, 4)
CDNA = Configuration(128, 128, 64, 4, 2)
CDNA_WIDE_HEAD = Configuration(64, 256, 64, 4, 2)
# A program takes 16 pairs of one head, or 8 where programs would be fewer than multiprocessors (70B under tensor
# parallelism has 40): twice as many read, and with 6 stages each has 40 KB of its weights on the way instead of 48.
DECODE = Configuration(16, 16, 256, 4, 4)
DECODE_NARROW = Configuration(16, 8, 256, 4, 6)


def candidates(
    path: str,
    arch: str,
    head_dim: int,
    rows: int,
    norm: bool = False,
    *,
    multiprocessors: int = 0,
    heads: int = 0,
) -> list[Configuration]:
    """The configurations of ``path`` that are measured for ``rows`` tokens, the one that is taken unmeasured first.

    Few: each is compiled and timed in the first call of a class of rows. Their limits are powers of two, as those of
    the classes are.

    Args:
        norm: heads are normalised too.
        multiprocessors: of the GPU, for ``"decode"``; ``heads`` of queries, keys and values together.
    """
    wide_head = head_dim > 128
    if path == "decode":
        few = heads * -(-head_dim // (2 * DECODE.columns)) < multiprocessors
        # AMD's tensor instructions take no 8 columns.
        return [DECODE_NARROW, DECODE] if few and not arch.startswith("gfx") else [DECODE]
    if path == "triton_tma":
        if arch != "sm_90":
            # With a norm a thread of the small tile spills.
            return [SQUARE] if rows > 512 or norm else [SQUARE, SMALL]
        if wide_head and norm:
            # In two halves it spills.
            return [WHOLE] if rows <= 1024 else [WHOLE, WHOLE_16]
        if rows > 1024:
            return [WHOLE, HALVES, HALVES_16]
        if wide_head:
            # A tile of 64 rows, whose threads have twice as many angles, spills.
            return [WHOLE, HALVES]
        if rows > 512:
            return [WHOLE, HALVES, SQUARE]
        return [SQUARE, WIDE, SMALL, HALVES] if rows > 64 else [SMALL, WIDE]
    if arch.startswith("gfx"):
        return [CDNA_WIDE_HEAD if wide_head else CDNA]
    if wide_head:
        return [POINTERS_WIDE_HEAD]
    return [POINTERS] if rows > 512 else [POINTERS, POINTERS_SMALL]


def every(path: str, arch: str, head_dim: int, norm: bool = False) -> list[Configuration]:
    """The configurations of ``path`` that can be asked for by name."""
    found = {
        configuration.name: configuration
        for rows in (64, 512, 1024, 2048)
        for configuration in candidates(path, arch, head_dim, rows, norm, multiprocessors=1)
    }
    return list(found.values())
