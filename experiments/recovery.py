"""What fine-tuning gives back of the perplexity that compression cost: signs alone, and signs with factors.

Distilled from the dense model on a part of Wikipedia; measured on another part of it, and on program text.  What is
trained is counted at the bits that it is stored in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import machinery
import numpy as np
from ablations import write_python
from drawing import axes
from machinery import Experiment, Result, decide, with_interval

from caldera_jax import CalderaConfig
from caldera_jax.jobs import artifact, evaluate, report
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.finetune import FinetuneConfig, finetune
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.jobs.student import TrainConfig
from caldera_jax.models import data
from caldera_jax.models.data import Tokens

WORK = Path("out/recovery")


@dataclass(frozen=True)
class Config:
    """One compressed model, and one training of it.  Names only, so that its hash does not depend on where they lie."""

    model: str
    caldera: CalderaConfig
    train: TrainConfig
    windows: int  # of calibration text
    text: Tokens  # to train and to validate on
    aside: int
    seed: int


RATES = {"tiny": {"sign_rate": 4e-3, "factor_rate": 1e-3},  # of least validation loss among those that ``runs`` tries
         "tiny-smoke": {"sign_rate": 4e-3, "factor_rate": 1e-3},
         "smollm2-135m": {"sign_rate": 4e-3, "factor_rate": 1e-4}}  # 1e-4: by trials that were not kept


def runs(preset: str) -> list[Config]:
    """Tiny at two ranks, none, half and all of them trained, three seeds, and at other rates, one seed; three of
    SmolLM2-135M, one seed."""
    if preset == "smoke":
        few = CalderaConfig(rank=4, quantizer="uniform", factor_quantizer="uniform", outer_iterations=2,
                            inner_iterations=2, svd="randomized")
        return [Config("tiny-smoke", few, TrainConfig(ranks=ranks, validate=2, **RATES["tiny-smoke"]), 8,
                       Tokens(windows=12, window=64), 4, 0) for ranks in (0, 2, 4)]

    def tiny(rank, ranks, seed, **rates):
        return Config("tiny", CalderaConfig(rank=rank, svd="randomized"),
                      TrainConfig(ranks=ranks, epochs=4, seed=seed, **RATES["tiny"] | rates), 32,
                      Tokens(windows=256, window=256), 64, seed)

    found = [tiny(rank, ranks, seed) for rank in (16, 32) for ranks in (0, rank // 2, rank) for seed in range(3)]
    found += [tiny(16, 0, 0, sign_rate=rate) for rate in (1e-3, 1e-2)]
    found += [tiny(16, 16, 0, factor_rate=rate) for rate in (3e-4, 3e-3)]
    return found + [Config("smollm2-135m", CalderaConfig(rank=rank, outer_iterations=5, svd="randomized"),
                           TrainConfig(ranks=ranks, **RATES["smollm2-135m"]), 64, Tokens(windows=144, window=512), 16,
                           0)
                    for rank, ranks in ((32, 0), (32, 16), (64, 64))]


def measure(config: Config) -> Result:
    """Perplexity on held-out Wikipedia and on program text: dense, compressed, trained."""
    before = compressed(config)
    out = before.parent / report.config_hash((config.train, config.text, config.aside))
    found = finetune(FinetuneConfig(str(before), config.train, config.text, config.aside), out)
    own, window = found["finetune"][-1], config.text.window
    base = machinery.model(config.model)
    program = {name: evaluate.perplexity(base.config, params, program_windows(config.model, window))
               for name, params in (("base", base.params), ("before", artifact.load(before).params),
                                    ("after", artifact.load(out).params))}
    wikipedia = {"base": found["base_perplexity"], "before": own["perplexity_before"], "after": own["perplexity"]}
    return {"wikipedia": wikipedia, "program": program, "bits_before": own["bits_per_weight_before"],
            "bits": found["bits_per_weight"], "steps": own["steps"], "trained": own["trained"],
            "losses": own["losses"], "validation": own["validation"], "stages": own["seconds"]}


def compressed(config: Config) -> Path:
    """The compressed model, made once."""
    window = config.text.window
    chosen = RunConfig(machinery.source(config.model), config.caldera, Tokens(windows=config.windows, window=window),
                       Tokens(windows=32, window=window), seed=config.seed, token_cap=0.0)  # as in the paper
    folder = WORK / machinery.fingerprint(config.model)[:12] / report.config_hash(
        (config.caldera, config.windows, window, config.seed))
    with machinery.claimed(folder / "model", wait=True):
        compress(chosen, folder / "model", WORK / "moments")
    return folder / "model"


@cache
def program_windows(name: str, window: int) -> np.ndarray:
    """Windows of Python's own library (``ablations.PYTHON``)."""
    with TemporaryDirectory() as folder:
        write_python(Path(folder))
        return data.token_windows(machinery.model(name).tokenizer, data.load_text(folder), window, 16, "evaluation")


