"""Files of models <-> (LlamaConfig, params): Hugging Face directories, GGUF files, hub ids and the built-ins.

Directories hold any family of ``families``, GGUF files Llama, Mistral and Qwen2.  Arrays are NumPy arrays in the type
of the file (bfloat16 through ml_dtypes; quantized GGUF types become float32).
Embedding and head are each a ``weights.Table``, a block is a ``weights.Block``: they read what is asked for each time
it is, so that a model need not fit in memory. Nothing is guessed: a tensor that is missing, left over or of the
wrong shape, and any option of the model that ``llama`` does not compute, is a ValueError.
"""

import json
import math
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from caldera_jax.models import data, families, files, llama, tokenizer
from caldera_jax.models.configuration import config_from_hf, config_to_hf, number, size
from caldera_jax.models.llama import LinearRopeScaling, Llama3RopeScaling, LlamaConfig, Params
from caldera_jax.models.weights import Model, Table, Tensor, assemble, by_tensor

# What GGUF files of other architectures compute, too, and the values that change nothing.
_IDLE = {"expert_count": (0,), "use_parallel_residual": (False,), "attention.causal": (True,)}
_IDLE |= {name: (0, 1) for name in ("logit_scale", "embedding_scale", "residual_scale", "rope.scaling.attn_factor")}
_IDLE |= {name: (0,) for name in ("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias",
                                  "attn_logit_softcapping", "final_logit_softcapping")}
STEP = 1024  # rows of a table that are read at a time
_PART = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")  # the first of several

KINDS = {"float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),  # of matrices, by what their arrays hold
         "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
         "uint8": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0)}
ARRAYS = {kind: np.dtype(name) for name, (kind, _) in KINDS.items()}

GGUF = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
GGUF |= {"o": "blk.{}.attn_output.weight"}
GGUF |= {name: f"blk.{{}}.attn_{name}.weight" for name in "qkv"}
GGUF |= {f"{name}_bias": f"blk.{{}}.attn_{name}.bias" for name in "qkv"}
GGUF |= {name: f"blk.{{}}.ffn_{name}.weight" for name in ("gate", "up", "down")}
GGUF |= {name: f"blk.{{}}.{name}.weight" for name in ("attn_norm", "ffn_norm")}


def load(name_or_path: str | Path) -> Model:
    """A model by built-in name, GGUF file, Hugging Face directory or hub id (``org/name``); ValueError otherwise."""
    name = str(name_or_path)
    path = data.fetch_model(name) if name in data.MODELS else Path(name).expanduser()
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        path = _from_hub(name)
    if path.is_file() and path.suffix == ".gguf":
        reader = read_gguf(path)
        fields = tokenizer.contents(reader)
        special, ends = tokenizer.special_from_fields(fields), tokenizer.ends_from_fields(fields)
        model = Model(*from_gguf(reader), tokenizer.from_gguf(reader), name, special, ends)
        called = str(tokenizer.field(reader, "general.name", "")).lower()
        if model.config.sliding_window is None and "mistral" in called:
            note(f"{name}: the file names no sliding window, so each token sees all before it; the same model's "
                 "config.json may have one (Mistral 7B v0.1: 4096 tokens), and then the two differ")
    elif path.is_dir():
        model = Model(*from_hf(path), tokenizer.from_directory(path), name, tokenizer.special_from_directory(path))
        model = model._replace(ends=tokenizer.ends_from_directory(path, model.config.vocab))
    else:
        raise ValueError(
            f"unknown model {name!r}. Accepted: {', '.join(data.MODELS)} (built in), a .gguf file, a directory with "
            "config.json, *.safetensors and tokenizer.json, or a hub id org/name"
        )
    added = {token.content for token in model.tokenizer.get_added_tokens_decoder().values()}
    if beyond := {token: id for token, id in model.tokenizer.get_vocab().items()
                  if id >= model.config.vocab and token not in added}:  # a text with an added one is refused by itself
        token = min(beyond, key=beyond.__getitem__)
        raise ValueError(f"{name}: the tokenizer has {model.tokenizer.get_vocab_size()} tokens, the model only "
                         f"{model.config.vocab} embeddings, none for token {beyond[token]}, {token!r}: put the model's "
                         "own tokenizer there")
    if model.config.family == "llama" and windowed(model.config):
        note(f"{name}: each token sees the last {model.config.sliding_window} only (sliding_window), which other "
             "programs ignore in a GGUF file of this architecture")
    return model


