"""Speed and memory of generation from compressed weights, in bytes and packed, beside the same weights dense.

    python experiments/generation.py                   # SmolLM2-135M, and four blocks of 1536 and 8960 inputs
    python experiments/generation.py --models tiny-smoke --rank 4 --bits 4    # seconds

Each model twice: E8P at 2 bits with L R, and all weights at one level.  Four wide blocks have random weights, since
their speed is that of their shapes.  Each measurement is a process of its own, one kind after the other in turn.  The
first of each compiles its programs; those after it find them, as `caldera generate` does from its second run on.
results/generation.json holds the first, and medians of the rest.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import drawing
import dry_run
import machinery
import numpy as np
import tyro

from caldera_jax import CalderaConfig, LevelConfig
from caldera_jax.jobs import report
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.generate import Result, Sampling, run_apart
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.models import files
from caldera_jax.models.data import Tokens
from caldera_jax.models.llama import LlamaConfig

WORK = Path("out/generation")
WIDE = {"wide": LlamaConfig(vocab=8192, dim=1536, layers=4, heads=12, kv_heads=2, head_dim=128, ffn_dim=8960,
                            qkv_bias=True, context=1024)}  # Qwen2.5-Coder-1.5B's blocks, and words enough to calibrate
PROMPTS = ("The capital of France is", "Water boils when", "In the nineteenth century", "A prime number is",
           "The river flows from", "Most birds", "The first computers", "She opened the door and")
KINDS = {"E8P + L R": ("bytes", "packed"), "level": ("bytes", "packed", "dense")}  # dense is dense


@dataclass(frozen=True)
class Config:
    """Greedy continuations of one prompt and of eight together; medians of ``repeats`` after the first."""

    models: tuple[str, ...] = ("smollm2-135m", "wide")
    tokens: int = 64
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 3
    rank: int = 32
    bits: float = 2.0


def source(config: Config, model: str, kind: str) -> Path:
    """The compressed model, made once."""
    out, smoke = WORK / model, model == "tiny-smoke"
    tokens = Tokens(windows=8 if smoke else 64, window=64 if smoke else 512)
    chosen = RunConfig(model if model in WIDE else machinery.source(model), calibration=tokens,
                       evaluation=dataclasses.replace(tokens, windows=4))
    if model in WIDE:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "random"
        if not path.is_dir():
            dry_run.write_model(path, WIDE[model], 0)
            dry_run.write_text(out / "words.txt", WIDE[model], 16 * 512, 1)
        few = Tokens(str(out / "words.txt"), 16, 512)
        chosen = dataclasses.replace(chosen, model=str(path), calibration=few,
                                     evaluation=dataclasses.replace(few, windows=4))
    own = {"caldera": CalderaConfig(rank=config.rank, outer_iterations=1 if model in WIDE else 5)}
    if kind == "level":
        own = {"bits": config.bits, "level": LevelConfig()}
    found = out / report.config_hash((config.rank, config.bits, kind))[:12]
    compress(dataclasses.replace(chosen, **own), found, out / "moments")
    return found


def figures(results: list[Result]) -> dict[str, float]:
    """Bytes, and medians of what varies."""
    first = results[0]
    return {"layer_bytes": first.layer_bytes, "weight_bytes": first.weight_bytes, "cache_bytes": first.cache_bytes,
            "peak_bytes": float(np.median([r.peak_bytes - r.start_bytes for r in results])),  # beyond the start
            **{name: float(np.median([getattr(r, name) for r in results]))
               for name in ("token_rate", "prompt_rate", "compile_seconds")}}


def measure(config: Config) -> dict[str, Any]:
    """For every model and batch the figures of every kind, speeds over the dense one's, and how many tokens are those
    of the dense weights."""
    rows = []
    for model in config.models:
        sources = {(kind, held): source(config, model, kind) for kind, of in KINDS.items() for held in of}
        for batch in config.batches:
            prompts = PROMPTS[:batch] if model not in WIDE else [f"w{i} w{i + 7} w{2 * i}" for i in range(batch)]
            with TemporaryDirectory() as programs, patch.dict(os.environ, {
                    "JAX_COMPILATION_CACHE_DIR": programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}):
                first, *rest = [{key: run_apart(path, prompts, Sampling(config.tokens), key[1])
                                 for key, path in sources.items()} for _ in range(1 + config.repeats)]
            dense = [one["level", "dense"] for one in rest]
            for key, path in sources.items():
                own, made = [one[key] for one in rest], files.read_json(path / "report.json")
                same = [a == b for x, y in zip(own[0].tokens, dense[0].tokens, strict=True)
                        for a, b in zip(x, y, strict=False)]
                rows.append({
                    "model": model, "batch": batch, "kind": key[0], "held": key[1], **figures(own),
                    "first": figures([first[key]]),
                    "rate_over_dense": float(np.median([a.token_rate / b.token_rate
                                                        for a, b in zip(own, dense, strict=True)])),
                    **({"tokens": len(same), "same_tokens": sum(same)} if key[0] == "level" else {}),
                    "stored_bits_per_weight": made["bits_per_weight"],
                    "bits_in_memory": 8 * own[0].layer_bytes / made["compressed_weights"],
                    "text": own[0].texts[0] if model not in WIDE else None})
    return {**report.provenance(config, 0), "rows": rows}


def main(config: Config) -> None:
    """Measure, record, print."""
    found = measure(config)
    other = "" if config.models == Config().models else f"_{config.models[0]}"
    files.write_json(drawing.RESULTS / f"generation{other}.json", found)
    for row in found["rows"]:
        same = f"; {row['same_tokens']} of {row['tokens']} tokens are those of dense weights" if "tokens" in row else ""
        print(f"{row['model']}, {row['kind']}, {row['held']}, batch {row['batch']}: {row['token_rate']:.1f} tokens/s, "
              f"{row['rate_over_dense']:.2f} times dense; layers {row['layer_bytes'] / 1e6:.1f} MB, "
              f"{row['bits_in_memory']:.2f} bits a weight; process beyond its start "
              f"{row['peak_bytes'] / 1e6:.0f} MB; compiling {row['first']['compile_seconds']:.1f} s the first time, "
              f"then {row['compile_seconds']:.1f} s{same}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
