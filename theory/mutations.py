"""Every claim is broken on purpose, and the check that ought to notice has to fail.

``python theory/mutations.py [NAME ...]`` takes a copy of the tree for each mutation, replaces one text, and runs there
the test that is expected to fail, with the copy's package.  NAME: mutations of that file, or of that claim's tests.
A mutation is caught if an assertion of that test fails; an error of another kind does not count.  Exit code 1 if one
is not caught.  results/mutations.json is written after each; what it holds is not tried again while the package and the
claim are the same.  About ten minutes on one core.

Three kinds: a wrong factor, an assumption dropped, feedback transposed or turned round; in the package, which the
claims are about, and in the claims' own formulas.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from caldera_jax.jobs import report
from caldera_jax.models import files

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "theory/results/mutations.json"
PARTS = ("caldera_jax", "theory", "tests/matrices.py", "tests/oracles.py", "tests/programs.py",
         "pyproject.toml")


class Mutation(NamedTuple):
    """``old`` stands once in ``file``; with ``new`` in its place ``test`` ("CLAIM::test_...") fails."""

    file: str
    old: str
    new: str
    test: str

    @property
    def claim(self) -> str:
        return self.test.split("::")[0]


def of(test: str, *substitutions: tuple[str, str, str]) -> list[Mutation]:
    """Mutations that one test catches."""
    return [Mutation(*substitution, test) for substitution in substitutions]


LDLQ, OBJECTIVE, CODEBOOKS = "caldera_jax/ldlq.py", "caldera_jax/objective.py", "caldera_jax/codebooks.py"
REGRESSION, INCOHERENCE, HADAMARD = (f"caldera_jax/{x}.py" for x in ("regression", "incoherence", "hadamard"))
LPLR, HESSIAN, DECOMPOSE = (f"caldera_jax/{x}.py" for x in ("lplr", "hessian", "decompose"))
RATE_GAP, LOOP, DOWNDATE = (f"theory/{x}.py" for x in ("rate_gap", "alternating_loop", "downdate"))
LEVELS, CALIBRATION, EVALUATE = ("caldera_jax/levels.py", "caldera_jax/jobs/calibration.py",
                                 "caldera_jax/jobs/evaluate.py")
STEPS, RANK, DIVERGENCE = (f"theory/{x}.py" for x in ("level_steps", "rank_at_one_level", "predicted_divergence"))
SQUARED = "root[i:i + block, i:i + block] ** 2"
BLOCK_FEEDBACK = "axis=1) + (w - q) @ columns"
LDLQ_BOUND = "return float(block * m * mu**2 * variance"
DITHER = "jnp.floor(position + jax.random.uniform("

MUTATIONS = (
    *of("ldlq_identity::test_the_loss_is_the_rounding_errors_weighted_by_d_and_each_block_is_at_its_nearest_point",
        (LDLQ, "lower = _pad_square(factors.lower, width)", "lower = _pad_square(factors.lower, width).T"),
        (LDLQ, "change = (old - new) @ lax", "change = 0.5 * (old - new) @ lax"),
        (HESSIAN, 'jnp.einsum("ajg,jgh->ajh"', 'jnp.einsum("ajg,jhg->ajh"'),
        ("theory/ldlq_identity.py", "eta = (q - w) @ factors.lower", "eta = (q - w) @ factors.lower.T")),
    *of("ldlq_identity::test_the_identity_needs_this_feedback",
        (LDLQ, "return target + part(e, 1) @ part(aside, 0)", "return target - part(e, 1) @ part(aside, 0)")),
    *of("ldlq_identity::test_ldlq_is_gptq_from_the_last_column_and_babais_nearest_plane",
        (LDLQ, BLOCK_FEEDBACK, "axis=1) + (q - w) @ columns"),
        ("theory/ldlq_identity.py", "np.outer(error, upper[j, j:])", "np.outer(error, upper[j:, j])"),
        ("theory/ldlq_identity.py", "gptq(w[:, ::-1], h[::-1, ::-1])[:, ::-1]", "gptq(w, h)")),
    *of("ldlq_identity::test_babais_bound_holds_and_is_met_by_the_deepest_holes",
        (OBJECTIVE, SQUARED, SQUARED.removesuffix(" ** 2")),
        ("theory/ldlq_identity.py", "bound = 20 / 4 * feedback_trace(h)", "bound = 20 / 5 * feedback_trace(h)")),

    *of("ldlq_optimality::test_the_average_loss_is_tr_c_over_12_or_over_6_for_uniform_and_for_dithered_weights",
        (LDLQ, BLOCK_FEEDBACK, "axis=1) + 0.5 * (w - q) @ columns"),
        ("theory/ldlq_optimality.py", '("nearest", 12), ("stochastic", 6)', '("nearest", 10), ("stochastic", 6)'),
        ("theory/ldlq_optimality.py", "u = 0.5 if key is None", "u = 0.4 if key is None")),
    *of("ldlq_optimality::test_no_feedback_costs_less_than_tr_d_and_what_it_costs_more_is_the_square_of_its_distance",
        (OBJECTIVE, SQUARED, f"2 * {SQUARED}"),
        ("theory/ldlq_optimality.py", "inverse @ h @ inverse.T)\n", "inverse.T @ h @ inverse)\n")),
    *of("ldlq_optimality::test_tr_d_is_at_most_tr_h_and_the_incoherence_bound",
        (OBJECTIVE, LDLQ_BOUND, "return float(block * m * variance")),
    *of("ldlq_optimality::test_looking_ahead_beats_ldlq_and_looking_back_at_w_does_not",
        (LDLQ, "jnp.where(own, 0, feedback)", "jnp.where(own, 0, 0.5 * feedback)")),
    *of("ldlq_optimality::test_on_a_clipped_grid_ldlq_is_worse_than_plain_rounding_by_any_factor_until_k_levels_more",
        (LDLQ, "q, codes = sweep(w, w, lower, quantize", "q, codes = sweep(w, w, lower.T, quantize"),
        ("theory/ldlq_optimality.py", "target.clip(0, top)", "target")),
    *of("ldlq_optimality::test_stochastic_rounding_has_a_smaller_worst_case_which_ldlq_does_not_minimise",
        ("theory/ldlq_optimality.py", "first + (1 + (l - feedback) ** 2)", "first + (1 + l**2)")),

    *of("randomized_hadamard::test_the_lemma_holds_at_every_delta_and_width",
        (INCOHERENCE, "return random.rademacher(key, (n,), dtype)", "return jnp.ones((n,), dtype)"),
        ("theory/randomized_hadamard.py", "np.sqrt(2 * np.log(2 * n**2 / delta))", "np.sqrt(np.log(2 * n**2 / delta))"),
        ),
    *of("randomized_hadamard::test_constructed_factors_are_orthogonal_and_flat_and_cosines_are_at_most_sqrt_2_higher",
        (HADAMARD, "return matrix / math.sqrt(order)", "return matrix / order")),
    *of("randomized_hadamard::test_each_of_the_two_steps_holds_for_weights_that_are_not_square",
        ("theory/randomized_hadamard.py", "return 2 * np.log(4 * m * n / delta)", "return np.log(4 * m * n / delta)")),
    *of("randomized_hadamard::test_one_transform_leaves_two_or_three_values_and_two_leave_a_binomial_at_distance_d_to_"
        "the_minus_half",
        (HADAMARD, "blocks = jnp.tensordot(blocks, matrix,", "blocks = jnp.tensordot(blocks, jnp.abs(matrix),"),
        ("theory/randomized_hadamard.py", "random.rademacher(one, shape, x.dtype) * x", "x")),

    *of("block_ldlq_bound::test_the_bound_is_attained_by_one_flat_direction_and_false_without_g",
        (OBJECTIVE, LDLQ_BOUND, "return float(m * mu**2 * variance"),
        (OBJECTIVE, SQUARED, SQUARED.removesuffix(" ** 2"))),
    *of("block_ldlq_bound::test_every_step_of_the_proof_holds_before_and_after_rotation",
        ("theory/block_ldlq_bound.py", "largest.max() * np.trace(half)", "largest.mean() * np.trace(half)"),
        ("theory/block_ldlq_bound.py", "eigvalsh(half[cut, cut])[-1]", "eigvalsh(half[cut, cut])[0]")),
    *of("block_ldlq_bound::test_the_expected_loss_is_tr_of_d_times_the_covariance_so_that_its_largest_eigenvalue_counts",
        (LDLQ, "lax.dynamic_slice_in_dim(lower, start", "lax.dynamic_slice_in_dim(lower.T, start"),
        ("theory/block_ldlq_bound.py", "np.linalg.eigvalsh(sigma)[-1] * trace", "np.diag(sigma)[-1] * trace")),
    *of("block_ldlq_bound::test_e8p_errors_have_equal_variances_and_a_small_negative_correlation_from_the_common_shift",
        (CODEBOOKS, "gain: float = 1.03", "gain: float = 0.9")),

    *of("lattice_shaping::test_the_scalar_facts_come_out",
        (CODEBOOKS, "* (2 / (2**self.bits - 1)) - 1", "* (2 / 2**self.bits) - 1"),
        (CODEBOOKS, "return jnp.clip((x + 1) * (top / 2), 0, top)", "return (x + 1) * (top / 2)")),
    *of("lattice_shaping::test_published_gains_and_residual_scales_are_the_best_on_a_gaussian_but_for_the_gain_at_4_"
        "bits",
        (CODEBOOKS, "residual_scale=2.04", "residual_scale=2.6")),
    *of("lattice_shaping::test_e8p_is_e8_where_the_lattice_point_is_a_codeword_and_its_parts_add_up",
        ("theory/lattice_shaping.py", "((near - y) ** 2).mean(1) / gain**2", "((near - y) ** 2).mean(1)")),
    *of("lattice_shaping::test_the_second_moment_of_e8_is_929_over_12960_below_that_of_the_cube_and_of_d8",
        ("theory/lattice_shaping.py", "G_CUBE = 929 / 12960,", "G_CUBE = 949 / 12960,")),
    *of("lattice_shaping::test_no_root_of_e8_leads_to_a_nearer_point",
        ("theory/lattice_shaping.py", "near.sum(1, keepdims=True) % 2 == 0", "True")),
    *of("lattice_shaping::test_no_quantizer_beats_shannons_lower_bound",
        ("theory/lattice_shaping.py", "* G_SPHERE * 4.0**-bits", "* G_CUBE * 4.0**-bits")),

    *of("rank_constrained_regression::"
        "test_the_optimum_is_the_tail_for_every_root_and_the_product_is_unique_where_there_is_a_gap",
        (REGRESSION, "jnp.linalg.svd(a @ root,", "jnp.linalg.svd(a,"),
        (REGRESSION, "jnp.linalg.svd(a @ root,", "jnp.linalg.svd(a @ root.T,"),
        ("theory/rank_constrained_regression.py", "np.linalg.pinv(root, rcond=1e-9)\n", "root.T\n")),
    *of("rank_constrained_regression::test_subspace_iteration_keeps_its_bound_and_is_never_below_the_optimum",
        (REGRESSION, "vectors[:, ::-1][:, :rank]", "vectors[:, :rank]")),
    *of("rank_constrained_regression::"
        "test_the_bound_of_subspace_iteration_is_met_but_for_what_a_turn_costs_and_the_other_columns_take",
        ("theory/rank_constrained_regression.py", "sums / (oversample - 1)", "sums / oversample / 2")),
    *of("rank_constrained_regression::test_to_first_order_the_excess_is_the_sum_over_pairs_and_falls_as_one_over_t",
        ("theory/rank_constrained_regression.py", "(top - rest)) / tokens", "(top - rest)) / (2 * tokens)")),

    *of("lplr_bound::test_spikes_before_a_flat_tail_meet_the_bound_and_refute_one_without_its_second_term",
        ("theory/lplr_bound.py", "(1 + rank / (columns - rank - 1))", "(1 + rank / (columns - 1))"),
        ("theory/lplr_bound.py", "right = jnp.linalg.lstsq(left, a)[0]", "right = left.T @ a")),
    *of("lplr_bound::test_the_bound_holds_for_every_k_at_once",
        (REGRESSION, "return Factors(left, left.T @ a)\n\n", "return Factors(left, left.T @ a / 2)\n\n")),
    *of("lplr_bound::test_with_dithered_factors_epsilon_is_the_variance_of_both",
        (CODEBOOKS, DITHER, DITHER.replace("floor", "round")),
        ("theory/lplr_bound.py", "share: float = 1 / 4", "share: float = 1 / 12")),
    *of("lplr_bound::test_the_packages_alternation_beats_the_rounded_sketch_and_its_clipped_start_does_not",
        (LPLR, "loss(left_t.values, gram, cross), jnp.inf", "-loss(left_t.values, gram, cross), jnp.inf")),

    *of("caldera_bound::test_the_eigenvalues_are_the_squared_singular_values_and_the_first_step_is_an_equality",
        (REGRESSION, "jnp.linalg.svd(a @ root,", "jnp.linalg.svd(a,"),
        ("theory/caldera_bound.py", "eta = (q - w) @ factors.lower", "eta = (q - w) @ factors.lower.T")),
    *of("caldera_bound::test_the_printed_form_holds_and_is_above_the_trivial_bound_at_every_rank",
        (LDLQ, "lax.dynamic_slice_in_dim(lower, start", "lax.dynamic_slice_in_dim(lower.T, start"),
        (OBJECTIVE, "return float(m * (4 * len(spectrum)", "return float(m * (2 * len(spectrum)"),
        ("theory/caldera_bound.py", "variance * feedback_trace(h) * rest", "variance * feedback_trace(h) * rest / 4")),
    *of("caldera_bound::test_below_a_fifth_of_m_the_printed_form_is_worse_than_plain_ldlq",
        (OBJECTIVE, "(1 - rank / (2 * m)) ** 2", "(1 - rank / m) ** 2"),
        ("theory/caldera_bound.py", "return (2 - np.sqrt(np.pi)) * m", "return (2 - np.sqrt(3)) * m")),
    *of("caldera_bound::test_the_tail_of_gaussian_noise_is_that_of_marchenko_and_pastur",
        ("theory/caldera_bound.py", "interp(1 - part / small", "interp(1 - part")),

    *of("factor_bits::test_dithering_costs_the_three_terms_and_no_more_than_their_bounds",
        (CODEBOOKS, DITHER, DITHER.replace("floor", "round")),
        ("theory/factor_bits.py", "float(v.sum(0) @ u)", "0.0"),
        ("theory/factor_bits.py", "np.sum(left**2) * right_step**2 / 4", "np.sum(left**2) * right_step**2 / 12")),
    *of("factor_bits::test_sparse_factors_meet_the_bound_and_break_the_first_order_formula",
        ("theory/factor_bits.py", "return 2 * energy * (np.sqrt", "return energy * (np.sqrt")),
    *of("factor_bits::test_rounding_r_is_an_ldlq_problem_and_so_is_rounding_l",
        (LDLQ, "lower = _pad_square(factors.lower, width)", "lower = _pad_square(factors.lower, width).T"),
        ("theory/factor_bits.py", "gram = right @ h @ right.T\n", "gram = right @ right.T\n")),
    *of("factor_bits::test_one_scale_rounds_small_directions_coarsely_and_turning_the_factors_mends_it",
        (HADAMARD, "return matrix / math.sqrt(order)", "return matrix / order"),
        ("theory/factor_bits.py", "return d * np.trace(right @ h @ right.T) + d * (1 + d)",
         "return d * (1 + d)")),
    *of("factor_bits::test_the_cost_falls_as_the_square_of_the_step",
        (CODEBOOKS, "* (2 / (2**self.bits - 1)) - 1", "* (2 / 2**self.bits) - 1")),

    *of("dither::test_expectation_and_variance_of_the_package_are_exactly_x_and_f_times_1_minus_f",
        (CODEBOOKS, DITHER, DITHER.replace("floor", "round")),
        (CODEBOOKS, "* (2 / (2**self.bits - 1)) - 1", "* (2 / 2**self.bits) - 1"),
        ("theory/dither.py", "** 2 * f * (1 - f)\n", "** 2 * f\n")),
    *of("dither::test_only_subtractive_dither_makes_the_error_independent_of_the_input",
        ("theory/dither.py", "(jnp.round((x + 1) / size + u) - u)", "jnp.round((x + 1) / size + u)")),
    *of("dither::test_the_loss_of_dithered_ldlq_is_the_variances_weighted_by_d_and_at_most_m_delta_squared_over_4_tr_d",
        (LDLQ, "lower = _pad_square(factors.lower, width)", "lower = _pad_square(factors.lower, width).T"),
        ("theory/dither.py", "targets = (q - (q - w) @ factors.lower)", "targets = (q - (q - w) @ factors.lower.T)"),
        ("theory/dither.py", "return m * delta**2 / c", "return m * delta**2 / (c + 1)")),
    *of("dither::test_clipping_brings_bias_and_breaks_the_bound",
        ("theory/dither.py", "(variance(codebook, targets) + bias**2)", "variance(codebook, targets)"),
        (CODEBOOKS, "return self.clip * _rms(x, real)", "return 8 * self.clip * _rms(x, real)")),

    *of("factor_bits::test_the_package_with_feedback_leaves_less_noise_than_without",
        (LPLR, "target = x[j] + lower[:, j] @ (x - q)", "target = x[j] - lower[:, j] @ (x - q)"),
        (LPLR, "turn = jnp.linalg.qr(jax.random.normal(turn_key, (rank, rank), a.dtype))[0]",
         "turn = jnp.eye(rank, dtype=a.dtype)")),

    *of("when_rank_pays::test_the_shares_predict_what_q_loses_and_the_feedback_how_much_it_widens",
        (OBJECTIVE, SQUARED, SQUARED.removesuffix(" ** 2")),
        (LDLQ, "lower = _pad_square(factors.lower, width)", "lower = _pad_square(factors.lower, width).T"),
        ("theory/when_rank_pays.py", "s.plain + 2 * c_factor * (1 - s.plain)", "s.plain"),
        ("theory/when_rank_pays.py", "target[cut] += variance @ fed_back[:, cut]", "target[cut] += 0"),
        ("theory/when_rank_pays.py", "variance @ fed_back[:, cut]", "fed_back[cut] @ variance")),
    *of("when_rank_pays::test_lr_last_repairs_more_than_its_own_columns_hold_and_less_than_2k_free_directions",
        (REGRESSION, "jnp.linalg.svd(a @ root,", "jnp.linalg.svd(a,"),
        ("theory/when_rank_pays.py", "float(tail[rank:].sum()", "float(tail[2 * rank + 4:].sum()")),
    *of("when_rank_pays::test_the_best_rank_stops_where_only_the_noise_of_the_factors_is_left",
        ("theory/when_rank_pays.py", "left = 1 - (1 - 2 * c_factor) * energy", "left = 1 - (1 - 1e-9) * energy")),
    *of("when_rank_pays::test_white_weights_never_pay_and_a_strong_spike_does",
        ("theory/when_rank_pays.py", "factor_bits * np.arange(len(left)) * (1 / m + 1 / n)",
         "factor_bits * np.arange(len(left)) / (m + n)")),
    *of("when_rank_pays::test_the_share_of_a_fixed_rank_is_bounded_and_vanishes",
        ("theory/when_rank_pays.py", "np.sqrt(m * d.max()) + np.sqrt(d.sum()) + deviations",
         "np.sqrt(m * d.max()) + deviations")),

    *of("rate_gap::test_an_ideal_code_has_no_gap_and_one_for_another_h_pays_for_it",
        (OBJECTIVE, "theta = level[np.argmax(level <= variances)]", "theta = level[0]"),
        (OBJECTIVE, "/ (2 * len(variances)))", "/ (2 * np.sum(variances > theta)))")),
    *of("rate_gap::test_the_gap_knows_neither_units_nor_basis", (OBJECTIVE, "along.mean()))", "1.0))")),
    *of("rate_gap::test_the_parts_add_up_to_the_gap",
        (OBJECTIVE, "return bits - rate_distortion_limit(", "return bits + rate_distortion_limit("),
        (RATE_GAP, "half_log(rest / eps)", "half_log(variance / eps)"),
        (RATE_GAP, "alignment=half_log(d / (eps * arithmetic))", "alignment=half_log(d / eps / np.trace(h) * len(h))"),
        (RATE_GAP, "damping=damped_limit - limit(loss(e, h) / w.size, w, h, spectral=spectral)",
         "damping=half_log(loss(e, h) / w.size / d)")),
    *of("rate_gap::test_w_s_own_structure_lowers_the_limit_by_its_spread_over_the_directions_of_h",
        (OBJECTIVE, "np.mean((w @ vectors) ** 2, axis=0)", "np.mean((w @ vectors.T) ** 2, axis=0)")),
    *of("rate_gap::test_the_parts_are_those_of_the_oracles_factors",
        (HESSIAN, 'jnp.einsum("ajg,jgh->ajh"', 'jnp.einsum("ajg,jhg->ajh"'),
        (LDLQ, "lower = _pad_square(factors.lower, width)", "lower = _pad_square(factors.lower.T, width)"),
        (RATE_GAP, "blocks = [root[j:j + block, j:j + block] for",
         "blocks = [np.diag(np.diag(root[j:j + block, j:j + block])) for")),
    *of("rate_gap::test_the_rows_add_up_alone_and_through_another_run_and_make_a_table",
        (RATE_GAP, 'exact["limit"] - rounded["limit"]', 'rounded["limit"] - exact["limit"]')),

    *of("alternating_loop::test_an_unrounded_lr_step_never_raises_f_whatever_q_and_lr_were",
        (REGRESSION, "jnp.linalg.svd(a @ root,", "jnp.linalg.svd(a,")),
    *of("alternating_loop::test_unrounded_lr_and_coordinate_descent_on_a_fixed_scalar_grid_descend_and_come_to_rest",
        (LDLQ, "feedback = inverses(diagonal)", "feedback = 2 * inverses(diagonal)"),
        (LOOP, "jnp.clip(jnp.round(target / scale), -levels", "jnp.clip(jnp.floor(target / scale), -levels"),
        (LOOP, "descent_feedback(h, 1)", "descent_feedback(h, 1).T")),
    *of("alternating_loop::test_with_q_last_noise_on_lr_costs_its_plain_mean_square_and_with_lr_last_its_weighted_one",
        (LDLQ, BLOCK_FEEDBACK, "axis=1) + (q - w) @ columns"),
        (LOOP, "step = np.sqrt(np.mean(target**2)) / 2", "step = 0.5")),
    *of("alternating_loop::test_a_cautious_lr_step_never_raises_the_error_and_rounding_does",
        (LOOP, "better(loss(new) < loss(low_rank), new", "better(loss(new) > loss(low_rank), new")),
    *of("alternating_loop::test_a_rounded_lr_step_moves_a_point_that_is_on_its_grid",
        (LOOP, "found = lplr_factorize(jax.random.key(0), a, factors, 4, left, right, 10).dense()",
         "found = a")),

    *of("downdate::test_the_loss_in_the_downdated_h_is_what_the_best_repair_along_v_leaves",
        (DECOMPOSE, "factors.root @ factors.root.T - m_v @ m_v.T", "factors.root @ factors.root.T - 0.5 * m_v @ m_v.T"),
        (DECOMPOSE, "m_v = factors.root @ v", "m_v = factors.root.T @ v"),
        (DOWNDATE, "left = (w - q) @ root", "left = (w - q) @ root.T")),
    *of("downdate::test_an_lr_of_zero_or_of_lower_rank_downdates_no_more_than_it_holds",
        (DECOMPOSE, "active = size > 10 *", "active = size > -10 *")),
    *of("downdate::test_before_the_repair_the_downdated_feedback_is_never_better",
        (DECOMPOSE, "root, hessian.block_ldl(root, block)", "root, hessian.block_ldl(factors.root, block)")),
    *of("downdate::test_the_sign_is_as_predicted_where_it_is_clear",
        (DOWNDATE, "c_down * repaired[rank:].sum()",
         "c_down * repaired.sum()"),
        (DOWNDATE, "np.sqrt(down + phi)", "np.sqrt(down)")),

    *of("level_steps::test_no_other_steps_of_the_same_bits_lose_less_and_the_ratio_is_the_mean_of_4_to_delta",
        (STEPS, "np.mean(4.0 ** (delta - np.mean(delta)))", "np.mean(2.0 ** (delta - np.mean(delta)))")),
    *of("level_steps::test_wrong_steps_of_the_rows_take_the_same_bits_and_lose_as_predicted",
        (LEVELS, "octave(1 / jnp.sqrt(g))", "octave(1 / g)")),
    *of("level_steps::test_the_gap_at_high_rate_is_the_shaping_loss_whatever_the_spectrum",
        (LEVELS, "octave(1 / jnp.sqrt(d))", "octave(1 / d)"),
        (STEPS, "levels.DISTORTION[states] / spacing**2)", "levels.DISTORTION[states] / spacing)")),

    *of("rank_at_one_level::test_what_low_rank_costs_is_what_its_rounding_says",
        (LEVELS, "left = _rounded(fit.T, of_inner, g, c, unit * size, config)",
         "left = _rounded(fit.T, of_inner, g, c, unit, config)")),
    *of("rank_at_one_level::test_a_spike_of_w_pays_and_a_direction_of_h_does_not",
        (RANK, "of(left, c / s[:k])", "of(left, c)"),
        (RANK, "of(w - left @ right, steps) +", "of(w, steps) +")),

    *of("predicted_divergence::test_to_second_order_the_divergence_is_half_the_fisher_form_of_the_error",
        (EVALUATE, "jnp.exp(p) * (p - q)", "2 * jnp.exp(p) * (p - q)"),
        (DIVERGENCE, "float(0.5 * jnp.mean(", "float(jnp.mean(")),
    *of("predicted_divergence::test_random_signs_lose_what_the_diagonal_of_the_fisher_information_says",
        (CALIBRATION, "np.asarray(square) / tokens.size", "np.asarray(square) / len(tokens)")),
    *of("row_scales::test_the_package_scales_rows_so",
        ("caldera_jax/linear.py", "jnp.sqrt(floored(g) / floored(energy))", "jnp.sqrt(floored(g) * floored(energy))")),
    *of("row_scales::test_measured_losses_are_those_predicted",
        ("theory/row_scales.py", "(1 - c) * np.mean(squares * e)", "np.mean(squares) * np.mean(e)")),
)


def matching(names: list[str]) -> list[Mutation]:
    """Mutations of these files, or of the tests of these claims; all without a name."""
    return [m for m in MUTATIONS if not names or {Path(m.file).stem, m.claim} & set(names)]


def broken(text: str, mutation: Mutation) -> str:
    """The file's text with the mutation; ValueError if what it replaces is not there exactly once."""
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.file} holds {mutation.old!r} {count} times: name a text that is there once")
    return text.replace(mutation.old, mutation.new)


