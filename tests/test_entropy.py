"""Range coding: exact, as small as the probabilities say, and damage is noticed."""

import numpy as np
import pytest
from scipy.special import ndtri

from caldera_jax import entropy
from caldera_jax.trellis import SEQUENCE, trellis

SHAPES = [(1, 1), (43, 21), (256, 64), (530, 71)]


def drawn(m, n, states, seed=0, wide=0.0):
    """Classes of rows and columns, and integers of those widths that the trellis allows."""
    rng, code = np.random.default_rng(seed), trellis(states)
    row, column = (np.round(8 * (wide + rng.uniform(-1, 1, size))).astype(int) for size in (m, n))
    y = 2.0 ** ((row[:, None] + column) / 8) * rng.standard_normal((m, n))
    q, state = np.zeros((m, n), np.int32), np.zeros(n, int)
    for i in range(m):
        state = np.where(i % SEQUENCE == 0, 0, state)
        parity = code.parity[state]
        q[i] = code.spacing * np.round((y[i] - parity) / code.spacing) + parity
        state = code.after[state, q[i] >> 1 & 1]
    return row, column, q


def predicted(q, row, column, states):
    """Bits of the tables."""
    spacing = trellis(states).spacing
    table, parity = entropy.tables(spacing), q & spacing - 1
    width = np.clip(row[:, None] + column, *entropy.WIDTHS) - entropy.WIDTHS[0]
    return table.bits[width, parity, table.symbol(q)].sum()


