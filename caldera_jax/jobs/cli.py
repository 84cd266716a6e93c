"""Compress language models: weight matrices as Q + L R, low rank and low precision (CALDERA)."""

import dataclasses
import errno
import hashlib
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from tqdm import tqdm

from caldera_jax.allocate import UNITS
from caldera_jax.hessian import MASSIVE
from caldera_jax.jobs import artifact, evaluate, explain, export, generate, page, spread
from caldera_jax.jobs.compress import Need, memory_need
from caldera_jax.jobs.compress import compress as run_compress
from caldera_jax.jobs.finetune import finetune as run_finetune
from caldera_jax.jobs.options import (
    Algorithm,
    Budget,
    Data,
    Float,
    Int,
    Ints,
    Level,
    Optimizer,
    Switch,
    Tables,
    Texts,
    Workers,
)
from caldera_jax.jobs.presets import PRESETS, TRAININGS
from caldera_jax.jobs.report import config_hash
from caldera_jax.jobs.settings import recorded, weights
from caldera_jax.levels import LevelConfig
from caldera_jax.models import convert, data, files, tokenizer

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Directory = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


def compress(model: Model, out: Path, preset: Literal["smoke", "default", "paper"] = "default", bits: Float = None,
             megabytes: Float = None, level: Float = None, rank: Int = None, q_bits: Int = None,
             factor_bits: Ints = None, blocks: Int = None, seed: Int = None, one_level: Level = Level(),
             tables: Tables = Tables(), budget: Budget = Budget(), texts: Texts = Texts(),
             algorithm: Algorithm = Algorithm(), workers: Workers = Workers()) -> None:
    """Compress a model: calibrate, compress every linear layer, evaluate before and after, write OUT/report.json.

    Killed and started again with the same arguments, it goes on where it was.

    Args:
        model: smollm2-135m (built in), a directory with config.json, *.safetensors and tokenizer.json, a .gguf file,
            or a hub id org/name.
        out: directory of the compressed model; must be new, or of the same run.
        preset: smoke (two blocks, rank 16, a minute), default (rank 64, 15 outer and 10 inner iterations: minutes),
            paper (the authors' settings: hours). All that follows overrides it.
        bits: budget: bits a weight that the compressed layers may store, everything counted. Each weight gets a rate of
            its own, all at one level that meets the budget. With --quantizer rates are fixed instead, and --rank,
            --q-bits and --factor-bits of every layer are chosen (with --preset paper add --downdate False).
        megabytes: the same budget in 10^6 bytes; of free rate it is of the whole model, unless --counted, --tables
            dense or fewer blocks (as of --preset smoke) say otherwise.
        level: the level itself, instead of a budget: the loss in nats goes with its square.
        rank: k of L R in every layer; 0 for Q alone, which is what --bits, --megabytes and --level take by themselves.
        q_bits: bits of Q: 2, 3 or 4 on the lattice, 1 to 4 on the trellis, more on other grids; 0 for L R alone.
        factor_bits: bits of L and R (one number for both, or two): 2, 3, 4 lattice, 8 scalar, 16 float16.
        blocks: compress only the first so many blocks.
        seed: random seed: of the rotations and of whatever else is random.
        one_level: free rates.
        tables: embedding and head.
        budget: fixed rates.
        texts: what the model is calibrated and evaluated on.
        algorithm: how a layer is compressed at a fixed rate (damping: at any).
        workers: who does the work.
    """
    if factor_bits is not None and len(factor_bits) not in (1, 2):
        raise ValueError(f"factor_bits takes one number, or two for L and R; got {len(factor_bits)}")
    sizes = {"--bits": bits, "--megabytes": megabytes, "--level": level}
    if len(given := [name for name, value in sizes.items() if value is not None]) > 1:
        raise ValueError(f"{' and '.join(given)} each say how small the model becomes: give one of them")
    if megabytes is not None and not 0 < megabytes < math.inf:
        raise ValueError(f"a budget of {megabytes} MB cannot be met: give a positive number")
    free = bool(given) and algorithm.quantizer is None
    of_fixed = {"q_bits": q_bits, "factor_bits": factor_bits, **vars(budget), **vars(algorithm)}
    of_fixed.pop("damping")
    of_layers = dict(vars(algorithm))
    if weighed := of_layers.pop("importance") == "fisher":
        of_fixed.pop("importance")  # RunConfig says why not
    of_one_level = {name: value for name, value in vars(one_level).items() if not (weighed and "importance" in name)}
    if free and (told := _flags(of_fixed)):
        raise ValueError(f"{told}: of fixed rates, and with {given[0]} each weight has a rate of its own: leave it "
                         "out, or add --quantizer e8p for fixed rates")
    if not free and (told := _flags(of_one_level | {"level": level})):
        raise ValueError(f"{told}: of one level for all weights: give --bits, --megabytes or --level, and no "
                         "--quantizer" + ", or --importance fisher" * ("importance" in told))
    if not given and (told := _flags(vars(budget))):
        raise ValueError(f"{told}: shares out a budget: give --bits or --megabytes, or leave it out")
    if given and not free and (told := _flags({"rank": rank, "q_bits": q_bits, "factor_bits": factor_bits})):
        raise ValueError(f"{told}: a budget of fixed rates chooses it: leave it out, or the budget")
    if algorithm.draft is not None and not given and 0 in (rank, q_bits):
        raise ValueError("--draft: the grid of Q in the rounds of Q and L R, and one of the two is off: leave it out")
    factors = factor_bits[0] if factor_bits is not None and len(factor_bits) == 1 else factor_bits
    base, tokens = PRESETS[preset], lambda kind: {name: getattr(texts, f"{kind}_{name}")
                                                  for name in ("text", "windows", "window")}
    of_level = override(LevelConfig(), states=one_level.states, bit_price=one_level.bit_price, rank=rank,
                        damping=algorithm.damping) if free else None
    estimate = {name: getattr(one_level, f"importance_{name}") for name in ("windows", "floor", "shrinkage")}
    config = override(
        base, model=model, bos=texts.bos, token_cap=texts.token_cap, activations=texts.activations, blocks=blocks,
        seed=seed, hessians=texts.hessians,
        caldera=override(base.caldera, rank=None if free else rank, q_bits=q_bits, factor_bits=factors,
                         **of_layers),
        bits=bits if megabytes is None else 1.0,  # until weights are counted
        **vars(budget), level=of_level, c=level, outputs="fisher" if weighed else None,
        importance=override(base.importance, **estimate),
        calibration=override(base.calibration, **tokens("calibration")),
        evaluation=override(base.evaluation, **tokens("evaluation")))
    whole = free and config.blocks is None and tables.tables != "dense"
    config = override(config, tables=tables.tables or ("level" if whole else None),
                      counted=tables.counted or ("model" if whole and megabytes is not None else None))
    windows = lambda of: (of.windows * len(data.named(of.text)), of.window)
    calibrated = windows(config.calibration) if config.hessians is None else (0, 1)
    if start(workers, lambda: memory_need(convert.load(model).config, calibrated, windows(config.evaluation),
                                          tables=config.tables == "level")):
        return
    if megabytes is not None:
        config = dataclasses.replace(config, bits=8e6 * megabytes / weights(config, convert.load(model).config))
    report = run_compress(config, out, texts.moments)
    if spread.rank() == 0:
        print(f"{table(report)}\n\nwritten: {out / 'report.json'}")


