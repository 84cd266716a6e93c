"""A compressed model on disk: one safetensors file a block, the rest of the model, the tokenizer, and a manifest.

``manifest.json`` is written last, so a directory with one is complete.  It holds the format version, the model's
configuration, the configuration of the run, shape and grids of every compressed layer, and the SHA-256 of every file
and of itself (``digest``).
Names in a block's file: ``q.left_t.codes`` is field ``left_t.codes`` of the CompressedLinear of layer q; layers that
stayed dense, gains and biases have their own name alone.  Of a model with experts ``up_5.q.codes`` is of the up of
expert 5, and ``router`` [experts, width] is dense.  ``rest.safetensors`` has ``embed`` [vocabulary, width], ``norm``
[width] and, unless the model is tied, ``head``, in the type that the base model had, as all that is dense; or these two
are compressed, as a layer is: ``embed.q.codes``, and ``layers`` has ``embed``.

**The arrays of a layer** W [m, n] ≈ Uᵀ (Q + L R) V.  A part that is off (Q, or L and R) has none.

    q.codes     uint8 [m, bytes]    row i of Q (column i, of a Trellis): ceil(n / g) codes of b bits, lowest bits and
                                    bytes first;
                                    rows end on whole bytes, and the last code may stand for numbers beyond n
    q.scale     float32 [1, 1]      what the decoded numbers are multiplied by; [m, ceil(n / group)] for a grid with a
                                    ``group``: one for each so many columns of a row
    left_t.*    [k, bytes], [1, 1]  the same for Lᵀ [k, m]
    right.*     [k, bytes], [1, 1]  the same for R [k, n]
    left_side   uint8 [ceil(m / 8)]  U = T diag(s): a bit an output, the lowest first, 1 for s = -1
    right_side  uint8 [ceil(n / 8)]  V = T diag(s): the same for the inputs

Where outputs count by their importance, ``left_side`` is float16 [m], the s themselves, which are not ±1.
Fine-tuned, ``left_side`` and ``right_side`` are float16 [m] and [n], the s themselves, and ``trained.0`` [r, m] and
``trained.1`` [r, n], bfloat16 or float32, are the first r rows of Lᵀ and R, those of the codes the others.

**A layer of free rate**, grids Integers: W ≈ diag(a) Z diag(b) + L R, a_i = level 2^(row_i / 8), b_j = 2^(column_j/8);
L [m, k] and R [k, n] are made as Z is, and ``layers`` has k as ``rank``.  Z is range coded, 256 x 32 numbers to a lane.

    q.level             float32 or float64 []
    q.integers.words    uint16 [words]      of all lanes, one lane after the other, the first 256 rows first
    q.integers.lengths  uint16 [lanes]      how many words of them
    q.integers.states   uint32 [lanes]      where the decoder begins
    q.integers.places   uint32 [outliers]   i n + j of integers that the tables do not hold
    q.integers.values   int32 [outliers]
    q.sides.stream.*    the same for small integers: row, spread + row, column, width + column, less ``middles``, 64 to
                        a column; spread_i + width_j is the class of the width of z_ij, and -64 means all zeros
    q.sides.middles     int16 [4]
    q.sides.widths      int8 [4]            class of the width of each
    left_t.*, right.*   the same for L and R

Fine-tuned, ``left_side.0`` is float16 [m]: what the outputs are multiplied by.

Bits: b / g a weight of Q; k (m + n) b / g of the grid of L and R; m + n signs, or 16 m + n with importance; 32 a scale;
what fills up rows.  With rotation "orthogonal" a side is the Kronecker product of float32 matrices ``left_side.0``,
``left_side.1``; with "none" it is missing and the identity.  ``layers`` of the manifest has, for ``blocks.0.q``,
``shape`` [m, n] and ``grids`` of Q, Lᵀ and R, with these kinds (c a code):

    E8P             g = 8, b = 16        e8p(c) below
    ResidualE8P     g = 8, b = 8 bits    bits 4: e8p(c >> 16) + e8p(c & 65535) / residual_scale
                                         bits 3: e8p(c >> 8) + e8(c & 255) / residual_scale: ``lattice.e8_decode``
    Uniform         g = 1, b = bits      2 c / (2^bits - 1) - 1; so has Dithered
    NormalFloat     g = 1, b = bits      level c of the sorted 2^bits: ``codebooks.NormalFloat.levels``
    Half            g = 1, b = 16        the bits of a float16 or bfloat16: ``format``
    Trellis         g = 1, b = bits      down the columns: ``q.codes`` is uint8 [n, bytes], a row for each column of Q,
                                         cut into equal circles of bits: trellis(...) below
    Integers                             coded by a trellis of so many ``states``, above

**T**, orthonormal of order n = 2^a q, q odd, is H ⊗ M / sqrt(n): Sylvester's H of order 2^a, and no M, if q = 1; else,
where 4 q is at most 256 and 4 | n, M of order 4 q by Paley's first construction (4 q - 1 prime), or else his second
(2 q - 1 prime), and H of order 2^a / 4.  Order 172, of n = 11008, is Goethals' and Seidel's, as below.  For other q,
of which 13 is the least, ``hadamard.factor`` says what takes M's place.

**To decode** a layer of grids E8P, Trellis and ResidualE8P of 4 bits, or of Integers, with NumPy alone, from ``arrays``
by these names and the ``layers`` entry ``meta``:

    import itertools, math, numpy as np

    triples = ("123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 "
               "045 067 057 047 056 046 014 237").split()
    rows = [[1.5 if i in t else 0.5 for i in range(8)] for j in range(5) for t in itertools.combinations(range(8), j)]
    rows += [[2.5 if i == j else 1.5 if i == t else 0.5 for i in range(8)] for j in range(8) for t in range(8)]
    patterns = np.array(rows + [[0.5 if str(i) in t else 1.5 for i in range(8)] for t in triples])  # [256, 8]

    def goethals_seidel():
        words, i = "6ab0879193e 36a81b91c7a 68d7c650996 5e7fddc15ec".split(), np.arange(43)
        a, b, c, d = (1 - 2 * (int(word, 16) >> (i[:, None] - i) % 43 & 1) for word in words)
        b, c, d, e, f, g = (matrix[:, ::-1] for matrix in (b, c, d, b.T, c.T, d.T))
        return np.block([[a, b, c, d], [-b, a, g, -f], [-c, -g, a, e], [-d, f, -e, a]])

    def paley(order):
        prime = lambda p: all(p % d for d in range(2, p))
        p = order - 1 if (first := prime(order - 1)) else order // 2 - 1
        if order > 256 or not prime(p):
            raise ValueError(f"no matrix of Paley's has order {order}: see hadamard.factor")
        i, character = np.arange(p), np.full(p, -1)
        character[i**2 % p], character[0] = 1, 0  # of the squares modulo p
        c = np.ones((p + 1, p + 1))
        c[1:, 1:] = character[(i[:, None] - i) % p]
        c[0, 0], c[1:, 0] = 0, -1 if first else 1
        second = np.kron(c, [[1, 1], [1, -1]]) + np.kron(np.eye(p + 1), [[1, -1], [-1, -1]])
        return np.eye(order) + c if first else second

    def e8p(code):
        size, minus = patterns[code >> 8], code[..., None] >> np.arange(1, 9) & 1
        minus[..., 7] = (size.sum(-1) + minus[..., :7].sum(-1)) % 2  # signed entries sum to an even number
        return (1 - 2 * minus) * size + np.where(code & 1, -0.25, 0.25)[..., None]

    def part(arrays, name, grid, width):
        words = np.ascontiguousarray(arrays[name + ".codes"]).view("<u2").astype(int)
        words = words.reshape(len(words), -(-width // 8), -1)  # low word, and high word of 4-bit codes
        x = e8p(words[..., -1])
        if grid["kind"] == "ResidualE8P":
            x = x + e8p(words[..., 0]) / grid["residual_scale"]
        return x.reshape(len(words), -1)[:, :width] * arrays[name + ".scale"]

    def trellis(arrays, grid, m):  # a number is a hash of the bits that begin with its own
        k, t = grid["bits"], min((d for d in range(192, m) if m % d == 0), default=m)
        log = min(grid["states"].bit_length() - 1, t * k)
        bits = np.unpackbits(arrays["q.codes"], axis=1, count=m * k, bitorder="little").reshape(-1, m // t, t * k)
        state = bits[..., (k * np.arange(t)[:, None] + np.arange(log)) % (t * k)] @ (1 << np.arange(log))
        word = (91540847 * state + 921920993) % 2**32
        total = sum(word >> 8 * i & 255 for i in range(4)).reshape(-1, m)
        return (total - 510).T / math.sqrt((256**2 - 1) / 3) * arrays["q.scale"]

    def side(signs, n):
        power, h = n & -n, np.ones((1, 1))
        while len(h) < (power if power == n else power // 4):
            h = np.kron([[1, 1], [1, -1]], h)
        order = 4 * n // power
        t = h if power == n else np.kron(h, goethals_seidel() if order == 172 else paley(order))
        bits = signs.dtype == np.uint8
        return t / np.sqrt(n) * (1.0 - 2 * np.unpackbits(signs, count=n, bitorder="little") if bits else signs)

    def frequencies(spacing):  # of 4096: what is left of a share goes to the largest fractions
        ndtr = np.vectorize(lambda x: math.erfc(-x / math.sqrt(2)) / 2)
        width, parity, k = np.meshgrid(range(-24, 45), range(spacing), range(-127, 128), indexing="ij")
        q, sigma, bits = spacing * k + parity, 2.0 ** (width / 8), np.zeros(k.shape)
        for _ in range(6):
            drawn = (0.116, 0.37)[spacing - 1] * np.diff(bits) / (2 * spacing)
            edges = (q[..., 1:] + q[..., :-1]) / 2 + np.clip(drawn, -0.45 * spacing, 0.45 * spacing)
            edges = np.pad(edges, ((0, 0), (0, 0), (1, 1)), constant_values=np.inf)
            low, high = ndtr(-abs(edges[..., :-1]) / sigma), ndtr(-abs(edges[..., 1:]) / sigma)
            p = np.where(q == 0, 1 - low - high, abs(low - high))
            bits = -np.log2(np.maximum(p, 1e-9))
        kept = ((p > 2.0**-13) | (abs(q) <= 2)) & (abs(k) < 127)
        share = np.where(kept, p, 0) * (4096 - kept.sum(2, keepdims=True)) / np.where(kept, p, 0).sum(2, keepdims=True)
        whole = np.floor(share).astype(int)
        for row, of_row, number in zip(*(a.reshape(-1, 255) for a in (whole, share, kept))):
            row[np.argsort(row - of_row, kind="stable")[:4096 - number.sum() - row.sum()]] += 1
        return (whole + kept).reshape(-1, 255)

    def integers(arrays, name, row, column, states):
        spacing, shift, mask = 1 + (states > 1), max(states.bit_length() - 2, 0), states - 1
        h0, h1 = {1: (0, 0), 4: (5, 2), 8: (11, 4), 16: (19, 4), 32: (37, 8), 64: (67, 20), 128: (157, 86),
                  256: (333, 242)}[states]
        words, lengths, x, places = (arrays[f"{name}.{field}"].astype(int)
                                     for field in ("words", "lengths", "states", "places"))
        table, (m, n) = frequencies(spacing), (len(row), len(column))
        ends, words, at = table.cumsum(1), np.append(words, 0), lengths.cumsum() - lengths
        row, column = (np.pad(a, (0, -len(a) % size), constant_values=-64).reshape(-1, size)
                       for a, size in ((row, 256), (column, 32)))
        x, at = (a.reshape(len(row), len(column)) for a in (x, at))
        z = np.zeros((len(row), 256, len(column), 32), int)
        for j in range(32):
            state = np.zeros(x.shape, int)
            for i in range(256):
                r, c, parity = row[:, i, None], column[:, j], state >> shift
                live, t = (r > -64) & (c > -64), (np.clip(r + c, -24, 44) + 24) * spacing + parity
                k = (ends[t] <= (x & 4095)[..., None]).sum(-1)
                y = table[t, k] * (x >> 12) + (x & 4095) - ends[t, k] + table[t, k]
                empty = live & (y < 65536)
                x = np.where(live, np.where(empty, y << 16 | words[at], y), x)
                at = at + empty
                z[:, i, :, j] = q = np.where(live, spacing * (k - 127) + parity, 0)
                after = (state << 1 & mask) ^ (h0 & mask) * parity ^ (h1 & mask) * (q >> 1 & 1)
                state = np.where(live, after, state)
        z = np.ascontiguousarray(z.reshape(256 * len(row), -1)[:m, :n])
        z.flat[places] = arrays[f"{name}.values"]
        return z

    def levelled(arrays, name, m, n, states):
        widths, columns = arrays[f"{name}.sides.widths"].astype(int), [-(-size // 64) for size in (m, m, n, n)]
        sides = integers(arrays, f"{name}.sides.stream", np.zeros(64, int), np.repeat(widths, columns), 1)
        row, size, column, height = (
            part.T.ravel()[:length] + middle for part, length, middle in
            zip(np.split(sides, np.cumsum(columns)[:-1], axis=1), (m, m, n, n), arrays[f"{name}.sides.middles"]))
        z = integers(arrays, f"{name}.integers", size - row, height - column, states)
        return float(arrays[f"{name}.level"]) * 2.0 ** (row / 8)[:, None] * z * 2.0 ** (column / 8)

    def weight(arrays, meta):
        (m, n), (grid, left, right) = meta["shape"], meta["grids"]
        if grid["kind"] == "Integers":
            of, k = lambda name, rows, columns: levelled(arrays, name, rows, columns, grid["states"]), meta.get("rank")
            w = of("q", m, n) + (of("left_t", m, k) @ of("right", k, n) if k else 0)
            return w * np.float64(arrays.get("left_side.0", np.ones(m)))[:, None]
        w = trellis(arrays, grid, m) if grid["kind"] == "Trellis" else part(arrays, "q", grid, n)
        if "left_t.codes" in arrays:
            w = w + part(arrays, "left_t", left, m).T @ part(arrays, "right", right, n)
        if "left_side" not in arrays:  # no rotation
            return w * np.float64(arrays.get("left_side.0", np.ones(m)))[:, None]
        return side(arrays["left_side"], m).T @ w @ side(arrays["right_side"], n)

A manifest of another format version, or of another program, is refused by ``read_manifest``, which says so.  Dense
files for other programs: ``export``.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from caldera_jax import codebooks, levels
from caldera_jax.codebooks import down
from caldera_jax.entropy import Classes, Stream
from caldera_jax.jobs import report, spread
from caldera_jax.levels import Coded, Integers, Levelled
from caldera_jax.linear import CompressedLinear, Grid, Packed, codes
from caldera_jax.models import convert, files, llama, tokenizer, weights
from caldera_jax.models.convert import Model
from caldera_jax.models.llama import LinearRopeScaling, Llama3RopeScaling, LlamaConfig, Params
from caldera_jax.models.weights import Block
from caldera_jax.packing import row_bytes

FORMAT = 5  # 1 had no trained signs and factors, 2 no integers of free rate, 3 no trained scales, 4 no trellis; all are
# read, too
MANIFEST = "manifest.json"
REST = "rest.safetensors"  # embedding, last norm and head
TOKENIZER = "tokenizer.json"
GRIDS = {kind.__name__: kind for kind in (codebooks.E8P, codebooks.ResidualE8P, codebooks.Uniform, codebooks.Dithered,
                                          codebooks.NormalFloat, codebooks.Half, codebooks.Trellis, Integers)}
PARTS = ("q", "left_t", "right")
_DAMAGED = (ValueError, LookupError, TypeError, ArithmeticError)  # of arrays and grids that do not fit each other


class Meta(TypedDict):
    """What the manifest says of a compressed layer."""

    shape: tuple[int, int]
    grids: tuple[dict | None, dict | None, dict | None]
    rank: NotRequired[int]


class Origin(TypedDict):
    """What it says of the run, as far as it is read."""

    config: dict
    model_sha256: str
    calibration_sha256: str
    evaluation_sha256: str
    hessians_sha256: NotRequired[dict]
    finetune: NotRequired[list[dict]]


class Manifest(TypedDict):
    """The manifest; the first ones had no special tokens, no ends and no digest."""

    format: int
    run: Origin
    model: str
    model_config: dict
    layers: dict[str, Meta]
    files: dict[str, str]
    special: NotRequired[dict[str, str]]
    ends: NotRequired[list[int]]
    sha256: NotRequired[str]


def block_file(index: int) -> str:
    """Name of a block's file."""
    return f"block_{index:03d}.safetensors"


