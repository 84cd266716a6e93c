"""A compressed model as dense files for other programs: a Hugging Face directory, or a GGUF file.

W ≈ Uᵀ (Q + L R) V is put together layer by layer, so that memory holds one file's part of the dense weights.  Files are
written beside their place and renamed when they are whole and on the disk.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from caldera_jax import linear
from caldera_jax.models import convert, files, tokenizer, weights
from caldera_jax.models.convert import Model
from caldera_jax.models.llama import Params
from caldera_jax.models.weights import Block

DTYPES = {"hf": ("float32", "bfloat16"), "gguf": ("float32", "float16")}


def export(model: Model, to: str, out: str | Path, dtype: str = "float32") -> None:
    """Write a model, compressed or not, as dense files: a directory (``to`` "hf") or one file ("gguf").

    float32, the default, keeps what the model computes: its logits and its perplexity are those of the compressed model
    up to the rounding of the products.  bfloat16 and float16 take half the space and round every weight, by at most
    2⁻⁸ and 2⁻¹¹ of itself (float16 by 3e-8 where that is more), far less than the compression did.  Gemma scales
    its embedding by a root that is rounded to the embedding's type: exported in another, by one up to 2⁻⁸ off.

    Needs memory for twice the embedding, one layer, and a gigabyte of weights.  Raises ValueError where OUT exists, the
    format cannot hold the model or its tokenizer, or a weight is too large for the dtype, and OSError where the disk is
    full; nothing is left of OUT.
    """
    out = Path(out)
    if to not in DTYPES:
        raise ValueError(f"unknown format {to!r}: choose one of {', '.join(DTYPES)}")
    if dtype not in DTYPES[to]:
        raise ValueError(f"--to {to} is written in {' or '.join(DTYPES[to])}, got {dtype!r}")
    if to == "gguf" and out.suffix != ".gguf":
        raise ValueError(f"a GGUF file is known by its name: let --out end in .gguf, got {out}")
    params = dense(model.params, jnp.dtype(dtype))
    with aside(out) as place:
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