@cache
def note(text: str) -> None:
    """Say on standard error, once, what a file says that others do in another way."""
    print(text, file=sys.stderr)


def windowed(config: LlamaConfig) -> bool:
    """Whether there are tokens that a later one does not see."""
    return config.sliding_window is not None and config.sliding_window < config.context


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{name!r} is neither built in nor a path here, and hub models need huggingface_hub: "
            "pip install 'caldera-jax[hub]', or download the model and pass its directory"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                                      ignore_patterns=["*/*", "consolidated*"]))  # the same weights in other forms
    except Exception as error:  # many kinds: offline, gated, unknown
        raise ValueError(
            f"{name!r} is no path here, and could not be fetched from the hub ({error}). "
            "Check the id, the network and your access to it, or download the model and pass its directory"
        ) from error


# ---- Hugging Face directories


def from_hf(directory: str | Path) -> tuple[LlamaConfig, Params]:
    """config.json and model.safetensors (where there is none, the files of its index) of a supported architecture."""
    directory = Path(directory)
    config = config_from_hf(_read_json(directory / "config.json"))
    tensors = _open_safetensors(directory)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    names = families.tensors(config.row, config.experts)
    if config.tied and {names["head"], names["embed"]} <= tensors.keys():
        if not np.array_equal(tensors.pop(names["head"]).read(), tensors[names["embed"]].read()):
            raise ValueError(
                f"{directory}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; "
                "correct whichever of the two is wrong"
            )
    return config, assemble(config, names, tensors, str(directory))


def save_hf(directory: str | Path, config: LlamaConfig, params: Params, shard_bytes: int = 2**30,
            more: dict[str, Any] | None = None) -> None:
    """Write dense params as config.json and safetensors that ``from_hf`` and transformers read; no tokenizer.

    Beyond ``shard_bytes`` the tensors are spread over several files with an index, as the hub does; one of the files is
    in memory at a time, its weights read from the params when it is their turn. ``more`` goes into config.json, which
    is written last. Raises ValueError where weights lie already, which could be mistaken for part of the model, and
    OSError where the disk is full.
    """
    directory, raw = Path(directory), config_to_hf(config) | (more or {})
    if found := sorted(directory.glob("*.safetensors*")):
        raise ValueError(f"{directory} already holds {found[0].name}; choose another directory or empty this one")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = ((name, np.ascontiguousarray(read()))
               for name, _, read in _tensors(config, families.tensors(config.row, config.experts), params))
    shards, total = [], 0  # of each file, its tensors
    for shard in _shards(tensors, shard_bytes):
        _save(directory / f"{len(shards)}.unfinished", shard)
        shards, total = [*shards, list(shard)], total + sum(value.nbytes for value in shard.values())
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for i, file in enumerate(files):
        (directory / f"{i}.unfinished").rename(directory / file)
    (directory / "config.json").write_text(json.dumps(raw, indent=1))


def _tensors(config: LlamaConfig, names: dict[str, str], params: Params
             ) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Any]]]:
    """Name in the file, shape, and how to get it, of every tensor of the params in turn: ``assemble``'s inverse."""
    table, tensors = (config.vocab, config.dim), by_tensor(config, names)
    for part, shape in {"embed": table, "norm": (config.dim,), "head": table}.items():
        if part != "head" or not config.tied:
            yield names[part], shape, partial(params.__getitem__, part)
    for i, block in enumerate(tqdm(params["blocks"], "writing", unit="block", leave=False, disable=None)):
        yield from ((name.format(i), shape, partial(_stacked, block, parts))
                    for name, (shape, parts) in tensors.items())


def _stacked(block, parts):
    """These parts, one below the other."""
    found = [block[part] for part in parts]
    return found[0] if len(found) == 1 else np.concatenate([np.asarray(rows) for rows in found])