def layer_arrays(layer: CompressedLinear) -> dict[str, np.ndarray]:
    """The arrays of one layer by name."""
    arrays = {}
    for name, grid in zip(PARTS, layer.grids, strict=True):
        if isinstance(part := getattr(layer, name), Levelled):
            arrays |= _named(name, levels.encode(part, grid.states))
        elif part is not None:
            arrays |= {f"{name}.codes": part.codes, f"{name}.scale": part.scale}
    for name in ("left_side", "right_side", "trained"):
        side = () if getattr(layer, name) is None else getattr(layer, name)
        arrays |= {f"{name}.{i}": matrix for i, matrix in enumerate(side)} if isinstance(side, tuple) else {name: side}
    return {name: np.asarray(value) for name, value in arrays.items()}


def _named(name: str, value: Any) -> dict[str, np.ndarray]:
    """The arrays of a tuple in a tuple by the names of their fields."""
    if not isinstance(value, tuple):
        return {name: value}
    parts = (_named(f"{name}.{field}", part) for field, part in value._asdict().items())
    return {key: array for part in parts for key, array in part.items()}


def layer_from(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> CompressedLinear:
    """The layer that ``layer_arrays`` and ``layer_meta`` describe.  ValueError for a damaged stream of free rate."""
    return layers_from({"": arrays}, {"": meta})[""]


def layers_from(arrays: dict[str, dict[str, np.ndarray]], metas: dict[str, dict[str, Any]]
                ) -> dict[str, CompressedLinear]:
    """Several, all their streams read side by side."""
    parts: dict[tuple[str, str], Packed | Levelled] = {}
    coded: dict[int, dict[tuple[str, str], tuple[Coded, tuple[int, int]]]] = {}  # by states
    for of, own in arrays.items():
        (m, n), rank = metas[of]["shape"], metas[of].get("rank", 0)
        for name, shape, grid in zip(PARTS, ((m, n), (m, rank), (rank, n)), metas[of]["grids"], strict=True):
            if f"{name}.level" in own:
                coded.setdefault(grid["states"], {})[of, name] = _coded(own, name), shape
            elif f"{name}.codes" in own:
                parts[of, name] = Packed(own[f"{name}.codes"], own[f"{name}.scale"])
    for states, each in coded.items():
        parts |= zip(each, map(levels.narrow, levels.decode(*zip(*each.values(), strict=True), states)), strict=True)
    return {of: _layer(own, metas[of], *(parts.get((of, name)) for name in PARTS)) for of, own in arrays.items()}


def _coded(arrays: dict[str, np.ndarray], name: str) -> Coded:
    own = {key.removeprefix(f"{name}."): array for key, array in arrays.items()}
    of = lambda prefix: Stream(*(own[f"{prefix}.{field}"] for field in Stream._fields))
    return Coded(own["level"], of("integers"), Classes(of("sides.stream"), own["sides.middles"], own["sides.widths"]))


def _layer(arrays: dict[str, np.ndarray], meta: dict[str, Any], *parts: Packed | Levelled | None) -> CompressedLinear:
    sides = (arrays[name] if name in arrays else tuple(arrays[key] for key in sorted(arrays) if key.startswith(name))
             for name in ("left_side", "right_side"))
    trained = tuple(arrays[f"trained.{i}"] for i in range(2)) if "trained.0" in arrays else None
    layer = CompressedLinear(*parts, *sides, tuple(meta["shape"]), tuple(map(_grid, meta["grids"])), trained)
    _check(layer)
    return layer


def _check(layer: CompressedLinear) -> None:
    """Raise ValueError for arrays that are not of the shapes that the layer's own shape and grids ask for."""
    (m, n), first = layer.shape, 0 if layer.left_t is None else len(codes(layer.left_t))
    wanted, found = {}, {}
    for name, rows, width, grid in zip(PARTS, (m, first, first), (n, m, n), layer.grids, strict=True):
        if isinstance(part := getattr(layer, name), Packed):
            if grid is None or isinstance(grid, Integers):
                raise ValueError(f"{name} has codes, and its grid is {grid}")
            lines, count = (width, rows) if down(grid) else (rows, -(-width // grid.block))
            wanted[name] = (lines, row_bytes(count, grid.code_bits))
            found[name] = part.codes.shape
            wanted[f"{name}.scale"] = (1, 1) if grid.group is None else (rows, -(-width // grid.group))
            found[f"{name}.scale"] = part.scale.shape
    for name, size in zip(("left_side", "right_side"), layer.shape, strict=True):
        if isinstance(side := getattr(layer, name), tuple):
            wanted[name], found[name] = size, math.prod(map(len, side)) if side else size
        else:
            wanted[name], found[name] = (-(-size // 8) if side.dtype == np.uint8 else size,), side.shape
    for part, size in zip(layer.trained or (), layer.shape, strict=False):
        wanted[f"trained {size}"], found[f"trained {size}"] = (len(layer.trained[0]), size), part.shape
    if wrong := [name for name in wanted if wanted[name] != found[name]]:
        raise ValueError(f"{wrong[0]} has shape {found[wrong[0]]}, and the layer's asks for {wanted[wrong[0]]}")


def layer_meta(layer: CompressedLinear) -> dict[str, Any]:
    """Shape, grids, and the rank of a levelled L R: what the arrays do not say.  ValueError for a grid that this format
    cannot name."""
    for grid in layer.grids:
        if grid is not None and GRIDS.get(type(grid).__name__) is not type(grid):
            raise ValueError(f"{type(grid).__name__} is not one of the package's codebooks ({', '.join(GRIDS)}), and a "
                             "model on disk can only name those: keep the layer in memory, or add the class to GRIDS")
    own = {"rank": len(layer.right.integers)} if isinstance(layer.right, Levelled) else {}
    return {"shape": list(layer.shape), "grids": [report.plain(grid) for grid in layer.grids], **own}


def _grid(meta: dict[str, Any] | None) -> Grid | None:
    if meta is None:
        return None
    fields = dict(meta)
    if not isinstance(kind := fields.pop("kind", None), str) or kind not in GRIDS:
        raise ValueError(f"a grid of kind {kind!r}, and known are {', '.join(GRIDS)}")
    return files.made(GRIDS[kind], fields, kind)


def finish(directory: Path, model: Model, layers: dict[str, dict[str, Any]], run: Any) -> None:
    """Write what is not a block's, then the manifest.  ``layers``: path -> ``layer_meta`` of the blocks' compressed
    layers."""
    rest, tables = weights.rest(model.params), {}
    for name in [name for name, value in rest.items() if isinstance(value, CompressedLinear)]:
        tables[name] = layer_meta(layer := rest.pop(name))
        rest |= {f"{name}.{field}": array for field, array in layer_arrays(layer).items()}
    files.write_arrays(directory / REST, {name: np.asarray(value) for name, value in rest.items()})
    files.write(directory / TOKENIZER, model.tokenizer.to_str().encode())
    names = [block_file(i) for i in range(model.config.layers)] + [REST, TOKENIZER]
    manifest = {"format": FORMAT, "model": model.name, "model_config": model.config.told(),
                "special": model.special, "ends": list(model.ends), "run": run, "layers": layers | tables,
                "files": {name: files.sha256(directory / name) for name in names}}
    files.write_json(directory / MANIFEST, manifest | {"sha256": digest(manifest)})


def digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's other fields, as JSON with sorted keys and no blanks."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return files.sha256(json.dumps(report.plain(rest), sort_keys=True, separators=(",", ":")).encode())


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a complete directory; ValueError where it is unfinished, foreign or of another version."""
    path = directory / MANIFEST
    if not path.is_file():
        unfinished = "an unfinished run (start `caldera compress` again with the same arguments to finish it)"
        what = unfinished if (directory / "unfinished").is_dir() else "no compressed model"
        raise ValueError(f"{directory}: {what}: there is no {MANIFEST}")
    manifest = files.read_json(path)
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError(f"{path}: not a manifest of this program")
    if type(manifest["format"]) is not int or manifest["format"] not in range(1, FORMAT + 1):
        raise ValueError(f"{path}: format {manifest['format']}, and this version reads formats 1 to {FORMAT}: use the "
                         "caldera-jax that wrote it, or compress the model again")
    if missing := Manifest.__required_keys__ - manifest.keys():
        raise ValueError(f"{path}: not a manifest of this program: it lacks {', '.join(sorted(missing))}")
    if manifest.get("sha256", own := digest(manifest)) != own:  # the first ones had none
        raise ValueError(f"{path}: its SHA-256 differs from the one that it names: the file was damaged or changed; "
                         "restore it or compress the model again")
    files.checked(manifest, Manifest, path)
    return manifest


def load(directory: str | Path) -> Model:
    """A compressed model, every file checked against its SHA-256; ValueError naming what is missing or damaged.

    Embedding, head and blocks stay on the disk, as those of ``convert.load``.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, digest in manifest["files"].items():
        if not (directory / name).is_file() or files.sha256(directory / name) != digest:
            raise ValueError(f"{directory / name}: missing, or its SHA-256 differs from the manifest's: the file was "
                             "damaged or replaced; restore it or compress the model again")
    config = _config(manifest["model_config"], f"{directory / MANIFEST}: model_config")
    known = {f"blocks.{i}.{name}" for i in range(config.layers) for name in llama.linears(config)}
    known |= llama.table_shapes(config).keys()
    if extra := manifest["layers"].keys() - known:
        raise ValueError(f"{directory / MANIFEST}: layers has {min(extra)}, which the model has not: restore it or "
                         "compress the model again")
    params, wanted = convert.arrays(directory / REST), llama.table_shapes(config) | {"norm": (config.dim,)}
    params |= _tables(directory / REST, params, manifest["layers"])
    shapes = {name: array.shape for name, array in params.items() if name != "classifier"}
    _same(directory / REST, shapes, wanted)
    layers = manifest["layers"]
    params["blocks"] = [_block(directory / block_file(i), layers, i, config) for i in range(config.layers)]
    return Model(config, params, tokenizer.from_directory(directory), manifest["model"],
                 manifest.get("special", {}), tuple(manifest.get("ends", ())))  # the first ones did not keep them


def _tables(path: Path, arrays: dict[str, Any], layers: dict[str, Any]) -> dict[str, CompressedLinear]:
    """Embedding and head as far as they are compressed; their arrays are taken out."""
    found = {}
    for name in [name for name in ("embed", "head") if name in layers]:
        own = {key: arrays.pop(key) for key in [*arrays] if key.startswith(f"{name}.")}
        try:
            layer = layer_from({key.removeprefix(f"{name}."): array for key, array in own.items()}, layers[name])
        except _DAMAGED as error:
            raise ValueError(f"{path}: {name}: {error}: restore the file or compress the model again") from error
        found[name] = jax.tree.map(jax.numpy.asarray, layer)
    return found


def _config(raw: dict[str, Any], at: str) -> LlamaConfig:
    if isinstance(scaling := raw.get("rope_scaling"), dict):
        kind = LinearRopeScaling if scaling.keys() == {"factor"} else Llama3RopeScaling
        raw = raw | {"rope_scaling": files.made(kind, scaling, f"{at}: rope_scaling")}
    return files.made(LlamaConfig, raw, at)


def _same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError for the first array that is missing, left over or of another shape than the configuration's."""
    for name in sorted(found.keys() | wanted.keys()):
        if tuple(found.get(name, ())) != tuple(wanted.get(name, ())):
            raise ValueError(f"{path}: {name} has shape {found.get(name, 'none')}, and the manifest's configuration "
                             f"asks for {wanted.get(name, 'none')}: they differ: restore them or compress "
                             "the model again")


def _block(path: Path, layers: dict[str, Any], index: int, config: LlamaConfig) -> Block:
    """The block in this file, each weight read when it is asked for."""
    wanted = llama.block_shapes(config)
    try:
        with safe_open(path, "np") as file:
            names = dict.fromkeys(key.split(".", 1)[0] for key in file.keys())  # noqa: SIM118
            metas = {name: meta for name in names if (meta := layers.get(f"blocks.{index}.{name}"))}
            shapes = {name: metas[name]["shape"] if name in metas else file.get_slice(name).get_shape()
                      for name in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}): restore it or compress the model again") from error
    _same(path, shapes, wanted)
    return Block({name: partial(_weight, path, name, metas) for name in names})


def _weight(path: Path, name: str, metas: dict[str, Any]) -> np.ndarray | CompressedLinear:
    """A dense array, or the layer that its meta describes."""
    if name not in metas:
        with safe_open(path, "np") as file:
            return file.get_tensor(name)
    try:
        try:
            layer = _levelled(path, path.stat().st_mtime_ns, json.dumps(metas))[name]
        except _DAMAGED:  # not of a level, or some layer is damaged: this one alone
            layer = layer_from(_arrays(path, name), metas[name])
        return jax.tree.map(jax.numpy.asarray, layer)
    except _DAMAGED as error:
        raise ValueError(f"{path}: {name}: {error}: restore the file or compress the model again") from error


@lru_cache(maxsize=3)  # two threads read (``generate.place``), and one may be ahead
def _levelled(path: Path, changed: int, metas: str) -> dict[str, CompressedLinear]:
    """A block's layers of free rate, read together, as few lanes take as long as many; the last blocks' are kept."""
    chosen = {name: meta for name, meta in json.loads(metas).items() if "states" in (meta["grids"][0] or {})}
    return layers_from({name: _arrays(path, name) for name in chosen}, chosen)


def _arrays(path: Path, name: str) -> dict[str, np.ndarray]:
    """Those of one layer."""
    with safe_open(path, "np") as file:
        return {key.removeprefix(f"{name}."): file.get_tensor(key) for key in file.keys()  # noqa: SIM118
                if key.startswith(f"{name}.")}


def sizes(directory: Path) -> dict[str, int]:
    """Bytes on the disk of every part, the largest first: each kind of layer in all blocks, embedding, head, what else
    there is of weights, and files that hold none; their sum is that of all files.  ValueError for a damaged file."""
    found: Counter[str] = Counter()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        size = path.stat().st_size
        if path.suffix != ".safetensors":
            found[path.name] = size
            continue
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            arrays = {name: meta["data_offsets"] for name, meta in header.items() if name != "__metadata__"}
            spans = [(name.split(".")[0], end - start) for name, (start, end) in arrays.items()]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
            raise ValueError(f"{path}: its header is damaged ({error!r}): restore it or compress the model again"
                             ) from error
        for part, taken in spans:
            kind = llama.kind_of(part)
            found["gains and biases" if part.endswith(("norm", "bias")) else kind] += taken
            size -= taken
        found["names of arrays"] += size
    return dict(found.most_common())


def model_bytes(params: Params) -> int:
    """Bytes of every array of a model, compressed or dense; embedding and head are not read for it."""
    parts = [{name: value for name, value in params.items() if name != "blocks"}, *params["blocks"]]
    return sum(leaf.nbytes for part in parts for leaf in jax.tree.leaves(dict(part)))


def dense_bytes(params: Params, compressed: Collection[str]) -> int:
    """Bytes of all but the ``compressed`` layers and tables, which are given by their paths and not read."""
    parts = {"": params} | {f"blocks.{i}.": block for i, block in enumerate(params["blocks"])}
    return sum(part[name].nbytes for prefix, part in parts.items() for name in part
               if name != "blocks" and f"{prefix}{name}" not in compressed)


def fingerprint(model: Model) -> str:
    """SHA-256 of configuration and weights, block by block, each read by one of the processes.

    Raises ValueError naming an array with NaN or infinities.
    """
    digests, owners = [], [index % spread.count() for index in range(model.config.layers)]
    for index, block in enumerate(model.params["blocks"]):
        mine = owners[index] == spread.rank()
        digests.append(_digest(f"blocks.{index}.", block) if mine else bytes(32))
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    rest = _digest("", weights.rest(model.params))
    return files.sha256(repr(model.config).encode() + rest + spread.exchange(rows, owners).tobytes())


def base(directory: str | Path) -> Model:
    """The dense model that this one was compressed from; ValueError where that is no longer the same."""
    run = read_manifest(Path(directory))["run"]
    found = convert.load(run["config"]["model"])
    if fingerprint(found) != run["model_sha256"]:
        raise ValueError(f"{run['config']['model']} is not the model that {directory} was compressed from: its weights "
                         "have changed since; put those back, or compress again")
    return found


def _digest(prefix: str, arrays: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        if not np.isfinite(array).all():
            raise ValueError(f"{prefix}{name}: the weights hold NaN or infinite values: fetch the model again")
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.digest()
