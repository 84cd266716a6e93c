"""Verdicts of the loops' experiments on made-up results: each part of a claim can hold, fail and stay undecided."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

import drawing  # noqa: E402
import inner  # noqa: E402
import machinery  # noqa: E402
import outer  # noqa: E402
import spectra  # noqa: E402

LAYER = {"model": "toy", "block": 0, "layer": "q"}


def loop(variant: str, rank: int, error: float, seed: int, bits: int = 4, trace=None):
    """A result of ``outer``; the trace's first half step is L R alone."""
    return {"config": {**LAYER, "variant": variant, "caldera": {"rank": rank, "factor_bits": bits}}, "seed": seed,
            "error": error, "trace": trace or [9.0, error, 2 * error, error]}


def line(verdict: str, start: str) -> str:
    """The line of a verdict that starts so."""
    return next(text.strip() for text in verdict.splitlines() if text.strip().startswith(start))


def loops(errors: dict[tuple[str, int], float]):
    """Three seeds of each (variant, rank), which differ by a factor that pairing by seed takes out."""
    return [loop(variant, rank, error * spread, seed) for (variant, rank), error in errors.items()
            for seed, spread in enumerate((0.8, 1.0, 1.3))]


def test_the_error_must_fall_from_each_rank_to_the_next_and_not_only_below_rank_zero():
    text = line(outer.verdict(loops({("plain", 0): 1, ("plain", 16): 0.5, ("plain", 32): 0.6, ("plain", 64): 0.3})),
                "the error falls with rank")
    assert "holds on 2 of 3: toy 0.q, 4-bit factors (k = 16 0.500, k = 64 0.500)" in text
    assert "does not hold on 1 of 3: toy 0.q, 4-bit factors (k = 32 1.200)" in text and "undecided" not in text


def test_the_last_round_is_compared_with_the_first_and_can_be_worse_however_good_the_best_was():
    def with_last(last, rank):
        return [loop("plain", rank, 0.1, seed, trace=[0.01, 0.4, 0.1, 0.1, last * step, 0.9])
                for seed, step in enumerate((0.99, 1, 1.01))]
    results = loops({("plain", 0): 1}) + with_last(0.2, 16) + with_last(0.6, 32) + with_last(0.4, 64)
    text = line(outer.verdict(results), "the outer iterations lower it")
    assert "holds on 1 of 3: toy 0.q, 4-bit factors (k = 16 0.500" in text
    assert "does not hold on 1 of 3: toy 0.q, 4-bit factors (k = 32 1.500" in text
    assert "undecided on 1 of 3: toy 0.q, 4-bit factors (k = 64 1.000" in text


def test_each_variant_is_over_its_own_reference():
    errors = {"plain": 1.0, "10 passes": 0.5, "downdate": 2.0, "downdate, 10 passes": 0.4, "no rotation": 3.0,
              "no rotation, downdate, 10 passes": 0.2}
    results = loops({("plain", 0): 4, ("no rotation", 0): 4} | {(variant, 16): e for variant, e in errors.items()})
    found = outer.ratios(results)
    key = "toy 0.q, 4-bit factors", "k = 16"
    assert {part: round(found[part][key][0], 6) for part in outer.REFERENCES} == {
        "downdate": 2.0, "downdate, 10 passes": 0.8, "no rotation": 3.0, "no rotation, downdate, 10 passes": 0.5}
    text = outer.verdict(results)
    assert "does not hold on 1 of 1" in line(text, "the downdate lowers it:")
    assert "holds on 1 of 1" in line(text, "the downdate lowers it, both")
    assert "does not hold on 1 of 1" in line(text, "so it does with downdate")
    assert set(outer.REFERENCES) | {"plain", "10 passes"} == set(outer.VARIANTS)


def test_what_no_seed_varies_is_said_and_one_seed_decides_nothing():
    fixed = [loop("no rotation", 0, 0.5, seed) for seed in range(3)]
    results = loops({("plain", 0): 0.25}) + fixed
    assert "does not depend on the seed (error on toy 0.q 0.500)" in outer.verdict(results)
    assert "calibration tokens, block and model are fixed" in outer.verdict(results)
    varied = loops({("plain", 0): 0.25, ("no rotation", 0): 0.5})
    assert "does not depend" not in outer.verdict(varied)
    one = [r for r in loops({("plain", 0): 1, ("plain", 16): 0.1}) if r["seed"] == 0]
    assert "undecided on 1 of 1" in line(outer.verdict(one), "the error falls with rank")


