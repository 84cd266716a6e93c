"""Tokenizers in ``tokenizer.json`` and in GGUF files' metadata, read and written, all as ``tokenizers.Tokenizer``.

What a tokenizer does not say itself is in a dict beside it, ``special``, with the names of tokenizer_config.json: the
tokens that are bos_token, eos_token, unk_token and pad_token, and the chat_template; each where it is known.  And in
``ends``, the ids that a model's files name as ends of a text or of a turn.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from jaxtyping import Int, Int32
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from caldera_jax.models import files

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # GGUF token types
_ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
          "pad_token": "padding_token_id"}  # and their names in GGUF
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of GGUF: of a text, a turn and a message

# Contractions, words with one leading other sign, runs of digits, signs, and blanks: Llama 3 takes up to three digits
# together, Qwen2 one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ALPHABET = set(pre_tokenizers.ByteLevel.alphabet())
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_SPLITTERS = {  # of byte-level tokenizers, by GGUF's names
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    **{name: [pre_tokenizers.Split(Regex(_WORDS % digits), "isolated"),
              pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
       for name, digits in (("llama-bpe", "{1,3}"), ("qwen2", ""))},
}  # fmt: skip
_NORMALIZED = ("qwen2",)  # by NFC in their own tokenizer.json, of which GGUF says nothing and llama.cpp does nothing


def encode(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " s"]:
    """Token ids of ``text`` with none added: no BOS or EOS, which is also the perplexity protocol here."""
    with _refused("the tokenizer cannot encode this text", "repair its tokenizer.json"):
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)


@contextmanager
def _refused(what, remedy):
    """What the library raises as a ValueError: bare Exceptions, and BaseExceptions where it panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what} ({error}); {remedy}") from error


def prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text to go on from: first what the tokenizer puts there, unless the text begins with it, and
    nothing put last."""
    first, ids = _added(tokenizer)[0], encode(tokenizer, text).tolist()
    return ids if ids[:len(first)] == first else [*first, *ids]


def bos(tokenizer: Tokenizer, special: Mapping[str, str]) -> int:
    """Id of the token that begins a text: bos_token, or else what the tokenizer puts first; ValueError for none."""
    named = tokenizer.token_to_id(special.get("bos_token", ""))
    if found := [named] if named is not None else _added(tokenizer)[0]:
        return found[0]
    raise ValueError("the model's tokenizer knows no token that begins a text: leave --bos out, or name its bos_token "
                     "in tokenizer_config.json")


def check(tokenizer: Tokenizer, ids: Sequence[int] | Int[np.ndarray, "..."], vocab: int) -> None:
    """ValueError, by name, for a token of a text that has no row among ``vocab`` embeddings."""
    if len(ids) and (last := int(np.max(ids))) >= vocab:
        raise ValueError(f"the text holds {tokenizer.id_to_token(last)!r}, token {last}, and the model has embeddings "
                         f"of tokens 0 to {vocab - 1} alone: take it out of the text")


def end_ids(tokenizer: Tokenizer, special: Mapping[str, str], ends: Sequence[int]) -> list[int]:
    """All ids that a model's files name as ends of a text: that of eos_token first, then ``ends``."""
    named = tokenizer.token_to_id(special.get("eos_token", ""))
    return list(dict.fromkeys([*([] if named is None else [named]), *ends]))


