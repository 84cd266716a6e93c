"""What the verdicts of the tables and of the ablations say of toy results whose answers are known, failing ones too."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.append(str(EXPERIMENTS))

import ablations  # noqa: E402
import drawing  # noqa: E402
import perplexity  # noqa: E402

BASE, SEEDS = 20.0, 3
NOISE = np.array([1.0, 1.02, 0.99])  # of the seeds, common to all that a seed did


# ---- perplexity


def results(rank, bits, values, q_bits=2, **caldera):
    """A result a seed, of perplexities ``values``."""
    caldera = {"rank": rank, "q_bits": q_bits, "factor_bits": 4, "quantizer": "e8p", "downdate": False,
               "refine_passes": 0, "outer_iterations": 15} | caldera
    return [{"config": {"model": "toy", "caldera": caldera}, "seed": seed, "preset": "toy", "base_perplexity": BASE,
             "compressed_perplexity": value, "bits_per_weight": bits} for seed, value in enumerate(values)]


def alone(seeds=SEEDS):
    """Q alone at 2, 3 and 4 bits: the logarithm of its perplexity exceeds the dense one's by 1, 1/4 and 1/16."""
    return [r for i, bits in enumerate((2, 3, 4))
            for r in results(0, bits, [BASE * np.exp(0.25**i)] * seeds, q_bits=bits)]


def line(text, start):
    found = [row.strip() for row in text.splitlines() if row.strip().startswith(start)]
    assert len(found) == 1, (start, text)
    return found[0]


def groups(text):
    """What follows "holds on", "does not hold on" and "undecided on"; of the last ": "-part that begins with one."""
    text = text[text.index(": holds on") + 2:].removesuffix(".")
    return {word: row.removeprefix(f"{word} ") for row in text.split("; ")
            for word in ("holds on", "does not hold on", "undecided on") if row.startswith(f"{word} ")}


def test_the_two_estimates_of_q_alone_are_linear_and_geometric_in_the_excess_and_dense_beyond_the_last():
    curves = perplexity.Curves(alone())
    for bits, upper, lower in ((2, 1, 1), (2.5, (1 + 1 / 4) / 2, np.sqrt(1 / 4)), (3, 1 / 4, 1 / 4),
                               (3.5, (1 / 4 + 1 / 16) / 2, np.sqrt(1 / 4 / 16)), (4, 1 / 16, 1 / 16), (5, 1 / 16, 0)):
        np.testing.assert_allclose(curves.alone(bits), BASE * np.exp([[upper] * SEEDS, [lower] * SEEDS]), rtol=1e-12)


def test_rank_is_worth_its_bits_only_below_both_estimates_and_not_worth_them_only_above_both():
    at = BASE * np.exp(np.array([0.45, 0.56, 0.7]))  # at 2.5 bits Q alone's lie between exp(0.5) and exp(0.625)
    judged = alone() + [r for k, v in zip((8, 16, 32), at, strict=True) for r in results(k, 2.5, v * NOISE**0.1)]
    judged += results(64, 5, [BASE * 1.01] * SEEDS)  # beyond Q's bits, below the last of them: Q might reach dense
    found = groups(line(perplexity.verdict(judged), "toy, L R is worth its bits"))
    assert found["holds on"].startswith("Q of 2 bits, L R of 4, k = 8, 2.50 bits: 0.840 ± 0.003 / 0.952")
    assert "k = 32" in found["does not hold on"] and found["does not hold on"].count("k = ") == 1
    assert all(f"k = {k}," in found["undecided on"] for k in (16, 64))


def test_one_seed_decides_nothing_and_no_model_of_mixed_bits_is_claimed():
    text = perplexity.verdict(alone(1) + results(8, 2.5, [BASE * np.exp(0.1)]))
    found = line(text, "toy, L R is worth its bits")
    assert groups(found)["holds on"] == "none" and "k = 8" in groups(found)["undecided on"]
    assert "no model of mixed bits was measured" in found and "toy: 1 seed, 15 outer iterations" in text
    assert groups(line(text, "toy, more rank"))["holds on"] == "none"


def test_a_rank_that_raises_perplexity_fails_at_its_step_alone():
    ranks = {8: 40, 16: 44, 32: 30}
    found = line(perplexity.verdict(alone() + [r for k, v in ranks.items() for r in results(k, 2.5, v * NOISE)]),
                 "toy, more rank")
    assert groups(found)["does not hold on"].startswith("k = 8 to 16: 1.100 ± 0.000")
    assert "k = 0 to 8" in groups(found)["holds on"] and "k = 16 to 32" in groups(found)["holds on"]


def test_the_downdate_with_ten_passes_is_compared_with_ten_passes_and_pairs_the_seeds():
    judged = alone() + results(32, 2.5, 30 * NOISE) + results(32, 2.5, 25 * NOISE, refine_passes=10)
    judged += results(32, 2.5, 27 * NOISE, refine_passes=10, downdate=True)  # below the plain loop, above ten passes
    judged += results(32, 2.5, 30 * NOISE[::-1], downdate=True)  # as good, in another order of the seeds
    text = perplexity.verdict(judged)
    ten = groups(line(text, "toy, downdate, both with 10 passes"))
    assert ten == {"holds on": "none", "does not hold on": "k = 32: 1.080 ± 0.000"}
    assert groups(line(text, "toy, 10 passes"))["holds on"] == "k = 32: 0.833 ± 0.000"
    assert groups(line(text, "toy, downdate: "))["undecided on"].startswith("k = 32: 1.000 ± ")


