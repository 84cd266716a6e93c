"""Print tables of README.md from results/*.json:  python experiments/tables.py"""

import math

from drawing import RESULTS
from original import table as original_table

from caldera_jax.models import files


def whole_model() -> str:
    """Perplexity against bits, in the order of the bits."""
    rows = [(path.stem.removeprefix("whole_model_"), files.read_json(path))
            for path in RESULTS.glob("whole_model_*.json")]
    base = rows[0][1]["base_perplexity"]
    lines = [f"| run | bits per weight | perplexity (base {base:.2f}) | layer error, mean / max | layers, MB | seconds "
             "to compress |",
             "|---" * 6 + "|"]
    for name, r in sorted(rows, key=lambda row: (row[1]["bits_per_weight"], row[0])):
        lines.append(f"| {name} | {r['bits_per_weight']:.3f} | {r['compressed_perplexity']:.2f} | "
                     f"{r['mean_layer_error']:.4f} / {r['max_layer_error']:.4f} | {r['stored_bytes'] / 1e6:.1f} | "
                     f"{r['seconds']['compress']:.0f} |")
    return "\n".join(lines)


def wide_model() -> str:
    """What is lost on both texts against bits, by ``wide_model.py`` and ``interop.py --quantize``."""
    found = []
    for path in RESULTS.glob("wide_model_*.json"):
        r = files.read_json(path)
        p = r["python"]
        dense, own = r["base_perplexity"], p["base_perplexity"]
        found.append((r["bits_per_weight"], path.stem.removeprefix("wide_model_"), r["compressed_perplexity"],
                      r["divergence"], p["compressed_perplexity"], p["divergence"],
                      f"{r['seconds']['total'] / 60:.0f}", f"{r['peak_memory_bytes'] / 1e9:.1f}"))
    for path in RESULTS.glob("interop_qwen2.5-coder-1.5b_*.json"):
        r, kind = files.read_json(path), path.stem.rpartition("1.5b_")[2]
        found += [(row["bits_per_weight"], f"llama.cpp {kind}, {name}", row["enwiki"]["perplexity"],
                   row["enwiki"]["divergence"], row["python"]["perplexity"], row["python"]["divergence"], "", "")
                  for name, row in r.items() if name in ("pure", "mixed")]
    lines = [f"| run | bits | Wikipedia (dense {dense:.2f}) | nats lost | divergence | program text ({own:.2f}) | nats "
             "lost | divergence | minutes | memory, GB |", "|---" * 10 + "|"]
    for bits, name, one, d, other, e, minutes, memory in sorted(found):
        lines.append(f"| {name} | {bits:.3f} | {one:.2f} | {math.log(one / dense):.3f} | {d:.3f} | {other:.2f} | "
                     f"{math.log(other / own):.3f} | {e:.3f} | {minutes} | {memory} |")
    return "\n".join(lines)


if __name__ == "__main__":
    original = original_table(files.read_json(RESULTS / "original_block14.json"))
    print(whole_model(), wide_model(), original, sep="\n\n")
