"""How small a model can be on disk: embedding, head and layers at one level, megabytes against perplexity.

Calibrated on two texts, scored on both and on one of neither kind: what Django says in eight other scripts, whose
tokens calibration hardly saw.  Rivals, calibrated on the same: the layers at the level beside tables of 8 bits, and
fixed rates beside such tables.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from drawing import axes
from machinery import Experiment, Result, model, source
from perplexity import moments

from caldera_jax import CalderaConfig, LevelConfig
from caldera_jax.jobs import artifact, evaluate, level
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.settings import RunConfig, weights
from caldera_jax.models import data
from caldera_jax.models.data import Tokens

TRANSLATIONS = data.Source("django==5.2.8", "*/LC_MESSAGES/django.po",
                           "14f866a0299275557d1fa51f65267c09409ad670b128b236003588e5d35d3e6b",
                           name="django-5.2.8.po.json")
LANGUAGES = ("ar", "el", "he", "hi", "ja", "ko", "ru", "th")
TEXTS = ("enwiki", "python", "other scripts")
BOTH, ONE, DRAWN = "enwiki+python", "enwiki", level.UNSEEN
LEVEL, EIGHT, FIXED = "all at one level", "layers at the level, tables of 8 bits", "Q of 2 bits + L R, tables of 8 bits"


@dataclass(frozen=True)
class Config:
    """One compressed model; ``megabytes``: of all its weights (of FIXED: what comes of it); ``unseen``: how far the
    importance of a table's rows is drawn to their mean, at least."""

    model: str
    part: str
    megabytes: float | None
    text: str
    unseen: float
    windows: int
    window: int
    seed: int


def runs(preset: str) -> list[Config]:
    """From 30 to 90 MB on disk, the rivals, one text alone, and what draws the tables' importance to its mean; one
    seed."""
    if preset == "smoke":
        return [Config("tiny-smoke", part, megabytes, BOTH, DRAWN, 8, 64, 0)
                for part, megabytes in ((LEVEL, 0.005), (LEVEL, 0.007), (EIGHT, 0.024))]
    points = [(LEVEL, megabytes, BOTH, DRAWN) for megabytes in (42.0, 28.0, 34.0, 55.0, 70.0, 88.0)]
    points += [(EIGHT, 55.0, BOTH, DRAWN), (LEVEL, 42.0, ONE, DRAWN), (FIXED, None, BOTH, DRAWN)]
    points += [(LEVEL, 42.0, BOTH, unseen) for unseen in (0.1, 0.8, 1.0)]
    return [Config("smollm2-135m", *point, 32, 512, 0) for point in points]


def run_config(config: Config) -> RunConfig:
    """What ``compress`` is asked for; one text gives as many windows as two."""
    calibrated = Tokens(config.text, config.windows * (2 if config.text == ONE else 1), config.window)
    base = RunConfig(source(config.model), calibration=calibrated, seed=config.seed,
                     evaluation=Tokens("enwiki", config.windows, config.window))
    if config.part == FIXED:
        return replace(base, caldera=CalderaConfig(rank=32, outer_iterations=5, svd="randomized"), tables="8")
    tables = "level" if config.part == LEVEL else "8"
    free = replace(base, bits=1.0, level=LevelConfig(), counted="model", tables=tables)
    return replace(free, bits=8e6 * config.megabytes / weights(free, model(config.model).config))


@cache
def translations() -> list[str]:
    """What Django says, a text for each of LANGUAGES, without its list of all languages' names."""
    files = json.loads(data.fetch(TRANSLATIONS, data.cache_directory()).read_bytes())
    said = {language: [] for language in LANGUAGES}
    for file in files:
        language = re.search(r'"Language: (\w+)', file)
        if language and language[1] in said and 'msgid "Afrikaans"' not in file:
            for strings in re.findall(r'msgstr(?:\[\d\])? ((?:"(?:[^"\\]|\\.)*"\s*)+)', file)[1:]:
                text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', strings))
                said[language[1]].append(text.replace("\\n", "\n").replace('\\"', '"'))
    return ["\n".join(filter(None, of)) for of in said.values()]