def _flags(options: dict[str, Any]) -> str:
    """Those that were given, as they are written."""
    return ", ".join(f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None)


def start(workers: Workers, need: Callable[[], Need]) -> bool:
    """Whether processes started here have done the work; if not, this one does it, or its part of it.

    ``need`` reads the model, and fails or fetches here, once, where the processes would do so each.
    """
    processes = workers.processes
    if processes is not None and processes < 0:
        raise ValueError(f"--processes must not be negative, got {processes}")
    if workers.process_id is not None and workers.coordinator is None:
        raise ValueError("--process-id is for runs on several hosts: give --coordinator HOST:PORT, too")
    if workers.coordinator is None and processes != 0 and not (processes is None and spread.accelerated()):
        (each, together), available = need(), spread.available_memory()
        if (fit := (available - together) // each) < 1 and processes is None:
            print(f"caldera: about {(each + together) / 1e9:.1f} GB of memory are needed, {together / 1e9:.1f} of them "
                  f"for the streams of text, and {available / 1e9:.1f} are available: the system may end this run; "
                  "fewer or shorter windows need less", file=sys.stderr)
        spread.launch(sys.argv[1:], processes or max(1, min(len(spread.cores()), fit, 8)))
        return True
    keep_programs()
    if workers.coordinator is not None:
        spread.connect(workers.coordinator, processes, workers.process_id)
    return False


def keep_programs() -> None:
    """Keep what JAX compiles, for later runs on this kind of machine, unless JAX was told where to keep it."""
    if jax.config.jax_compilation_cache_dir is None:
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.is_file() else [platform.processor()]
        kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        digest = hashlib.sha256("".join(kind or lines[:1]).encode()).hexdigest()
        jax.config.update("jax_compilation_cache_dir", str(data.cache_directory() / "xla" / digest[:12]))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def override(base: Any, **changes: Any) -> Any:
    """The dataclass with every change that is not None."""
    return dataclasses.replace(base, **{name: value for name, value in changes.items() if value is not None})


def table(r: dict[str, Any]) -> str:
    """The report of a run for people."""
    lines = [f"{r['model']}: {len(r['layers'])} linear layers, {r['compressed_weights'] / 1e6:.1f} million weights",
             f"  perplexity        base {r['base_perplexity']:.3f}   compressed {r['compressed_perplexity']:.3f}   "
             f"({r['evaluated_tokens']} tokens{', behind BOS' if r['config'].get('bos') else ''})",
             f"  bits per weight   {r['bits_per_weight']:.4f}   (compressed linear layers, everything stored)",
             f"  size              layers {r['stored_bytes'] / 1e6:.1f} MB; {table_words(r)}in memory "
             f"{r['model_bytes'] / 1e6:.1f} MB; on disk {r['disk_bytes'] / 1e6:.1f} MB",
             *(budget_lines(r) if "allocation" in r else level_lines(r) if "level" in r else []),
             f"  layer error       mean {r['mean_layer_error']:.4f}   max {r['max_layer_error']:.4f}",
             *massive_lines(r),
             *few_lines(r),
             "  stage                 seconds  of it compiling  peak memory"]
    lines += [f"    {name:20s} {stage['seconds']:8.1f} {stage['compile_seconds']:16.1f} "
              f"{stage['peak_memory_bytes'] / 1e9:9.2f} GB" for name, stage in r["stages"].items()]
    return "\n".join(lines)


def table_words(r: dict[str, Any]) -> str:
    """What became of embedding and head, and bits a weight of the whole model with them."""
    rows, whole = r.get("tables", []), r.get("model_bits_per_weight")
    tables = ", ".join(f"{row['path']} {row['bits'] / 8e6:.1f} MB at {row['bits_per_weight']:.4f} bits" for row in rows)
    model = f"model {whole:.4f} bits a weight; " if whole else ""  # the first reports had none
    return f"{tables or 'embedding dense'}; {model}"


def massive_lines(r: dict[str, Any]) -> list[str]:
    """The inputs in which one token outweighs all others."""
    cap = r["config"].get("token_cap", 0.0)
    found = {row["path"]: row["peak"] for row in r["layers"] if row.get("peak", 0) > MASSIVE}
    largest = sorted(found, key=found.__getitem__, reverse=True)
    more = f" ({len(found)} layers have such tokens)" if len(found) > 1 else ""
    return [f"  massive token     {path}: {found[path]:.3g} times the median squared norm, counted "
            f"{f'as {cap:g} times' if cap else 'whole'}{more}" for path in largest[:1]]


def few_lines(r: dict[str, Any]) -> list[str]:
    """The expert that the calibration has asked least, if H of its inputs cannot have full rank."""
    found = [row for row in r["layers"] if row.get("tokens", math.inf) < row["shape"][1]]
    least = min(found, key=lambda row: row["tokens"] / row["shape"][1], default=None)
    if least is None:
        return []
    experts = len({(row["path"].split(".")[1], row["path"].split("_")[1]) for row in found})
    few = f"{least['tokens']} tokens for {least['shape'][1]} inputs"
    return [f"  few tokens        {least['path']}: {few} ({experts} expert{'s have' if experts > 1 else ' has'} "
            "fewer than inputs): give more --calibration-windows"]


def level_lines(r: dict[str, Any]) -> list[str]:
    """The level, and what it was to cost and has cost."""
    budget = f", for a budget of {r['budget_bits_per_weight']:.4f} bits a weight" if r["budget_bits_per_weight"] else ""
    divergence = (f"predicted divergence {r['predicted_damage']:.4f}, measured {r['divergence']:.4f}; "
                  if "divergence" in r else "")  # not of a model that was trained since
    return [f"  level             {r['level']:.6g}{budget}",
            f"  nats a token      {divergence}log-perplexity lost {r['lost']:.4f}"]


def budget_lines(r: dict[str, Any]) -> list[str]:
    """What a plan was to keep to, and what it predicted and achieved."""
    budget, most = r["budget_bits_per_weight"], r["dearest_bits_per_weight"]
    more = [f"                    more than the dearest choice, {most:.4f} bits a weight, takes: some of it is left"]
    return [f"  budget            {budget:.4f} bits a weight, by {r['allocation']}: predicted loss "
            f"{r['predicted_loss']:.5f}, achieved {r['loss']:.5f} ({UNITS[r['allocation']]}, summed over the layers)",
            *(more if budget > most else [])]


def finetune(directory: Directory, out: Path,
             preset: Literal["smoke", "signs", "factors", "both", "rte", "winogrande"] = "signs",
             signs: Switch = None, ranks: Int = None,
             factor_dtype: Annotated[Literal["bfloat16", "float32"] | None,
                                     tyro.conf.arg(metavar="{bfloat16,float32}", help_behavior_hint="")] = None,
             goal: Annotated[Literal["distill", "text", "labels"] | None,
                             tyro.conf.arg(metavar="{distill,text,labels}", help_behavior_hint="")] = None,
             temperature: Float = None, reconstruct: Int = None, data: Data = Data(),
             optimizer: Optimizer = Optimizer()) -> None:
    """Train a compressed model: rotation signs as reals, the first ranks of L R as numbers; codes stay as they are.

    Args:
        directory: of a compressed model, as compress wrote it.
        out: directory for the trained one; must be new, or of the same run.
        preset: smoke (two steps); signs (the authors' first stage, the default) and factors (their second); both at
            once; rte and winogrande (their settings for classes of texts). All that follows overrides it.
        signs: train the signs of the rotations; of a model of one level, which has none, a scale of each output and the
            norms' gains.
        ranks: train so many first columns of L and rows of R; at one level, where there is no L R, a new one.
        factor_dtype: that trained factors are stored in.
        goal: distill, the dense model's soft targets; text, the next token; labels, the class of a text.
        temperature: of the soft targets.
        reconstruct: epochs of fitting block after block to the dense model, before all are trained together.
        data: what is trained on.
        optimizer: how.
    """
    base = TRAININGS[preset]
    train = override(base.train, signs=signs, ranks=ranks, factor_dtype=factor_dtype, goal=goal,
                     temperature=temperature, reconstruct=reconstruct, **vars(optimizer))
    tunes = train.ranks > 0 or train.goal == "labels"
    idle = {"--temperature": temperature is not None and train.goal != "distill",
            "--factor-dtype": factor_dtype is not None and not train.ranks,
            "--factor-rate": optimizer.factor_rate is not None and not tunes,
            "--weight-decay": bool(optimizer.weight_decay) and not tunes,
            "--sign-rate": optimizer.sign_rate is not None and not train.signs}
    if told := [name for name, is_idle in idle.items() if is_idle]:
        raise ValueError(f"{', '.join(told)}: of no effect with goal {train.goal}, {train.ranks} ranks and "
                         f"{'trained' if train.signs else 'frozen'} signs: leave it out, or train what it is for")
    tokens = override(base.text, text=data.text, windows=data.windows, window=data.window)
    config = override(base, source=str(directory), train=train, text=tokens, aside=data.aside)
    keep_programs()
    report = run_finetune(config, out)
    own = report["finetune"][-1]
    lost = own["perplexity_before"], own["perplexity"], report["base_perplexity"]
    right = f", {100 * own['accuracy']:.1f} % of the classes right" if "accuracy" in own else ""
    print(f"{directory}: {own['steps']} steps, {own['trained']} numbers trained{right}\n"
          f"  perplexity        base {lost[2]:.3f}   before {lost[0]:.3f}   after {lost[1]:.3f}\n"
          f"  bits per weight   before {own['bits_per_weight_before']:.4f}   after {report['bits_per_weight']:.4f}\n"
          f"  seconds           {own['seconds']['total']:.0f}, {own['seconds']['compile']:.0f} of them compiling\n\n"
          f"written: {out / 'report.json'}")


def generate_(model: Model, prompts: Annotated[tuple[str, ...], tyro.conf.Positional], tokens: int = 64,
              temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, held: generate.Held | None = None,
              cache: generate.Kept | None = None, compare: bool = False) -> None:
    """Continue prompts; then say how fast, and with how much memory. Compressed weights are never dense.

    One prompt is shown as its text comes, several when all are done. No chat template is put around them.

    Args:
        model: directory of a compressed model, or a dense model as `caldera compress` takes it.
        prompts: one or more, each in quotes; together they are one batch.
        tokens: at most so many are added to each; fewer where the text ends or the model's context is full.
        temperature: 0 takes the likeliest token; above, tokens are drawn, at 1 as the model says.
        top_p: draw from the fewest tokens that have this probability together.
        seed: of the draws.
        held: how compressed layers lie in memory: bytes, fastest, 8 bits a weight where a layer is one of integers (one
            level; E8P at 2 bits) and packed where not; packed, as the file has them; dense. Left out: bytes, if they
            take at most half of what is free.
        cache: type of keys and values: float32, or bfloat16, half as large and rounded to 8 bits. Left out: float32 on
            a CPU, elsewhere bfloat16.
        compare: do it again with all weights put together as dense matrices, in a process of its own.
    """
    keep_programs()
    sampling, unsaid = generate.Sampling(tokens, temperature, top_p, seed), iter(prompts)
    single = lambda _, text: print(next(unsaid, "") + text, end="", flush=True)
    packed = generate.run(model, prompts, sampling, held, cache, single if len(prompts) == 1 else lambda *_: None)
    print() if len(prompts) == 1 else print(*map("".join, zip(prompts, packed.texts, strict=True)), sep="\n\n")
    print(f"\nthis model  {figures(packed)}")
    if compare:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)  # for that process
        dense = generate.run_apart(model, prompts, sampling, kept=cache)
        pairs = [pair for rows in zip(packed.tokens, dense.tokens, strict=True) for pair in zip(*rows, strict=False)]
        print(f"dense       {figures(dense)}\nlayers take {dense.layer_bytes / packed.layer_bytes:.2f} times the "
              f"memory when dense, all weights {dense.weight_bytes / packed.weight_bytes:.2f} times; "
              f"{sum(a == b for a, b in pairs)} of {len(pairs)} tokens are the same")


