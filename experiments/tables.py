"""Print tables of README.md from results/*.json:  python experiments/tables.py"""

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


if __name__ == "__main__":
    print(whole_model(), "\n", original_table(files.read_json(RESULTS / "original_block14.json")), sep="\n")