def from_directory(path: str | Path) -> Tokenizer:
    """The tokenizer in ``path/tokenizer.json``; ValueError where there is none or it cannot be read.

    Truncation, padding and dropout, which are for training, are off.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{path}: no tokenizer.json. Save the model's fast tokenizer there "
            f"(transformers: AutoTokenizer.from_pretrained(...).save_pretrained({str(path)!r}))"
        )
    with _refused(f"{file}: not a readable tokenizer file", "download it again"):
        tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def special_from_directory(path: str | Path) -> dict[str, str]:
    """``special`` out of ``path/tokenizer_config.json`` and ``chat_template.jinja``; empty where there are none."""
    file, template = Path(path) / "tokenizer_config.json", Path(path) / "chat_template.jinja"
    raw = files.read_json(file) if file.is_file() else {}
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object: download it again")
    found = {role: raw.get(role) for role in (*_ROLES, "chat_template")}
    found = {role: value.get("content") if isinstance(value, dict) else value for role, value in found.items()}
    found |= {"chat_template": template.read_text("utf-8")} if template.is_file() else {}
    return {role: value for role, value in found.items() if isinstance(value, str)}


def ends_from_directory(path: str | Path, vocab: int) -> tuple[int, ...]:
    """``ends`` out of eos_token_id, an id or several, of ``path/generation_config.json`` and ``path/config.json``."""
    found: list[int] = []
    for file in (Path(path) / name for name in ("generation_config.json", "config.json")):
        raw = files.read_json(file) if file.is_file() else {}
        if not isinstance(raw, dict):
            raise ValueError(f"{file}: not a JSON object: download it again")
        ids = raw.get("eos_token_id")
        found += [_checked(id, f"{file}: eos_token_id", vocab) for id in (ids if isinstance(ids, list) else [ids])
                  if ids is not None]
    return tuple(dict.fromkeys(found))


def _checked(id, where, vocab):
    if type(id) is not int or not 0 <= id < vocab:
        raise ValueError(f"{where} is {id!r}, and the model's tokens are 0 to {vocab - 1}: correct it, or take it out")
    return id


def to_directory(path: str | Path, tokenizer: Tokenizer, special: Mapping[str, str], context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads as they are.

    But transformers 5 gives a model of type qwen2 the rules of Qwen2's own tokenizer, whatever tokenizer.json says.
    """
    files.write(Path(path) / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    files.write_json(Path(path) / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
        "clean_up_tokenization_spaces": False, **special})


# ---- GGUF


def contents(reader: GGUFReader) -> dict[str, Any]:
    """The metadata of a GGUF file; ValueError naming a key whose text cannot be read."""
    return {key: _content(reader, key) for key in reader.fields}


def field(reader: GGUFReader, key: str, *default):
    """A metadata value of a GGUF file; ValueError naming the key if it is absent and has no default."""
    return _value({key: _content(reader, key)} if key in reader.fields else {}, key, *default)


def _content(reader, key):
    try:
        return reader.fields[key].contents()
    except UnicodeDecodeError as error:
        raise ValueError(f"the GGUF file's {key!r} is no text in UTF-8 ({error}); download it again") from error


def _value(fields, key, *default):
    if key not in fields and not default:
        raise ValueError(
            f"the GGUF file has no {key!r}: it is incomplete or of another kind; convert or download it again"
        )
    return fields[key] if key in fields else default[0]


def from_gguf(reader: GGUFReader) -> Tokenizer:
    """The tokenizer described in a GGUF file: byte-level BPE (``gpt2``) or SentencePiece BPE (``llama``).

    Tokens of type control or unknown never split and are skipped when decoding. Raises ValueError for other kinds.
    """
    return from_fields(contents(reader))


def from_fields(fields: Mapping[str, Any]) -> Tokenizer:
    """``from_gguf`` of a file's metadata alone."""
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = files.checked(_value(fields, "tokenizer.ggml.model"), str, "tokenizer.ggml.model")
    if kind not in kinds:
        raise ValueError(f"GGUF tokenizer model {kind!r} is not supported; supported: {', '.join(kinds)}")
    tokens = _tokens(fields)
    tokenizer = kinds[kind](fields, tokens)
    for token, type in zip(tokens, _each(fields, "token_type", int, [_NORMAL] * len(tokens)), strict=True):
        if type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=type != _USER_DEFINED)])
    special = special_from_fields(fields)
    # Llama 3's files often leave add_bos_token out, and readers put BOS first, as for SentencePiece.
    first = kind == "llama" or _value(fields, "tokenizer.ggml.pre", "") == "llama-bpe"
    asked = {role: _value(fields, f"tokenizer.ggml.add_{role}", None) for role in ("bos_token", "eos_token")}
    if unknown := [role for role, add in asked.items() if add and role not in special]:
        raise ValueError(f"tokenizer.ggml.add_{unknown[0]} is true, and there is no tokenizer.ggml.{unknown[0]}_id: "
                         "convert the file again")
    ends = [[special[role]] if role in special and (default if asked[role] is None else asked[role]) else []
            for role, default in (("bos_token", first), ("eos_token", False))]
    if any(ends):  # what ``tokenizer.encode`` adds by itself, and ``encode`` here does not
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*ends[0], "$A", *ends[1]],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*ends[0], *ends[1]}])
    return tokenizer


def special_from_fields(fields: Mapping[str, Any]) -> dict[str, str]:
    """``special`` out of a GGUF file's metadata."""
    tokens = _tokens(fields)
    ids = {role: _id(fields, name, len(tokens)) for role, name in _ROLES.items()}
    special = {role: tokens[id] for role, id in ids.items() if id is not None}
    template = files.checked(fields.get("tokenizer.chat_template", ""), str, "tokenizer.chat_template")
    return special | ({"chat_template": template} if template else {})


