"""All that decides the result of a run, and what follows from it alone."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from caldera_jax import allocate
from caldera_jax.decompose import CalderaConfig
from caldera_jax.jobs import artifact
from caldera_jax.levels import LevelConfig
from caldera_jax.models import files, llama
from caldera_jax.models.data import Tokens
from caldera_jax.packing import row_bytes


@dataclass(frozen=True)
class Importance:
    """How g is estimated: from how many of the calibration windows of each text (None: all), and
    ``objective.importance``."""

    windows: int | None = 32
    floor: float = 0.02
    shrinkage: float = 0.1

    def __post_init__(self):
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"importance_windows must be at least 1, got {self.windows}")
        if not 0 <= self.floor < math.inf or not 0 <= self.shrinkage <= 1:
            raise ValueError("importance needs a floor of at least 0 and a shrinkage from 0 to 1, got "
                             f"{self.floor} and {self.shrinkage}")

    def of(self, tokens: Int[np.ndarray, "w s"], texts: int = 1) -> Int[np.ndarray, "v s"]:
        """The windows of so many texts that g is estimated from: as far apart as there are."""
        count = len(tokens) if self.windows is None else min(texts * self.windows, len(tokens))
        return tokens[np.arange(count) * len(tokens) // count]


@dataclass(frozen=True)
class RunConfig:
    """All that decides the result of a run.

    bos: windows of calibration and evaluation begin with the model's BOS, which takes the place of their last token.
    tables: embedding and head as they are ("dense"), at the level of the layers, or with 8 or 4 bits a weight and a
    scale a row.  counted: what ``bits`` is of, the linear layers alone or the tables, too.
    outputs: at a fixed rate, whether the errors of all outputs of a layer count alike, as in the paper, or by their
    ``importance``, as they do at a level.
    token_cap: how much of one token counts in the Moments (``hessian.update``); 0: all of it, as in the paper.
    hessians: a directory of Hessians as the authors released them, instead of calibrating.
    blocks: compress only the first so many blocks (None: all).  activations: take the Moments on the dense model, as
    in the paper, or on the model whose earlier blocks are compressed already.
    bits: a budget of stored bits a weight.
    level: integers of free rate, all layers at one level (``levels``): at c, or where that is None at what meets the
    budget.
    importance: how that of the outputs is estimated.
    Without ``level`` rates are fixed, as in ``caldera``; with a budget ``allocate`` chooses rank, bits of Q and of L R
    of every layer.  allocation: by what; see ``allocate.damage``; "uniform" chooses one for all layers.  ranks: to
    choose from (None: ``allocate.grid`` of each layer, or any for "uniform"); (0,) shares out the bits of Q alone.
    """

    model: str
    caldera: CalderaConfig = CalderaConfig()
    calibration: Tokens = Tokens()
    evaluation: Tokens = Tokens(windows=32)
    activations: Literal["dense", "compressed"] = "dense"
    blocks: int | None = None
    seed: int = 0
    hessians: str | None = None
    bits: float | None = None
    allocation: allocate.Rule = "gradient"
    ranks: tuple[int, ...] | None = None
    level: LevelConfig | None = None
    c: float | None = None
    importance: Importance = Importance()
    bos: bool = False
    token_cap: float = 1e4
    tables: Literal["dense", "level", "8", "4"] = "dense"
    counted: Literal["layers", "model"] = "layers"
    outputs: Literal["alike", "fisher"] = field(default="alike", metadata={"later": True})

    def __post_init__(self):
        if self.activations not in ("dense", "compressed"):
            raise ValueError(f"activations must be 'dense' or 'compressed', got {self.activations!r}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2^32 - 1, got {self.seed}")
        if self.evaluation.window < 2:
            raise ValueError(f"perplexity needs windows of at least 2 tokens, got {self.evaluation.window}")
        if self.allocation not in get_args(allocate.Rule):
            raise ValueError(f"allocation must be one of {', '.join(get_args(allocate.Rule))}; got {self.allocation!r}")
        if not (self.token_cap == 0 or 1 <= self.token_cap < math.inf):
            raise ValueError("token_cap times the median is the largest squared norm that a token counts with: give 1 "
                             f"or more, or 0 for no cap; got {self.token_cap}")
        if self.bits is not None and not 0 < self.bits < math.inf:
            raise ValueError(f"a budget of {self.bits} bits a weight cannot be met: give a positive number")
        if self.level is None and self.c is not None or self.level is not None and (
                (self.bits is None) == (self.c is None)):
            raise ValueError("one level for all layers has a LevelConfig, and is either given as c or found for a "
                             f"budget of bits; got {self.level}, bits {self.bits} and c {self.c}")
        if self.c is not None and not 0 < self.c < math.inf:
            raise ValueError(f"the level c must be positive and finite, got {self.c}")
        if self.tables not in get_args(RunConfig.__annotations__["tables"]) or self.counted not in ("layers", "model"):
            raise ValueError("tables must be 'dense', 'level', '8' or '4', and counted 'layers' or 'model'; got "
                             f"{self.tables!r} and {self.counted!r}")
        if self.tables == "level" and self.level is None:
            raise ValueError("tables at the level need a level: give bits of free rate, or tables='8' or '4'")
        if self.counted == "model" and (self.level is None or self.bits is None or self.blocks is not None):
            raise ValueError("a budget of the whole model is one of free rate, for all blocks: give bits and no "
                             "blocks, or count the layers alone")
        if self.counted == "model" and self.tables == "dense":
            raise ValueError("a budget of the whole model leaves embedding and head not dense: add --tables level, 8 "
                             "or 4, or count the layers alone")
        if self.outputs not in ("alike", "fisher"):
            raise ValueError(f"outputs must be 'alike' or 'fisher', got {self.outputs!r}")
        if self.outputs == "fisher" and (self.level is not None or self.bits is not None):
            raise ValueError("importance (outputs='fisher') is asked for at one fixed rate alone: at a level it counts "
                             "always, and a plan of fixed rates does not know it: leave out --importance, or the "
                             "budget")
        if self.outputs == "fisher" and self.caldera.rotation != "hadamard":
            raise ValueError("importance scales the rows for a rotation that spreads what Q loses over all alike: use "
                             f"--rotation hadamard, got {self.caldera.rotation!r}, or leave out --importance")
        if self.level is not None:
            return
        if self.bits is not None and self.activations == "compressed":
            raise ValueError("a budget is shared out before any layer is compressed, so its Moments must be those of "
                             "the dense model: use activations='dense', or give no bits")
        if self.bits is not None and self.caldera.downdate:
            raise ValueError("a budget is shared out by what layers lose without the downdate, which would spoil the "
                             "plan: add --downdate False (downdate=False), or give no budget")
        if self.ranks is not None and (self.bits is None or not self.ranks or min(self.ranks) < 0):
            raise ValueError("ranks are what a budget of bits chooses from, one or more numbers from 0 on; got "
                             f"{self.ranks} and {'no' if self.bits is None else 'a'} budget: give both or neither")

    @property
    def cap(self) -> float:
        """``hessian.update``'s."""
        return self.token_cap or math.inf


