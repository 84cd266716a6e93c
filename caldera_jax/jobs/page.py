"""A page that explains a compressed model: one HTML file with its figures inside, no script and no link outwards."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from caldera_jax.allocate import UNITS
from caldera_jax.jobs import explain
from caldera_jax.jobs.facts import PARTS, LayerFacts, TextFacts, examples, measure, read_text
from caldera_jax.jobs.markup import COLOURS, CSS, Markup, escape, panel, panels, paragraph, plots, table
from caldera_jax.models import files, llama

RISEN, PASSAGE, BEFORE = 20, 256, 12  # tokens listed, shown, and before a listed one
BINS = ((0.9, 1.0), (0.5, 0.9), (0.1, 0.5), (0.01, 0.1), (0.0, 0.01))  # of the base model's probability: (low, high]


def write(directory: Path, target: Path, moments: Path | None = None) -> None:
    """Write the page of a compressed model: where its bits went, its spectra, its error, its channels, its tokens.

    ``moments``: as ``explain.layers`` takes it.  In memory: one layer, and one input's eigenvectors.
    Cost, beside the calibration (or the reading of kept Moments) and WINDOWS windows of text through both models:
    float64 on the host, O(n³) an input and O(m n²) a layer, and four SVDs for each of at most three layers: for the 210
    layers of SmolLM2-135M 3 minutes of one CPU core, calibration on 64 windows of 512 included.  The same directory
    gives the same bytes on the same machine with the same versions.
    Raises ValueError for a target that is a directory, lacks a folder or does not end in .html, where matplotlib is
    missing, for a directory that holds no finished model, and where model, text or Hessians are no longer the run's.
    """
    if target.is_dir():
        raise ValueError(f"{target} is a directory: name the file to write, as {target / 'page.html'}")
    if target.suffix != ".html":
        raise ValueError(f"{target}: the report is an HTML page: give it a name that ends in .html")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such directory: make it first")
    plots()
    report = explain.report_of(directory)
    text = read_text(directory)  # first: it soon tells what is missing
    files.write(target, render(report, measure(directory, moments), text).encode())


def render(report: dict[str, Any], layers: Sequence[LayerFacts], text: TextFacts) -> str:
    """The whole page."""
    sections = {"Summary": summary(report), "Where the bits went": bits(layers, report),
                "Spectra": spectra(layers, examples(report["layers"])), "Share of the error": errors(layers, report),
                "Input channels that L R took over": channels(layers, examples(report["layers"])),
                "Text: tokens that lost most": tokens(text)}
    links = " ".join(f'<a href="#s{i}">{escape(title)}</a>' for i, title in enumerate(sections, 1))
    body = "\n".join(f'<section id="s{i}"><h2>{i}. {escape(title)}</h2>\n{content}</section>'
                     for i, (title, content) in enumerate(sections.items(), 1))
    name = escape(Path(report["model"]).name)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}, compressed</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style></head>\n'
            f"<body><h1>{name}, compressed</h1>\n<nav>{links}</nav>\n{body}\n</body></html>\n")


# ---- its sections


def summary(report: dict[str, Any]) -> str:
    """Section 1."""
    base, compressed = report["base_perplexity"], report["compressed_perplexity"]
    dense = 2 * report["compressed_weights"]  # bytes in 16 bits
    big = {"perplexity of the base model": f"{base:.3f}", "perplexity compressed": f"{compressed:.3f}",
           "bits per weight": f"{report['bits_per_weight']:.4f}", "MB of layers": f"{report['stored_bytes'] / 1e6:.2f}"}
    cells = "".join(f"<div><b>{value}</b>{escape(name)}</div>" for name, value in big.items())
    said = (f"{len(report['layers'])} linear layers of {report['compressed_weights'] / 1e6:.2f} million weights take "
            f"{report['stored_bytes'] / 1e6:.2f} MB; 16 bits a weight would take {dense / 1e6:.2f} MB. Perplexity on "
            f"{report['evaluated_tokens']} held-out tokens goes from {base:.3f} to {compressed:.3f}, by "
            f"{100 * (compressed / base - 1):+.1f} %.")
    rows = [(name, "none" if value is None else value) for name, value in _settings(report["config"])]
    return (f"<div class=big>{cells}</div>\n{paragraph(said)}<details><summary>Settings of the run</summary>\n"
            f"{table(('setting', 'value'), rows, text=(0, 1))}</details>\n")


def _settings(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every setting."""
    if not isinstance(value, dict):
        return [(prefix, value)]
    named = {f"{prefix}.{name}" if prefix else name: item for name, item in value.items()}
    return [pair for name, item in named.items() if not name.endswith("kind") for pair in _settings(item, name)]