def copy_tree(target: Path) -> Path:
    """What the checks need, copied to ``target``."""
    skip = shutil.ignore_patterns("__pycache__", "results", "figures")
    for part in map(Path, PARTS):
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target / part, ignore=skip)
        else:
            shutil.copy(ROOT / part, target / part)
    return target


def check(root: Path, tests: list[str], cache: str) -> tuple[int, str]:
    """pytest's exit code and output for these tests in a copy; the copies share what XLA compiled."""
    environment = os.environ | {
        "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000", "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    run = lambda *command: subprocess.run([sys.executable, *command], cwd=root, env=environment, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    origin = run("-c", "import importlib.util as u; print(u.find_spec('caldera_jax').origin)").stdout.strip()
    if Path(origin).resolve() != (root / "caldera_jax/__init__.py").resolve():
        raise RuntimeError(f"the copy imports {origin}, not its own package: unset what puts that first")
    ids = ["theory/{}.py::{}".format(*test.split("::")) for test in tests]
    done = run("-m", "pytest", "-q", "-x", "--no-header", "--tb=short", "-p", "no:cacheprovider", *ids)
    return done.returncode, done.stdout


def try_out(mutation: Mutation, cache: str) -> dict:
    """One row of the record."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        path = copy_tree(Path(directory)) / mutation.file
        path.write_text(broken(path.read_text(), mutation))
        code, output = check(Path(directory), [mutation.test], cache)
    found = re.search(r"^FAILED \S+::(\S+) - (?:AssertionError|assert)", output, re.MULTILINE)
    caught = code == 1 and found is not None
    return {**mutation._asdict(), "caught": caught, "by": found[1] if found else output[-1000:],
            "seconds": round(time.perf_counter() - start, 1)}


def state(claim: str) -> str:
    """A hash of what a claim's checks run on: the package, what the claims share, and the claim."""
    package = sorted(path.relative_to(ROOT) for path in (ROOT / "caldera_jax").rglob("*.py"))
    paths = (*package, "theory/common.py", "tests/matrices.py", f"theory/{claim}.py")
    return hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in paths)).hexdigest()[:12]


