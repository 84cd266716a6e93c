"""Tokenizers, from ``tokenizer.json`` or rebuilt from a GGUF file's metadata, all as ``tokenizers.Tokenizer``."""

from pathlib import Path

import numpy as np
from gguf import GGUFReader
from jaxtyping import Int32
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types

# Llama 3 splits off contractions, words with one leading other sign, runs of up to three digits, signs, and blanks.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def encode(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " s"]:
    """Token ids of ``text`` with none added: no BOS or EOS, which is also the perplexity protocol here."""
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def from_directory(path: str | Path) -> Tokenizer:
    """The tokenizer in ``path/tokenizer.json``; ValueError where there is none or it cannot be read."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{path}: no tokenizer.json. Save the model's fast tokenizer there "
            f"(transformers: AutoTokenizer.from_pretrained(...).save_pretrained({str(path)!r}))"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a readable tokenizer file ({error}); download it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def from_gguf(reader: GGUFReader) -> Tokenizer:
    """The tokenizer described in a GGUF file: byte-level BPE (``gpt2``) or SentencePiece BPE (``llama``).

    Tokens of type control never split and are skipped when decoding. Raises ValueError for other kinds.
    """
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = field(reader, "tokenizer.ggml.model")
    if kind not in kinds:
        raise ValueError(f"GGUF tokenizer model {kind!r} is not supported; supported: {', '.join(kinds)}")
    tokens = field(reader, "tokenizer.ggml.tokens")
    tokenizer = kinds[kind](reader, tokens)
    for token, type in zip(tokens, field(reader, "tokenizer.ggml.token_type", []), strict=False):
        if type in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=type == _CONTROL)])
    return tokenizer


def field(reader: GGUFReader, key: str, *default):
    """A metadata value of a GGUF file; ValueError naming the key if it is absent and has no default."""
    if key in reader.fields:
        return reader.fields[key].contents()
    if default:
        return default[0]
    raise ValueError(f"the GGUF file has no {key!r}: it is incomplete or of another kind; convert or download it again")


def _byte_level(reader, tokens):
    pre = field(reader, "tokenizer.ggml.pre", "default")
    splitters = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
                      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    }  # fmt: skip
    if pre not in splitters:
        raise ValueError(f"GGUF pre-tokenizer {pre!r} is not supported; supported: {', '.join(splitters)}")
    ids, merges = _ids(tokens), [tuple(pair.split(" ")) for pair in field(reader, "tokenizer.ggml.merges")]
    try:
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the GGUF file's merges and tokens do not fit ({error}); convert the file again") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitters[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(reader, tokens):
    """SentencePiece merges the adjacent pair whose union scores highest: merges ranked by the score of their union."""
    ids, scores = _ids(tokens), field(reader, "tokenizer.ggml.scores")
    normal = [id for id, kind in enumerate(field(reader, "tokenizer.ggml.token_type")) if kind == 1]
    ranked = sorted(normal, key=lambda id: -scores[id])
    splits = ((token[:i], token[i:]) for token in (tokens[id] for id in ranked) for i in range(1, len(token)))
    merges = [(left, right) for left, right in splits if left in ids and right in ids]
    unknown = tokens[field(reader, "tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if field(reader, "tokenizer.ggml.add_space_prefix", True) else []
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
