"""Tokenizers rebuilt from GGUF metadata against the tokenizer.json they came from, and against greedy merging."""

import json

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from caldera_jax.models import tokenizer

CORPUS = ["The quick brown fox, it's 12345 times over the lazy dog's back.\n\nThe fox wasn't thinking there."] * 3 + [
    "Rotations and quantizers: 3.14159, 2718 and 1000000 are numbers; naïve café — 東京.\r\n  indented    text\t!!"
]
TEXTS = [*CORPUS, "  two  spaces ", "we'LL see 12 123 1234 12345", "\n\n\nline", "émoji 🎉🎉", "<|end|>", ""]
SPECIAL = "<|end|>"


def byte_level(pre):
    """A byte-level BPE tokenizer trained here, as a model's tokenizer.json would hold it."""
    steps = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [pre_tokenizers.Split(Regex(tokenizer._WORDS % "{1,3}"), "isolated"),
                      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    }[pre]  # fmt: skip
    out = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    out.pre_tokenizer, out.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    out.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    out.add_special_tokens([AddedToken(SPECIAL, normalized=False)])
    return out


def gguf_reader(path, **fields):
    """A GGUF file of ``tokenizer.ggml`` metadata alone."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        add = (
            writer.add_bool
            if isinstance(value, bool)
            else writer.add_string
            if isinstance(value, str)
            else writer.add_array
        )
        (writer.add_uint32 if type(value) is int else add)(f"tokenizer.ggml.{name}", value)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return gguf.GGUFReader(str(path))


def as_gguf(path, original, pre):
    stored = json.loads(original.to_str())["model"]
    tokens = [original.id_to_token(i) for i in range(original.get_vocab_size())]
    types = [3 if token == SPECIAL else 1 for token in tokens]
    merges = [" ".join(pair) for pair in stored["merges"]]
    return gguf_reader(path, model="gpt2", pre=pre, tokens=tokens, token_type=types, merges=merges)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm")
    return tokenizer.from_gguf(as_gguf(folder / "t.gguf", byte_level("smollm"), "smollm"))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_a_tokenizer_rebuilt_from_gguf_encodes_like_its_tokenizer_json(tmp_path, pre):
    original = byte_level(pre)
    original.save(str(tmp_path / "tokenizer.json"))
    from_json = tokenizer.from_directory(tmp_path)
    rebuilt = tokenizer.from_gguf(as_gguf(tmp_path / "t.gguf", original, pre))
    for text in TEXTS:
        expected = tokenizer.encode(from_json, text)
        assert expected.dtype == np.int32
        np.testing.assert_array_equal(tokenizer.encode(rebuilt, text), expected)
        assert rebuilt.decode(list(expected), skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("smollm", ["it's", "1", "2", "3", "4", "5"]),
        ("gpt-2", ["it's", "12345"]),
        ("llama-bpe", ["it's", "123", "45"]),
    ],
)
def test_pre_tokenizers_split_digits_in_their_own_way(tmp_path, pre, pieces):
    rebuilt = tokenizer.from_gguf(as_gguf(tmp_path / "t.gguf", byte_level(pre), pre))
    words = [word for word, _ in rebuilt.pre_tokenizer.pre_tokenize_str("it's 12345")]
    digits = [word.lstrip("Ġ") for word in words if word.lstrip("Ġ").isdigit()]
    assert words[:2] == ["it", "'s"] and digits == pieces[1:]


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=60))
def test_decoding_undoes_encoding_for_any_text(smollm, text):
    assert smollm.decode(list(tokenizer.encode(smollm, text)), skip_special_tokens=False) == text


def test_special_tokens_never_split_and_are_dropped_in_decoding(smollm):
    ids = tokenizer.encode(smollm, f"fox{SPECIAL}fox")
    assert list(ids).count(smollm.token_to_id(SPECIAL)) == 1
    assert smollm.decode(list(ids)) == "foxfox"


def test_user_defined_tokens_never_split_but_are_text(tmp_path):
    original = byte_level("smollm")
    tokens = [original.id_to_token(i) for i in range(original.get_vocab_size())]
    merges = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]
    types = [4 if token == SPECIAL else 1 for token in tokens]
    reader = gguf_reader(
        tmp_path / "t.gguf", model="gpt2", pre="smollm", tokens=tokens, token_type=types, merges=merges
    )
    rebuilt = tokenizer.from_gguf(reader)
    ids = tokenizer.encode(rebuilt, f"fox{SPECIAL}fox")
    assert rebuilt.token_to_id(SPECIAL) in ids and rebuilt.decode(list(ids)) == f"fox{SPECIAL}fox"


def test_encode_adds_no_token_and_cuts_none_whatever_the_file_asks(tmp_path):
    original = byte_level("smollm")
    plain = tokenizer.encode(original, CORPUS[0])
    end = original.token_to_id(SPECIAL)
    original.post_processor = processors.TemplateProcessing(single=f"{SPECIAL} $A", special_tokens=[(SPECIAL, end)])
    original.enable_truncation(5)
    original.enable_padding(length=300)
    original.save(str(tmp_path / "tokenizer.json"))
    assert original.encode(CORPUS[0]).ids[0] == end
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.from_directory(tmp_path), CORPUS[0]), plain)


# ---- SentencePiece


def pieces():
    """(tokens, scores, types) in the order of Llama 2: unknown, control, 256 bytes, merged pieces, characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    merges = json.loads(trained.to_str())["model"]["merges"]
    merged = list(dict.fromkeys("".join(pair) for pair in merges))
    letters = sorted(token for token in trained.get_vocab() if len(token) == 1)
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    scores = [0.0] * 258 + [-float(i) for i in range(len(merged) + len(letters))]
    return tokens, scores, [2, 3] + [6] * 256 + [1] * (len(merged) + len(letters))


