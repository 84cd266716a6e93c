"""What the kernels of ``caldera_jax.kernels`` could reach on one GPU and one TPU: computed, not measured.

    python experiments/roofline.py        # writes results/roofline.json and prints it

The least time for y = x Wᵀ with W of LLaMA-2 7B: every unit of the device at its published peak, all at once, and the
slowest binds.  "dense" reads a float16 matrix; "packed" decodes on chip, once for every tile of x, as
``kernels.matmul`` does on a TPU (for a GPU no such kernel is here); "decoded" decodes into a dense matrix in main
memory first.  Operations are those of the kernels' jaxprs.  Real kernels reach a part of such bounds: ``accelerator``
measures it.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp

from caldera_jax import lattice
from caldera_jax.jobs import report
from caldera_jax.kernels import matmul
from caldera_jax.models import files

RESULT = Path(__file__).parent / "results" / "roofline.json"
STATUS = "computed, not measured"

# Rates in bytes, flops, operations on one number and table lookups a second; tile: rows of x that share one decoding.
# A GPU has separate lanes for integers, fuses multiply and add, and serves one line of 128 bytes a cycle of those that
# the 32 lanes of a gather touch; a table of 1 KiB has 8.  A TPU permutes lanes: 5 operations a lookup (``lookup_in``).
A100_CLOCK = 108 * 1.41e9
DEVICES = {
    "A100 80GB SXM": {"memory": 2039e9, "matrix": 312e12, "integer": 64 * A100_CLOCK, "vector": 128 * A100_CLOCK,
                      "lookup": 32 / 8 * A100_CLOCK, "tile": 64, "fused": True, "sources": [
                          "NVIDIA A100 80 GB SXM datasheet: 2039 GB/s, 312 TFLOP/s dense half precision",
                          "NVIDIA A100 whitepaper: 108 SMs at 1.41 GHz, each 4 x 32 lanes issued a cycle, 64 integer",
                          "lookup: an assumption, see the source of this file"]},
    "TPU v5e": {"memory": 819e9, "matrix": 197e12, "integer": None, "vector": 8 * 128 * 4 * 1.5e9, "lookup": None,
                "tile": 256, "fused": False, "sources": [
                    "Cloud TPU documentation, v5e: HBM 819 GB/s, 197 TFLOP/s bfloat16, 4 matrix units",
                    "scaling book of the JAX team: vector unit of 8 x 128 lanes with 4 units each",
                    "1.5 GHz: 197 TFLOP/s over 4 units of 128 x 128 multiply-adds"]}}
LAYERS = {"attention": (4096, 4096), "gate and up": (11008, 4096), "down": (4096, 11008)}  # m outputs, n inputs
RANK, BATCHES, STAGES = 64, (1, 512), {2: (1.0,), 4: (1.0, 1 / 3.45)}  # factors: 4 bits
FREE = ("bitcast_convert_type", "broadcast_in_dim", "convert_element_type", "squeeze", "reshape", "jit")


def operations(f, *args) -> dict[str, int]:
    """Operations of an elementwise f on each entry of its arguments: integer, float additions, multiplications."""
    counts = {"integer": 0, "add": 0, "multiply": 0}

    def count(jaxpr):
        for eqn in jaxpr.eqns:
            for inner in (p.jaxpr for p in eqn.params.values() if hasattr(p, "jaxpr")):
                count(inner)
            if eqn.primitive.name not in FREE:
                real = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
                counts[("multiply" if eqn.primitive.name == "mul" else "add") if real else "integer"] += 1

    count(jax.make_jaxpr(f)(*args).jaxpr)
    return counts


@cache
def per_weight(bits: int, single: bool) -> dict[str, float]:
    """Operations and lookups a weight to decode, and to multiply where x is a single row."""
    lookups = []

    def weights(word, x):
        places = matmul._places(word, STAGES[bits], lambda which, byte: (lookups.append(which), byte)[1])
        return sum(make() * x for make in places) if single else [make() for make in places]

    counts = operations(weights, jnp.zeros((8, 128), jnp.int32), jnp.zeros((8, 128), jnp.float32))
    return {name: count / (32 // bits) for name, count in {**counts, "lookup": len(lookups)}.items()}


def bound(device: dict, byte_count: float, flops: float = 0, weights: float = 0, counts: dict | None = None) -> dict:
    """Least microseconds of each unit, the largest of them, and whose it is."""
    c = counts or {"integer": 0, "add": 0, "multiply": 0, "lookup": 0}
    vector = c["integer"] + c["add"] + (0 if device["fused"] else c["multiply"])
    vector += c["lookup"] * (1 if device["fused"] else 5)
    work = {"memory": byte_count, "matrix": flops, "integer": weights * (c["integer"] + c["lookup"]),
            "vector": weights * vector, "lookup": weights * c["lookup"]}
    times = {unit: round(1e6 * amount / device[unit], 2) for unit, amount in work.items() if device[unit]}
    binds = max(times, key=lambda unit: times[unit])
    return {"bytes": byte_count, "microseconds": times, "bound": times[binds], "binds": binds}


def row(name: str, layer: str, bits: int, b: int) -> dict:
    """Bounds of one product: dense, packed, and decoded first.  (The factors count as weights of Q with their bits.)"""
    device, (m, n) = DEVICES[name], LAYERS[layer]
    q, factors, activations = m * n, RANK * (m + n), 2 * b * (m + n)
    tiles = -(-b // device["tile"])
    packed_bytes = q * bits / 8 + factors / 2
    counts = {single: {key: (q * per_weight(bits, single)[key] + factors * per_weight(4, single)[key]) / (q + factors)
                       for key in per_weight(bits, single)} for single in (False, True)}
    flops = 2 * b * (q + factors)
    dense = bound(device, 2 * q + activations, 2 * b * q)
    packed = bound(device, packed_bytes * tiles + activations, 0 if b == 1 else flops, (q + factors) * tiles,
                   counts[b == 1])
    decoded = bound(device, packed_bytes + 4 * q + activations, flops, q + factors, counts[False])
    return {"status": STATUS, "device": name, "layer": layer, "m": m, "n": n, "rank": RANK, "q_bits": bits, "batch": b,
            "bytes_per_weight": round(packed_bytes / q, 4), "operations_per_weight": counts[b == 1], "dense": dense,
            "packed": packed, "decoded": decoded, "dense_over_packed": round(dense["bound"] / packed["bound"], 2)}


def encode(name: str) -> dict:
    """Bound of the encoder on 4096 x 4096 weights (8.5 bytes each)."""
    vector = [jnp.zeros((8, 128), jnp.float32)] * 8
    counts = operations(lambda *v: lattice.code_of(lattice.search(list(v))), *vector)
    counts = {"lookup": 0, **{key: count / 8 for key, count in counts.items()}}
    return {"status": STATUS, "device": name, "operations_per_weight": counts,
            **bound(DEVICES[name], 8.5 * 4096**2, 0, 4096**2, counts)}


def main() -> None:
    rows = [row(name, layer, bits, b) for name in DEVICES for b in BATCHES for bits in STAGES for layer in LAYERS]
    config = {"devices": DEVICES, "layers": LAYERS, "rank": RANK, "factor_bits": 4}
    files.write_json(RESULT, {**report.provenance(config, seed=0), "status": STATUS, "rows": rows,
                              "encode": [encode(name) for name in DEVICES]})
    print(f"Least microseconds ({STATUS})",
          "| device | batch | layer | Q bits | dense | packed | which binds | dense / packed | decoded first |",
          "|---" * 9 + "|", sep="\n")
    for r in rows:
        print(f"| {r['device']} | {r['batch']} | {r['layer']} {r['m']} x {r['n']} | {r['q_bits']} | "
              f"{r['dense']['bound']:.1f} | {r['packed']['bound']:.1f} | {r['packed']['binds']} | "
              f"{r['dense_over_packed']} | {r['decoded']['bound']:.1f} |")


if __name__ == "__main__":
    main()
