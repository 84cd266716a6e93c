"""What the theory says of every layer of a compressed model: measured error, bounds, rate-distortion limit, gap."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from caldera_jax import hessian, incoherence, kernels, objective
from caldera_jax.codebooks import rounding_error
from caldera_jax.jobs import artifact, calibration, report
from caldera_jax.jobs.compress import calibrated, hessians_sha256
from caldera_jax.jobs.run import moments_hash
from caldera_jax.jobs.settings import RunConfig, recorded
from caldera_jax.levels import DISTORTION, Levelled
from caldera_jax.linear import CompressedLinear, Grid
from caldera_jax.models import data, files, llama
from caldera_jax.models.convert import Model


class LayerTheory(NamedTuple):
    """One layer: relative errors sqrt(loss / tr(W H Wᵀ)), H undamped; then bits a weight.  NaN where Q is off.

    Of a layer whose outputs count by their importance all are in its own metric, W's rows scaled; the ``error`` of a
    run's report counts outputs alike."""

    error: float  # measured
    floor: float  # least error of any unrounded L R of this rank beside the Q that is stored (Lemma 4.2)
    ldlq: float  # predicted by the LDLQ identity if every rounding error were that of a unit Gaussian
    quip_sharp: float  # the bound of QuIP#'s Theorem 4.1, of the same rounding error
    caldera: float  # the bound of CALDERA's Theorem 4.1 as printed
    limit: float  # rate-distortion limit at the measured error, W white
    limit_own: float  # the same for sources of W's own energy along each eigenvector of H
    gap: float  # stored bits above ``limit``


