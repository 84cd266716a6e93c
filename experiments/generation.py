"""Memory and speed of generation from packed weights, beside the same weights put together as dense matrices.

    python experiments/generation.py                   # SmolLM2-135M at k = 32, as ``recovery.py`` compresses it
    python experiments/generation.py --model tiny-smoke    # seconds

Each measurement is a process of its own, packed and dense in turn.  The first of each compiles its programs; those
after it find them, as `caldera generate` does from its second run on.  results/generation.json holds the first, and
medians of the rest.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest.mock import patch

import drawing
import machinery
import numpy as np
import recovery
import tyro

from caldera_jax.jobs import artifact, report
from caldera_jax.jobs.generate import Result, Sampling, run_apart
from caldera_jax.models import files

PROMPTS = ("The capital of France is", "Water boils when", "In the nineteenth century", "A prime number is",
           "The river flows from", "Most birds", "The first computers", "She opened the door and")


@dataclass(frozen=True)
class Config:
    """Greedy continuations of one prompt and of eight together; medians of ``repeats`` after the first."""

    model: Literal["smollm2-135m", "tiny-smoke"] = "smollm2-135m"
    tokens: int = 64
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 5


def source(config: Config) -> Path:
    """The compressed model."""
    preset = "smoke" if config.model == "tiny-smoke" else "full"
    return recovery.compressed(next(one for one in recovery.runs(preset) if one.model == config.model))


def figures(results: list[Result]) -> dict[str, float]:
    """Bytes, and medians of what varies."""
    first = results[0]
    return {"layer_bytes": first.layer_bytes, "weight_bytes": first.weight_bytes, "cache_bytes": first.cache_bytes,
            "peak_bytes": float(np.median([r.peak_bytes - r.start_bytes for r in results])),  # beyond the start
            **{name: float(np.median([getattr(r, name) for r in results]))
               for name in ("token_rate", "prompt_rate", "compile_seconds")}}


def measure(config: Config) -> dict[str, Any]:
    """For every batch the packed and the dense figures, their ratios, and how many tokens are the same."""
    directory, rows = source(config), []
    for batch in config.batches:
        with TemporaryDirectory() as programs, patch.dict(os.environ, {
                "JAX_COMPILATION_CACHE_DIR": programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}):
            first, *pairs = [[run_apart(directory, PROMPTS[:batch], Sampling(config.tokens), dense)
                              for dense in (False, True)] for _ in range(1 + config.repeats)]
        packed, dense = map(list, zip(*pairs, strict=True))
        both = [(a, b) for rows_of in zip(packed[0].tokens, dense[0].tokens, strict=True)
                for a, b in zip(*rows_of, strict=False)]
        ours, theirs = figures(packed), figures(dense)
        rows.append({"batch": batch, "packed": ours, "dense": theirs,
                     "first": {name: figures([one]) for name, one in zip(("packed", "dense"), first, strict=True)},
                     "dense_over_packed": {name: theirs[name] / ours[name] for name in ours if "byte" in name},
                     "packed_over_dense_rate": float(np.median([p.token_rate / d.token_rate for p, d in pairs])),
                     "tokens": len(both), "same_tokens": sum(a == b for a, b in both), "text": packed[0].texts[0]})
    own = files.read_json(directory / "report.json")
    return {**report.provenance(config, 0), "model_sha256": machinery.fingerprint(config.model),
            "caldera": artifact.read_manifest(directory)["run"]["config"]["caldera"],
            "bits_per_weight": own["bits_per_weight"], "rows": rows}


def main(config: Config) -> None:
    """Measure, record, print."""
    found = measure(config)
    other = "" if config.model == Config().model else f"_{config.model}"
    files.write_json(drawing.RESULTS / f"generation{other}.json", found)
    for row in found["rows"]:
        ours, theirs, ratio = row["packed"], row["dense"], row["dense_over_packed"]
        sizes = "; ".join(f"{name} {ours[key] / 1e6:.1f} of {theirs[key] / 1e6:.1f} MB ({ratio[key]:.2f} times)"
                          for name, key in (("layers", "layer_bytes"), ("weights", "weight_bytes"),
                                            ("process beyond its start", "peak_bytes")))
        print(f"batch {row['batch']}: {sizes}; {ours['token_rate']:.1f} against {theirs['token_rate']:.1f} tokens/s "
              f"({row['packed_over_dense_rate']:.2f}); {row['same_tokens']} of {row['tokens']} tokens are the same; "
              f"compiling takes {ours['compile_seconds']:.1f} and {theirs['compile_seconds']:.1f} s, the first time " +
              " and ".join(f"{one['compile_seconds']:.1f} s in {one['peak_bytes'] / 1e6:.0f} MB"
                           for one in row["first"].values()))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
