"""What the paper prints, from published.json, as a Markdown table:  python experiments/published.py

None of it was reproduced here: every entry says why not, which command of this project ``prepares`` the model, and
which ``reproduces`` the number, that is prints it; or the ``reason`` why none does.  The directories of models and
Hessians, and the texts, are the user's own.
"""

import re
import sys
from pathlib import Path
from typing import Any

from caldera_jax.models import files, llama
from caldera_jax.models.llama import LlamaConfig

PATH = Path(__file__).parent / "published.json"
FIELDS = ("source", "model", "setting", "metric", "dataset", "value", "unit", "status", "prepares", "reproduces",
          "reason")  # and maybe a note
SETTING = ("method", "rank", "q_bits", "factor_bits", "average_bits", "finetuned")

SHAPES = {
    "LLaMA-2 7B": LlamaConfig(32000, 4096, 32, 32, 32, 128, 11008, context=4096),
    "LLaMA-2 13B": LlamaConfig(32000, 5120, 40, 40, 40, 128, 13824, context=4096),
    "LLaMA-2 70B": LlamaConfig(32000, 8192, 80, 64, 8, 128, 28672, context=4096),
    "LLaMA-3 8B": LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, rope_theta=500_000.0, context=8192),
}


def load() -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The settings and the entries; ValueError naming one that lacks a field, or both a command and a reason."""
    content = files.read_json(PATH)
    for i, entry in enumerate(content["entries"]):
        given = (*entry, *entry.get("setting", ()))
        if lacking := [name for name in FIELDS + SETTING if name not in given]:
            raise ValueError(f"{PATH.name}: entry {i} has no {', '.join(lacking)}")
        if bool(entry["reproduces"]) == bool(entry["reason"]):
            raise ValueError(f"{PATH.name}: entry {i} needs either a command that reproduces it or a reason")
    return content["settings"], content["entries"]


def average_bits(config: LlamaConfig, rank: int, q_bits: float, factor_bits: float) -> float:
    """B_Q + Σ k (B_L m + B_R n) / Σ m n over the linear layers, B_L = B_R; scales and signs are not counted."""
    shapes = llama.shapes(config).values()
    return q_bits + rank * factor_bits * sum(m + n for m, n in shapes) / sum(m * n for m, n in shapes)


def out_of(command: str) -> str | None:
    """The directory that a command writes."""
    found = re.search(r"--out (\S+)", command)
    return found and found[1]


def cells(entry: dict[str, Any]) -> list[str]:
    """One row of the table."""
    s = entry["setting"]
    bits = f", {s['factor_bits']}-bit factors" if s["factor_bits"] else ""
    what = s["method"] + (f", k = {s['rank']}" if s["rank"] else "") + bits
    what += f", fine-tuned: {s['finetuned']}" if s["finetuned"] else ""
    unit = "" if entry["unit"] == "1" else f" {entry['unit']}"
    prepares, reproduces = (f"`{entry[key]}`" if entry[key] else "–" for key in ("prepares", "reproduces"))
    return [entry["model"], what, s["average_bits"] or "–", entry["metric"], entry["dataset"] or "–",
            f"{entry['value']}{unit}", entry["status"], prepares, entry["reason"] or reproduces]


def table() -> str:
    """All entries, and the settings below them."""
    settings, entries = load()
    rows = [["model", "method", "average bits", "metric", "data", "printed", "status", "prepared by",
             "printed by"], ["---"] * 9, *map(cells, entries)]
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "",
                      *(f"* {name}: {text}." for name, text in settings.items())])


if __name__ == "__main__":
    try:
        print(table())
    except ValueError as error:
        sys.exit(f"published.py: {error}")