def ends_from_fields(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """``ends`` out of a GGUF file's metadata."""
    count = len(_tokens(fields))
    return tuple(dict.fromkeys(id for name in _ENDS if (id := _id(fields, name, count)) is not None))


def _tokens(fields):
    return files.checked(_value(fields, "tokenizer.ggml.tokens"), list[str], "tokenizer.ggml.tokens")


def _each(fields, name, kind, *default):
    """One number for each token."""
    key, count = f"tokenizer.ggml.{name}", len(_tokens(fields))
    if len(values := files.checked(_value(fields, key, *default), list[kind], key)) != count:
        raise ValueError(f"the GGUF file's {key} has {len(values)} entries for {count} tokens: convert or download it "
                         "again")
    return values


def _id(fields, name, count, *default):
    """The id of a token of this role; None where there is none, which some files write as -1."""
    if (id := fields.get(key := f"tokenizer.ggml.{name}", *default)) in (None, -1, 2**32 - 1):
        return None
    if not 0 <= files.checked(id, int, key) < count:
        raise ValueError(f"the GGUF file's {key} is {id}, and there are {count} tokens: convert or download it again")
    return id


def to_gguf(tokenizer: Tokenizer, special: Mapping[str, str], vocab: int, ends: Sequence[int] = ()) -> dict[str, Any]:
    """The metadata from which ``from_fields`` makes a tokenizer of the same encodings, for ``vocab`` embeddings.

    Raises ValueError, naming the part, where GGUF has no words for how this tokenizer works.
    """
    raw = json.loads(tokenizer.to_str())
    if raw["model"]["type"] != "BPE":
        raise _inexpressible(f"kind, {raw['model']['type']}")
    added = {token["content"]: token["special"] for token in raw["added_tokens"]}
    if beyond := [token for token in added if tokenizer.token_to_id(token) >= vocab]:
        raise _inexpressible(f"token {beyond[0]!r}, which has no embedding")
    tokens = [tokenizer.id_to_token(i) for i in range(vocab)]  # None where the model has rows without a token
    rank = {token: i for i, token in enumerate(dict.fromkeys(map("".join, raw["model"]["merges"])))}

    def type_of(token):
        if token in added:
            unknown = token == raw["model"]["unk_token"] and raw["model"]["byte_fallback"]
            return _USER_DEFINED if not added[token] else _UNKNOWN if unknown else _CONTROL
        byte = token is not None and raw["model"]["byte_fallback"] and token in _BYTES
        return _UNUSED if token is None else _BYTE if byte else _NORMAL

    def padding(name):  # llama.cpp's, unless a token has it
        return name if tokenizer.token_to_id(name) is None else padding(f"[{name}]")

    fields = {"tokens": [padding(f"[PAD{i}]") if token is None else token for i, token in enumerate(tokens)],
              "token_type": [type_of(token) for token in tokens]}
    if raw["model"]["byte_fallback"]:
        fields |= {"model": "llama", "scores": [-float(rank.get(token, len(rank))) for token in tokens],
                   "add_space_prefix": any(step["type"] == "Prepend" for step in _steps(raw["normalizer"]))}
        special = {**special, "unk_token": raw["model"]["unk_token"] or tokens[0]}
    else:
        fields |= {"model": "gpt2", "pre": _splitter(raw["pre_tokenizer"]),
                   "merges": [" ".join(pair) for pair in raw["model"]["merges"]]}
        if not fields["merges"]:
            raise _inexpressible("vocabulary without merges")
    first, last = _added(tokenizer)
    if max(len(first), len(last)) > 1:
        raise _inexpressible("template, which adds several tokens to a text")
    fields |= {_ROLES[role]: tokenizer.token_to_id(special[role]) for role in _ROLES if role in special}
    fields |= {"add_bos_token": bool(first), "add_eos_token": bool(last)}
    fields |= {"bos_token_id": first[0]} if first else {}
    told = list(dict.fromkeys([*last, *end_ids(tokenizer, special, ends)]))
    told[1:] = sorted(told[1:], key=lambda id: tokens[id] == "<|eom_id|>")
    if len(told) > len(_ENDS):
        raise _inexpressible(f"{len(told)} tokens that end a text")
    fields |= dict(zip(_ENDS, told, strict=False))
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}
    fields |= {"tokenizer.chat_template": special["chat_template"]} if "chat_template" in special else {}
    _check_same(raw, tokenizer, from_fields(fields))
    return fields


