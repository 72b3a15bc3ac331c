"""Formulas of a page as inline SVG: GitHub renders ``$...$``, and a site that loads nothing has no MathJax."""

from __future__ import annotations

import functools
import html
import io
import re

MATH = re.compile(
    r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>(?! )[^$\n]+?)(?<! )\$(?![\w$])", re.DOTALL
)
# What stands for a formula while Markdown is made HTML: in hexadecimal nothing is Markdown's.
MARK = re.compile(r"MATH(BLOCK|INLINE)x([0-9a-f]+)x")
# Names of TeX that matplotlib has under another one.
ALIASES = {r"\ge": r"\geq", r"\le": r"\leq", r"\ne": r"\neq", r"\to": r"\rightarrow"}
SIZE = 12


def marked(markdown: str) -> str:
    """``markdown`` with a mark in place of each formula."""
    return MATH.sub(
        lambda found: f"MATH{found.lastgroup.upper()}x{found[found.lastgroup].encode().hex()}x", markdown
    )


def drawn(page: str) -> str:
    """The HTML of a page with the formula of each mark as inline SVG in the colour of the text."""

    def picture(mark: re.Match[str]) -> str:
        svg = _svg(" ".join(bytes.fromhex(mark[2]).decode().split()))
        return f'<span style="display:block;text-align:center">{svg}</span>' if mark[1] == "BLOCK" else svg

    return MARK.sub(picture, page)


@functools.cache
def _svg(formula: str) -> str:
    import matplotlib as mpl
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    known = re.sub(r"\\[a-z]+", lambda name: ALIASES.get(name[0], name[0]), formula)
    buffer = io.StringIO()
    # Without a salt names in the file are random, and the same page is another file each time.
    with mpl.rc_context({"svg.hashsalt": formula, "mathtext.fontset": "cm"}):
        font = FontProperties(size=SIZE)
        depth = math_to_image(f"${known}$", buffer, prop=font, dpi=72, format="svg", color="#010203")
    svg = buffer.getvalue()
    width, height = (
        float(re.search(rf'\b{side}="([\d.]+)pt"', svg)[1]) / SIZE for side in ("width", "height")
    )
    (box,) = re.findall(r'viewBox="[^"]+"', svg)
    # Neither the style sheet nor the white background, which are the page's.
    glyphs = (
        svg[svg.index('<g id="text_1">') : svg.rindex("</g>")]
        .replace("#010203", "currentColor")
        .replace(' id="text_1"', "")
    )
    style = f"vertical-align:{-depth / SIZE:.3f}em"
    return (
        f'<svg role="img" aria-label="{html.escape(formula)}" style="{style}" width="{width:.3f}em" '
        f'height="{height:.3f}em" {box} xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{glyphs}</svg>'
    )