def account(w: Float[np.ndarray, "m n"], q: Float[np.ndarray, "m n"], low_rank: Float[np.ndarray, "m n"],
            h: Float[np.ndarray, "n n"], damping: float, rank: int, grid: Grid | None, bits: float,
            steps: Float[np.ndarray, "m n"] | None = None, spectral: objective.Spectral | None = None) -> LayerTheory:
    """What theory says of W ≈ Q + L R, float64, everything in the basis in which Q was rounded.

    With E = Q + L R − W, H' = H + damping · mean diagonal · I = lower blockdiag(D) lowerᵀ in blocks of ``grid``, and
    σ² = c ‖W − L R‖²_F / (m n), c the grid's mean squared error on a unit Gaussian:
    error² ∝ tr(E H Eᵀ);  floor² ∝ Σ_{i>k} σᵢ²((W − Q) H^½);  ldlq² ∝ m σ² tr D;  quip_sharp² ∝ g m μ² σ² / n
    tr(H'^½)²;  caldera² ∝ m 4 n λ_max R² / (π (2^B − 1)²) (1 − k/2m)² + m ε, of H, where R is the largest number that Q
    rounded, max |Q − E lower|, and m ε the excess of the measured loss over the floor's.  Of free rate, with ``steps``:
    ldlq² ∝ d Σ_ij step_ij² D_j, d what the trellis leaves of a step² at high rate, and the two bounds are of no such.

    ``grid`` None: Q is off.  ``bits``: all stored bits a weight.  ``spectral``: ``np.linalg.eigh`` of H over its mean
    diagonal, where it is at hand: what takes longest.  R and ``ldlq`` are those of the last LDLQ with this
    L R: of no other than a Q rounded last, without downdate, refinement or q_metric="plain".  ``ldlq`` and
    ``quip_sharp`` also count the loss that damping adds, and neither they nor ``caldera`` bound the loss
    of a clipped grid.  Host function, O(n³ + m³).  Sources: ``theory/ldlq_identity.py``, ``block_ldlq_bound.py``,
    ``caldera_bound.py``.
    """
    m, n = w.shape
    with jax.enable_x64(True):
        factors = _factor(jnp.asarray(h), damping, grid.block if grid else 1)
        h, used, _, lower, _ = map(np.asarray, factors)
    e = q + low_rank - w
    energy, loss = (float(np.sum((a @ h) * a)) for a in (w, e))
    relative = partial(_relative, energy=energy)
    least = float(objective.energies(w - q, h)[rank:].sum()) if rank else loss
    error = relative(loss)
    limit = own = np.inf if error == 0 and energy > 0 else 0.0
    if spectral is None and (0 < error < 1 or grid and steps is None):
        spectral = np.linalg.eigh(h)
    if 0 < error < 1:
        limit, own = (objective.rate_distortion_limit(error, w, spectral, sources) for sources in ("white", "own"))
    ldlq = quip_sharp = caldera = np.nan
    if steps is not None:
        ldlq = relative(DISTORTION[grid.states] * float(np.sum(steps**2 * np.diagonal(np.asarray(factors.root))**2)))
    elif grid:
        damped, variance = h + used * np.eye(n), rounding_error(grid) * float(np.mean((w - low_rank) ** 2))
        radius = float(np.abs(q - e @ lower[:n, :n]).max())
        excess = max(loss - least, 0.0) / m
        ldlq = relative(m * variance * objective.feedback_trace(damped, grid.block))
        quip_sharp = relative(objective.ldlq_bound((spectral[0] + used, spectral[1]), m, variance, grid.block))
        caldera = relative(objective.caldera_bound(spectral, m, rank, grid.code_bits // grid.block, radius, excess))
    return LayerTheory(error, relative(least), ldlq, quip_sharp, caldera, limit, own, bits - limit)


_factor = jax.jit(hessian.factor, static_argnums=(1, 2))


def _relative(loss: float, energy: float) -> float:
    """sqrt(loss / energy); 0 / 0 is 0, a loss without energy is infinite, a loss below 0 (rounding) counts as 0."""
    return float(np.sqrt(max(loss, 0.0) / energy)) if energy > 0 else float("inf") if loss > 0 else 0.0


def of_layer(layer: CompressedLinear, w: Float[np.ndarray, "m n"], h: Float[np.ndarray, "n n"], damping: float,
             bits: float | None = None) -> LayerTheory:
    """``account`` of a stored layer that stands for W [m, n], H [n, n] as calibrated (not rotated, not damped).

    ``damping``: what the run used, in units of H's mean diagonal.  ``bits``: a weight; None: all that is stored.
    """
    with jax.enable_x64(True), kernels.use("jax"):  # rotated in float32, H would lose its small eigenvalues
        found = _rotated(layer, jnp.asarray(w, jnp.float64), jnp.asarray(h, jnp.float64))
    w, h, q, left, right = (np.asarray(part, np.float64) for part in found)
    steps = None
    if isinstance(layer.q, Levelled):
        a, b = (np.asarray(scale) for scale in layer.q.scales(jnp.float32))
        steps = np.outer(a.astype(np.float64), b)
    return account(w, q, left @ right, h, damping, layer.rank, None if layer.q is None else layer.grids[0],
                   layer.stored_bits / w.size if bits is None else bits, steps)


@jax.jit
def _rotated(layer, w, h):
    rotation, (m, n) = layer.sides(w.dtype), w.shape
    straight = incoherence.Rotation(*(incoherence.reciprocal(side, w.dtype) for side in rotation))
    shapes = (m, n), (m, layer.rank), (layer.rank, n)
    parts = (jnp.zeros(shape) if part is None else part for part, shape in zip(layer.rotated(), shapes, strict=True))
    return incoherence.rotate_weight(straight, w), incoherence.rotate_hessian(rotation.right, h), *parts


def layers(directory: Path, moments: Path | None = None
           ) -> Iterator[tuple[str, CompressedLinear, np.ndarray, np.ndarray, dict[str, Any]]]:
    """(path, layer, W, H, its row of the report) of every compressed layer, in order, W and H float64 as calibrated.

    Reads the base model again, and takes H from where the run had it: from released Hessians, from ``moments`` (the
    directory given to `caldera compress --moments`) where the run's are all there, or calibrates again, a block at a
    time.  Memory: as a run's, embedding and head, one block, its Moments and the residual streams.
    Raises ValueError where the artifact has no report, and where the model, the text or the Hessians are not, or no
    longer, those of the run.
    """
    rows = {row["path"]: row for row in report_of(directory)["layers"]}
    run, config, model, compressed = opened(directory)
    chosen, names = model.config.layers if config.blocks is None else config.blocks, llama.linears(model.config)
    if rows.keys() != {f"blocks.{i}.{name}" for i in range(chosen) for name in names}:
        raise ValueError(f"{directory}: its layers are not those of the blocks that the run compressed: compress again")
    blocks = model.params["blocks"]
    with tqdm(total=chosen * len(names), desc="theory", unit="layer") as progress:
        for index, of_input in enumerate(_hessians(config, run, model, chosen, moments)):
            for name in names:
                path = f"blocks.{index}.{name}"
                progress.set_postfix_str(path)
                w, layer = np.asarray(blocks[index][name], np.float64), compressed.params["blocks"][index][name]
                yield path, layer, w, of_input(llama.input_of(name)), rows[path]
                progress.update()
            blocks[index] = compressed.params["blocks"][index]  # later blocks may be calibrated behind it


def opened(directory: Path) -> tuple[dict[str, Any], RunConfig, Model, Model]:
    """What a run's manifest says of it, its configuration, the base model and the compressed one.

    Raises ValueError where the base model is not, or no longer, the run's.
    """
    run = artifact.read_manifest(directory)["run"]
    config: RunConfig = recorded(run["config"])
    return run, config, artifact.base(directory), artifact.load(directory)


def report_of(directory: Path) -> dict[str, Any]:
    """The report of a finished run; ValueError where there is none (yet), or one of other layers."""
    manifest, path = artifact.read_manifest(directory), directory / "report.json"
    if not path.is_file():
        raise ValueError(f"{directory}: compressed, but not evaluated yet: start `caldera compress` again with the "
                         "same arguments")
    found = report.read(path)
    if sorted(row["path"] for row in found["layers"] + found.get("tables", [])) != sorted(manifest["layers"]):
        raise ValueError(f"{path}: its layers are not those of {artifact.MANIFEST}: restore it, or compress the model "
                         "again")
    return found


def _hessians(config: RunConfig, run: dict[str, Any], model: Model, chosen: int, kept: Path | None
              ) -> Iterator[Callable[[str], np.ndarray]]:
    """For each block the function from an input's name to its H.  Asked for the next, the last one is compressed."""
    wide = lambda h: np.asarray(h, np.float64)
    if (released := config.hessians) is not None:
        if hessians_sha256(released) != run["hessians_sha256"]:
            raise ValueError(f"{released}: not the Hessians of this run: files are missing or have changed "
                             "since; put those back, or compress again")
        for index in range(chosen):
            yield lambda name, index=index: wide(
                calibration.released(Path(released), model.config, index, name))
    elif kept is not None and calibrated(folder := kept / moments_hash(run), model.config, range(chosen)):
        for index in range(chosen):
            yield lambda name, index=index: wide(
                calibration.load_moments(calibration.spilled(folder, index, name))[name].mean())
    else:
        sequential = config.activations == "compressed"
        inputs = calibration.collect(model.config, model.params, _tokens(config, run, model), chosen, sequential,
                                     config.cap)
        for _, moments in inputs:
            yield lambda name, moments=moments: wide(moments[name].mean())


def _tokens(config: RunConfig, run: dict[str, Any], model: Model) -> np.ndarray:
    """The windows that the run was calibrated on."""
    ours = config.calibration
    tokens = data.windows_beside(model, ours, config.evaluation.text, "calibration", config.bos)
    if files.sha256(tokens) != run["calibration_sha256"]:
        raise ValueError(f"the calibration text {ours.text!r} has changed since the run: put the old one back, or give "
                         "--moments the directory of the run's Moments")
    return tokens
