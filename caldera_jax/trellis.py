"""Trellis-coded integers: Ungerboeck's rate-1/2 trellises over Z, searched by the Viterbi algorithm.  (``bitshift`` has
the trellis of fixed rate.)

The integers mod 4 are four classes 2 z1 + z0.  A state allows one parity z0, the branch tells z1, and any integer of
the class may be taken: to the coder a scalar grid of spacing 2, in many dimensions packed as if its spacing were less
(Marcellin and Fischer, 1990).  One state is the plain grid of all integers, of spacing 1.

Sequences run along the first axis, begin in state 0 and end anywhere; the other axes are lanes.
"""

from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

# Parity-check polynomials h0, h1 by number of states (Ungerboeck, 1987, table for amplitude modulation).
POLYNOMIALS = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24),
               128: (0o235, 0o126), 256: (0o515, 0o362)}
STATES = (1, *POLYNOMIALS)
SEQUENCE = 256  # integers of a sequence, at most: to begin in a known state costs some 3 bits


class Trellis(NamedTuple):
    """What leads where.  ``after[s, z1]``: the next state; ``parity[s]``: z0; ``before[s, :]``: the two states that
    lead to s, and ``label[s, :]`` the classes of those branches."""

    after: np.ndarray
    parity: np.ndarray
    before: np.ndarray
    label: np.ndarray

    @property
    def spacing(self) -> int:
        """Of the integers that a state allows."""
        return 1 if len(self.parity) == 1 else 2


@cache
def trellis(states: int) -> Trellis:
    """The trellis of so many states.  ValueError for a number that no code is known for.

    Systematic feedback encoder: the last bit of the state is z0; the bits move on by one place, h0 z0 and h1 z1 added.
    """
    if states not in STATES:
        raise ValueError(f"no trellis of {states} states: choose one of {', '.join(map(str, STATES))}")
    if states == 1:
        zero = np.zeros((1, 2), np.int32)
        return Trellis(zero, zero[:, 0], zero, zero)
    (h0, h1), memory = POLYNOMIALS[states], states.bit_length() - 1
    state, z1 = np.arange(states)[:, None], np.arange(2)[None, :]
    z0 = state >> memory - 1  # the last place
    after = (state << 1 & states - 1) ^ (h0 & states - 1) * z0 ^ (h1 & states - 1) * z1
    order = np.argsort(after.ravel(), kind="stable").reshape(states, 2)  # branches 2 s + z1 by where they lead
    label = (2 * z1 + z0).ravel()[order]
    return Trellis(*(a.astype(np.int32) for a in (after, z0[:, 0], order // 2, label)))


def viterbi(cost: Float[Array, "t c lanes"], code: Trellis, absent: Bool[Array, "t lanes"]) -> Int[Array, "t lanes"]:
    """The class at each place of the cheapest path, cost[t, c] that of class c at t.  O(t states) steps of lanes.

    A place that is absent leaves the state as it is; what is returned there means nothing.  The first of equals wins,
    so that the path depends on nothing but the costs.
    """
    states, lanes = len(code.parity), cost.shape[2]
    if states == 1:
        return jnp.zeros((len(cost), lanes), jnp.int32)

    def step(metric, place):  # of the cheapest path to each state
        cost, absent = place
        either = metric[code.before] + cost[code.label]
        least = jnp.minimum(either[:, 0], either[:, 1])
        return jnp.where(absent[None], metric, least), either[:, 1] < either[:, 0]

    start = jnp.where(jnp.arange(states)[:, None] == 0, 0.0, jnp.inf).astype(cost.dtype)
    metric, second = lax.scan(step, jnp.broadcast_to(start, (states, lanes)), (cost, absent))

    def back(state, place):
        second, absent = place
        at = 2 * state + jnp.take_along_axis(second, state[None], 0)[0].astype(jnp.int32)
        return jnp.where(absent, state, jnp.asarray(code.before.ravel())[at]), jnp.asarray(code.label.ravel())[at]

    return lax.scan(back, jnp.argmin(metric, axis=0).astype(jnp.int32), (second, absent), reverse=True)[1]