def test_configurations_of_the_committed_runs_are_still_run():
    paths = {machinery.path_of(outer.EXPERIMENT, "full", config) for config in outer.runs("full")}
    assert set((drawing.RESULTS / "outer").glob("full_*.json")) <= paths and len(paths) == 342


def factorized(parts, bits: int = 4, rank: int = 16):
    """Results of ``inner`` whose iterations remove these parts of the excess, a seed each."""
    return [{"config": {**LAYER, "rank": rank, "factor_bits": bits, "iterations": [0, 50]}, "seed": seed,
             "unrounded": 1.0, "trace": [float(np.sqrt(2)), float(np.sqrt(2 - part))]}
            for seed, part in enumerate(parts)]


@pytest.mark.parametrize(("parts", "word"), [((0.5, 0.52, 0.48), "holds"), ((0, 0, 0), "does not hold"),
                                             ((0, 0, 0.3), "undecided"), ((0.5,), "undecided"),
                                             ((-0.2, -0.21, -0.19), "does not hold")])
def test_inner_iterations_that_remove_nothing_do_not_lower_the_error(parts, word):
    text = inner.verdict(factorized(parts))
    assert f": {word} on 1 of 1: toy 0.q, 4 bits (k = 16" in line(text, "4 bits (Fig. 4)")
    assert ("nothing is removed, on toy 0.q, 4 bits, k = 16" in text) == (min(parts) <= 0)


def test_four_bits_come_first_and_the_error_itself_is_judged_apart():
    small = factorized((0.01, 0.012, 0.014), rank=32)  # 1.2 % of the excess is 0.3 % of the error
    text = inner.verdict(factorized((0, 0, 0), bits=2) + small)
    assert text.startswith("4 bits (Fig. 4)") and "holds on 1 of 1" in line(text, "4 bits (Fig. 4)")
    assert "does not hold on 1 of 1" in line(text, "2 bits: ")
    assert "does not hold on 1 of 1" in line(text, "4 bits, part by which the error itself falls")


def decomposed(layer: str, share: float, lr: float, q: float, weighted: float):
    """Three results of ``spectra`` at rank 2, of a W whose singular values are 1, 1, ½."""
    return [{"config": {**LAYER, "layer": layer, "caldera": {"rank": 2}}, "seed": seed, "w": [1.0, 1.0, 0.5],
             "q": [q * step, 0.1, 0.1], "lr": [lr * step, lr], "share": share, "share_white": 0.3 * step,
             "share_weighted": weighted, "share_white_weighted": 0.6 * step}
            for seed, step in enumerate((0.99, 1, 1.01))]


def test_each_part_of_the_spectra_s_claim_can_fail_on_one_layer_and_hold_on_another():
    text = spectra.verdict(decomposed("good", 0.8, 0.9, 0.2, 0.9) + decomposed("bad", 0.2, 0.1, 0.95, 0.4))
    for start in ("2 directions hold more than half", "... more than of white weights", "... more of ‖W H^½‖²_F",
                  "L R holds", "Q is without them"):
        found = line(text, start)
        assert "holds on 1 of 2: toy 0 (good " in found and "does not hold on 1 of 2: toy 0 (bad " in found
    assert "good 0.800)" in line(text, "2 directions")  # no interval where the seed varies nothing
    assert "Q's largest is 0.40 to 1.92 times" in text


def test_the_control_of_the_weighted_spectrum_is_white_weights_with_the_true_h(monkeypatch):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((16, 16)), rng.standard_normal((64, 16)) * np.geomspace(10, 0.1, 16)
    monkeypatch.setattr(spectra, "layers", lambda *_: {"q": (w, x.T @ x / 64)})
    config = spectra.Config("toy", 0, "q", spectra.CalderaConfig(rank=2, outer_iterations=2, inner_iterations=1), 3)
    found = spectra.measure(config)
    g = np.random.default_rng(3).standard_normal((16, 16))
    energies = np.linalg.svd(g @ x.T, compute_uv=False) ** 2
    assert found["share_white_weighted"] == pytest.approx(energies[:2].sum() / energies.sum(), rel=1e-6)
    assert found["share_white_weighted"] > 2 * found["share_white"] and len(found["trace"]) == 4