def greedy(text, tokens, scores):
    """Merge the adjacent pair whose union scores highest, the leftmost among equals, until none is a token."""
    rank = {token: score for token, score in zip(tokens, scores, strict=True) if not token.startswith("<")}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        found = [(-rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in rank]
        if not found:
            break
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    known = lambda part: [part] if part in rank else [f"<0x{byte:02X}>" for byte in part.encode()]
    return [tokens.index(token) for part in parts for token in known(part)]


@pytest.mark.parametrize("text", [t for t in TEXTS if t])
def test_sentencepiece_from_gguf_merges_greedily_by_score(tmp_path, text):
    tokens, scores, types = pieces()
    reader = gguf_reader(tmp_path / "t.gguf", model="llama", tokens=tokens, scores=scores, token_type=types)
    rebuilt = tokenizer.from_gguf(reader)
    ids = tokenizer.encode(rebuilt, text)
    np.testing.assert_array_equal(ids, greedy(text, tokens, scores))
    assert rebuilt.decode(list(ids)) == text


def test_sentencepiece_without_space_prefix_adds_none(tmp_path):
    tokens, scores, types = pieces()
    reader = gguf_reader(
        tmp_path / "t.gguf", model="llama", tokens=tokens, scores=scores, token_type=types, add_space_prefix=False
    )
    rebuilt = tokenizer.from_gguf(reader)
    ids = list(tokenizer.encode(rebuilt, "The fox"))
    assert not rebuilt.id_to_token(ids[0]).startswith("▁") and rebuilt.decode(ids) == "The fox"


# ---- refusals


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model": "bert"}, "tokenizer model 'bert' is not supported; supported: gpt2, llama"),
        ({"model": "gpt2", "pre": "viking", "tokens": ["a"], "merges": ["a b"]}, "pre-tokenizer 'viking'.*smollm"),
        ({"model": "gpt2", "pre": "smollm", "tokens": ["a", "b"]}, "no 'tokenizer.ggml.merges'"),
        ({"model": "gpt2", "pre": "smollm", "tokens": ["a", "a"], "merges": ["a a"]}, "lists 1 tokens twice"),
        ({"model": "gpt2", "pre": "smollm", "tokens": ["a", "b"], "merges": ["a c"]}, "merges.*do not fit"),
        ({"model": "gpt2", "pre": "smollm", "tokens": ["a", "b"], "merges": ["ab"]}, "merges.*do not fit"),
        ({"model": "gpt2", "pre": "smollm", "tokens": ["w0", "w1"], "merges": ["w0 w1"]}, "merges.*do not fit"),
        ({"model": "gpt2", "pre": "smollm", "tokens": ["a", "b"], "merges": [1]}, r"merges\[0\]: 1 is no text"),
        ({"model": "gpt2", "tokens": ["a"], "merges": ["a a"], "pre": 3}, "pre: 3 is no text"),
        ({"model": "gpt2", "tokens": [1, 2], "merges": ["a a"]}, r"tokens\[0\]: 1 is no text"),
    ],
)
def test_an_unsupported_gguf_tokenizer_is_refused_by_name(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.from_gguf(gguf_reader(tmp_path / "t.gguf", **fields))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize(("change", "message"), [
    ({"unknown_token_id": 2**32 - 1}, "unknown_token_id names no token"),
    ({"unknown_token_id": 10_000}, "unknown_token_id is 10000, and there are 442 tokens"),
    ({"bos_token_id": 442}, "bos_token_id is 442, and there are 442 tokens"),
    ({"eos_token_id": "x"}, "eos_token_id: 'x' is no integer"),
    ({"scores": [0.0] * 20}, "scores has 20 entries for 442 tokens"),
    ({"scores": [0.0] * 443}, "scores has 443 entries for 442 tokens"),
    ({"scores": ["a"] * 442}, r"scores\[0\]: 'a' is no number"),
    ({"token_type": [1] * 100}, "token_type has 100 entries for 442 tokens"),
    ({"token_type": [1] * 443}, "token_type has 443 entries for 442 tokens"),
])
def test_a_list_or_an_id_that_does_not_fit_the_tokens_is_refused_by_name(tmp_path, model, change, message):
    tokens, scores, types = pieces()
    given = {"model": model, "pre": "gpt-2", "tokens": tokens, "scores": scores, "token_type": types, "merges": ["▁ t"]}
    reader = gguf_reader(tmp_path / "t.gguf", **given | change)
    idle = model == "gpt2" and ("scores" in change or change == {"unknown_token_id": 2**32 - 1})
    if idle:  # of no use there
        tokenizer.from_gguf(reader)
    else:
        with pytest.raises(ValueError, match=message):
            tokenizer.from_gguf(reader)


@pytest.mark.parametrize("id", [2**32 - 1, -1])
def test_an_id_of_minus_one_is_no_token(id):
    tokens, scores, types = pieces()
    lists = {"tokens": tokens, "scores": scores, "token_type": types, "model": "llama"}
    fields = {f"tokenizer.ggml.{name}": value for name, value in lists.items()} | {
        "tokenizer.ggml.padding_token_id": id, "tokenizer.ggml.bos_token_id": 1}
    assert tokenizer.special_from_fields(fields) == {"bos_token": "<s>"}
    assert tokenizer.from_fields(fields).encode("The").ids[0] == 1


def test_a_missing_or_damaged_tokenizer_json_is_named(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer file"):
        tokenizer.from_directory(tmp_path)


# ---- what begins and ends a text


def fields_of(pre, **more):
    """Metadata of a byte-level tokenizer whose token SPECIAL is its BOS."""
    original = byte_level(pre)
    tokens = [original.id_to_token(i) for i in range(original.get_vocab_size())]
    merges = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "bos_token_id": tokens.index(SPECIAL),
              "token_type": [3 if token == SPECIAL else 1 for token in tokens]} | more
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


@pytest.mark.parametrize(("pre", "asked", "first"), [
    ("llama-bpe", None, True), ("smollm", None, False), ("gpt-2", None, False), ("llama-bpe", False, False),
    ("llama-bpe", True, True), ("gpt-2", True, True),
])
def test_bos_comes_first_for_llama_3_unless_the_file_says_otherwise(pre, asked, first):
    fields = fields_of(pre, **({} if asked is None else {"add_bos_token": asked}))
    rebuilt = tokenizer.from_fields(fields)
    own, plain = fields["tokenizer.ggml.bos_token_id"], tokenizer.encode(rebuilt, "the fox").tolist()
    assert rebuilt.encode("the fox").ids == [own] * first + plain and own not in plain
    for role in ("", SPECIAL):  # one BOS, whether the text brings it or not
        assert tokenizer.prompt(rebuilt, f"{role}the fox") == [own] * (first or bool(role)) + plain


@pytest.mark.parametrize(("more", "message"), [
    ({"eos_token_id": 10**4}, "eos_token_id is 10000"), ({"padding_token_id": -2}, "padding_token_id is -2"),
    ({"eot_token_id": 10**4}, "eot_token_id is 10000"), ({"eom_token_id": "a"}, "eom_token_id: 'a' is no integer"),
    ({"add_eos_token": True}, "add_eos_token is true, and there is no tokenizer.ggml.eos_token_id"),
])
def test_a_special_token_that_a_gguf_file_does_not_have_is_refused_by_its_field(more, message):
    with pytest.raises(ValueError, match=message):
        (tokenizer.from_fields(fields_of("gpt-2", **more)), tokenizer.ends_from_fields(fields_of("gpt-2", **more)))


def test_a_prompt_is_not_followed_by_what_ends_a_text():
    made = byte_level("gpt-2")
    end = (SPECIAL, made.token_to_id(SPECIAL))
    made.post_processor = processors.TemplateProcessing(single=f"$A {SPECIAL}", special_tokens=[end])
    assert made.encode("the fox").ids[-1] == end[1]
    assert tokenizer.prompt(made, "the fox") == tokenizer.encode(made, "the fox").tolist()


@pytest.mark.parametrize(("generation", "config", "expected"), [
    ({"eos_token_id": [72, 5]}, {"eos_token_id": 5}, (72, 5)), ({"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
    ({}, {}, ()), (None, {"eos_token_id": [7, 8]}, (7, 8)), ({"eos_token_id": 0}, {}, (0,)),
])
def test_the_end_tokens_of_a_directory_are_those_of_both_its_configurations(tmp_path, generation, config, expected):
    for name, raw in (("generation_config.json", generation), ("config.json", config)):
        if raw is not None:
            (tmp_path / name).write_text(json.dumps(raw))
    assert tokenizer.ends_from_directory(tmp_path, 100) == expected


@pytest.mark.parametrize("wrong", [100, -1, "2", [5, 100], [[5]], True, 2.0])
def test_an_end_token_that_is_none_of_the_models_is_refused_by_its_file(tmp_path, wrong):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is .* tokens are 0 to 99"):
        tokenizer.ends_from_directory(tmp_path, 100)


def test_dropout_of_a_tokenizer_json_is_off(tmp_path):
    """It is drawn anew for each text: no two encodings, and so no two runs, would be alike."""
    made = byte_level("gpt-2")
    plain = tokenizer.encode(made, CORPUS[0])
    made.model.dropout = 0.5
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.from_directory(tmp_path)
    assert json.loads(loaded.to_str())["model"]["dropout"] is None
    for _ in range(8):
        np.testing.assert_array_equal(tokenizer.encode(loaded, CORPUS[0]), plain)