def figures(r: generate.Result) -> str:
    """Speed and memory on one line."""
    rate = f"{r.token_rate:.1f} tokens/s" if math.isfinite(r.token_rate) else "too few tokens for a speed"
    return (f"{rate}, prompt {r.prompt_rate:.1f} tokens/s, and {r.compile_seconds:.1f} s "
            f"compiling; weights {r.weight_bytes / 1e6:.1f} MB, {r.layer_bytes / 1e6:.1f} of it layers "
            f"({r.bytewise} of {r.layers} in bytes); keys and values {r.cache_bytes / 1e6:.1f} MB; peak memory "
            f"{r.peak_bytes / 1e9:.2f} GB, {r.start_bytes / 1e9:.2f} at start")


def export_(directory: Directory, to: Literal["hf", "gguf"], out: Path,
            dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32",
            adapter: Path | None = None) -> None:
    """Write a compressed model as files that other programs read: W ≈ Q + L R put together again.

    Args:
        directory: of a compressed model, as compress wrote it.
        to: hf, a directory with config.json, safetensors and tokenizer that transformers loads as it is; gguf, one file
            of architecture Llama or Qwen2.
        out: the directory, or the file ending in .gguf, to write; must be new.
        dtype: float32 keeps logits and perplexity; bfloat16 (hf) and float16 (gguf) take half the space and round every
            weight once; q8_0 (gguf) takes 8.5 bits a weight, keeps the integers of one level as they are and rounds
            other weights.
        adapter: write L R here, in float32, as a LoRA of its own (PEFT's directory, or a GGUF file), and to OUT the
            model without them: the base that the adapter belongs to.
    """
    model = artifact.load(directory)
    found = export.export(model, to, out, dtype, adapter)
    print(f"written: {out}" + ("" if adapter is None else f" and {adapter}"))
    if found:
        path, worst = max(found.items(), key=lambda item: item[1].error)
        layers = [one for name, one in found.items() if "." in name]
        kept = sum(one.kept for one in layers) / sum(one.of for one in layers)
        print(f"{kept:.2%} of the layers' integers are the model's own, all else is rounded: {path} the most, by "
              f"{worst.error:.1e} of its norm")
    if "classifier" in model.params:
        print("the classifier is not in it: neither format has a place for it")
    if to == "gguf" and convert.windowed(model.config):
        convert.note(f"{out}: each token sees the last {model.config.sliding_window} only, which is in the file and "
                     "which other programs ignore in one of this architecture: longer texts differ")
    if not tokenizer.end_ids(model.tokenizer, model.special, model.ends):
        print("no token is known to end a text: programs that generate with it must be told one")