def _shards(tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> Iterator[dict[str, np.ndarray]]:
    """Consecutive groups of at most ``limit`` bytes, or of one tensor."""
    shard = {}
    for name, value in tensors:
        if shard and sum(v.nbytes for v in shard.values()) + value.nbytes > limit:
            yield shard
            shard = {}
        shard[name] = value
    yield shard


def _save(path, shard):
    path.touch()
    mode = path.stat().st_mode  # of any new file here; safetensors' own are for the owner alone
    try:
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error})") from error


def _read_json(path):
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent}: no {path.name}; a complete Hugging Face directory is needed") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; download it again")
    return content


def _open_safetensors(directory):
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    listed = {}
    if not single.is_file() and index.is_file():
        listed = files.checked(_read_json(index).get("weight_map"), dict[str, str], f"{index}: weight_map")
    elif index.is_file():
        note(f"{directory}: {single.name} is read, as transformers does, and {index.name} and its files are not: "
             "remove what is not the model")
    tensors, found = {}, {}
    for file in sorted(set(listed.values())) or [single.name]:
        if not (directory / file).is_file():
            raise ValueError(f"{directory}: no {file}. Only safetensors weights are read; download or convert them")
        try:
            with safe_open(directory / file, "np") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if found.setdefault(name, file) != file:
                        raise ValueError(f"{directory}: tensor {name} is in {found[name]} and in {file}: remove the "
                                         "file that is not of this model")
                    tensors[name] = _tensor(directory / file, opened, name)
        except SafetensorError as error:
            raise ValueError(f"{directory / file}: damaged safetensors file ({error}); download it again") from error
    for name, file in listed.items():
        if found.get(name) != file:
            raise ValueError(f"{index}: tensor {name} is not in {file}, where it should be"
                             + (f", but in {found[name]}" if name in found else "") + "; download both again")
    return tensors