def known_rows() -> dict[Mutation, dict]:
    """The rows of the record that the list still holds."""
    rows = files.read_json(RECORD)["rows"] if RECORD.is_file() else []
    found = {Mutation(*(row[field] for field in Mutation._fields)): row for row in rows}
    return {mutation: found[mutation] for mutation in MUTATIONS if mutation in found}


def save(rows: dict[Mutation, dict]) -> None:
    record = report.provenance(MUTATIONS, 0) | {"config": {"mutations": len(MUTATIONS)}}
    files.write_json(RECORD, record | {"rows": [rows[mutation] for mutation in MUTATIONS if mutation in rows]})


def main(names: list[str]) -> int:
    chosen, rows = matching(names), known_rows()
    if not chosen:
        raise SystemExit(f"no mutation of {', '.join(names)}: name a file or a claim, without .py")
    states = {mutation.claim: state(mutation.claim) for mutation in chosen}
    todo = [m for m in chosen if m not in rows or not rows[m]["caught"] or rows[m]["state"] != states[m.claim]]
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as directory:
        if todo:
            code, output = check(copy_tree(Path(directory)), sorted({m.test for m in todo}), cache)
            if code:
                raise SystemExit(f"{output}\nthe checks fail before anything is broken: mend them first")
        for mutation in tqdm(todo, unit="mutation"):
            row = rows[mutation] = try_out(mutation, cache) | {"state": states[mutation.claim]}
            tqdm.write(f"{'caught' if row['caught'] else 'NOT CAUGHT'}: {mutation.file}: {mutation.old!r} -> "
                       f"{mutation.new!r}, {row['by']}, {row['seconds']} s")
            save(rows)
    save(rows)
    missed = sum(not rows[m]["caught"] for m in chosen)
    print(f"{len(chosen) - missed} of {len(chosen)} caught, {len(todo)} of them tried now")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