def bits(layers: Sequence[LayerFacts], report: dict[str, Any]) -> str:
    """Section 2."""
    by_kind, by_block = (_grouped(layers, key) for key in (lambda f: f.kind, lambda f: f.block))
    total = {part: sum(f.bits[part] for f in layers) for part in PARTS}
    stored, weights = sum(total.values()), sum(f.weights for f in layers)
    share = {part: f"{100 * count / stored:.1f} %" for part, count in total.items()}
    said = (f"Of {stored:,} bits ({stored / weights:.4f} a weight) the codes of Q take {share['codes of Q']}, those of "
            f"L {share['codes of L']}, those of R {share['codes of R']}, scales {share['scales']}, the rotations' "
            f"signs or factors {share['rotation']} and trained factors {share['trained factors']}.")

    def stack(groups, unit, label):
        def draw(axes):
            bottom = np.zeros(len(groups))
            for part, colour in zip(PARTS, COLOURS, strict=True):
                heights = np.asarray([sum(f.bits[part] for f in group) / unit(group) for group in groups.values()])
                axes.bar(range(len(groups)), heights, 0.75, bottom, color=colour, label=part)
                bottom += heights
            axes.set(ylabel=label, ylim=(0, 1.32 * bottom.max()), xlabel="" if "q" in groups else "block")
            step = -(-len(groups) // 12)
            axes.set_xticks(range(0, len(groups), step), [str(name) for name in groups][::step])
            axes.grid(axis="x", visible=False)
            axes.legend(ncols=3, loc="upper left", columnspacing=1, handlelength=1)
        return draw

    per_weight = lambda group: sum(f.weights for f in group)
    drawn = panels(panel(stack(by_kind, lambda group: 8e6, "megabytes"), "Megabytes by kind of layer"),
                   panel(stack(by_kind, per_weight, "bits per weight"), "Bits per weight by kind of layer"),
                   panel(stack(by_block, per_weight, "bits per weight"), "Bits per weight by block"))
    head = (*PARTS, "all bits", "bits a weight")
    return (paragraph(said) + drawn + _planned(layers, report)
            + table(("kind", *head), _bit_rows(by_kind), "Stored bits by kind of layer", total=True)
            + "<details><summary>The same by block</summary>\n"
            + table(("block", *head), _bit_rows(by_block), "Stored bits by block", total=True) + "</details>\n")


def _planned(layers: Sequence[LayerFacts], report: dict[str, Any]) -> str:
    """What a plan gave each layer; nothing where there was no budget."""
    if "allocation" not in report:
        return ""
    rule = report["allocation"]
    said = (f"Rank and bits of Q were chosen for a budget of {report['budget_bits_per_weight']:.4f} bits a weight, by "
            f"{rule}: damage predicted {report['predicted_loss']:.5f}, achieved {report['loss']:.5f} ({UNITS[rule]}, "
            "summed over the layers). In each cell of the map: the rank of L R, of experts from the least to the most.")
    values = [sum(f.bits.values()) / f.weights for f in layers]
    return paragraph(said) + heat(layers, values, "bits a weight", "Bits a weight of each layer",
                                  [str(f.rank) for f in layers], low=min(values))


def heat(layers: Sequence[LayerFacts], values: Sequence[float], title: str, alt: str,
         cells: Sequence[str] | None = None, low: float = 0.0) -> str:
    """A map of kinds by blocks, coloured from ``low`` on; ``cells``: numbers that are written in each (None: the
    values).  Of experts the mean value, and the least and the largest number."""
    blocks, places = sorted({f.block for f in layers}), {}
    for i, f in enumerate(layers):
        places.setdefault((llama.LINEARS.index(f.kind), blocks.index(f.block)), []).append(i)

    def draw(axes):
        grid = np.full((len(llama.LINEARS), len(blocks)), np.nan)
        for place, group in places.items():
            grid[place] = np.mean([values[i] for i in group])
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=low)
        axes.set(xlabel="block", yticks=range(len(llama.LINEARS)), yticklabels=llama.LINEARS, title=title)
        axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
        axes.grid(visible=False)
        for (i, j), group in places.items():
            told = [f"{grid[i, j]:.1f}"] if cells is None else sorted((cells[k] for k in group), key=float)
            axes.text(j, i, "–".join(dict.fromkeys((told[0], told[-1]))), ha="center", va="center", fontsize=7.5,
                      color="black" if image.norm(grid[i, j]) > 0.6 else "white")
        axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)

    return panel(draw, alt, (max(4.2, 1.2 + 0.36 * len(blocks)), 3.1))