def test_smollm2_is_read_by_the_names_of_its_runs_and_a_missing_one_is_named_with_its_command(tmp_path, monkeypatch):
    assert list(perplexity.models(alone())) == ["toy"]  # beside the full preset only
    monkeypatch.setattr(drawing, "RESULTS", tmp_path)
    (tmp_path / "whole_model_stray.json").write_text("{}")
    with pytest.raises(ValueError, match=r"whole_model_q2.json is missing: python .*whole_model.py q2"):
        perplexity.models([r | {"preset": "full"} for r in alone()])


# ---- ablations


def toy(held_out, error=None, bits=lambda config: 2.5):
    """Results of the full preset: errors of a config before the noise of its seed."""
    error = error or held_out
    return [{"config": {"model": c.model, "block": c.block, "layer": c.layer, "windows": c.windows}, "seed": c.seed,
             "preset": "full", "shape": [576, 1000 if c.model == "tiny" else 2000],
             "bits_per_weight": bits(c), "held_out": held_out(c) * NOISE[c.seed], "error": error(c) * NOISE[c.seed]}
            for c in ablations.runs("full")]


def plain(config):
    """The default and every other choice alike."""
    return 0.1


def test_welch_is_scipys_and_decides_nothing_with_one_seed():
    rng = np.random.default_rng(0)
    a, b = 1.1 + 0.02 * rng.standard_normal(4), 1 + 0.005 * rng.standard_normal(3)
    ratio, half = ablations.welch(a, b)
    theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    np.testing.assert_allclose([ratio - 1 - half, ratio - 1 + half], np.array([*theirs]) / b.mean(), rtol=1e-9)
    assert ablations.welch(a[:1], b[:1])[1] == np.inf
    assert ablations.compare(a[:1], b[:1], paired=False).side == "undecided"


def test_what_the_seeds_share_is_taken_out_where_they_are_paired_and_not_where_they_are_not():
    noise = np.array([1.0, 1.3, 0.8])
    assert ablations.compare(0.95 * noise, noise, paired=True).side == "lower"
    assert ablations.compare(0.95 * noise, noise, paired=False).side == "undecided"
    assert ablations.compare(1.5 * NOISE, NOISE, paired=False).side == "higher"
    assert ablations.compare(1.005 * NOISE, NOISE, paired=True).side == "undecided"  # decided, but by less than 1 %


def test_layers_of_opposite_sign_are_not_averaged():
    def error(c):
        return 0.1 * ({"v": 0.9, "down": 1.001}.get(c.layer, 1.2) if c.caldera.order == "q-first" else 1)

    text = ablations.verdict(toy(error))
    found = groups(line(text, "order, lr-first has the least error"))
    assert found == {"holds on": "smollm2-135m 14.q (q-first: 1.200 ± 0.000), tiny 2.q (q-first: 1.200 ± 0.000)",
                     "does not hold on": "smollm2-135m 14.v (q-first: 0.900 ± 0.000)",
                     "undecided on": "smollm2-135m 14.down (q-first: 1.001 ± 0.000)"}
    assert line(text, "q-first: ").startswith(
        "q-first: lower on smollm2-135m 14.v 0.900 ± 0.000; higher on smollm2-135m 14.q 1.200 ± 0.000, tiny 2.q 1.200 "
        "± 0.000; undecided on smollm2-135m 14.down 1.001 ± 0.000")


def test_a_choice_that_only_fits_the_calibration_text_is_judged_by_the_held_out_text():
    def at(ratio):
        return lambda c: 0.1 * (ratio if c.caldera.refine_passes == 10 else 1)

    text = ablations.verdict(toy(at(1.1), at(0.9)))
    assert "does not hold on" not in line(text, "refine passes, 0 has the least error")
    found = line(text, "10: ")
    assert found.startswith("10: higher on ") and "| calibration text: lower on" in found and "undecided" not in found
    assert "holds on none; undecided" in line(ablations.verdict(toy(plain)), "refine passes, 0 has the least error")


def test_the_split_is_compared_with_one_pass_and_its_bits_are_said():
    def error(c):
        """One pass 1.05 of the 15 rounds' error, divided 1.03."""
        preserved = getattr(c.start, "preserved", None)
        return 0.1 * (1 if preserved is None else 1.03 if preserved == 16 else 1.05)

    text = ablations.verdict(toy(error, bits=lambda c: 2.55 if getattr(c.start, "preserved", 0) == 16 else 2.5))
    found = groups(line(text, "one pass, k/2 before Q and k/2 after has the least error"))
    assert list(found) == ["holds on"] and found["holds on"].count("1.019 ± 0.000 (-0.05 bits)") == 4
    assert line(text, "one pass, k/2 before Q and k/2 after: higher on").count("1.030 ± 0.000 (+0.05 bits)") == 8


def test_every_variant_is_named_once_with_every_layer_and_the_range_of_calibration_is_said():
    text = ablations.verdict(toy(plain))
    for part, variants in ablations.parts("full").items():
        first, *others = variants
        lines = text[text.index(f"{part}, {first} has the least error"):].splitlines()[1:len(others) + 1]
        for name, row in zip(others, lines, strict=True):
            held_out = row.partition(" | ")[0]
            assert row.strip().startswith(f"{name}: ")
            assert all(held_out.count(ablations.label(place)) == 1 for place in ablations.places("full"))
    found = line(text, "The range is")
    assert "1, 4, 24, 96 windows" in found and "tiny 2.q with 1." in found and "14.q with 1, " in found
    assert "14.q with 4" not in found and "most" not in found.replace("at most", "")


def test_the_figure_shows_every_dot(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = ablations.draw(toy(lambda c: 0.1 * (1.55 if c.windows == 1 else 0.8 if c.windows == 96 else 1)))
    for panel in figure.axes:
        low, high = panel.get_xlim()
        dots = np.concatenate([part.lines[0].get_xdata() for part in panel.containers])
        assert len(dots) and low < dots.min() and dots.max() < high
    pyplot.close("all")
