"""Trellises: the codes are Ungerboeck's, and the Viterbi path is the cheapest of all."""

import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caldera_jax import trellis as trellises
from caldera_jax.trellis import trellis, viterbi

CODED = trellises.STATES[1:]


def walk(code, branches):
    """The classes that branches lead through, from state 0."""
    state, classes = 0, []
    for z1 in branches:
        classes.append(2 * z1 + code.parity[state])
        state = code.after[state, z1]
    return classes


def free_distance(code):
    """The least squared distance of two paths that part and meet again."""
    ahead, seen = [(4, *sorted(code.after[s])) for s in range(len(code.parity))], set()
    heapq.heapify(ahead)
    while ahead:
        far, a, b = heapq.heappop(ahead)
        if a == b:
            return far
        if (a, b) not in seen:
            seen.add((a, b))
            for i, j in itertools.product(range(2), repeat=2):
                apart = (2 * i + code.parity[a] - 2 * j - code.parity[b]) % 4
                heapq.heappush(ahead, (far + min(apart, 4 - apart) ** 2, *sorted((code.after[a, i], code.after[b, j]))))
    return None


def test_free_distances_grow_with_the_states_as_those_of_ungerboecks_codes():
    """Squared, in units of the spacing of all integers; two members of one class are 16 apart."""
    assert [free_distance(trellis(s)) for s in CODED] == [9, 10, 11, 13, 14, 16, 17]


@pytest.mark.parametrize("states", CODED)
def test_two_branches_leave_a_state_with_one_parity_and_two_lead_to_it(states):
    code = trellis(states)
    assert (np.bincount(code.after.ravel(), minlength=states) == 2).all() and set(code.parity) == {0, 1}
    for s, (before, label) in enumerate(zip(code.before, code.label, strict=True)):
        assert (code.after[before, label >> 1] == s).all() and (code.parity[before] == label & 1).all()
    assert code.after[0, 0] == 0 and code.parity[0] == 0  # zeros for ever
    assert code.spacing == 2 and trellis(1).spacing == 1


@pytest.mark.parametrize("states", [1, *CODED])
def test_the_viterbi_path_is_the_cheapest_of_all_paths(states):
    code, length = trellis(states), 7
    cost = np.random.default_rng(states).uniform(size=(length, 4 if states > 1 else 1, 5))
    absent = jnp.zeros((length, 5), bool)
    found = np.asarray(jax.jit(lambda c: viterbi(c, code, absent))(jnp.asarray(cost)))
    np.testing.assert_array_equal(found, viterbi(jnp.asarray(cost), code, absent))
    paths = np.array([walk(code, branches) for branches in itertools.product(range(2), repeat=length)])
    paths = paths if states > 1 else 0 * paths
    for lane in range(5):
        totals = cost[np.arange(length), paths, lane].sum(1)
        np.testing.assert_array_equal(found[:, lane], paths[np.argmin(totals)])


def test_equal_costs_take_the_first_branch_and_a_path_of_one_is_the_cheaper_of_two():
    code = trellis(8)
    assert not np.asarray(viterbi(jnp.ones((9, 4, 3)), code, jnp.zeros((9, 3), bool))).any()
    cost = jnp.asarray([[[5.0], [0.0], [3.0], [0.0]]])
    found = viterbi(cost, code, jnp.zeros((1, 1), bool))
    assert found.item() == 2  # 1 and 3 are cheaper, and state 0 does not allow them


def test_places_that_are_absent_are_passed_over():
    code, rng = trellis(8), np.random.default_rng(0)
    cost, absent = rng.uniform(size=(12, 4, 3)), np.zeros((12, 3), bool)
    absent[[2, 3, 9]] = absent[11, 1] = True
    found = np.asarray(viterbi(jnp.asarray(cost), code, jnp.asarray(absent)))
    for lane in range(3):
        kept = ~absent[:, lane]
        alone = viterbi(jnp.asarray(cost[kept, :, lane:lane + 1]), code, jnp.zeros((kept.sum(), 1), bool))
        np.testing.assert_array_equal(found[kept, lane], alone[:, 0])


def test_a_number_of_states_that_no_code_is_known_for_is_named():
    with pytest.raises(ValueError, match="no trellis of 12 states: choose one of 1, 4, 8"):
        trellis(12)