def _bit_rows(groups: dict[Any, list[LayerFacts]]) -> list[tuple[Any, ...]]:
    every = [f for group in groups.values() for f in group]

    def row(name, group):
        counts = [sum(f.bits[part] for f in group) for part in PARTS]
        weights = sum(f.weights for f in group)
        return name, *(f"{count:,}" for count in (*counts, sum(counts))), f"{sum(counts) / weights:.4f}"

    return [*(row(name, group) for name, group in groups.items()), row("all", every)]


def _grouped(layers: Sequence[LayerFacts], key: Callable[[LayerFacts], Any]) -> dict[Any, list[LayerFacts]]:
    """Layers by key, keys in the order in which they come."""
    groups: dict[Any, list[LayerFacts]] = {}
    for f in layers:
        groups.setdefault(key(f), []).append(f)
    return groups


def spectra(layers: Sequence[LayerFacts], chosen: dict[str, str]) -> str:
    """Section 3."""
    by_path = {f.path: f for f in layers}

    def draw(f, why):
        def inner(axes):
            for name, values in f.spectra.items():
                kept = values[:f.rank] if name == "L R" else values
                axes.loglog(np.arange(1, len(kept) + 1), kept, LINES[name], color=SHADES[name], label=f"{name} H^½")
            if f.rank:
                axes.axvline(f.rank, color="#777777", linewidth=0.8, linestyle=":")
            axes.set(xlabel="index i (dotted: rank k)" if f.rank else "index i", ylabel="singular value / ‖W H^½‖",
                     title=f"{f.path}: error {f.error:.4f}, {why}", ylim=_decades(f.spectra))
            axes.legend(loc="lower left")
        return inner

    said = ("Singular values of each part times H^½, H the second moment of the layer's inputs, so that they count as "
            "the outputs do; over the Frobenius norm ‖W H^½‖, so without a unit. ")
    said += " ".join(_spectrum_says(by_path[path]) for path in chosen)
    drawn = (panel(draw(by_path[path], why), f"Spectra of {path}") for path, why in chosen.items()
             if by_path[path].spectra)
    return paragraph(said) + panels(*drawn)


LINES = {"W": "-", "Q": "-", "L R": "--", "E": "-"}
SHADES = {"W": "#000000", "Q": COLOURS[0], "L R": COLOURS[1], "E": COLOURS[4]}


def _decades(spectra: dict[str, np.ndarray]) -> tuple[float, float]:
    """Limits that show what matters and not the rounding of zeros."""
    top = max(values[0] for values in spectra.values())
    middle = [np.median(values[values > 1e-9 * top]) for values in spectra.values() if values[0] > 1e-9 * top]
    return min(0.1 * min(middle), 1e-2 * top), 1.6 * top