def scored(config: Config) -> dict[str, np.ndarray]:
    """Held-out windows of the last two of TEXTS: ``compress`` scores the first."""
    base, windows = model(config.model), config.windows // 2
    each, held_out = -(-windows // len(LANGUAGES)), data.windows_beside(
        base, Tokens(TEXTS[1], windows, config.window), BOTH, "evaluation")
    return {TEXTS[1]: held_out, TEXTS[2]: np.concatenate([
        data.token_windows(base.tokenizer, [text], config.window, each, TEXTS[2]) for text in translations()])}


def measure(config: Config) -> Result:
    """Compress the whole model, in a directory that is then dropped; megabytes, and every text's perplexity."""
    with TemporaryDirectory() as folder, patch.object(level, "UNSEEN", config.unseen):
        out = Path(folder) / "out"
        found = compress(run_config(config), out, Path(moments().name))
        base, other = model(config.model), artifact.load(out)
        scores = {TEXTS[0]: {"base_perplexity": found["base_perplexity"], "perplexity": found["compressed_perplexity"],
                             "lost": found["lost"], "divergence": found["divergence"]}}
        for text, tokens in scored(config).items():
            compared = evaluate.compare(base.config, base.params, other.params, tokens, title=text)
            before, after, divergence = (evaluate.mean(part)[0] for part in compared[:3])
            scores[text] = {"base_perplexity": math.exp(before), "perplexity": math.exp(after), "lost": after - before,
                            "divergence": divergence}
    tables = {row["path"]: row["bits_per_weight"] for row in found["tables"]}
    return {**{name: found[name] for name in ("bits_per_weight", "model_bits_per_weight", "model_bytes", "disk_bytes")},
            "table_bits_per_weight": tables, "texts": scores, "stages": found["seconds"]}


def verdict(results: Sequence[Result]) -> str:
    """What each model weighs, and what every text loses, over the loss of the calibrated ones."""
    dense = {text: row["base_perplexity"] for text, row in results[0]["texts"].items()}
    lines = ["dense: perplexity " + ", ".join(f"{text} {value:.2f}" for text, value in dense.items()) + "."]
    for r in results:
        config, texts = r["config"], r["texts"]
        drawn = f", importance drawn by {config['unseen']:g}" if config["unseen"] != DRAWN else ""
        tables = ", ".join(f"{bits:.3f}" for bits in r["table_bits_per_weight"].values())
        scores = ", ".join(f"{text} {row['perplexity']:.2f} ({row['lost']:.3f})" for text, row in texts.items())
        lines.append(f"{config['part']}, calibrated on {config['text']}{drawn}: {r['disk_bytes'] / 1e6:.1f} MB on "
                     f"disk, layers {r['bits_per_weight']:.3f} bits, tables {tables}; perplexity (nats lost) {scores}; "
                     f"{TEXTS[2]} lose {texts[TEXTS[2]]['lost'] / texts[TEXTS[0]]['lost']:.2f} times what {TEXTS[0]} "
                     "does.")
    return "\n  ".join(lines)


def draw(results: Sequence[Result]):
    """Perplexity of each text against megabytes on disk."""
    figure, panels = axes(3, height=2.8)
    for panel, text in zip(panels, TEXTS, strict=True):
        for label, of, style in ((f"{LEVEL}, {BOTH}", (LEVEL, BOTH), "C4o-"), (f"{LEVEL}, {ONE}", (LEVEL, ONE), "C4^"),
                                 (EIGHT, (EIGHT, BOTH), "C2s"), (FIXED, (FIXED, BOTH), "C1D")):
            own = sorted((r["disk_bytes"] / 1e6, r["texts"][text]["perplexity"]) for r in results
                         if (r["config"]["part"], r["config"]["text"], r["config"]["unseen"]) == (*of, DRAWN))
            if own:
                panel.semilogy(*np.array(own).T, style, label=label)
        panel.axhline(results[0]["texts"][text]["base_perplexity"], color="k", linestyle="--", linewidth=1,
                      label="dense")
        panel.set(xlabel="MB on disk", ylabel="perplexity", title=text)
    panels[0].legend()
    return figure


EXPERIMENT = Experiment("size", "with embedding and head at the level of the layers SmolLM2 takes less than half of "
                        "its file of 4-bit weights (98 MB), and scripts that calibration did not see lose no more than "
                        "others", runs, measure, draw, verdict)
