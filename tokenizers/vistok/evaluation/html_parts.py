"""What sections of a page are made of: plots and tables of numbers."""

from collections.abc import Callable, Sequence
from html import escape

from matplotlib.axes import Axes

from vistok.evaluation.pictures import png_uri
from vistok.evaluation.plots import DARK, LIGHT, Theme, figure_png


def plot(
    alternative: str,
    draw: Callable[[Axes, Theme], None],
    size: tuple[float, float] = (6.4, 3.4),
    *,
    wide: bool = False,
    caption: str = "",
) -> str:
    """A figure in light and in dark.

    Args:
        alternative: What stands in its place where pictures are not shown.
        draw: Draws into the axes.
        size: Width and height in inches.
        wide: Whether it has a row of its own.
        caption: What stands below.
    """
    light, dark = (png_uri(figure_png(draw, theme, size=size)) for theme in (LIGHT, DARK))
    source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    kind = ' class="wide"' if wide else ""
    return f'<figure{kind}><picture>{source}<img src="{light}" alt="{escape(alternative)}"></picture>{below}</figure>'


def table(head: Sequence[str], body: Sequence[Sequence[str]], *, first: bool = False) -> str:
    """A table of numbers; `first`: whether its first row stands out."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top, lines = line(head, "th"), "".join(line(cells, "td") for cells in body)
    kind = "numbers first" if first else "numbers"
    return f'<div class="scroll"><table class="{kind}"><thead>{top}</thead><tbody>{lines}</tbody></table></div>'
