"""The flags of the longer commands, in the groups that their --help shows.  One that is not given is the preset's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

Int = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
Ints = Annotated[tuple[int, ...] | None, arg(metavar="INT [INT ...]", help_behavior_hint="")]
Float = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
Str = Annotated[str | None, arg(metavar="STR", help_behavior_hint="")]
File = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
Switch = Annotated[bool | None, arg(metavar="{True,False}", help_behavior_hint="")]


@dataclass(frozen=True)
class Algorithm:
    """Of compress."""

    outer_iterations: Int = None
    """rounds of Q and L R; all run, the best half step is kept."""
    inner_iterations: Int = None
    """rounds of L and R within each."""
    order: Annotated[Literal["lr-first", "q-first"] | None,
                     arg(metavar="{lr-first,q-first}", help_behavior_hint="")] = None
    """which half step comes first."""
    downdate: Switch = None
    """let Q ignore the directions that L R repairs."""
    refine_passes: Int = None
    """passes of coordinate descent after each LDLQ."""
    svd: Annotated[Literal["exact", "randomized"] | None,
                   arg(metavar="{exact,randomized}", help_behavior_hint="")] = None
    """SVD of the low-rank step: exact, or subspace iteration."""
    rotation: Annotated[Literal["hadamard", "orthogonal", "none"] | None,
                        arg(metavar="{hadamard,orthogonal,none}", help_behavior_hint="")] = None
    """applied on both sides before anything else."""
    damping: Float = None
    """added to the Hessian, in units of its mean diagonal."""
    quantizer: Str = None
    """family of Q's grid: e8p, trellis (less error, minutes in place of seconds), uniform, dithered or nf; with a
    budget, rates are then fixed and planned by layer (on a trellis for an hour)."""
    draft: Str = None
    """family of Q's grid in all rounds but the last: e8p beside --quantizer trellis."""
    factor_quantizer: Str = None
    """family of the factors' grids."""
    factor_rounding: Annotated[Literal["nearest", "feedback"] | None,
                               arg(metavar="{nearest,feedback}", help_behavior_hint="")] = None
    """of L and R: to the nearest, as in the paper, or with feedback, which takes much of what rounding them costs."""
    importance: Annotated[Literal["fisher", "none"] | None,
                          arg(metavar="{fisher,none}", help_behavior_hint="")] = None
    """of outputs: by the gradients of the loss, or all alike, as in the paper; 16 bits an output. With free rates they
    always count so."""


@dataclass(frozen=True)
class Texts:
    """Of compress."""

    calibration_text: Str = None
    """enwiki or python (built in), a text file, a .jsonl file ("text" of each line is a document; FILE.jsonl:FIELD for
    another field), a directory of .txt, .md and .jsonl files, or several of these joined by +."""
    calibration_windows: Int = None
    """windows of calibration text, of each where there are several."""
    calibration_window: Int = None
    """tokens a window."""
    evaluation_text: Str = None
    """the same for perplexity; the same text as for calibration is split by document."""
    evaluation_windows: Int = None
    """windows of evaluation text."""
    evaluation_window: Int = None
    """tokens a window."""
    bos: Switch = None
    """begin each window, of calibration and of evaluation, with the model's BOS, in place of its last token."""
    token_cap: Float = None
    """a calibration token whose squared norm exceeds so many times the median one counts as one of that norm;
    10000 unless the preset says otherwise (paper: 0, no cap)."""
    activations: Annotated[Literal["dense", "compressed"] | None,
                           arg(metavar="{dense,compressed}", help_behavior_hint="")] = None
    """calibrate on the dense model, or on the one whose earlier blocks are compressed already."""
    moments: File = None
    """directory to keep the calibration Moments in, read again by later runs on the same model and text."""
    hessians: Str = None
    """directory of Hessians as the authors released them (0_qkv.pt, 0_o.pt, 0_up.pt, 0_down.pt, 1_qkv.pt, …; needs
    torch), used instead of calibrating."""