def _spectrum_says(f: LayerFacts) -> str:
    if not f.spectra or not f.rank:
        return f"{f.path} has no {'L R' if f.spectra else 'energy'}."
    energy = lambda name: 100 * float(np.sum(f.spectra.get(name, np.zeros(1))[:f.rank] ** 2))
    return (f"In {f.path} the {f.rank} leading directions of W hold {energy('W'):.1f} % of ‖W H^½‖², and "
            f"‖L R H^½‖² is {energy('L R'):.1f} % of it.")


def errors(layers: Sequence[LayerFacts], report: dict[str, Any]) -> str:
    """Section 4."""
    losses = np.asarray([f.loss.sum() for f in layers])
    shares = losses / losses.sum() if losses.sum() > 0 else losses
    worst, most = max(layers, key=lambda f: f.error), int(np.argmax(shares))
    said = (f"The relative error sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)) is the largest in {worst.path}, {worst.error:.4f}. "
            f"Summed over the layers, tr(E H Eᵀ), the squared error of the outputs per token, has "
            f"{100 * shares[most]:.1f} % in {layers[most].path}; layers differ in the unit of their outputs, so that "
            "such a share is of squares and not of perplexity.")
    maps = (heat(layers, [100 * f.error for f in layers], "relative error, %", "Relative error of each layer"),
            heat(layers, (100 * shares).tolist(), "share of the summed tr(E H Eᵀ), %",
                 "Share of the error of each layer"))
    wide = "class=wide" in maps[0]
    return (paragraph(said) + ("".join(maps) if wide else panels(*maps))
            + f"<details><summary>Every layer</summary>\n{_every_layer(layers, shares, report)}</details>\n"
            + _directions(layers))


def _every_layer(layers: Sequence[LayerFacts], shares: np.ndarray, report: dict[str, Any]) -> str:
    head, damages = ("layer", "relative error", "share of the error"), {}
    if "allocation" in report:
        head += tuple(f"damage {name}, {UNITS[report['allocation']]}" for name in ("predicted", "achieved"))
        damages = {row["path"]: [f"{row[name]:.8f}" for name in ("predicted_loss", "loss")]
                   for row in report["layers"]}
    return table(head, [(f.path, f"{f.error:.6f}", f"{shares[i]:.8f}", *damages.get(f.path, ()))
                        for i in np.argsort(-shares, kind="stable") for f in [layers[i]]])