def evaluate_(directory: Directory, text: str | None = None, windows: int | None = None, window: int | None = None,
              context: int | None = None, stride: int | None = None, bos: Switch = None, base: bool = False,
              tasks: str | None = None, task_files: Path | None = None, limit: int | None = None,
              workers: Workers = Workers()) -> None:
    """Perplexity of a compressed model, from disk, on the text its run was evaluated on or on another one; or tasks by
    lm_eval, written to a DIRECTORY/tasks_….json for these tasks and settings.

    Args:
        directory: of a compressed model, as compress wrote it.
        text: enwiki or python (built in; the part that no run is calibrated on), a text file, a .jsonl file (as
            compress takes it), a directory, or several of these joined by +.
        windows: number of windows of text.
        window: tokens a window.
        context: tokens that a prediction may look back on, itself included; by default --window. With --tasks, the
            model's.
        stride: tokens from one context to the next; by default the context: no overlap, and the first token of each
            context is not scored. Below that every token but the text's first is scored once, with at least
            context - stride before it, where there are so many.
        bos: begin each window and context with the model's BOS, in place of its last token; every token of the text is
            then scored. By default as the run was evaluated.
        base: the base model, too: its perplexity, D_KL(base || compressed) a token and how often both find the same
            token likeliest; with --tasks, its answers.
        tasks: names or patterns of lm_eval's tasks, joined by commas, e.g. winogrande,piqa, in place of the perplexity;
            they fetch their data on first use. Needs lm_eval (extra eval); runs in one process.
        task_files: folder of further task files (.yaml).
        limit: the first so many documents of each task.
        workers: who does the work.
    """
    if tasks is not None:
        if any(given is not None for given in (text, windows, window, stride, bos)):
            raise ValueError("--text, --windows, --window, --stride and --bos are for perplexity: leave them out, or "
                             "--tasks")
        return run_tasks(directory, tasks, task_files, limit, context, base)
    if task_files is not None or limit is not None:
        raise ValueError("--task-files and --limit are for tasks: name them with --tasks")
    config = recorded(artifact.read_manifest(directory)["run"]["config"])
    ours, theirs = config.calibration, config.evaluation
    chosen = override(theirs, text=text, windows=windows, window=window)
    bos = config.bos if bos is None else bos
    context = chosen.window if context is None else context
    stride = context - bos if stride is None else stride
    count = chosen.windows * len(data.named(chosen.text)) * chosen.window
    evaluated = 1 + max(0, count - context) // max(1, stride), max(2, context)
    if start(workers, lambda: memory_need(artifact.load(directory).config, (0, 1), evaluated, 1 + base)):
        return
    model = artifact.load(directory)
    tokens = data.windows_beside(model, chosen, ours.text, "evaluation", bos)
    if context > model.config.context:
        raise ValueError(f"a context of {context} tokens exceeds the model's, {model.config.context}: shorten it")
    views, scored = evaluate.sliding_windows(tokens[:, int(bos):].reshape(-1), context, stride,
                                             int(tokens[0, 0]) if bos else None)
    lines = []
    if base:
        _, _, dense, model = explain.opened(directory)
        found = evaluate.compare(model.config, dense.params, model.params, views, title="compare")
        (before, _), (after, _) = (evaluate.mean(loss, scored) for loss in (found.base_loss, found.loss))
        (divergence, of_d), (agree, of_a) = (evaluate.mean(x, scored) for x in (found.divergence, found.agree))
        value = math.exp(after)
        lines = [f"  base perplexity {math.exp(before):.4f}; D_KL(base || compressed) {divergence:.5f} ± {of_d:.5f} "
                 f"nats a token; the likeliest token is the same for {100 * agree:.2f} ± {100 * of_a:.2f} %"]
    else:
        value = evaluate.perplexity(model.config, model.params, views, title="perplexity", scored=scored)
    if spread.rank() == 0:
        print(f"{directory}: perplexity {value:.4f} on {len(tokens)} windows of {chosen.window} tokens of "
              f"{chosen.text}{', BOS first' if bos else ''}: context {context}, stride {stride}, {scored.sum()} tokens "
              "scored")
        print(*lines, sep="\n", end="\n" if lines else "")


