"""The bitshift trellis code (QTIP, arXiv 2406.11235): k bits a number, each number a hash of log2 S bits in a row.

A sequence of t numbers is a circle of k t bits, the first number's lowest bits first.  Bits k i to k i + log2 S - 1 are
the state of number i, and the number is ``values`` of it: no table, and no more state to the decoder than these bits.
Two neighbours share all of their states but k bits each, so the choice of each number's bits bears on the log2 S / k
numbers before it; the Viterbi algorithm finds the best choice of all.

Sequences run along the last axis.  ``codebooks.Trellis`` is the grid; ``trellis`` another code, of free rate.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, Int32, UInt, UInt8, UInt32

# Of 250 pairs drawn at random, near the best by the error at 2 bits and 4096 states; as good at 1 to 4 bits and 2^16.
MULTIPLIER, INCREMENT = 91540847, 921920993
UNIT = 1 / math.sqrt((256**2 - 1) / 3)  # of four bytes' standard deviation
SHORTEST = 192  # numbers of a sequence, where its axis has so many: to be a circle costs some bits of each


def length(count: int) -> int:
    """Numbers of a sequence where ``count`` of them are cut into equal ones: the least that is not too short."""
    return min((part for part in range(SHORTEST, count) if count % part == 0), default=count)


def values(state: UInt[Array, "*batch"], dtype=jnp.float32) -> Float[Array, "*batch"]:
    """The number of each state s: the sum of the four bytes of a s + b mod 2^32, of mean 0 and variance 1 over all
    words of 32 bits (the paper's 1MAD with another a and b)."""
    return integers(state).astype(dtype) * jnp.asarray(UNIT, dtype)


def integers(state: UInt[Array, "*batch"]) -> Int32[Array, "*batch"]:
    """``values`` in units of ``UNIT``: -510 to 510."""
    word = state.astype(jnp.uint32) * jnp.uint32(MULTIPLIER) + jnp.uint32(INCREMENT)
    pairs = (word & 0x00FF00FF) + (word >> 8 & 0x00FF00FF)
    return (pairs * jnp.uint32(0x10001) >> 16).astype(jnp.int32) - 510


def windows(codes: UInt[Array, "*batch t"], bits: int, states: int) -> UInt32[Array, "*batch t"]:
    """The state of each number from the codes of all, ``bits`` each; of at most all bits of the sequence."""
    log = _log(codes.shape[-1], bits, states)
    found, held = codes.astype(jnp.uint32), 1  # codes that each entry holds
    while held * bits < log:
        step = min(held, -(-log // bits) - held)
        found = found | jnp.roll(found, -step, axis=-1) << (bits * step)
        held += step
    return found & jnp.uint32((1 << log) - 1)


def decode(codes: UInt[Array, "*batch t"], bits: int, states: int, dtype=jnp.float32) -> Float[Array, "*batch t"]:
    """The numbers of a sequence."""
    return values(windows(codes, bits, states), dtype)


def period(count: int, bits: int) -> int:
    """After how many numbers codes and bytes begin together again; 0 for a sequence of so many numbers that is no whole
    number of periods, or of fewer than three bytes: ``apart`` does not read it."""
    found = 8 // math.gcd(8, bits)
    return 0 if count % found or count * bits < 24 else found


def apart(packed: UInt8[Array, "*batch bytes"], bits: int, states: int) -> list[Int32[Array, "*batch _"]]:
    """``integers`` of the numbers of a sequence from its bytes: numbers i, i + p, i + 2 p, … for each i of a ``period``
    p.  Without a code by itself: a state is some bits of three bytes.
    """
    count = packed.shape[-1] * 8 // bits
    numbers, mask = period(count, bits), jnp.uint32((1 << _log(count, bits, states)) - 1)
    first, second, third = (jnp.roll(packed, -i, axis=-1).astype(jnp.uint32) for i in range(3))
    words, step = first | second << 8 | third << 16, numbers * bits // 8
    places = [divmod(bits * i, 8) for i in range(numbers)]
    return [integers(words[..., byte::step] >> bit & mask) for byte, bit in places]


def encode(x: Float[Array, "b t"], bits: int, states: int) -> UInt8[Array, "b t"]:
    """Codes of the circle with least Σ (x − its numbers)², for the overlap that the best open path has at its middle.

    Best of all circles with that overlap, the log2 S − bits that the last state shares with the first.  It is a guess
    (as in QTIP): where it is taken, half a turn from its ends, the path does not feel them.  Twice O(t S) for each
    sequence, and t S / 2^bits bytes.  Of equal paths the one with the lower state is taken.
    """
    log, half = _log(x.shape[1], bits, states), x.shape[1] // 2
    back = x[:, ::-1]  # a state holds the numbers behind its own: they must be known first
    open_path = viterbi(jnp.roll(back, -half, axis=1), bits, log)
    overlap = open_path[:, -1 - half] & ((1 << (log - bits)) - 1)
    return (viterbi(back, bits, log, overlap)[:, ::-1] & ((1 << bits) - 1)).astype(jnp.uint8)


def viterbi(x: Float[Array, "b t"], bits: int, log: int, overlap: Int[Array, " b"] | None = None) -> Int[Array, "b t"]:
    """The states s_0, s_1, … of the path with least Σ (x_i − values(s_i))², s_i = (s_{i−1} 2^bits + c_i) mod 2^log.

    ``overlap``: the highest log − bits bits of the first state and the lowest of the last; None: any.
    """
    states, shared = 1 << log, 1 << (log - bits)
    every = jnp.arange(states, dtype=jnp.int32)
    numbers = values(every.astype(jnp.uint32), x.dtype)[None]
    distance = lambda at: (at[:, None] - numbers) ** 2

    def only(metric, bits_of):
        return metric if overlap is None else jnp.where(bits_of[None] == overlap[:, None], metric, jnp.inf)

    def step(metric, at):  # of the best path to each state
        before = metric.reshape(len(x), 1 << bits, shared)  # the highest bits go: states that differ in them meet
        metric = jnp.repeat(jnp.min(before, axis=1), 1 << bits, axis=1) + distance(at)
        return metric, jnp.argmin(before, axis=1).astype(jnp.uint8)

    metric, highest = lax.scan(step, only(distance(x[:, 0]), every >> bits), x[:, 1:].T)
    last = jnp.argmin(only(metric, every & (shared - 1)), axis=1).astype(jnp.int32)

    def back(state, highest):
        low = state >> bits
        state = jnp.take_along_axis(highest, low[:, None], axis=1)[:, 0].astype(jnp.int32) * shared + low
        return state, state

    path = lax.scan(back, last, highest, reverse=True)[1]
    return jnp.concatenate([path, last[None]]).T


def _log(count, bits, states):
    """Bits of a state: of a short sequence all there are."""
    return min(states.bit_length() - 1, bits * count)