def _added(tokenizer):
    """Ids that the tokenizer puts before and after each text."""
    found = tokenizer.encode("a")
    added = list(zip(found.ids, found.special_tokens_mask, strict=True))
    first, last = ([id for id, _ in takewhile(lambda pair: pair[1], side)] for side in (added, reversed(added)))
    return first, last[::-1]


def _inexpressible(what):
    return ValueError(f"GGUF has no words for this tokenizer's {what}: export the model with --to hf")


def _steps(raw):
    """The steps of a normalizer or pre-tokenizer, without what only offsets depend on."""
    steps = [] if raw is None else raw.get("normalizers") or raw.get("pretokenizers") or [raw]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _splitter(raw):
    for name, steps in _SPLITTERS.items():
        probe = Tokenizer(models.BPE())
        probe.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if _steps(json.loads(probe.to_str())["pre_tokenizer"]) == _steps(raw):
            return name
    raise _inexpressible(f"pre-tokenizer (known: {', '.join(_SPLITTERS)})")


def _check_same(raw, tokenizer, rebuilt):
    """Refuse, by the first part that differs, what would encode in another way when it is read again."""
    ours, theirs = _parts(raw), _parts(json.loads(rebuilt.to_str()))
    if different := [part for part in ours if ours[part] != theirs[part]]:
        raise _inexpressible(different[0])
    if not tokenizer.get_vocab().items() <= rebuilt.get_vocab().items():
        raise _inexpressible("vocabulary, whose tokens exceed the model's embeddings")


def _parts(raw):
    """What encodings depend on besides the vocabulary."""
    model, normalizer = raw["model"], _steps(raw["normalizer"])
    pairs = [tuple(pair) for pair in model["merges"]]
    unknown = model["unk_token"] if model["byte_fallback"] or not _ALPHABET <= model["vocab"].keys() else None
    names = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback")
    if model["byte_fallback"]:  # the splits of one token may stand in any order, which only their overlaps could tell
        pairs = list(dict.fromkeys(map("".join, pairs))), sorted(pairs)
    flags = ("special", "single_word", "lstrip", "rstrip") + ("normalized",) * bool(normalizer)
    return {
        "normalizer": normalizer,
        "pre-tokenizer": _steps(raw["pre_tokenizer"]),
        "options": [model[name] or None for name in names],
        "unknown token": (unknown, unknown is not None and model["fuse_unk"]),
        "merges": pairs,
        "added tokens": {token["content"]: [token[flag] for flag in flags] for token in raw["added_tokens"]},
    }


def _byte_level(fields, tokens):
    pre = files.checked(_value(fields, "tokenizer.ggml.pre", "default"), str, "tokenizer.ggml.pre")
    if pre not in _SPLITTERS:
        raise ValueError(f"GGUF pre-tokenizer {pre!r} is not supported; supported: {', '.join(_SPLITTERS)}")
    pairs = files.checked(_value(fields, "tokenizer.ggml.merges"), list[str], "tokenizer.ggml.merges")
    ids, merges = _ids(tokens), [tuple(pair.split(" ")) for pair in pairs]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise ValueError(f"the GGUF file's merges and tokens do not fit ({' '.join(pair)!r} is no merge of two "
                             "tokens to a third); convert the file again")
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.normalizer = normalizers.NFC() if pre in _NORMALIZED else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_SPLITTERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields, tokens):
    """SentencePiece merges the adjacent pair whose union scores highest: merges ranked by the score of their union."""
    ids, scores = _ids(tokens), _each(fields, "scores", float)
    normal = [id for id, kind in enumerate(_each(fields, "token_type", int)) if kind == _NORMAL]
    ranked = sorted(normal, key=lambda id: -scores[id])
    splits = ((token[:i], token[i:]) for token in (tokens[id] for id in ranked) for i in range(1, len(token)))
    merges = [(left, right) for left, right in splits if left in ids and right in ids]
    if (unknown := _id(fields, "unknown_token_id", len(tokens), 0)) is None:
        raise ValueError("the GGUF file's tokenizer.ggml.unknown_token_id names no token, and a SentencePiece "
                         "tokenizer needs one: convert the file again")
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if _value(fields, "tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _ids(tokens):
    ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ValueError(f"the GGUF vocabulary lists {len(tokens) - len(ids)} tokens twice; convert the file again")
    return ids
