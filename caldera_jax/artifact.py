"""A compressed model on disk: one safetensors file a block, the rest of the model, the tokenizer, and a manifest.

``manifest.json`` is written last, so a directory with one is complete.  It holds the format version, the model's
configuration, the configuration of the run, shape and grids of every compressed layer, and the SHA-256 of every file.
Names in a block's file: ``q.left_t.codes`` is field ``left_t.codes`` of the CompressedLinear of layer q; layers that
stayed dense, and gains, have their own name alone.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

from caldera_jax import codebooks, files, report
from caldera_jax.codebooks import Codebook
from caldera_jax.linear import CompressedLinear, Packed
from caldera_jax.models.convert import Model
from caldera_jax.models.llama import Llama3RopeScaling, LlamaConfig, Params
from caldera_jax.models.weights import Block

FORMAT = 1
MANIFEST = "manifest.json"
REST = "rest.safetensors"  # embedding, last norm and head
TOKENIZER = "tokenizer.json"
GRIDS = {kind.__name__: kind for kind in (codebooks.E8P, codebooks.ResidualE8P, codebooks.Uniform, codebooks.Dithered,
                                          codebooks.NormalFloat, codebooks.Half)}


def block_file(index: int) -> str:
    """Name of a block's file."""
    return f"block_{index:03d}.safetensors"


def layer_arrays(layer: CompressedLinear) -> dict[str, np.ndarray]:
    """The arrays of one layer by name."""
    arrays = {}
    for name in ("q", "left_t", "right"):
        if (part := getattr(layer, name)) is not None:
            arrays |= {f"{name}.codes": part.codes, f"{name}.scale": part.scale}
    for name in ("left_side", "right_side"):
        side = getattr(layer, name)
        arrays |= {f"{name}.{i}": matrix for i, matrix in enumerate(side)} if isinstance(side, tuple) else {name: side}
    return {name: np.asarray(value) for name, value in arrays.items()}


def layer_from(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> CompressedLinear:
    """The layer that ``layer_arrays`` and ``layer_meta`` describe."""
    parts = (Packed(arrays[f"{name}.codes"], arrays[f"{name}.scale"]) if f"{name}.codes" in arrays else None
             for name in ("q", "left_t", "right"))
    sides = (arrays[name] if name in arrays else tuple(arrays[key] for key in sorted(arrays) if key.startswith(name))
             for name in ("left_side", "right_side"))
    return CompressedLinear(*parts, *sides, tuple(meta["shape"]), tuple(_grid(g) for g in meta["grids"]))


def layer_meta(layer: CompressedLinear) -> dict[str, Any]:
    """Shape and grids: what the arrays do not say.  Raises ValueError for a grid that this format cannot name."""
    for grid in layer.grids:
        if grid is not None and GRIDS.get(type(grid).__name__) is not type(grid):
            raise ValueError(f"{type(grid).__name__} is not one of the package's codebooks ({', '.join(GRIDS)}), and a "
                             "model on disk can only name those: keep the layer in memory, or add the class to GRIDS")
    return {"shape": list(layer.shape), "grids": [report.plain(grid) for grid in layer.grids]}


def _grid(meta: dict[str, Any] | None) -> Codebook | None:
    if meta is None:
        return None
    fields = dict(meta)
    return GRIDS[fields.pop("kind")](**fields)


def block_arrays(block: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All arrays of a block, dense or compressed, by name."""
    arrays = {}
    for name, value in block.items():
        if isinstance(value, CompressedLinear):
            arrays |= {f"{name}.{field}": array for field, array in layer_arrays(value).items()}
        else:
            arrays[name] = np.asarray(value)
    return arrays


def finish(directory: Path, model: Model, layers: dict[str, dict[str, Any]], run: Any) -> None:
    """Write what is not a block's, then the manifest.  ``layers``: path -> ``layer_meta`` of the compressed layers."""
    files.write_arrays(directory / REST, {name: np.asarray(v) for name, v in model.params.items() if name != "blocks"})
    files.write(directory / TOKENIZER, model.tokenizer.to_str().encode())
    names = [block_file(i) for i in range(model.config.layers)] + [REST, TOKENIZER]
    manifest = {"format": FORMAT, "model": model.name, "model_config": dataclasses.asdict(model.config),
                "run": run, "layers": layers, "files": {name: files.sha256(directory / name) for name in names}}
    files.write_json(directory / MANIFEST, manifest)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a complete directory; ValueError where it is unfinished, foreign or of another version."""
    path = directory / MANIFEST
    if not path.is_file():
        unfinished = "an unfinished run (start `caldera compress` again with the same arguments to finish it)"
        what = unfinished if (directory / "unfinished").is_dir() else "no compressed model"
        raise ValueError(f"{directory}: {what}: there is no {MANIFEST}")
    manifest = files.read_json(path)
    needed = {"format", "run", "model", "model_config", "layers", "files"}
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError(f"{path}: not a manifest of this program")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: format {manifest['format']}, and this version reads format {FORMAT}: use the "
                         "caldera-jax that wrote it, or compress the model again")
    if missing := needed - manifest.keys():
        raise ValueError(f"{path}: not a manifest of this program: it lacks {', '.join(sorted(missing))}")
    return manifest


def load(directory: str | Path) -> Model:
    """A compressed model, every file checked against its SHA-256; ValueError naming what is missing or damaged.

    Its blocks stay on the disk, as those of ``convert.load``.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, digest in manifest["files"].items():
        if not (directory / name).is_file() or files.sha256(directory / name) != digest:
            raise ValueError(f"{directory / name}: missing, or its SHA-256 differs from the manifest's: the file was "
                             "damaged or replaced; restore it or compress the model again")
    raw = dict(manifest["model_config"])
    if raw["rope_scaling"] is not None:
        raw["rope_scaling"] = Llama3RopeScaling(**raw["rope_scaling"])
    config = LlamaConfig(**raw)
    params = files.read_arrays(directory / REST)
    params["blocks"] = [_block(directory / block_file(i), manifest["layers"], i) for i in range(config.layers)]
    return Model(config, params, Tokenizer.from_file(str(directory / TOKENIZER)), manifest["model"])


def _block(path: Path, layers: dict[str, Any], index: int) -> Block:
    """The block in this file, each weight read when it is asked for."""
    with safe_open(path, "np") as file:
        names = dict.fromkeys(key.split(".", 1)[0] for key in file.keys())  # noqa: SIM118
    return Block({name: partial(_weight, path, name, layers.get(f"blocks.{index}.{name}")) for name in names})


def _weight(path: Path, name: str, meta: dict[str, Any] | None) -> np.ndarray | CompressedLinear:
    """A dense array, or the layer that ``meta`` describes."""
    with safe_open(path, "np") as file:
        if meta is None:
            return file.get_tensor(name)
        arrays = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in file.keys()  # noqa: SIM118
                  if key.startswith(f"{name}.")}
    return jax.tree.map(jax.numpy.asarray, layer_from(arrays, meta))


def model_bytes(params: Params) -> int:
    """Bytes of every array of a model, compressed or dense."""
    parts = [{name: value for name, value in params.items() if name != "blocks"}, *params["blocks"]]
    return sum(leaf.nbytes for part in parts for leaf in jax.tree.leaves(dict(part)))
