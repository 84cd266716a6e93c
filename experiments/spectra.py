"""Fig. 1 of the paper, singular values of query weights: of every layer's W, and of what Q and L R keep of it.

W is compared with white weights, and W H^½ with white weights times the same H^½, for H alone makes it near low rank.
The seed varies these, the rotation, the subspace start and the quantizer keys; calibration tokens, block and model are
fixed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from drawing import axes
from machinery import Experiment, Result, layers
from outer import Found, side, where

from caldera_jax import CalderaConfig, compress_matrix
from caldera_jax.models import llama
from caldera_jax.objective import energies


@dataclass(frozen=True)
class Config:
    """One layer, its decomposition, and the distribution (of a NumPy generator) of the weights it is compared with."""

    model: str
    block: int
    layer: str
    caldera: CalderaConfig
    seed: int
    control: str = "standard_normal"


def runs(preset: str) -> list[Config]:
    """Every layer of a block of either model; seeds innermost."""
    if preset == "smoke":
        few = CalderaConfig(rank=4, outer_iterations=2, svd="randomized")
        return [Config("tiny-smoke", 0, layer, few, 0) for layer in ("q", "o")]  # one shape: one program
    return [Config(*place, layer, CalderaConfig(rank=32, outer_iterations=15, svd="randomized"), seed)
            for place in (("smollm2-135m", 14), ("tiny", 2)) for layer in llama.LINEARS for seed in range(3)]


def measure(config: Config) -> Result:
    """Singular values of W, Q, L R, W H^½ and its control over the Frobenius norm of W or of themselves, the energy of
    the k leading directions, and the loop's error after each half step."""
    w, h = (np.asarray(a, np.float64) for a in layers(config.model, config.block)[config.layer])
    layer, trace = compress_matrix(jax.random.key(config.seed), np.float32(w), np.float32(h), config.caldera)
    q, left, right = (np.asarray(part, np.float64) for part in layer.rotated())
    values = lambda a: np.linalg.svd(a, compute_uv=False)
    weigh = lambda a: np.sqrt(energies(a, h))
    gaussian = getattr(np.random.default_rng(config.seed), config.control)(w.shape)
    own = {"white": values(gaussian), "weighted": weigh(w), "white_weighted": weigh(gaussian)}
    spectrum, scale = values(w), np.linalg.norm(w)
    share = lambda s: float(np.sum(s[:config.caldera.rank] ** 2) / np.sum(s**2))
    thin = lambda s: [float(f"{x:.4g}") for x in s]
    return {"shape": list(w.shape), "w": thin(spectrum / scale), "q": thin(values(q) / scale),
            "lr": thin(values(left @ right)[:config.caldera.rank] / scale), "share": share(spectrum),
            **{key: thin(s / np.linalg.norm(s)) for key, s in own.items()},
            **{f"share_{key}": share(s) for key, s in own.items()},
            "trace": np.asarray(trace.error, np.float64).tolist()}


def verdict(results: Sequence[Result]) -> str:
    """A sentence for each part of the claim: on which layers it holds, and by what margin."""
    k, seeds = results[0]["config"]["caldera"]["rank"], len({r["seed"] for r in results})

    def line(claim: str, value: Callable[[Result], float], wanted: str, bound: float = 1) -> str:
        found: Found = {}
        for r in results:
            key = f"{r['config']['model']} {r['config']['block']}", r["config"]["layer"]
            found.setdefault(key, []).append(value(r))
        return f"{claim}: {where(found, lambda values: side(np.array(values) / bound, wanted))}."

    left = [r["q"][0] / r["w"][k] for r in results]
    return "\n  ".join((
        line(f"{k} directions hold more than half of ‖W‖²_F", lambda r: r["share"], "higher", 0.5),
        line("... more than of white weights (ratio)", lambda r: r["share"] / r["share_white"], "higher"),
        line("... more of ‖W H^½‖²_F than of white weights with the same H (ratio)",
             lambda r: r["share_weighted"] / r["share_white_weighted"], "higher"),
        line(f"L R holds the large directions: its values are more than half of W's first {k} (mean ratio)",
             lambda r: float(np.mean(np.array(r["lr"]) / r["w"][:k])), "higher", 0.5),
        line("Q is without them: its largest singular value is less than half of W's (ratio)",
             lambda r: r["q"][0] / r["w"][0], "lower", 0.5),
        f"Exact truncation of W would leave Q with W's next singular value; Q's largest is {min(left):.2f} to "
        f"{max(left):.2f} times that.",
        f"Mean ± half the 95 % interval over {seeds} seed(s) of white weights, rotation and subspace start; without ± "
        f"what does not depend on them. Calibration tokens, block and model are fixed. The paper's figure shows query "
        f"weights (q) only; the bound ½ is ours."))


def draw(results: Sequence[Result]):
    """Spectra of the query layers, seed 0."""
    chosen = [r for r in results if r["config"]["layer"] == "q" and r["seed"] == 0]
    figure, panels = axes(len(chosen))
    for panel, r in zip(panels, chosen, strict=True):
        for key, label, style in (("w", "W", "C0"), ("q", "Q", "C1"), ("lr", "L R", "C2"), ("white", "white W", "C0--"),
                                  ("weighted", "W H^½", "C4"), ("white_weighted", "white W, H^½", "C4--")):
            panel.loglog(np.arange(1, len(r[key]) + 1), r[key], style, label=label)
        c = r["config"]
        panel.set(xlabel="index", ylabel="singular value / Frobenius norm", ylim=(1e-4, 1),
                  title=f"{c['model']} {c['block']}.{c['layer']}, k = {c['caldera']['rank']}, seed 0")
        panel.legend()
    return figure


EXPERIMENT = Experiment("spectra", "weights are close to low rank; L R holds their large directions, Q the rest (our "
                        "reading of Fig. 1 of 2405.18886, which shows singular values of query weights)", runs, measure,
                        draw, verdict)
