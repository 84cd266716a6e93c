"""HTML of one file: tables, paragraphs, and figures of matplotlib inside it; no script and no link outwards."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")  # also for the colour-blind (Okabe, Ito)
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "lines.linewidth": 1.3, "axes.grid": True,
    "grid.linewidth": 0.4, "grid.alpha": 0.6, "axes.axisbelow": True, "figure.constrained_layout.use": True,
    "svg.hashsalt": "caldera", "svg.fonttype": "path"}
escape = html.escape

CSS = """
body { max-width: 1160px; margin: 0 auto; padding: 0 16px 48px; color: #1a1a1a; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
nav a { display: inline-block; margin: 0 1rem .3rem 0; } p { max-width: 46rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: right; vertical-align: top;
  white-space: nowrap; }
th { color: #555; font-weight: 600; } caption { text-align: left; color: #555; padding: .3rem 0; }
.t { text-align: left; } table.text td.t { white-space: normal; min-width: 12rem; }
tr.sum td { font-weight: 600; border-top: 2px solid #999; }
.scroll { overflow-x: auto; } .wide { max-width: none; }
.panels { display: flex; flex-wrap: wrap; gap: 12px; } .panels > * { flex: 0 1 375px; min-width: 0; }
figure { margin: 0; max-width: 100%; } .panels img { width: 100%; height: auto; }
mark { background: #f6c9a0; padding: 0 .1em; } details { margin: .8rem 0; } summary { cursor: pointer; color: #0060a0; }
.passage { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 56rem; line-height: 1.8; padding: .8rem 1rem;
  border: 1px solid #ddd; } .key span { padding: .1rem .5rem; }
.big { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1rem 0; } .big div { color: #555; }
.big b { display: block; font-size: 1.5rem; color: #1a1a1a; }
"""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", text: Sequence[int] = (0,),
          total: bool = False, kind: str = "data") -> str:
    """A table whose columns ``text`` are set left; cells are escaped but for those that are ``Markup``."""
    def row(cells, tag, of=""):
        marked = (f"<{tag}{' class=t' if i in text else ''}>{_cell(cell)}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr{of}>{''.join(marked)}</tr>"

    rows = list(rows)
    lines = [row(cells, "td", " class=sum" if total and i == len(rows) - 1 else "") for i, cells in enumerate(rows)]
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(lines)
    return (f'<div class=scroll><table class="{kind}">{above}<thead>{row(head, "th")}</thead>\n'
            f"<tbody>{body}</tbody></table></div>\n")


class Markup(str):
    """HTML that is made here."""


def _cell(value: Any) -> str:
    return value if isinstance(value, Markup) else escape(str(value))


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>\n"


def panel(draw: Callable[[Any], None], alt: str, size: tuple[float, float] = (4.2, 3.1)) -> str:
    """A figure of one panel, ``size`` in inches, which ``draw`` gets the axes of."""
    matplotlib = plots()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), io.BytesIO() as file:
        figure = Figure(figsize=size)
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", dpi=150, metadata={"Date": None})
        content = base64.b64encode(file.getvalue()).decode()
    wide = size[0] > 5
    image = (f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{content}"'
             f'{f" class=wide width={size[0] * 90:.0f}" if wide else ""}>')
    return f"<figure{' class=scroll' if wide else ''}>{image}</figure>\n"


def panels(*each: str) -> str:
    """Figures side by side, as many as fit."""
    return f"<div class=panels>{''.join(each)}</div>\n"


def plots():
    """matplotlib; ValueError where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the page's figures need matplotlib: pip install 'caldera-jax[plots]'") from error
    return matplotlib