def cumulative(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Cumulative shares, which end at 1; zeros where there is nothing to share."""
    total = values.sum()
    return np.cumsum(values) / total if total > 0 else np.zeros(len(values))


def _directions(layers: Sequence[LayerFacts]) -> str:
    first = lambda values: cumulative(values)[-(-len(values) // 100) - 1]
    energy, loss = (100 * float(np.mean([first(getattr(f, name)) for f in layers])) for name in ("energy", "loss"))
    said = ("Along the eigenvectors of H, from the largest eigenvalue down: on average the first 1 % of the directions "
            f"hold {energy:.1f} % of the outputs' energy tr(W H Wᵀ) and {loss:.1f} % of the error tr(E H Eᵀ). Where "
            "the error's curve lies below the energy's, the directions that matter most were kept best.")

    def draw(kind, group):
        def inner(axes):
            index = np.arange(1, len(group[0].loss) + 1)
            for name, label, colour in (("energy", "energy", "#000000"), ("loss", "error", COLOURS[4])):
                curves = np.stack([cumulative(getattr(f, name)) for f in group])
                axes.fill_between(index, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
                axes.semilogx(index, curves.mean(0), color=colour, label=label)
            axes.set(xlabel="eigenvectors of H, largest eigenvalue first", ylabel="cumulative share", ylim=(0, 1.02),
                     title=f"{kind}: mean over the layers, and their range", xlim=(1, len(index)))
            axes.legend(loc="lower right")
        return inner

    drawn = (panel(draw(kind, group), f"Cumulative share of energy and error, layers {kind}", (4.2, 2.7))
             for kind, group in _grouped(layers, lambda f: f.kind).items())
    return "<h3>Along the eigenvectors of H</h3>\n" + paragraph(said) + panels(*drawn)


def channels(layers: Sequence[LayerFacts], chosen: dict[str, str]) -> str:
    """Section 5."""
    ranked = [f for f in layers if f.rank > 0]
    if not ranked:
        return paragraph("Every layer has rank 0: there is no L R that could take over a channel.")
    top = lambda f: np.argsort(-f.diagonal, kind="stable")[:-(-len(f.diagonal) // 100)]
    middle = lambda values: float(np.nanmedian(values)) if np.isfinite(values).any() else 0.0
    every, most = (float(np.mean(values)) for values in zip(
        *((middle(f.taken), middle(f.taken[top(f)])) for f in ranked), strict=True))
    said = ("Of input channel j, eⱼ its unit vector, L R has the energy ‖L R eⱼ‖² Hⱼⱼ and W has ‖W eⱼ‖² Hⱼⱼ. Their "
            f"ratio (without a unit; above 1 where Q takes some back) is {every:.3f} in the median channel and "
            f"{most:.3f} in the 1 % of channels with the largest Hⱼⱼ, on average over the layers.")

    plots()
    from matplotlib import ticker

    def draw(f):
        def inner(axes):
            seen = np.flatnonzero((f.diagonal > 0) & (f.taken > 0))  # NaN is not
            x, y = f.diagonal[seen], f.taken[seen]
            axes.semilogx(x, y, ".", color=COLOURS[0], markersize=3, alpha=0.5, rasterized=True)
            parts = np.array_split(seen[np.argsort(x, kind="stable")], min(12, len(seen)))
            axes.plot([np.median(f.diagonal[part]) for part in parts], [np.median(f.taken[part]) for part in parts],
                      color=COLOURS[1], label="median of a twelfth")
            axes.set(xlabel="Hⱼⱼ / median", ylabel="‖L R eⱼ‖² / ‖W eⱼ‖²", ylim=(0, None),
                     title=f"{f.path}, k = {f.rank}")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.legend(loc="best")
        return inner

    shown = [f for f in ranked if f.path in chosen and np.any((f.diagonal > 0) & (f.taken > 0))]
    head = ("block", "input of", "channel j", "Hⱼⱼ / median", "L R's ratio to W")
    return (paragraph(said) + panels(*(panel(draw(f), f"Channels of {f.path}") for f in shown))
            + table(head, _outliers(ranked), "The channels with the largest Hⱼⱼ", text=(1, 4)))


def _outliers(layers: Sequence[LayerFacts], count: int = 15) -> list[tuple[Any, ...]]:
    """Block, layers of the input, channel, Hⱼⱼ over the median, and the ratio of L R to W in each of the layers."""
    inputs = _grouped(layers, lambda f: (f.block, llama.input_of(f.name)))
    each = [(group[0].diagonal[j], group, j) for group in inputs.values()
            for j in np.argsort(-group[0].diagonal, kind="stable")[:count]]
    largest = sorted(each, key=lambda found: -found[0])[:count]
    return [(group[0].block, ", ".join(f.name for f in group), j, f"{ratio:.1f}",
             ", ".join(f"{f.name} {f.taken[j]:.3f}" for f in group)) for ratio, group, j in largest]


def tokens(text: TextFacts) -> str:
    """Section 6."""
    rise = text.compressed - text.base
    said = (f"{rise.size} tokens of held-out text in {len(rise)} windows: the loss −log p rises by {rise.mean():.4f} "
            f"nats on average, from {text.base.mean():.4f} to {text.compressed.mean():.4f}; it rises on "
            f"{100 * np.mean(rise > 0):.0f} % of the tokens and falls on the others.")
    order = np.argsort(-rise, axis=None, kind="stable")[:RISEN]
    rows = (_risen(text, *np.unravel_index(at, rise.shape)) for at in order)
    head = ("token, after what comes before it", "rise, nats", "p base", "p compressed")
    return (paragraph(said) + table(head, rows, f"The {len(order)} tokens whose loss rose most", kind="text")
            + f"<h3>A passage</h3>\n{_passage(text, rise)}<h3>Certain or uncertain tokens?</h3>\n{_bins(text, rise)}")


def _risen(text: TextFacts, window: Any, at: Any) -> tuple[Any, ...]:
    """A row of the table: the loss at ``at`` is of the token after it."""
    base, compressed = text.base[window, at], text.compressed[window, at]
    line = lambda parts: escape("".join(parts).replace("\n", "↵"))
    before = line(text.pieces[window][max(at + 1 - BEFORE, 0):at + 1])
    token = line(text.pieces[window][at + 1])
    return (Markup(f"{before}<mark>{token}</mark>"), f"{compressed - base:.4f}", f"{math.exp(-base):.4g}",
            f"{math.exp(-compressed):.4g}")


def _passage(text: TextFacts, rise: np.ndarray) -> str:
    """The start of the first window, each token shaded by its rise."""
    def shaded(piece, value, title):
        colour = "213,94,0" if value > 0 else "0,114,178"
        style = f' style="background:rgba({colour},{0.75 * min(abs(value) / 3, 1):.2f})"'
        return f"<span{style if abs(value) >= 0.1 else ''}{title}>{escape(piece)}</span>"

    each = zip(text.pieces[0][1:PASSAGE], text.base[0], text.compressed[0], rise[0], strict=False)
    spans = (shaded(piece, value, f' title="base {math.exp(-base):.3g}, compressed {math.exp(-compressed):.3g}"')
             for piece, base, compressed, value in each)
    key = " ".join(shaded(f"{value:+d}" if value else "0", value, "") for value in (-3, -2, -1, 0, 1, 2, 3))
    said = "The first window. Colour: the rise in nats; orange lost, blue gained."
    return (f"<p class=key>{said} {key}</p>\n<div class=passage>{escape(text.pieces[0][0])}{''.join(spans)}</div>\n")


def _bins(text: TextFacts, rise: np.ndarray) -> str:
    """Mean rise by the base model's probability of the token."""
    probability = np.exp(-text.base)
    inside = [rise[(probability > low) & (probability <= high)] if low else rise[probability <= high]
              for low, high in BINS]
    names = [f"{low:g} to {high:g}" for low, high in BINS]
    rows = [(name, x.size, f"{x.mean():.4f}" if x.size else "–", f"{100 * x.sum() / rise.sum():.1f} %"
             if rise.sum() else "–") for name, x in zip(names, inside, strict=True)]

    def draw(axes):
        means = np.asarray([x.mean() if x.size else 0.0 for x in inside])
        chance = [x.std() / math.sqrt(x.size) if x.size else 0.0 for x in inside]
        colours = [COLOURS[1] if mean > 0 else COLOURS[0] for mean in means]
        axes.bar(range(len(inside)), means, 0.7, yerr=chance, color=colours, error_kw={"capsize": 3})
        axes.set_xticks(range(len(names)), [name.replace(" to ", "–") for name in names])
        axes.axhline(0, color="#333333", linewidth=0.8)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="base model's probability of the token", ylabel="mean rise, nats ± standard error")

    said = ("Tokens by the probability p that the base model gives them; the mean rise is the largest where p is "
            f"{names[int(np.argmax([x.mean() if x.size else -np.inf for x in inside]))]}. A loss near 0 can only rise, "
            "and a high one falls by chance more easily: some slope would be there for noise alone.")
    head = ("p base", "tokens", "mean rise, nats", "share of the whole rise")
    return paragraph(said) + panels(panel(draw, "Mean rise by the base model's probability"), table(head, rows))