@dataclass(frozen=True)
class Tables:
    """Of compress: the embedding and the head, often a third of a small model."""

    tables: Annotated[Literal["dense", "level", "8", "4"] | None,
                      arg(metavar="{dense,level,8,4}", help_behavior_hint="")] = None
    """as they are, at the level of the layers (the default where each weight has a rate of its own, in all blocks), or
    rounded to 8 or 4 bits a weight, a scale a row."""
    counted: Annotated[Literal["layers", "model"] | None,
                       arg(metavar="{layers,model}", help_behavior_hint="")] = None
    """what the budget is of: the linear layers (the default with --bits), or the tables, too (with --megabytes, unless
    these stay dense)."""


@dataclass(frozen=True)
class Level:
    """Of compress, with --bits, --megabytes or --level: every weight has a rate of its own."""

    states: Int = None
    """of the trellis: 1 (scalar), 4, 8, 16, 32, 64 (the default), 128 or 256; more take longer and lose less."""
    bit_price: Float = None
    """squared steps that a bit must save; left out: what is best at high rates."""
    importance_windows: Int = None
    """of each calibration text, to find from gradients how much each output matters; 32 by default. This and the next
    two also with --importance fisher."""
    importance_floor: Float = None
    """the least importance of an output, in units of its layer's mean; 0.02 by default."""
    importance_shrinkage: Float = None
    """how far importance is drawn towards its layer's mean, from 0 to 1; 0.1 by default, and at least 0.5 for
    the rows of embedding and head, as few windows show few of the tokens."""


@dataclass(frozen=True)
class Budget:
    """Of compress, with --bits or --megabytes and a --quantizer: how a plan of fixed rates shares the budget out."""

    allocation: Annotated[Literal["gradient", "trace", "error", "uniform"] | None,
                          arg(metavar="{gradient,trace,error,uniform}", help_behavior_hint="")] = None
    """what layers are weighed by: gradient (the default), by the Fisher information of their outputs and the error on
    their inputs; trace, by that of their weights and the plain error; error, relative error, all alike; uniform
    chooses one for all layers."""
    ranks: Ints = None
    """to choose from, by default 0 and powers of two from 8 to a quarter of each layer's smaller side, five at most; 0
    alone shares out the bits of Q."""


@dataclass(frozen=True)
class Workers:
    """Of compress and eval.  Results do not depend on them, but on the threads of a process: with ``processes=0`` on
    several cores of a CPU sums are added in another order."""

    processes: Int = None
    """local processes, each on one core; 0 works in this one, on all devices that JAX finds. Left out: as many as
    there are cores and as memory allows, at most 8; 0 where a GPU or TPU build of JAX is installed."""
    coordinator: Str = None
    """HOST:PORT of process 0: this is one process of a run on several hosts, started on each with --processes and
    --process-id; auto where TPU, SLURM or Open MPI tell all three. All must see the directories in the arguments."""
    process_id: Int = None
    """number of this process, from 0."""


@dataclass(frozen=True)
class Data:
    """Of finetune."""

    text: Str = None
    """enwiki or python (built in; the part that no run is evaluated on), a text file, a .jsonl file, a directory, or
    several joined by +; with --goal labels a file of JSON lines {"text": …, "label": …}."""
    windows: Int = None
    """of each text, those for validation included; with --goal labels all lines are taken."""
    window: Int = None
    """tokens a window."""
    aside: Int = None
    """windows of all texts, the last, that are not trained on: the parameters of least loss on them are kept."""


@dataclass(frozen=True)
class Optimizer:
    """Of finetune."""

    epochs: Int = None
    """passes over the text."""
    batch: Int = None
    """windows a step."""
    accumulate: Int = None
    """parts of a batch, one after the other, to save memory."""
    sign_rate: Float = None
    """of AdamW for signs, scales and gains."""
    factor_rate: Float = None
    """of AdamW for factors and a classifier."""
    weight_decay: Float = None
    """of factors and a classifier."""
    clip: Float = None
    """largest norm of a gradient."""
    schedule: Annotated[Literal["linear", "cosine", "constant"] | None,
                        arg(metavar="{linear,cosine,constant}", help_behavior_hint="")] = None
    """of the rates, after the warm-up."""
    warmup: Float = None
    """share of the steps."""
    validate: Int = None
    """steps between validations, each of which is a point to go on from."""
    seed: Int = None
    """of the order of the windows."""