def run_tasks(directory: Path, tasks: str, task_files: Path | None, limit: int | None, context: int | None,
              base: bool) -> None:
    """lm_eval's tasks on the compressed model, and on its base; tables, and a record of these tasks and settings."""
    from caldera_jax.jobs import harness  # seconds, and an extra

    config = harness.TaskConfig(tuple(filter(None, tasks.split(","))), task_files and str(task_files), limit, context)
    keep_programs()
    models = {"compressed": artifact.load(directory)} | ({"base": artifact.base(directory)} if base else {})
    records, path = {}, directory / f"tasks_{config_hash(config)}.json"
    for name, model in models.items():
        records[name] = record = harness.run(config, model)
        files.write_json(path, records)  # the first is kept if the second fails
        print(f"{name}, context {record['context']}:\n{harness.table(record)}")
    print(f"written: {path}")


def inspect(directory: Directory, sizes: bool = False, theory: bool = False, report: Path | None = None,
            moments: Path | None = None) -> None:
    """Show the layers of a compressed model: shape, bits of Q, rank, bits of L and R, error, bits, damping, seconds; or
    where its megabytes are; or error and bits beside the theory's; or write a page that shows where the bits went and
    where the loss came from.

    Args:
        directory: of a compressed model, as compress wrote it.
        sizes: bytes on the disk of each kind of layer in all blocks, of embedding, head and all else; they add up.
        theory: compare every layer with what theory says of it. Errors are relative, against the undamped Hessian:
            error, measured; floor, the least that any unrounded L R of this rank reaches beside this Q; ldlq, predicted
            from the grid's rounding error; quip# and thm 4.1, the bounds of QuIP#'s and of CALDERA's theorem. Bits a
            weight: bits, stored; limit, the least (rate-distortion) at this error for Gaussian weights; own, the same
            for weights that are known to vary as these do along the Hessian's eigenvectors; gap, bits less limit.
            Reads the base model and calibrates again: about as long as the run's calibration, and seconds a layer.
        report: write an HTML page to this file: where the bits went, spectra, error by layer and direction, channels
            that L R took over, tokens whose loss rose most. Reads the base model and calibrates again, too; needs
            matplotlib (extra plots).
        moments: with --theory or --report, the directory given to `caldera compress --moments`: no calibration where it
            holds the run's Moments.
    """
    if moments is not None and not theory and report is None:
        raise ValueError("--moments is for --theory and --report: add --theory or --report, or leave --moments out")
    if report is not None:
        keep_programs()
        page.write(directory, report, moments)
        print(f"written: {report}")
        if not theory:
            return
    if sizes:
        found = artifact.sizes(directory)
        for part, size in (found | {"all files": sum(found.values())}).items():
            print(f"{part:18s} {size / 1e6:10.3f} MB {size / sum(found.values()):7.2%}")
        return
    r = explain.report_of(directory)
    if theory:
        return theory_table(directory, moments)
    print(f"{'layer':18s} {'m':>6s} {'n':>6s} {'Q':>5s} {'rank':>5s} {'L,R':>9s} {'error':>8s} {'bits':>7s} "
          f"{'damping':>8s} {'seconds':>8s}")
    for row in r["layers"] + r.get("tables", []):
        m, n = row["shape"]
        factors = ",".join(f"{bits:.3g}" for bits in row["factor_bits"]) if row["rank"] else "-"
        print(f"{row['path']:18s} {m:6d} {n:6d} {row['q_bits']:5.3g} {row['rank']:5d} {factors:>9s} "
              f"{row['error']:8.4f} {row['bits_per_weight']:7.4f} {row['damping']:8.3g} {row['seconds']:8.2f}")
    if "finetune" in r:
        print("error, damping and seconds are those of the compression, before the fine-tuning")
    print(table(r))


