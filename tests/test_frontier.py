"""Frontier, allocation, distillation: what they conclude follows from the results, and can be against the claim."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

import allocation  # noqa: E402
import distillation  # noqa: E402
import frontier  # noqa: E402
import fronts  # noqa: E402
import machinery  # noqa: E402


def result(method, bits, lost, seed=0, settings=(), errors=(), family="quantization", noise=0.0):
    """What a run of the frontier records; ``noise`` differs from window to window."""
    losses = 2.0 + lost + noise * np.cos(np.arange(32) + seed)
    return {"config": {"model": "tiny", "method": method, "settings": [list(s) for s in settings]}, "family": family,
            "bits": bits, "perplexity": float(np.exp(losses.mean())), "base_perplexity": float(np.exp(2.0)),
            "losses": losses.tolist(), "base_losses": [2.0] * 32, "error": 0.1, "errors": list(errors), "seed": seed}


def test_the_front_is_what_nothing_surely_beats_and_a_tie_stays_on_it():
    points = fronts.gather([result("a", 2.0, 0.5), result("b", 3.0, 0.2), result("c", 3.5, 0.3), result("d", 4.0, 0.5),
                            result("e", 4.1, 0.201, noise=0.1), result("f", 5.0, 0.1)], "tiny")
    assert [p.label for p in fronts.front(points)] == ["a", "b", "e", "f"]  # e: 0.001 is less than its noise


def test_seeds_of_one_setting_are_one_point():
    (p,) = fronts.gather([result("a", 2.0, 0.1, 0), result("a", 2.0, 0.3, 1)], "tiny")
    assert p.mean == pytest.approx(0.2) and p.lost.shape == (2, 32)
    assert p.perplexity == pytest.approx(np.exp(2.2))


def test_the_hull_is_convex_below_every_point_and_ends_at_the_dense_model():
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in zip(rng.uniform(1, 9, 40), rng.exponential(1, 40), strict=True)]
    found = fronts.hull(points)
    assert found[-1] == (16.0, 0.0) and set(found[:-1]) <= set(points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(found, found[1:], strict=False)]
    assert np.all(np.diff(slopes) > 0)
    assert all(y >= np.interp(x, *zip(*found, strict=True)) - 1e-12 for x, y in points)


def test_bits_at_a_loss_are_those_of_the_mixture_and_what_a_family_pays_is_the_difference():
    two = fronts.gather([result("a", 2.0, 0.4, family="x"), result("b", 4.0, 0.2, family="x"),
                         result("c", 6.0, 0.2, family="y")], "tiny")
    assert fronts.bits_at(fronts.curve(two), 0.3) == pytest.approx(3.0)
    assert fronts.bits_at(fronts.curve(two), 0.1) == pytest.approx(10.0)  # half of b, half dense
    assert fronts.paid(two, "family", 0.1) == pytest.approx({"x": 0.0, "y": 1.0})


@pytest.mark.parametrize(("lost", "word"), [(0.15, "lower"), (0.3, "undecided"), (0.45, "higher")])
def test_l_r_is_judged_against_q_alone_mixed_to_its_size_and_by_seed(lost, word):
    alone = [result("e8p", b, y + 0.01 * seed, seed, settings=[("bits", b)]) for b, y in ((2, 0.4), (3, 0.2))
             for seed in range(3)]
    ours = [result("caldera", 2.5, lost + 0.01 * seed, seed, settings=[("rank", 8)], family="both")
            for seed in range(3)]
    line, _ = fronts.against_q_alone("tiny", [*alone, *ours])
    assert f": {word} for caldera, k = 8 (2.50 bits) {np.exp(lost - 0.3):.3f} ± 0.000" in line


@pytest.mark.parametrize(("bits", "lost", "word", "at"), [
    (2.5, 0.29, "undecided", 0.08**0.5), (3.5, 0.2, "higher", 0.0), (3.0, 0.15, "lower", 0.2)])
def test_the_second_estimate_of_q_alone_is_geometric_and_nothing_is_lost_beyond_it(bits, lost, word, at):
    alone = [result("e8p", b, y, seed, settings=[("bits", b)]) for b, y in ((2, 0.4), (3, 0.2)) for seed in range(3)]
    ours = [result("caldera", bits, lost, seed, settings=[("rank", 8)], family="both") for seed in range(3)]
    _, line = fronts.against_q_alone("tiny", [*alone, *ours])
    assert f"bends: {word} for caldera, k = 8 ({bits:.2f} bits) {np.exp(lost - at):.3f} ± 0.000" in line


def test_l_r_that_only_matches_q_alone_at_its_bits_saves_none_and_a_lower_error_saves_some():
    alone = [(2.0, 0.2), (3.0, 0.1), (4.0, 0.05)]
    on_curve = 0.2 * 2**-0.5  # of 2.5 bits
    assert fronts.saved(on_curve, 2.5, alone) == pytest.approx(0, abs=1e-12)
    assert fronts.saved(0.1, 2.5, alone) == pytest.approx(0.5) and fronts.saved(0.2, 2.5, alone) < 0


@pytest.mark.parametrize(("measured", "right"), [(0.09, 1), (0.19, 0)])
def test_the_boundary_counts_where_theory_and_measurement_agree(measured, right, monkeypatch):
    monkeypatch.setattr(fronts, "LAYERS", 1)
    alone = [result("e8p", b, 0.1, settings=[("bits", b)], errors=[e]) for b, e in ((2, 0.2), (3, 0.1), (4, 0.05))]
    ours = result("caldera", 2.5, 0.1, settings=[("rank", 8)], errors=[measured], family="both")
    theory = {"config": {"model": "tiny", "method": "theory", "settings": []}, "family": "theory", "seed": 0,
              "options": [[0, 2, 4], [0, 3, 4], [0, 4, 4], [8, 2, 4]], "option_bits": [[2.0, 3.0, 4.0, 2.5]],
              "errors": [[0.2, 0.1, 0.05, 0.1]]}
    (line,) = fronts.boundary("tiny", [*alone, ours, theory])
    assert f"k = 8: {right} save bits, predicted 1, right {right} of 1 (the commoner answer: 1)" in line


def test_every_point_of_the_presets_is_a_known_method_and_no_two_have_one_label():
    for preset in ("full", "some", "smoke"):
        chosen = [p for p in frontier.points(preset) if p[0] not in fronts.ASIDE]
        assert all(name in frontier.METHODS or name in frontier.WHOLE for name, _ in chosen)
        labels = [fronts.label({"config": {"method": name, "settings": settings}}) for name, settings in chosen]
        assert len(set(labels)) == len(labels)


def test_every_family_of_the_frontier_is_there_and_the_larger_model_has_at_least_twelve_points():
    chosen = frontier.points("full")
    families = {frontier.METHODS[name].family for name, _ in chosen if name in frontier.METHODS}
    assert families == {"quantization", "low rank", "both", "pruning", "sharing"}
    assert len([p for p in frontier.points("some") if p[0] not in fronts.ASIDE]) >= 12


@pytest.mark.parametrize("name", ["frontier", "allocation", "distillation"])
def test_committed_bits_never_depend_on_the_seed(name):
    experiment = {"frontier": frontier, "allocation": allocation, "distillation": distillation}[name].EXPERIMENT
    bits: dict[str, set[float]] = {}
    for r in machinery.collect(experiment, "full"):
        if name != "allocation" and r["family"] not in fronts.ASIDE:
            name_ = fronts.label(r) if name == "frontier" else r["family"]
            bits.setdefault(name_ + r["config"]["model"], set()).add(round(r["bits"], 9))
        elif name == "allocation":  # under a budget they may, and are never above it
            assert 0.99 * r["config"]["bits"] <= r["bits_per_weight"] <= r["config"]["bits"] or (
                r["config"]["rule"] == "uniform" and r["bits_per_weight"] <= r["config"]["bits"])
    # of two masks the cheaper is stored, and of a split rank a part may be empty, whose scale is not
    chosen = ("magnitude", "wanda", "sparsegpt", "gradient", "pruning", "srr", "level")  # the last: under a budget
    assert all(len(values) == 1 for label, values in bits.items() if not label.startswith(chosen))
    assert all(max(values) < 1.005 * min(values) if label.startswith("level") else max(values) < 1.001 * min(values)
               for label, values in bits.items())


# ---- allocation


def budgeted(rule, perplexity, seed):
    """What a run of the allocation records."""
    return {"config": {"model": "tiny", "rule": rule, "bits": 2.3}, "seed": seed, "bits_per_weight": 2.299,
            "compressed_perplexity": perplexity, "base_perplexity": 20.0,
            "layers": [{"rank": rank, "predicted_loss": 0.1} for rank in (0, 8)]}


@pytest.mark.parametrize(("factor", "word"), [(0.9, "lower"), (1.1, "higher"), (1.001, "undecided")])
def test_a_rule_is_compared_with_uniform_sizes_of_its_own_seed(factor, word):
    uniform = [30.0, 33.0, 27.0]
    rows = [budgeted("uniform", u, seed) for seed, u in enumerate(uniform)]
    rows += [budgeted("gradient", factor * u, seed) for seed, u in enumerate(uniform)]
    nats = [np.log(factor * u / 20) for u in uniform]
    assert (f"predicted {min(0.2 / x for x in nats):.2f} to {max(0.2 / x for x in nats):.2f} of the nats lost; L R on "
            "1 to 1 of 2 layers") in allocation.verdict(rows)
    found = f"gradient {factor:.3f} ± 0.000 ({word}, below 1 in {3 * (factor < 1)} of 3 seeds)"
    assert found in allocation.verdict(rows)


# ---- distillation


def test_the_soft_loss_is_zero_for_the_teacher_itself_and_its_gradient_does_not_shrink_with_the_temperature():
    rng = np.random.default_rng(0)
    teacher, student = (jnp.asarray(rng.standard_normal((2, 3, 7)), jnp.float32) for _ in range(2))
    assert float(distillation.soft_loss(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    p, q = (np.asarray(a, np.float64) for a in (teacher, student))
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (p, q))
    assert float(distillation.soft_loss(teacher, student, 1.0)) == pytest.approx(
        float(np.mean(np.sum(p * np.log(p / q), -1))), rel=1e-5)
    hot = [float(distillation.soft_loss(teacher, student, t)) for t in (50.0, 100.0)]
    difference = np.asarray(teacher - student, np.float64)
    limit = float(np.mean(np.var(difference, axis=-1)) / 2)  # T² KL tends to half the variance of the difference
    assert abs(hot[1] - limit) < abs(hot[0] - limit) < 0.05 * limit


def test_of_three_rates_the_one_of_least_validation_loss_counts_and_recovery_is_a_share_of_the_lost_logarithm():
    base = {"family": "both", "method": "caldera", "bits": 2.0, "base_perplexity": 10.0, "before": 40.0, "seed": 0,
            "trained": 5, "trace": [1.0], "config": {"model": "tiny", "rate": 1, "steps": 1, "batch": 1, "window": 2,
                                       "temperature": 2.0}}
    rows = [{**base, "validation": 2.0, "perplexity": 12.0}, {**base, "validation": 1.0, "perplexity": 20.0}]
    ((chosen,),) = distillation.chosen(rows).values()
    assert chosen["perplexity"] == 20.0 and distillation.recovered(chosen) == pytest.approx(0.5)
    assert "50% of the lost log perplexity" in distillation.verdict(rows)


def test_a_student_is_rebuilt_from_what_is_trained_and_stored_in_eight_bits():
    rng = np.random.default_rng(0)
    w, q = (jnp.asarray(rng.standard_normal((6, 9)), jnp.float32) for _ in range(2))
    low_rank = np.asarray(w[:, :2] @ w[:2], np.float64)
    left, right = distillation._factors(low_rank, 2)
    both = distillation.dense({"left": left, "right": right}, {"q": q})
    np.testing.assert_allclose(both, np.float32(low_rank) + q, atol=1e-5)
    scales = {"out": jnp.ones(6, jnp.float32), "in": jnp.full(9, 2, jnp.float32)}
    np.testing.assert_array_equal(distillation.dense(scales, {"w": w}), 2 * w)
    np.testing.assert_array_equal(distillation.dense({"w": w}, {"mask": w > 0}), np.maximum(np.asarray(w), 0))
    free = [{"q": {"w": w, "left": left, "right": right, "out": w[:, 0]}}]
    ((stored,),) = ([block["q"] for block in distillation._stored(free)],)
    for name, axis in (("w", 1), ("left", 0), ("right", 1)):
        a = np.asarray(free[0]["q"][name])
        step = np.abs(a).max(axis, keepdims=True) / 127
        assert np.all(np.abs(stored[name] - a) <= (0.5 + 127 * 2**-11) * step)  # half a step, and float16 of the step
    assert np.array_equal(stored["out"], np.float32(np.float16(w[:, 0])))


def test_blocks_that_share_weights_are_neighbours(monkeypatch):
    monkeypatch.setattr(distillation.llama, "LINEARS", ("q",))
    params = {"blocks": [{"q": None, "norm": i} for i in range(5)]}
    free = [{"q": {"w": jnp.full((2, 2), float(i))}} for i in range(2)]
    built = distillation.assembled(params, free, [{"q": {}}] * 5)
    assert [float(block["q"][0, 0]) for block in built["blocks"]] == [0, 0, 0, 1, 1]
    assert [block["norm"] for block in built["blocks"]] == [0, 1, 2, 3, 4]
