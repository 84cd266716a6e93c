"""A compressed model as files for other programs: a Hugging Face directory, or a GGUF file.

W ≈ Uᵀ (Q + L R) V is put together layer by layer, so that memory holds one file's part of the dense weights; in Q8_0,
whose rows are integers and scales, the integers of a levelled W = diag(a) Z diag(b) are written as they are.  Files are
written beside their place and renamed when they are whole and on the disk.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from caldera_jax import linear
from caldera_jax.levels import Levelled
from caldera_jax.linear import CompressedLinear
from caldera_jax.models import convert, files, llama, tokenizer, weights
from caldera_jax.models.convert import Model
from caldera_jax.models.llama import LINEARS, LlamaConfig, Params
from caldera_jax.models.weights import Block

DTYPES = {"hf": ("float32", "bfloat16"), "gguf": ("float32", "float16", "q8_0")}
BLOCK = 32  # weights of a row that share a scale in Q8_0


class Written(NamedTuple):
    """Of a matrix in Q8_0: how many of its integers are those of the model, of how many, and ‖Ŵ − W‖ / ‖W‖."""

    kept: int
    of: int
    error: float


def export(model: Model, to: str, out: str | Path, dtype: str = "float32",
           adapter: str | Path | None = None) -> dict[str, Written]:
    """Write a model, compressed or not, for other programs: a directory (``to`` "hf") or one file ("gguf").

    float32, the default, keeps what the model computes: its logits and its perplexity are those of the compressed model
    up to the rounding of the products.  bfloat16 and float16 take half the space and round every weight, by at most
    2⁻⁸ and 2⁻¹¹ of itself (float16 by 3e-8 where that is more), far less than the compression did.  Gemma scales
    its embedding by a root that is rounded to the embedding's type: exported in another, by one up to 2⁻⁸ off.
    q8_0 takes 8.5 bits a weight, integers of 8 bits and a float16 scale for 32 of them (``quantized``); what became of
    each matrix is returned, of other types nothing.
    ``adapter``: L R go there, as a LoRA of scale 1 in float32, a directory as PEFT has it or a GGUF file, and OUT holds
    the model without them, its base.

    Needs memory for twice the embedding, one layer (q8_0: one block), and a gigabyte of weights.  Raises ValueError
    where OUT exists, the format cannot hold the model or its tokenizer, or a weight is too large for the dtype, and
    OSError where the disk is full; nothing is left of OUT.
    """
    out = Path(out)
    if to not in DTYPES:
        raise ValueError(f"unknown format {to!r}: choose one of {', '.join(DTYPES)}")
    if dtype not in DTYPES[to]:
        raise ValueError(f"--to {to} is written in {' or '.join(DTYPES[to])}, got {dtype!r}")
    for name, path in (("--out", out), ("--adapter", adapter)):
        if to == "gguf" and path is not None and Path(path).suffix != ".gguf":
            raise ValueError(f"a GGUF file is known by its name: let {name} end in .gguf, got {path}")
    low_rank = None
    if adapter is not None:
        model, low_rank = _apart(model, dtype)
    params, found = quantized(model) if dtype == "q8_0" else (dense(model.params, jnp.dtype(dtype)), {})
    with aside(out) as place, nullcontext() if adapter is None else aside(Path(adapter)) as beside:
        if low_rank is not None:
            (convert.save_gguf_lora if to == "gguf" else convert.save_peft)(beside, model.config, low_rank, str(out))
        if to == "gguf":
            convert.save_gguf(place, model._replace(params=params))
        else:
            ends = tokenizer.end_ids(model.tokenizer, model.special, model.ends)
            ids = {"bos_token_id": model.tokenizer.token_to_id(model.special.get("bos_token", "")),
                   "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}  # None: not Llama 2's
            special = {role: text for role, text in model.special.items()
                       if role == "chat_template" or model.tokenizer.token_to_id(text) is not None}
            convert.save_hf(place, model.config, params, more={**ids, "dtype": dtype, "torch_dtype": dtype})
            tokenizer.to_directory(place, model.tokenizer, special, model.config.context)
            files.write_json(place / "generation_config.json", ids)
    return found


def _apart(model: Model, dtype: str) -> tuple[Model, dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]]:
    """The model without its L R, and these by block and layer, as they stand beside what ``dtype`` makes of it."""
    low_rank, blocks = {}, []

    def alone(block, name):
        return linear.q_alone(weight) if isinstance(weight := block[name], CompressedLinear) else weight

    for i, block in enumerate(model.params["blocks"]):
        parts = dict(block)
        base = {name: alone(parts, name) for name in parts}
        sides = _folded(model.config, base)[2] if dtype == "q8_0" and _foldable(base) else {}
        for name, weight in parts.items():
            if isinstance(weight, CompressedLinear) and weight.rank:
                outer, inner = sides.get(name, (1.0, 1.0))
                left, right = (np.asarray(part, np.float64) for part in linear.low_rank(weight))
                low_rank[i, name] = np.float32(np.reshape(outer, (-1, 1)) * left), np.float32(right / inner)
        blocks.append(Block({name: partial(alone, block, name) for name in block}))
    if not low_rank:
        raise ValueError("this model has no L R: leave --adapter out")
    return model._replace(params=model.params | {"blocks": blocks}), low_rank


def quantized(model: Model) -> tuple[Params, dict[str, Written]]:
    """The params with every matrix as rows of Q8_0, and what became of each once it has been read.

    Of W = diag(a) Z diag(b) the integers Z are kept and a becomes the scales.  b, which layers of one input share, goes
    into the norm before them (q, k, v; gate, up), into the rows of up (down) or of v (o, but where query heads share
    those of v); powers of two between them keep the scales in the range of float16.  Integers beyond 8 bits share a
    coarser scale with their block and are rounded to it, as is what is not of one level.
    Raises ValueError for a matrix whose inputs are no multiple of 32.
    """
    config, params, found = model.config, model.params, {}
    for name, (_, n) in (llama.table_shapes(config) | llama.shapes(config)).items():
        if n % BLOCK:
            raise ValueError(f"Q8_0 has a scale for {BLOCK} inputs, and {name} has {n}: choose another --dtype")

    def write(path, values, unit, exact=False):
        packed, of_path = pack(path, values, unit)
        found[path] = of_path if exact else of_path._replace(kept=0)
        return packed

    def rounded(path, weight):
        weight = np.asarray(linear.dense(weight), np.float32)
        unit = np.abs(weight.reshape(len(weight), -1, BLOCK)).max(-1) / 127
        return write(path, weight / np.repeat(np.where(unit > 0, unit, 1), BLOCK, axis=1), unit)

    @lru_cache(1)  # of the blocks, whose tensors are read one after the other
    def block(index):
        parts, scales = dict(params["blocks"][index]), {}
        if _foldable(parts):
            parts, scales, _ = _folded(config, parts)
        return {name: np.asarray(part, np.float32) if np.ndim(part) == 1 else
                write(f"blocks.{index}.{name}", np.asarray(part), scales[name][:, None], True) if name in scales else
                rounded(f"blocks.{index}.{name}", part) for name, part in parts.items()}

    blocks = [Block({name: partial(lambda i, name: block(i)[name], i, name) for name in of})
              for i, of in enumerate(params["blocks"])]
    tables = {name: rounded(name, params[name]) for name in llama.table_shapes(config)}
    return tables | {"norm": np.asarray(params["norm"], np.float32), "blocks": blocks}, found


def _foldable(block: Params) -> bool:
    """Whether all layers are diag(a) Z diag(b), those of one input with one b."""
    layers = [block.get(name) for name in LINEARS]  # experts have other names
    if not all(isinstance(w, CompressedLinear) and isinstance(w.q, Levelled) and not w.rank and not w.right_side
               for w in layers):
        return False
    shared = ("q", "k"), ("q", "v"), ("gate", "up")
    return all(np.array_equal(*(block[name].q.column for name in pair)) for pair in shared)


def _folded(config: LlamaConfig, block: Params) -> tuple[Params, dict[str, np.ndarray], dict[str, tuple]]:
    """The block with integers in place of the layers that keep theirs, the scales of their rows, and by what the
    outputs of each layer grew, and its inputs: W became diag(outer) W diag(1 / inner)."""
    parts, outer, inner, a, b, found = {name: block[name].q for name in LINEARS}, {}, {}, {}, {}, dict(block)
    for name, part in parts.items():
        a[name], b[name] = (np.asarray(side, np.float64) for side in part.scales(np.float32))
        a[name] = np.where(np.any(part.integers, axis=1), a[name], 0)  # that of a row of zeros may be of any size
        a[name] = a[name] * np.asarray(block[name].left_side[0] if block[name].left_side else 1, np.float64)
    middle = lambda scale: 2.0 ** np.round(np.log2(np.abs(scale[scale != 0])).mean()) if scale.any() else 1.0
    for norm, first, layers in (("attn_norm", "q", "qkv"), ("ffn_norm", "gate", ("gate", "up"))):
        size = middle(a[first])
        found[norm] = np.asarray(block[norm], np.float64) * b[first] * size
        for name in layers:
            a[name], inner[name] = a[name] / size, b[first] * size
    grouped = config.heads != config.kv_heads
    for before, name in (("up", "down"), *(() if grouped else (("v", "o"),))):
        size = middle(np.sqrt(np.abs(a[name])))  # half of it
        outer[before] = inner[name] = b[name] * size
        a[before], a[name] = a[before] * outer[before], a[name] / size
        if bias := {f"{before}_bias"} & block.keys():
            found |= {part: np.asarray(block[part], np.float64) * outer[before] for part in bias}
    sides = {name: (outer.get(name, 1.0), inner.get(name, 1.0)) for name in LINEARS}
    kept = [name for name in LINEARS if not (name == "o" and grouped)]
    return found | {name: parts[name].integers for name in kept}, {name: a[name] for name in kept}, sides


def pack(path: str, values: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, Written]:
    """Rows of Q8_0 of values [m, n] in units [m, n / 32 or 1], as bytes, and what is lost of them.

    ValueError where a scale leaves the range of float16."""
    values = values.reshape(len(values), -1, BLOCK)
    top = np.abs(values).max(-1)
    coarse = np.exp2(np.maximum(np.ceil(np.log2(np.maximum(top, 1) / 127)), 0))
    scale = np.broadcast_to(unit, top.shape) * coarse
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"{path}: a scale of {np.abs(scale).max():.3g} is too large for the float16 of Q8_0 (largest: "
                         "65504): choose --dtype float32")
    codes = np.rint(values / coarse[..., None]).astype(np.int8)
    wanted, got = values * np.float64(unit)[..., None], codes * np.float64(half)[..., None]
    size = np.linalg.norm(wanted)
    packed = np.concatenate([half[..., None].view(np.uint8), codes.view(np.uint8)], axis=-1)
    error = float(np.linalg.norm(got - wanted) / size) if size else 0.0
    return packed.reshape(len(values), -1), Written(BLOCK * int(np.sum(coarse == 1)), values.size, error)


def dense(params: Params, dtype) -> Params:
    """The params with every weight dense and in ``dtype``; those of the blocks are made when they are asked for.

    Float16 has vectors (gains and biases, of which a model has few) in float32, as GGUF files do.  Raises ValueError,
    naming the weight, where one is too large for ``dtype``.
    """
    rest = {name: _cast(name, linear.dense(value), dtype) for name, value in weights.rest(params).items()}
    blocks = [Block({name: partial(_weight, block, name, f"blocks.{i}.{name}", dtype) for name in block})
              for i, block in enumerate(params["blocks"])]
    return rest | {"blocks": blocks}


def _weight(block, name, path, dtype):
    return _cast(path, linear.dense(block[name]), dtype)


def _cast(path, weight, dtype):
    weight = np.asarray(weight)
    dtype = np.dtype(np.float32) if weight.ndim == 1 and dtype == np.float16 else dtype
    with np.errstate(over="ignore"):
        cast = weight.astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        raise ValueError(f"{path}: holds NaN or infinite values, or ones too large for {dtype} (largest: "
                         f"{np.abs(weight).max():.3g}, {dtype} ends at {jnp.finfo(dtype).max:.3g}): choose another "
                         "--dtype, float32 has the widest range")
    return cast


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """Where to write what shall be ``out``, which is there only when all of it is; ValueError where it is already."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists: choose another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        place = Path(folder) / out.name
        try:
            yield place
        except OSError as error:
            raise OSError(f"{out}: not written, and nothing of it is left ({error}); if the disk is full, free some "
                          "space and run the same command again") from error
        for path in place.rglob("*") if place.is_dir() else [place]:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())  # or a power cut could leave the name without the content
        os.rename(place, out)
