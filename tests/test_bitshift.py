"""The bitshift trellis: states, numbers, and the best circle of bits."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest

import caldera_jax as cj
from caldera_jax import bitshift
from caldera_jax.codebooks import quantize
from caldera_jax.packing import pack

ENCODE, VITERBI = jax.jit(bitshift.encode, static_argnums=(1, 2)), jax.jit(bitshift.viterbi, static_argnums=(1, 2))
QUANTIZE, COMPRESS = jax.jit(quantize, static_argnums=0), cj.compress_matrix


def number(state):
    """By the four bytes of a word of 32 bits."""
    word = (91540847 * state + 921920993) % 2**32
    return (sum(word.to_bytes(4, "little")) - 510) / math.sqrt(4 * (256**2 - 1) / 12)


def circle(codes, bits, log):
    """The numbers of a circle of bits, one by one."""
    digits = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    return [number(int("".join(digits[(bits * i + j) % len(digits)] for j in range(min(log, len(digits))))[::-1], 2))
            for i in range(len(codes))]


@pytest.mark.parametrize(("bits", "t", "states"), [(1, 30, 256), (2, 24, 4096), (3, 16, 512), (4, 9, 65536),
                                                  (3, 7, 2**16), (2, 3, 4096), (4, 1, 256)])
def test_a_number_is_a_hash_of_the_bits_that_begin_with_its_own(bits, t, states):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, t), np.uint8)
    wanted = [circle(row.tolist(), bits, states.bit_length() - 1) for row in codes]
    np.testing.assert_allclose(bitshift.decode(jnp.asarray(codes), bits, states, jnp.float64), wanted, atol=1e-14)


def test_the_numbers_of_all_states_have_mean_0_and_variance_1():
    for log, bound in ((16, 0.01), (12, 0.03), (8, 0.1)):
        found = bitshift.values(jnp.arange(2**log, dtype=jnp.uint32), jnp.float64)
        assert abs(found.mean()) < bound and abs(found.std() - 1) < bound


def test_equal_sequences_are_the_shortest_of_at_least_192():
    assert [bitshift.length(m) for m in (1, 100, 192, 193, 576, 577, 578, 1536, 8960, 11008)] == [
        1, 100, 192, 193, 192, 577, 289, 192, 224, 256]


@pytest.mark.parametrize(("bits", "log"), [(1, 3), (2, 4), (3, 3), (3, 5)])
def test_viterbi_finds_the_best_of_all_paths_and_of_those_with_an_overlap(bits, log):
    t, rng = 4, np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((6, t)))
    overlap = rng.integers(0, 1 << (log - bits), 6)
    numbers = np.array([number(state) for state in range(1 << log)])
    paths = []
    for first, *codes in itertools.product(range(1 << log), *[range(1 << bits)] * (t - 1)):
        path = [first]
        for code in codes:
            path.append((path[-1] << bits | code) % (1 << log))
        paths.append(path)
    paths = np.array(paths)
    costs = ((np.asarray(x)[:, None] - numbers[paths][None]) ** 2).sum(2)
    first, last = paths[None, :, 0] >> bits, paths[None, :, -1] % (1 << log - bits)
    least = np.where((first == overlap[:, None]) & (last == overlap[:, None]), costs, np.inf).min(1)
    cost = lambda found: ((np.asarray(x) - numbers[np.asarray(found)]) ** 2).sum(1)
    np.testing.assert_allclose(cost(VITERBI(x, bits, log)), costs.min(1), rtol=1e-12)
    held = VITERBI(x, bits, log, jnp.asarray(overlap, jnp.int32))
    np.testing.assert_allclose(cost(held), least, rtol=1e-12)


def test_the_circle_found_is_nearly_the_best_of_all_and_is_a_circle():
    """The overlap is guessed: of 64 circles of 12 bits and 16 states the mean loss is within a tenth of the least."""
    bits, states, t = 1, 16, 12
    x = np.random.default_rng(2).standard_normal((64, t))
    every = (np.arange(2**t)[:, None] >> np.arange(t) & 1).astype(np.uint8)
    numbers = bitshift.decode(jnp.asarray(every), bits, states, jnp.float64)
    least = ((x[:, None] - np.asarray(numbers)[None]) ** 2).sum(2).min(1)
    codes = ENCODE(jnp.asarray(x), bits, states)
    found = ((x - np.asarray(bitshift.decode(codes, bits, states, jnp.float64))) ** 2).sum(1)
    assert np.all(found >= least - 1e-9) and found.mean() < 1.1 * least.mean()
    assert (found < least + 1e-9).mean() > 0.5


@pytest.mark.parametrize(("bits", "t", "states"), [(1, 32, 65536), (2, 192, 4096), (3, 16, 65536), (4, 10, 256)])
def test_from_bytes_come_the_numbers_that_come_from_codes(bits, t, states):
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 2**bits, (5, t), np.uint8))
    parts = bitshift.apart(pack(codes, bits), bits, states)
    assert len(parts) == {1: 8, 2: 4, 3: 8, 4: 2}[bits]
    found = np.stack(parts, axis=2).reshape(5, t) * bitshift.UNIT
    np.testing.assert_allclose(found, bitshift.decode(codes, bits, states, jnp.float64), atol=1e-14)


@pytest.mark.parametrize(("bits", "count"), [(1, 28), (2, 8), (2, 14), (3, 10), (3, 4), (4, 13)])
def test_sequences_of_no_whole_periods_or_of_two_bytes_are_left_to_the_codes(bits, count):
    assert bitshift.period(count, bits) == 0


@pytest.mark.parametrize(("states", "most", "columns"), [(256, 0.0850, 48), (4096, 0.0735, 48), (65536, 0.0700, 8)])
def test_the_error_on_a_unit_gaussian_falls_with_the_states(states, most, columns):
    """The limit is 2^-4 = 0.0625, E8P has 0.0915."""
    x = jnp.asarray(np.random.default_rng(7).standard_normal((192, columns)), jnp.float32)
    error = float(jnp.mean((QUANTIZE(cj.Trellis(2, states), x).values - x) ** 2))
    assert 0.0625 * 0.97 < error < most


def test_each_bit_takes_the_error_to_less_than_a_third():
    x = jnp.asarray(np.random.default_rng(8).standard_normal((192, 16)), jnp.float32)
    errors = [float(jnp.mean((QUANTIZE(cj.Trellis(bits, 1024), x).values - x) ** 2)) for bits in (1, 2, 3, 4)]
    assert errors[0] < 0.3 and all(after < before / 3 for before, after in itertools.pairwise(errors))


def test_ldlq_on_a_trellis_has_less_error_than_on_e8p_of_as_many_bits():
    w, h = matrices.gaussian(192, 48), matrices.hessian("power", 48)
    layers = [COMPRESS(jax.random.key(0), w, h, cj.CalderaConfig(rank=0, quantizer=grid))
              for grid in (cj.E8P(), cj.Trellis(2, 1024))]
    (e8p, of_e8p), (trellis, of_trellis) = layers
    assert trellis.stored_bits == e8p.stored_bits
    assert of_trellis.error[0] < 0.95 * of_e8p.error[0]
    np.testing.assert_allclose(cj.relative_error(w, trellis.dense(), h), of_trellis.error[0], rtol=1e-6)


def test_a_draft_wins_half_of_what_a_trellis_in_all_rounds_wins():
    """Of as many rounds."""
    w = matrices.decaying(192, 48) + 0.1 * matrices.gaussian(192, 48)
    h, best, traces = matrices.hessian("power", 48), {}, {}
    for name, more in (("e8p", {}), ("trellis", {"quantizer": cj.Trellis(2, 1024)}),
                       ("draft", {"quantizer": cj.Trellis(2, 1024), "draft": "e8p"})):
        config = cj.CalderaConfig(rank=4, outer_iterations=3, inner_iterations=2, **more)
        layer, trace = COMPRESS(jax.random.key(0), w, h, config)
        best[name], traces[name] = cj.relative_error(w, layer.dense(), h), trace.error
    assert best["e8p"] - best["draft"] > 0.5 * (best["e8p"] - best["trellis"]) > 0.01 * best["e8p"]
    assert traces["draft"].shape == traces["trellis"].shape == (6,)
    np.testing.assert_allclose(best["draft"], traces["draft"][4:].min(), rtol=1e-6)


@pytest.mark.parametrize("off", [{"rank": 0}, {"q_bits": 0}])
def test_a_draft_means_nothing_without_rounds(off):
    w, h = matrices.gaussian(16, 12), matrices.hessian("power", 12)
    config = cj.CalderaConfig(rank=2, outer_iterations=2, inner_iterations=1)
    plain, drafted = (COMPRESS(jax.random.key(0), w, h, dataclasses.replace(config, **more, **off))[0].dense()
                      for more in ({}, {"draft": "uniform"}))
    np.testing.assert_array_equal(plain, drafted)


@pytest.mark.parametrize(("more", "said"), [
    ({"factor_quantizer": "trellis", "factor_bits": 8}, "a trellis is a grid of Q"),
    ({"factor_quantizer": cj.Trellis(2)}, "a trellis is a grid of Q"),
    ({"draft": "gptq"}, "unknown quantizer 'gptq'"), ({"draft": "e8p"}, "draft is the grid of Q itself"),
    ({"draft": "uniform", "outer_iterations": 1}, "give 2"),
    ({"draft": "e8p", "quantizer": cj.Trellis(1), "q_bits": 1}, "e8p is not offered at 1 bits"),
    ({"quantizer": "trellis", "q_bits": 5}, "trellis is not offered at 5 bits")])
def test_what_a_trellis_or_a_draft_is_not_for_is_refused_by_name(more, said):
    with pytest.raises(ValueError, match=said):
        cj.CalderaConfig(**more)