@pytest.mark.parametrize("states", [1, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_decoded_is_what_was_encoded(shape, states):
    row, column, q = drawn(*shape, states)
    stream = entropy.encode(q, row, column, states)
    np.testing.assert_array_equal(entropy.decode(stream, row, column, states), q)
    assert [a.dtype for a in stream] == [np.uint16, np.uint16, np.uint32, np.uint32, np.int32]


@pytest.mark.parametrize("states", [1, 8])
def test_outliers_and_widths_beyond_the_tables_come_back_too(states):
    row, column, q = drawn(70, 80, states)
    row[3], row[5], column[7] = -60, 300, 127
    q[2, 3] += 40_000
    q[-1, -1] -= 4 * 10**8
    stream = entropy.encode(q, row, column, states)
    assert len(stream.places) >= 2
    np.testing.assert_array_equal(entropy.decode(stream, row, column, states), q)


@pytest.mark.parametrize(("value", "bytes"), [(2**15 - 1, 2), (2**15, 4), (-(2**15), 2), (-(2**15) - 1, 4)])
def test_integers_come_back_in_16_bits_but_where_one_needs_more(value, bytes):
    row, column, q = drawn(20, 30, 1)
    q[3, 4] = value
    found = entropy.decode(entropy.encode(q, row, column, 1), row, column, 1)
    assert found.dtype.itemsize == bytes
    np.testing.assert_array_equal(found, q)


def test_streams_that_are_read_together_are_those_read_one_by_one():
    rows, columns, integers = zip(*(drawn(*shape, 8, seed) for seed, shape in enumerate(SHAPES)), strict=True)
    integers[1][-1, -1] -= 4 * 10**8  # an outlier
    streams = [entropy.encode(*of, 8) for of in zip(integers, rows, columns, strict=True)]
    for ours, theirs in zip(integers, entropy.decode_all(streams, rows, columns, 8), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    streams[2] = streams[2]._replace(words=streams[2].words ^ 1)
    with pytest.raises(ValueError, match="damaged"):
        entropy.decode_all(streams, rows, columns, 8)


@pytest.mark.parametrize("states", [1, 8])
@pytest.mark.parametrize("wide", [-1.0, 0.5, 2.0])
def test_a_stream_is_as_small_as_its_probabilities_say(states, wide):
    row, column, q = drawn(512, 640, states, wide=wide)
    stream, bits = entropy.encode(q, row, column, states), predicted(q, row, column, states)
    lanes = len(stream.states)
    assert lanes == 2 * 20 and 0.998 * bits < stream.stored_bits < 1.002 * bits + 48 * lanes


def test_what_pads_a_lane_is_free():
    row, column, q = drawn(257, 33, 8)
    stream = entropy.encode(q, row, column, 8)
    assert len(stream.states) == 4 and stream.stored_bits < 1.01 * predicted(q, row, column, 8) + 4 * 64


def test_dead_rows_and_columns_are_free_and_must_be_zeros():
    row, column, q = drawn(70, 80, 8)
    whole = np.zeros((90, 84), np.int32)
    long_row, long_column = np.full(90, entropy.DEAD), np.full(84, entropy.DEAD)
    long_row[:64], long_column[:80], whole[:64, :80] = row[:64], column, q[:64]
    stream = entropy.encode(whole, long_row, long_column, 8)
    np.testing.assert_array_equal(entropy.decode(stream, long_row, long_column, 8), whole)
    assert stream.stored_bits < entropy.encode(q[:64], row[:64], column, 8).stored_bits + 2 * 48 + 32
    with pytest.raises(ValueError, match="class -64 must be all zeros"):
        entropy.encode(whole + 1, long_row, long_column, 8)


def test_zeros_of_no_width_cost_nearly_nothing():
    row, column = np.full(640, -40), np.full(640, -40)
    stream = entropy.encode(np.zeros((640, 640), np.int32), row, column, 8)
    assert stream.stored_bits / 640**2 < 0.02


def test_a_damaged_stream_is_noticed():
    row, column, q = drawn(100, 100, 8)
    stream = entropy.encode(q, row, column, 8)
    for at in (0, len(stream.words) // 2, len(stream.words) - 1):
        words = stream.words.copy()
        words[at] ^= 1
        with pytest.raises(ValueError, match="damaged"):
            entropy.decode(stream._replace(words=words), row, column, 8)
    with pytest.raises(ValueError, match="other scales"):
        entropy.decode(stream, row + 8, column, 8)
    for other in ({"words": stream.words[:-1]}, {"states": stream.states[1:]}, {"lengths": stream.lengths[1:]},
                  {"places": np.uint32([10_000]), "values": np.int32([300])}):
        with pytest.raises(ValueError, match="damaged"):
            entropy.decode(stream._replace(**other), row, column, 8)


def test_classes_come_back_and_take_about_their_entropy():
    rng = np.random.default_rng(0)
    arrays = [np.round(size * rng.standard_normal(n)).astype(np.int32) + middle
              for size, n, middle in ((5, 576, 70), (1.3, 576, -31), (9, 1537, 4), (0.05, 1, -200))]
    arrays[1][[3, 7]] = entropy.DEAD, 9000
    found = entropy.encode_classes(arrays)
    for ours, theirs in zip(arrays, entropy.decode_classes([found], [[len(a) for a in arrays]])[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    gaussian = sum(len(a) * np.log2(size * np.sqrt(2 * np.pi * np.e))
                   for a, size in zip(arrays, (5, 1.3, 9), strict=False))
    assert found.stored_bits < 1.03 * gaussian + 600
    words = found.stream.words.copy()
    words[9] ^= 4
    with pytest.raises(ValueError, match="damaged"):
        entropy.decode_classes([found._replace(stream=found.stream._replace(words=words))],
                               [[len(a) for a in arrays]])


@pytest.mark.parametrize("spacing", [1, 2])
def test_frequencies_sum_to_one_hold_every_stand_in_and_do_not_hang_on_last_bits(spacing, monkeypatch):
    table = entropy.tables(spacing)
    assert (table.frequency.sum(2) == 1 << entropy.PRECISION).all() and table.frequency.shape[2] <= 256
    stand_ins = entropy.stand_in(np.arange(-9, 9), spacing)
    assert set(stand_ins) == ({-2, -1, 0, 1} if spacing == 2 else {0})
    for q in stand_ins:
        assert (table.frequency[:, q & spacing - 1, (q - (q & spacing - 1)) // spacing + table.reach] > 0).all()
    exact = entropy.ndtr
    monkeypatch.setattr(entropy, "ndtr", lambda x: exact(x) * (1 + 4e-15 * np.cos(1e3 * np.maximum(x, -99))))
    np.testing.assert_array_equal(entropy.tables.__wrapped__(spacing).frequency, table.frequency)


@pytest.mark.parametrize("spacing", [1, 2])
def test_the_probability_of_an_integer_is_that_of_the_gaussian_targets_it_is_the_cheapest_for(spacing):
    table = entropy.tables(spacing)
    y = ndtri((np.arange(20000) + 0.5) / 20000)
    q = spacing * np.arange(-table.reach, table.reach + 1)
    for width in range(-16, 33, 8):
        bits = table.bits[width - entropy.WIDTHS[0], 0]
        assert (np.diff(bits[table.reach:]) >= 0).all()
        cost = (2.0 ** (width / 8) * y[:, None] - q) ** 2 + entropy.PRICE[spacing] * bits
        found = np.bincount(np.argmin(cost, axis=1), minlength=len(q)) / len(y)
        held = found > 0
        loss = np.sum(found[held] * (bits[held] + np.log2(found[held])))
        assert loss < (2e-3 if width < 20 else 0.05)  # the tails of the widest are cut to 12 bits