def recorded(value: Any) -> RunConfig:
    """The inverse of ``report.plain``: the RunConfig that a manifest's ``run`` holds as ``config``; ValueError if it is
    none."""
    known = {"token_cap": 0.0, **value} if isinstance(value, dict) else value  # the first ones had none
    return files.checked(revived(known), RunConfig, "the run's configuration")


def revived(value: Any) -> Any:
    """The inverse of ``report.plain``, of any part of a configuration."""
    if isinstance(value, dict):
        fields = {name: revived(item) for name, item in value.items()}
        kinds = {kind.__name__: kind for kind in (RunConfig, Tokens, CalderaConfig, LevelConfig, Importance)}
        kind = (kinds | artifact.GRIDS).get(str(fields.pop("kind", None)))
        return files.made(kind, fields, f"the run's configuration: {kind.__name__}") if kind else fields
    return tuple(revived(item) for item in value) if isinstance(value, list) else value


def count(config: RunConfig, model: llama.LlamaConfig) -> int:
    """Number of blocks that a run compresses."""
    return model.layers if config.blocks is None else config.blocks


def weights(config: RunConfig, model: llama.LlamaConfig) -> int:
    """Number of weights that a budget counts."""
    tables = sum(map(math.prod, llama.table_shapes(model).values())) if config.counted == "model" else 0
    return count(config, model) * llama.block_weights(model) + tables


def budget(config: RunConfig, model: llama.LlamaConfig) -> float:
    """Bits that a run may store of what is at the level, or planned."""
    rounded = config.counted == "model" and config.tables in ("8", "4")
    sizes = llama.table_shapes(model).values() if rounded else ()
    return config.bits * weights(config, model) - sum(m * (8 * row_bytes(n, int(config.tables)) + 32) for m, n in sizes)