def arrays(path: Path) -> Params:
    """What ``files.write_arrays`` wrote, but that embedding and head stay in the file; raises as ``read_arrays``."""
    try:
        with safe_open(path, "np") as opened:
            tensors = {name: _tensor(path, opened, name) for name in opened.keys()}  # noqa: SIM118
        return {name: Table(tensor) if name in ("embed", "head") and len(tensor.shape) == 2 and tensor.shape[0] else
                tensor.read() for name, tensor in tensors.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or not a safetensors file ({error})") from error


def _tensor(path, opened, name):
    header = opened.get_slice(name)
    return Tensor(tuple(header.get_shape()), header.get_dtype(),
                  partial(_read_safetensors, path, files.stamp(path), name))


def _read_safetensors(file, stamp, name, rows=None):
    if files.stamp(file) != stamp:
        raise ValueError(f"{file}: gone or replaced since the model was opened: restore it, or start again")
    with safe_open(file, "np") as opened:  # opened anew, so that no page of the file stays mapped
        if rows is None:
            return opened.get_tensor(name)
        whole = opened.get_slice(name)
        if isinstance(rows, slice):
            return whole[rows]
        parts = np.split(rows, np.flatnonzero(np.diff(rows // STEP)) + 1)  # it takes slices alone
        return np.concatenate([whole[int(part[0]):int(part[-1]) + 1][part - part[0]] for part in parts])


# ---- GGUF


class _Reader(GGUFReader):
    """The ``gguf`` package's, but what a damaged header says of lengths is believed only as far as the file goes."""

    def _get(self, offset, dtype, count=1, *more, **named):
        found = super()._get(offset, dtype, count, *more, **named)
        if len(found) < count:
            raise ValueError(f"it ends before the {count} numbers at byte {offset}")
        return found

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type == GGUFValueType.ARRAY and (count := self._get(orig_offs + 4, np.uint64)[0]) > 2**24:
            raise ValueError(f"a list of {count} entries at byte {orig_offs}")
        return super()._get_field_parts(orig_offs, raw_type)


def read_gguf(path: str | Path) -> GGUFReader:
    """Open (memory-map) a GGUF file; ValueError if it is not one or is cut short.

    Of a file that was split, given the first part: its metadata, and the tensors of all parts.
    """
    reader = _open_gguf(path)
    number, count = (files.checked(tokenizer.field(reader, f"split.{name}", default), int, f"{path}: split.{name}")
                     for name, default in (("no", 0), ("count", 1)))
    if count <= 1:
        return reader
    named = _PART.fullmatch(Path(path).name)
    if number or not named or int(named[2]) != count:
        raise ValueError(f"{path}: part {number + 1} of {count} of a GGUF file: give the first, beside the others, "
                         f"called NAME-00001-of-{count:05d}.gguf")
    for i in range(1, count):
        other = Path(path).with_name(f"{named[1]}-{i + 1:05d}-of-{count:05d}.gguf")
        if not other.is_file():
            raise ValueError(f"{path}: its part {i + 1} of {count} is not there: put {other.name} beside it")
        part = _open_gguf(other)
        if (tokenizer.field(part, "split.no", 0), tokenizer.field(part, "split.count", 1)) != (i, count):
            raise ValueError(f"{other}: not part {i + 1} of {count}; download it again")
        reader.tensors += part.tensors
    names = {tensor.name for tensor in reader.tensors}
    if not len(names) == len(reader.tensors) == tokenizer.field(reader, "split.tensors.count", len(names)):
        raise ValueError(f"{path}: its {count} parts hold {len(reader.tensors)} tensors of {len(names)} names, and "
                         "should hold another number: they are not of one file; download them again")
    return reader


def _open_gguf(path):
    try:
        with np.errstate(over="raise"):  # of offsets
            return _Reader(str(path))
    except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error}); download it again") from error


def from_gguf(reader: GGUFReader) -> tuple[LlamaConfig, Params]:
    """Config and params of a GGUF file of architecture ``llama`` or ``qwen2``; tied where output.weight is absent."""
    tensors = {t.name: Tensor(tuple(int(size) for size in reversed(t.shape)), "F16" if t.tensor_type.name == "F16"
                              else "F32", partial(_dense, t)) for t in reader.tensors}
    if GGUF["embed"] not in tensors or not tensors[GGUF["embed"]].shape:
        raise ValueError(f"the GGUF file has no tensor {GGUF['embed']!r}, or a number for it")
    factors = tensors.pop("rope_freqs.weight").read() if "rope_freqs.weight" in tensors else None
    vocab = tensors[GGUF["embed"]].shape[0]
    config = _config_from_gguf(reader, vocab, tied=GGUF["head"] not in tensors, factors=factors)
    for part, heads in _paired(config).items():
        before, after = GGUF[part].split("{}")
        for name, tensor in tensors.items():
            if name.startswith(before) and name.endswith(after):
                tensors[name] = tensor._replace(read=partial(_pair_halves, tensor.read, heads))
    return config, assemble(config, GGUF, tensors, "the GGUF file")


def _dense(tensor, rows=None):
    """The tensor, or rows of it, as floating-point numbers, some at a time: dequantizing takes several times the
    result."""
    data, kind = tensor.data if rows is None else tensor.data[rows], tensor.tensor_type
    try:
        if kind.name in ("F32", "F16"):
            return np.array(data)
        if len(tensor.shape) == 1:
            return dequantize(data, kind)
        shape = (*data.shape[:-1], int(tensor.shape[0]))
        value, step = np.empty(shape, np.float32), max(1, 2**20 // shape[-1])
        for i in range(0, len(data), step):
            value[i:i + step] = dequantize(data[i:i + step], kind)
        return value
    except NotImplementedError as error:
        raise ValueError(f"GGUF tensor {tensor.name}: type {kind.name} cannot be dequantized") from error
    finally:
        mapped = getattr(tensor.data, "_mmap", None)
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # the pages of the file count as memory of this process


def _paired(config):
    """The layers whose rows the file has in rotary pairs (2i, 2i + 1), and their heads."""
    return {} if config.qkv_bias else {"q": config.heads, "k": config.kv_heads}


def _pair_halves(read, heads):
    """Rows from GGUF's rotary pairs (2i, 2i + 1) to Hugging Face's (i, i + e/2), head by head."""
    weight = read()
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def save_gguf(path: str | Path, model: Model) -> None:
    """Write a dense model as a GGUF file of architecture ``llama``, or ``qwen2`` where q, k and v have biases, that
    ``load`` and other programs read.

    Matrices in the type of the embedding, float16, float32 or, as bytes of every row, Q8_0, and vectors in float32;
    each is read from the params when it is its turn. Raises ValueError for what such a file cannot hold: other
    families, Llama 3's rope scaling beside biases, or with other numbers than its releases', some tokenizers
    (``tokenizer.to_gguf``); and OSError where the disk is full.
    """
    config, params = model.config, model.params
    architecture = _architecture(config)
    if config.qkv_bias and not isinstance(config.rope_scaling, LinearRopeScaling | None):
        raise ValueError("GGUF's architecture 'qwen2' has no words for Llama 3's rope scaling: export the model with "
                         "--to hf")
    factors = _factors_from_llama3(config) if isinstance(config.rope_scaling, Llama3RopeScaling) else None
    writer, table = GGUFWriter(path, architecture), tokenizer.to_gguf(
        model.tokenizer, model.special, config.vocab, model.ends)
    kind, file_type = KINDS[np.dtype(params["embed"].dtype).name]
    writer.add_type("model")
    writer.add_name(Path(model.name).name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if isinstance(config.rope_scaling, LinearRopeScaling):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    for key, value in table.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    paired = {GGUF[part].format(i): count for part, count in _paired(config).items() for i in range(config.layers)}
    tensors = [] if factors is None else [("rope_freqs.weight", factors.shape, lambda: factors)]
    tensors = [(name, shape, partial(_interleave, read, paired[name]) if name in paired else read,
                kind if len(shape) == 2 else GGMLQuantizationType.F32)
               for name, shape, read in [*tensors, *_tensors(config, GGUF, params)]]
    try:
        for name, shape, _, of in tensors:
            block, size = GGML_QUANT_SIZES[of]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, read, of in tensors:
            writer.write_tensor_data(np.ascontiguousarray(read(), ARRAYS[of]))
    finally:
        writer.close()


def _architecture(config):
    """GGUF's name; ValueError for a family that is not written."""
    if config.family != "llama":
        raise ValueError(f"GGUF files of family {config.family!r} are not written, only of Llama, Mistral and Qwen2: "
                         "export the model with --to hf")
    return "qwen2" if config.qkv_bias else "llama"


LowRank = Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]]  # L [m, k] and R [k, n] by block and layer


def save_gguf_lora(path: str | Path, config: LlamaConfig, low_rank: LowRank, base: str) -> None:
    """Write L R of some layers as a LoRA adapter of scale 1 for the model that ``save_gguf`` writes without them.
    ValueError as there for other families."""
    writer, paired = GGUFWriter(path, _architecture(config)), _paired(config)
    writer.add_type("adapter")
    writer.add_name(Path(base).name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # else W + L R alpha / k
    for (i, layer), (left, right) in low_rank.items():
        name = GGUF[layer].format(i)
        left = _interleave(lambda left=left: left, paired[layer]) if layer in paired else left
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(right, np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(left, np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def save_peft(directory: str | Path, config: LlamaConfig, low_rank: LowRank, base: str) -> None:
    """Write L R of some layers as a LoRA adapter of scale 1, a directory for PEFT, beside the model that ``save_hf``
    writes without them.  ValueError for families that keep several of the layers in one matrix."""
    names = families.tensors(config.row, config.experts)
    if fused := [layer for _, layer in low_rank if list(names.values()).count(names[layer]) > 1 or config.experts]:
        raise ValueError(f"no adapter is written for family {config.family!r}, in whose files {fused[0]} is a part of "
                         "a larger matrix: leave --adapter out")
    modules = {names[layer].format(i).removesuffix(".weight"): pair for (i, layer), pair in low_rank.items()}
    ranks = {module: int(right.shape[0]) for module, (_, right) in modules.items()}
    most = max(ranks.values())
    Path(directory).mkdir(parents=True)
    _save(Path(directory) / "adapter_model.safetensors", {
        f"base_model.model.{module}.{name}.weight": np.ascontiguousarray(part, np.float32)
        for module, (left, right) in modules.items() for name, part in (("lora_A", right), ("lora_B", left))})
    files.write_json(Path(directory) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": most, "lora_alpha": most,
        "rank_pattern": ranks, "alpha_pattern": ranks, "target_modules": list(modules), "bias": "none",
        "lora_dropout": 0.0, "fan_in_fan_out": False, "inference_mode": True})


def _interleave(read, heads):
    """The inverse of ``_pair_halves``."""
    weight = np.asarray(read())
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _factors_from_llama3(config):
    """The inverse of ``_llama3_scaling``: GGUF's divisors of the frequencies."""
    plain, scaled = (llama.rope_frequencies(config.head_dim, config.rope_theta, s) for s in (None, config.rope_scaling))
    factors = (plain / scaled).astype(np.float32)
    try:
        _llama3_scaling(factors, config.rope_theta, config.head_dim)
    except ValueError as error:
        raise ValueError(f"GGUF files tell only the rope scaling of Llama 3's releases, not {config.rope_scaling}: "
                         "export the model with --to hf") from error
    return factors


def _config_from_gguf(reader, vocab, tied, factors):
    architecture = tokenizer.field(reader, "general.architecture")
    if architecture not in ("llama", "qwen2"):
        raise ValueError(f"GGUF architecture {architecture!r} is not supported, only 'llama' and 'qwen2'")
    prefix = f"{architecture}."
    raw = {key.removeprefix(prefix): f.contents() for key, f in reader.fields.items() if key.startswith(prefix)}
    for key in _IDLE.keys() & raw.keys():
        if raw[key] not in _IDLE[key]:
            raise ValueError(f"GGUF {key} = {raw[key]!r} is not supported for architecture {architecture!r}")
    dim, heads = size(raw, "embedding_length"), size(raw, "attention.head_count")
    head_dim = size(raw, "attention.key_length", dim // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if raw.get(key, head_dim) != head_dim:
            raise ValueError(f"GGUF {key} {raw[key]} differs from the head width {head_dim}, which is not supported")
    theta = number({"rope.freq_base": 10_000.0} | raw, "rope.freq_base")
    return LlamaConfig(
        vocab=vocab,
        dim=dim,
        layers=size(raw, "block_count"),
        heads=heads,
        kv_heads=size(raw, "attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_dim=size(raw, "feed_forward_length"),
        rope_theta=theta,
        rope_scaling=_rope_from_gguf(raw, factors, theta, head_dim),
        norm_eps=number(raw, "attention.layer_norm_rms_epsilon"),
        tied=tied,
        context=size(raw, "context_length"),
        sliding_window=size(raw, "attention.sliding_window") if raw.get("attention.sliding_window") else None,
        qkv_bias=architecture == "qwen2",
    )


def _rope_from_gguf(raw, factors, theta, head_dim):
    """The scaling in the metadata, linear where no type is named, or in the tensor of frequencies' divisors."""
    if (kind := raw.get("rope.scaling.type", "linear")) not in ("none", "linear"):
        raise ValueError(f"GGUF rope scaling {kind!r} is not supported; supported: 'none', 'linear'")
    told = {key: number(raw, key) for key in ("rope.scaling.factor", "rope.scale_linear") if key in raw}
    linear = {factor for factor in told.values() if kind == "linear" and factor not in (0, 1)}
    if len(linear) + (factors is not None) > 1:
        tensor = "" if factors is None else " and the tensor rope_freqs.weight"
        raise ValueError(f"GGUF rope scaling is told twice, {told}{tensor}, and only one is supported")
    if factors is not None:
        return _llama3_scaling(factors, theta, head_dim)
    return LinearRopeScaling(*linear) if linear else None


def _llama3_scaling(factors, theta, head_dim):
    """The Llama 3 scaling behind GGUF's divisors of the frequencies: all releases differ in ``factor`` alone."""
    scaling = Llama3RopeScaling(float(factors.max(initial=1)), 1.0, 4.0, 8192)
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    scaled = llama.rope_frequencies(head_dim, theta, scaling)
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-4):
        raise ValueError("GGUF tensor rope_freqs.weight is not Llama 3's rope scaling, and no other is supported")
    return scaling