def recovered(of: dict[str, float]) -> float:
    """The share of the lost log perplexity that training gave back."""
    return float(1 - np.log(of["after"] / of["base"]) / np.log(of["before"] / of["base"]))


def cells(results: Sequence[Result]) -> dict[tuple[str, int, int], list[Result]]:
    """The seeds of each model, rank and number of ranks trained, at the chosen rates."""
    found: dict[tuple[str, int, int], list[Result]] = {}
    for r in results:
        c = r["config"]
        if all(c["train"][name] == rate for name, rate in RATES[c["model"]].items()):
            found.setdefault((c["model"], c["caldera"]["rank"], c["train"]["ranks"]), []).append(r)
    return found


def name(rank: int, ranks: int) -> str:
    """What is trained, in words."""
    return f"k = {rank}, signs" + (f" and {ranks} ranks" if ranks else "")


def verdict(results: Sequence[Result]) -> str:
    """Perplexity after over before, and the share of the loss recovered; and the order none > signs > both."""
    lines, found = [], cells(results)
    for (model, rank, ranks), rows in found.items():
        texts = []
        for text in ("wikipedia", "program"):
            ratio = [r[text]["after"] / r[text]["before"] for r in rows]
            mean = {key: np.mean([r[text][key] for r in rows]) for key in ("base", "before", "after")}
            share = (f"{np.mean([recovered(r[text]) for r in rows]):.0%} of the loss recovered"
                     if min(r[text]["before"] / r[text]["base"] for r in rows) > 1.02 else "next to nothing was lost")
            texts.append(f"{text} {mean['before']:.2f} to {mean['after']:.2f} (dense {mean['base']:.2f}), "
                         f"{decide(ratio)} {with_interval(ratio)}, {share}")
        lines.append(f"{model}, {name(rank, ranks)}: {np.mean([r['bits_before'] for r in rows]):.3f} to "
                     f"{np.mean([r['bits'] for r in rows]):.3f} bits, {rows[0]['steps']} steps; {'; '.join(texts)}.")
    for model, rank in dict.fromkeys((model, rank) for model, rank, _ in found):
        each = sorted((ranks, rows) for (m, k, ranks), rows in found.items() if (m, k) == (model, rank))
        for (_, fewer), (more, rows) in zip(each, each[1:], strict=False):
            ratio = [b["wikipedia"]["after"] / a["wikipedia"]["after"] for a, b in zip(fewer, rows, strict=True)]
            lines.append(f"{model}, k = {rank}, {more} ranks trained over fewer: {decide(ratio)} "
                         f"{with_interval(ratio)}.")
    tried = [r for r in results if r["config"]["model"] == "tiny" and r["config"]["caldera"]["rank"] == 16
             and r["config"]["seed"] == 0 and r["config"]["train"]["ranks"] in (0, 16)]
    lines += [f"tiny, {name(16, c['ranks'])}, rates {c['sign_rate']:g} and {c['factor_rate']:g}: soft loss "
              f"{r['validation'][0]:.4f} to {np.nanmin(r['validation']):.4f} on the validation windows."
              for r in tried for c in [r["config"]["train"]]]
    return "\n  ".join(lines)


def draw(results: Sequence[Result]):
    """Perplexity before and after against stored bits, and the course of validation."""
    names = list(dict.fromkeys(r["config"]["model"] for r in results))
    figure, panels = axes(2, len(names), height=2.8)
    for row, model in enumerate(names):
        first, second = panels[2 * row:2 * row + 2]
        for i, ((_, rank, ranks), rows) in enumerate(
                (key, rows) for key, rows in cells(results).items() if key[0] == model):
            old, new = (np.mean([r[key] for r in rows]) for key in ("bits_before", "bits"))
            before, after = (np.mean([r["wikipedia"][key] for r in rows]) for key in ("before", "after"))
            first.annotate("", (new, after), (old, before), arrowprops={"arrowstyle": "->", "color": f"C{i}"})
            first.plot(old, before, f"C{i}o", fillstyle="none")
            first.plot(new, after, f"C{i}o", label=name(rank, ranks))
            course = np.mean([r["validation"] for r in rows], axis=0)
            second.plot(np.minimum(np.arange(len(course)) * rows[0]["config"]["train"]["validate"], rows[0]["steps"]),
                        course, f"C{i}")
        first.axhline(np.mean([r["wikipedia"]["base"] for r in results if r["config"]["model"] == model]), color="0.5",
                      linestyle="--", label="dense")
        first.set(xlabel="stored bits per weight", ylabel="perplexity", title=f"{model}, held-out text")
        second.set(xlabel="step", ylabel="soft loss, nats a token", title=f"{model}, validation")
        first.legend()
    return figure


EXPERIMENT = Experiment("recovery", "training signs, and more so signs and factors, gives back part of the loss",
                        runs, measure, draw, verdict)