def theory_table(directory: Path, moments: Path | None) -> None:
    """A line a layer, each printed when it is found, and the mean gap."""
    keep_programs()
    titles, gaps, weights = ("error", "floor", "ldlq", "quip#", "thm 4.1", "limit", "own", "gap"), 0.0, 0
    tqdm.write(f"{'layer':18s} {'rank':>5s} {'bits':>7s} " + " ".join(f"{title:>8s}" for title in titles))
    for path, layer, w, h, row in explain.layers(directory, moments):
        found = explain.of_layer(layer, w, h, row["damping"])
        cells = " ".join(f"{'-' if math.isnan(x) else format(x, '.4f'):>8s}" for x in found)
        tqdm.write(f"{path:18s} {layer.rank:5d} {layer.stored_bits / w.size:7.4f} {cells}")
        gaps, weights = gaps + found.gap * w.size, weights + w.size
    print(f"mean gap {gaps / weights:.4f} bits a weight above the rate-distortion limit; for the columns see "
          "`caldera inspect --help`")


def fetch(names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("smollm2-135m", "enwiki")) -> None:
    """Fetch built-in models and texts into the cache, so that later runs need no network.

    Args:
        names: of built-ins.
    """
    for name in names:
        print(name, data.fetch_text(name) if name in data.TEXTS else data.fetch_model(name))


def main() -> None:
    """Entry point: bad input prints one line and exits with 2; nothing finished is lost."""
    try:
        commands = {"compress": compress, "finetune": finetune, "generate": generate_, "eval": evaluate_,
                    "export": export_, "inspect": inspect, "fetch": fetch}
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    except spread.Lost as error:
        spread.leave(spread.LOST if spread.WATCHED in os.environ else _say(str(error)))
    except (ValueError, RuntimeError) as error:
        spread.leave(_say(" ".join(str(error).split())))
    except OSError as error:
        full = " The disk is full: free some space and run the same command again; what is finished is kept."
        spread.leave(_say(f"{error}.{full if error.errno == errno.ENOSPC else ''}"))
    except KeyboardInterrupt:
        spread.leave(_say("interrupted; run the same command again to go on from what is finished"))


def _say(text: str) -> int:
    print(f"caldera: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
