"""Compressed models as dense files: the same logits elsewhere and again here; the native format decoded in NumPy."""

import dataclasses
import gc
import json
import resource
import textwrap
import tracemalloc
from functools import cache

import gguf
import jax
import jax.numpy as jnp
import matrices
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from caldera_jax import CalderaConfig, LevelConfig, compress_matrix, hadamard, level, linear
from caldera_jax.codebooks import E8P, ResidualE8P, Trellis, Uniform
from caldera_jax.jobs import artifact, evaluate, export, generate
from caldera_jax.kernels.matmul import Packed
from caldera_jax.levels import Integers, Levelled
from caldera_jax.models import convert, data, files, llama, tokenizer, weights
from caldera_jax.models.llama import LinearRopeScaling, Llama3RopeScaling, LlamaConfig

SCALING = Llama3RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
PLAIN = LlamaConfig(vocab=420, dim=24, layers=2, heads=2, kv_heads=2, head_dim=12, ffn_dim=24, norm_eps=1e-5,
                    context=256)  # every layer of one shape: one compilation
CONFIGS = {
    "llama": dataclasses.replace(PLAIN, kv_heads=1, ffn_dim=40),
    "tied": dataclasses.replace(PLAIN, tied=True),
    "llama3": dataclasses.replace(PLAIN, rope_theta=5e5, rope_scaling=SCALING, heads=1, kv_heads=1, head_dim=24),
    "linear": dataclasses.replace(PLAIN, rope_scaling=LinearRopeScaling(4.0)),
    "mistral": dataclasses.replace(PLAIN, sliding_window=5),
    "qwen2": dataclasses.replace(PLAIN, qkv_bias=True),
}
GRIDS = (E8P(), ResidualE8P(4), ResidualE8P(4))
TOKENS = np.random.default_rng(1).integers(0, 400, (3, 32), np.int32)
CORPUS = ["The quick brown fox, it's 12345 times over the lazy dog's back.\n\nThe fox wasn't thinking there."] * 3 + [
    "Rotations and quantizers: 3.14159, 2718 and 1000000 are numbers; naïve café — 東京.\r\n  indented    text\t!!"
]
TEXTS = [*CORPUS, "  two  spaces ", "we'LL see 12 123 1234 12345", "\n\n\nline", "émoji 🎉🎉", "a<|end|>b<s>c", "<unk>",
         "a <think> b", ""]
DENSE, forward = jax.jit(lambda layer: layer.dense()), jax.jit(llama.forward, static_argnums=0)


def random_layer(seed, m, n, rank, grids=GRIDS):
    """A layer of random codes, all of which stand for something, and of about the norm of a random weight."""
    rng = np.random.default_rng(seed)
    octets = lambda *shape: jnp.asarray(rng.integers(0, 256, shape, np.uint8))
    scales = 0.7 / np.sqrt(n), 0.7 / np.sqrt(n), 0.3
    parts = [Packed(octets(rows, -(-width // grid.block) * grid.code_bits // 8), jnp.full((1, 1), scale, jnp.float32))
             for rows, width, grid, scale in zip((m, rank, rank), (n, m, n), grids, scales, strict=True)]
    return linear.CompressedLinear(*parts, octets(-(-m // 8)), octets(-(-n // 8)), (m, n), grids)


def make(config, text=None, special=None):
    """A model of random compressed layers."""
    params = jax.tree.map(np.asarray, llama.init(jax.random.key(0), config))
    shapes = llama.shapes(config)
    for i, block in enumerate(params["blocks"]):
        block |= {name: random_layer(10 * i + j, *shapes[name], 4) for j, name in enumerate(shapes)}
        block |= {name: block[name] + np.float32(0.1) for name in block if name.endswith("bias")}
    return convert.Model(config, params, text or byte_level("gpt-2"), "a/tiny one", special or {})


def byte_level(pre):
    """A byte-level BPE tokenizer as a model's tokenizer.json would hold it."""
    out = Tokenizer(models.BPE(unk_token="<|end|>", ignore_merges=pre == "llama-bpe"))
    steps = tokenizer._SPLITTERS[pre]
    if pre == "qwen2":
        out.normalizer = normalizers.NFC()
    out.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    out.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    out.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    out.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    out.add_tokens([AddedToken("<think>", normalized=False)])
    return out


def sentencepiece(prefix=True, bos=True):
    """A tokenizer as those of Llama 2: pieces of ranked merges, bytes for what is unknown."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    merges = json.loads(trained.to_str())["model"]["merges"]
    merged = list(dict.fromkeys("".join(pair) for pair in merges))
    letters = sorted(token for token in trained.get_vocab() if len(token) == 1)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    ids = {token: i for i, token in enumerate(tokens)}
    splits = [(t[:i], t[i:]) for t in merged for i in range(1, len(t)) if t[:i] in ids and t[i:] in ids]
    out = Tokenizer(models.BPE(ids, splits, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    first = [normalizers.Prepend("▁")] if prefix else []
    out.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    out.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    out.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:3]])
    if bos:
        out.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return out


def exact(layer):
    """The matrix of a layer, in float64, by the text of the format."""
    return decoder()["weight"](artifact.layer_arrays(layer), artifact.layer_meta(layer))


def logits(model):
    """In float64, of what every layer decodes to."""
    wide = lambda value: exact(value) if isinstance(value, linear.CompressedLinear) else np.asarray(value, np.float64)
    params = jax.tree.map(wide, weights.whole(model.params),
                          is_leaf=lambda leaf: isinstance(leaf, linear.CompressedLinear))
    return np.asarray(forward(model.config, params, jnp.asarray(TOKENS)))


def assert_close(found, wanted, bound):
    assert np.abs(np.asarray(found) - wanted).max() <= bound * np.abs(wanted).max()


# ---- the native format


@cache
def decoder():
    """The functions in the docstring of ``artifact``, as a reader would copy them."""
    text = artifact.__doc__
    code = textwrap.dedent(text[text.index("    import itertools"):text.index("A manifest of another")])
    assert "caldera" not in code and "jax" not in code
    scope = {}
    exec(code, scope)
    return scope


def test_the_decoder_in_the_docstring_reads_a_layer_whose_outputs_count_differently():
    config = CalderaConfig(rank=2, outer_iterations=1, inner_iterations=1)
    layer, _ = compress_matrix(jax.random.key(0), matrices.gaussian(12, 20), np.eye(20), config, g=np.arange(1.0, 13))
    found = decoder()["weight"](artifact.layer_arrays(layer), json.loads(json.dumps(artifact.layer_meta(layer))))
    assert_close(DENSE(layer), found, 20 * 2.0**-23)


@pytest.mark.parametrize(("m", "n", "rank"), [(24, 576, 5), (576, 24, 16), (40, 28, 3), (64, 12, 1), (12, 20, 9),
                                             (8, 344, 2)])
def test_the_decoder_in_the_docstring_reads_a_layer_from_its_file(tmp_path, m, n, rank):
    """float32 sums of n products each, here in float64: n units in the last place of the largest weight are enough."""
    layer = random_layer(m, m, n, rank)
    files.write_arrays(tmp_path / "block", {f"q.{k}": v for k, v in artifact.layer_arrays(layer).items()})
    meta = json.loads(json.dumps(artifact.layer_meta(layer)))
    arrays = {name.removeprefix("q."): value for name, value in load_file(tmp_path / "block").items()}
    found = decoder()["weight"](arrays, meta)
    assert found.shape == (m, n) and found.dtype == np.float64
    assert_close(DENSE(layer), found, max(m, n) * 2.0**-23)


@pytest.mark.parametrize(("m", "n", "bits", "rank"), [(384, 20, 2, 3), (40, 12, 3, 0), (13, 8, 1, 0), (578, 4, 4, 0)])
def test_the_decoder_in_the_docstring_reads_a_trellis(m, n, bits, rank):
    grid = Trellis(bits, 512)
    config = CalderaConfig(rank=rank, quantizer=grid, outer_iterations=1, inner_iterations=1, rotation="none")
    layer, _ = compress_matrix(jax.random.key(0), matrices.gaussian(m, n), np.eye(n), config)
    found = decoder()["weight"](artifact.layer_arrays(layer), json.loads(json.dumps(artifact.layer_meta(layer))))
    assert_close(DENSE(layer), found, 20 * 2.0**-23)


@pytest.mark.parametrize(("m", "n", "rank", "states"), [(300, 40, 0, 8), (20, 90, 3, 8), (65, 10, 0, 1), (9, 9, 0, 64)])
def test_the_decoder_in_the_docstring_reads_a_layer_of_free_rate(m, n, rank, states):
    w, h = matrices.gaussian(m, n, 0), matrices.hessian("power", n, 0)
    w[3], w[5, 7] = 0, 300  # a dead row, and an outlier
    layer = level(w, h, np.linspace(0.1, 3, m), 0.3, LevelConfig(states, rank=rank))
    found = decoder()["weight"](artifact.layer_arrays(layer), json.loads(json.dumps(artifact.layer_meta(layer))))
    np.testing.assert_allclose(found, layer.dense(), atol=1e-12)
    assert rank or len(artifact.layer_arrays(layer)["q.integers.places"]) and not found[3].any()


def test_every_lattice_point_is_decoded_alike():
    code = np.arange(2**16)
    wanted = jax.jit(E8P().decode, static_argnums=1)(jnp.asarray(code, jnp.uint16), jnp.float64)
    np.testing.assert_array_equal(decoder()["e8p"](code), wanted.reshape(-1, 8))


def test_the_docstrings_matrices_are_those_of_every_width_that_it_does_not_refuse():
    """Also of the width of LLaMA-2 7B, 11008 = 64 · 172."""
    assert hadamard.factor(11008) == (64, 172, "hadamard")
    np.testing.assert_array_equal(decoder()["goethals_seidel"](), hadamard.hadamard_matrix(172))
    refused = []
    for n in range(12, 1030, 4):
        power, order, kind = hadamard.factor(n)
        try:
            found = decoder()["side"](np.zeros(-(-n // 8), np.uint8), n)
        except ValueError as error:
            assert "see hadamard.factor" in str(error)
            refused.append(order if kind == "hadamard" else kind)
        else:
            power = n if kind == "sylvester" else power
            wanted = np.kron(hadamard.hadamard_matrix(power), hadamard.hadamard_matrix(n // power))
            np.testing.assert_allclose(found * np.sqrt(n), wanted, atol=1e-12)
    assert set(refused) == {52, 92, 100, 116, 156, 244, "cosine"}


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_scalar_codes_are_packed_as_the_docstring_says(bits):
    width, grid = 11, Uniform(bits)
    packed = np.random.default_rng(0).integers(0, 256, (6, -(-width * bits // 8)), np.uint8)
    layer = linear.CompressedLinear(Packed(jnp.asarray(packed), jnp.ones((1, 1))), None, None, (), (), (6, width),
                                    (grid, *GRIDS[1:]))
    digits = np.unpackbits(packed, axis=1, count=width * bits, bitorder="little").reshape(6, width, bits)
    np.testing.assert_allclose(layer.rotated()[0], 2 * (digits @ 2 ** np.arange(bits)) / (2**bits - 1) - 1, atol=1e-15)


# ---- Hugging Face


@pytest.mark.extra
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_the_directory_as_it_is_and_has_our_logits(tmp_path, name):
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    text = byte_level("qwen2" if name == "qwen2" else "gpt-2")  # transformers has no other for a model of type qwen2
    model = make(CONFIGS[name], text, {"eos_token": "<|end|>"})
    export.export(model, "hf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.dtype == torch.float32 and theirs.config.bos_token_id is None
    assert theirs.generation_config.eos_token_id == model.tokenizer.token_to_id("<|end|>")
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    assert_close(expected, logits(model), 1e-5)  # float32 rounds sums of 24 products, in 14 of them one after another
    if name == "llama":
        assert_close(forward(model.config, model.params, jnp.asarray(TOKENS)), expected, 1e-5)
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert encode.eos_token == "<|end|>"
    for text in TEXTS:
        assert encode(text)["input_ids"] == model.tokenizer.encode(text).ids
        assert encode.decode(encode(text)["input_ids"]) == model.tokenizer.decode(model.tokenizer.encode(text).ids,
                                                                                  skip_special_tokens=False)


@pytest.mark.extra
@pytest.mark.parametrize("prefix", [True, False])
def test_transformers_encodes_and_decodes_as_a_sentencepiece_tokenizer(tmp_path, prefix):
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "gone",
               "chat_template": "{{ messages[0].content }}</s>"}
    model = make(dataclasses.replace(PLAIN, vocab=460), sentencepiece(prefix), special)
    export.export(model, "hf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token) == ("<s>", "</s>", "<unk>", None)
    assert theirs.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False) == "fox</s>"
    for text in TEXTS:
        ids = model.tokenizer.encode(text).ids
        assert theirs(text)["input_ids"] == ids and ids[0] == 1
        assert theirs.decode(ids, skip_special_tokens=True) == model.tokenizer.decode(ids)


@pytest.mark.extra
def test_transformers_ends_at_each_token_that_the_model_ends_at(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    model = make(PLAIN, special={"eos_token": "<|end|>"})._replace(ends=(5, 6))
    end = model.tokenizer.token_to_id("<|end|>")
    export.export(model, "hf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == [end, 5, 6]
    back = convert.load(tmp_path / "out")
    assert generate.end_tokens(back) == generate.end_tokens(model) == {end, 5, 6}


@pytest.mark.parametrize(("special", "ends", "told"), [
    ({"eos_token": "<|end|>"}, [], ["<|end|>"]), ({}, ["a"], ["a"]),
    ({"eos_token": "<|end|>"}, ["a", "<|end|>", "b"], ["<|end|>", "a", "b"]),
    ({"eos_token": "<|end|>"}, ["<|eom_id|>", "a"], ["<|end|>", "a", "<|eom_id|>"]),
])
def test_a_gguf_file_names_the_tokens_that_end_a_text_a_turn_and_a_message(tmp_path, special, ends, told):
    made = byte_level("gpt-2")
    made.add_special_tokens([AddedToken("<|eom_id|>", normalized=False)])
    ids = lambda tokens: tuple(map(made.token_to_id, tokens))
    export.export(make(PLAIN, made, special)._replace(ends=ids(ends)), "gguf", tmp_path / "m.gguf")
    fields = tokenizer.contents(convert.read_gguf(tmp_path / "m.gguf"))
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    assert tuple(fields[key] for name in names if (key := f"tokenizer.ggml.{name}") in fields) == ids(told)
    assert convert.load(tmp_path / "m.gguf").ends == ids(told)


def test_what_gguf_cannot_say_of_tokens_is_refused_by_name(tmp_path):
    model = make(PLAIN, special={"eos_token": "<|end|>"})._replace(ends=(5, 6, 7))
    with pytest.raises(ValueError, match="4 tokens that end a text: export the model with --to hf"):
        export.export(model, "gguf", tmp_path / "m.gguf")
    made = byte_level("gpt-2")
    made.add_special_tokens([AddedToken(f"<{i}>", normalized=False) for i in range(made.get_vocab_size(), PLAIN.vocab)])
    made.add_special_tokens([AddedToken("<pad>", normalized=False)])
    with pytest.raises(ValueError, match="token '<pad>', which has no embedding: export the model with --to hf"):
        export.export(make(PLAIN, made), "gguf", tmp_path / "m.gguf")
    export.export(make(PLAIN, made), "hf", tmp_path / "out")
    assert convert.load(tmp_path / "out").tokenizer.token_to_id("<pad>") == PLAIN.vocab


@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_exported_comes_back_with_the_same_logits(tmp_path, name, to):
    model = make(CONFIGS[name], special={"eos_token": "<|end|>", "chat_template": "{{ messages }}"})
    out = tmp_path / "deep" / f"model.{to}"
    export.export(model, to, out)
    back = convert.load(out)
    assert dataclasses.replace(back.config, norm_eps=model.config.norm_eps) == model.config  # GGUF: in float32
    assert_close(logits(back), logits(model), 1e-5)
    assert back.special == model.special
    for text in TEXTS:
        np.testing.assert_array_equal(tokenizer.encode(back.tokenizer, text), tokenizer.encode(model.tokenizer, text))
    if name == "tied":
        ours, theirs = (evaluate.perplexity(m.config, m.params, TOKENS) for m in (model, back))
        assert f"{ours:.4g}" == f"{theirs:.4g}"
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert len({path.stat().st_mode for path in out.rglob("*")}) <= 1  # who may read one file may read all


@pytest.mark.parametrize(("to", "dtype", "kind", "unit"), [
    ("hf", "bfloat16", ml_dtypes.bfloat16, 2.0**-8), ("gguf", "float16", np.float16, 2.0**-11)])
def test_narrow_types_round_every_weight_once_to_nearest(tmp_path, to, dtype, kind, unit):
    model = make(PLAIN)
    export.export(model, to, tmp_path / "out.gguf", dtype)
    config, params = convert.from_hf(tmp_path / "out.gguf") if to == "hf" else convert.from_gguf(
        convert.read_gguf(tmp_path / "out.gguf"))
    for found, wanted in zip(params["blocks"], model.params["blocks"], strict=True):
        for name in wanted:
            value = exact(wanted[name]) if name in llama.LINEARS else wanted[name]
            assert found[name].dtype == (np.float32 if kind == np.float16 and value.ndim == 1 else kind)
            gap = np.abs(found[name].astype(np.float64) - value)  # beside what float32 sums are off by
            assert (gap <= unit * np.abs(value) + 24 * 2.0**-23 * np.abs(value).max()).all()
    assert params["embed"].dtype == kind


def computed(model):
    """The logits of what ``dense`` makes of every layer."""
    params = jax.tree.map(lambda value: np.asarray(linear.dense(value), np.float64), weights.whole(model.params),
                          is_leaf=lambda leaf: isinstance(leaf, linear.CompressedLinear))
    return np.asarray(forward(model.config, params, jnp.asarray(TOKENS)))


def levelled(config, widest=100):
    """A model of random layers of one level, whose integers reach so far, with a row and a column of zeros."""
    model, shapes, rng = make(config), llama.shapes(config), np.random.default_rng(5)
    octaves = lambda size: np.round(3 * rng.standard_normal(size)).astype(np.int16)
    for block in model.params["blocks"]:
        columns = {of: octaves(n) for of, n in llama.input_sizes(config).items()}
        for name, (m, n) in shapes.items():
            z = np.round(3 * rng.standard_normal((m, n))).astype(np.int16)
            z[1, 2], z[3], z[:, 4] = widest, 0, 0
            row, column = octaves(m), columns[llama.INPUT_OF[name]].copy()
            row[3] = 300  # nothing asks how large that of a row of zeros is
            q = Levelled(*map(jnp.asarray, (np.float32(0.03 / np.sqrt(n)), z, row, column, 0 * row, 0 * column)))
            block[name] = linear.CompressedLinear(q, None, None, (), (), (m, n), (Integers(),) * 3)
        block |= {name: value * np.float32(1.5) for name, value in block.items() if name.endswith("norm")}
    return model


WIDE = dataclasses.replace(PLAIN, dim=64, heads=4, kv_heads=4, head_dim=16, ffn_dim=96)


@pytest.mark.parametrize(("change", "widest", "folded"), [
    ({}, 100, set(llama.LINEARS)), ({"qkv_bias": True}, 127, set(llama.LINEARS)),
    ({"kv_heads": 2}, -127, set(llama.LINEARS) - {"o"}), ({"tied": True}, 300, set(llama.LINEARS))])
def test_q8_0_holds_the_integers_of_a_level_as_they_are(tmp_path, change, widest, folded):
    model = levelled(dataclasses.replace(WIDE, **change), widest)
    found = export.export(model, "gguf", tmp_path / "m.gguf", "q8_0")
    back, blocks = convert.load(tmp_path / "m.gguf"), weights.whole(model.params)["blocks"]
    assert_close(logits(back), computed(model), 0.02 if abs(widest) < 128 else 0.06)
    outer = {name: value for name, value in model.params.items() if name != "blocks"}
    exact_outer = back._replace(params=back.params | outer)  # the tables are rounded
    assert_close(logits(exact_outer), computed(model), 2e-3 if "o" in folded and abs(widest) < 128 else 0.06)
    for i, block in enumerate(blocks):
        for name in llama.LINEARS:
            kept, of, error = found[f"blocks.{i}.{name}"]
            inside = of if abs(widest) < 128 else of - 32
            assert (kept, of) == (inside if name in folded else 0, block[name].q.integers.size)
            assert error < (4e-4 if kept == of else 0.1)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    down = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    assert down.tensor_type == gguf.GGMLQuantizationType.Q8_0
    codes = np.asarray(down.data).reshape(64, 3, 34)[:, :, 2:].view(np.int8).reshape(64, 96)
    z = blocks[1]["down"].q.integers
    if abs(widest) < 128:
        np.testing.assert_array_equal(codes, z)
    else:  # a block beyond 8 bits is rounded to multiples of 4
        np.testing.assert_array_equal(np.delete(codes, np.s_[:32], 1), np.delete(z, np.s_[:32], 1))
        assert np.abs(4.0 * codes[1, :32] - np.asarray(z[1, :32], float)).max() <= 2
    assert sum(t.n_bytes for t in reader.tensors if len(t.shape) == 2) * 32 == 34 * sum(
        t.n_elements for t in reader.tensors if len(t.shape) == 2)


def test_q8_0_rounds_what_is_not_of_one_level(tmp_path):
    model, other = levelled(WIDE), levelled(WIDE)
    packed = {name: random_layer(3, *shape, 4) for name, shape in llama.shapes(WIDE).items()}
    other.params["blocks"][1] |= packed
    k = other.params["blocks"][0]["k"]  # no norm takes two b
    other.params["blocks"][0]["k"] = dataclasses.replace(k, q=k.q._replace(column=k.q.column.at[5].add(1)))
    for given, blocks in ((model, ()), (other, (0, 1))):
        found = export.export(given, "gguf", tmp_path / f"{len(blocks)}.gguf", "q8_0")
        lost = {name.split(".")[1] for name, one in found.items() if "." in name and not one.kept}
        assert lost == set(map(str, blocks))
        assert max(one.error for one in found.values()) < 0.01
        assert_close(logits(convert.load(tmp_path / f"{len(blocks)}.gguf")), computed(given), 0.05)


def with_low_rank(model):
    """The same with an L R of rank 2, one level, beside some layers."""
    def factor(rng, m, n):
        one = lambda size: jnp.asarray(rng.integers(-3, 4, size))
        return Levelled(jnp.float32(0.05), jnp.asarray(rng.integers(-5, 6, (m, n)), jnp.int8), one(m), one(n), one(m),
                        one(n))

    rng = np.random.default_rng(9)
    for block in model.params["blocks"]:
        for name in ("q", "v", "o", "up", "down"):
            m, n = block[name].shape
            block[name] = dataclasses.replace(block[name], left_t=factor(rng, m, 2), right=factor(rng, 2, n))
    return model


def adapted(model, of_layer):
    """The logits of a base with L R, as ``of_layer`` finds them, beside its layers."""
    params = weights.whole(model.params)
    blocks = [{name: np.asarray(value, np.float64) + (of_layer(i, name) if name in llama.LINEARS else 0)
               for name, value in block.items()} for i, block in enumerate(params["blocks"])]
    return np.asarray(forward(model.config, params | {"blocks": blocks}, jnp.asarray(TOKENS)))


@pytest.mark.parametrize(("make_it", "to", "dtype", "bound"), [
    (lambda: make(CONFIGS["llama"]), "hf", "float32", 1e-5), (lambda: make(CONFIGS["llama"]), "gguf", "float32", 1e-5),
    (lambda: with_low_rank(levelled(dataclasses.replace(WIDE, qkv_bias=True))), "gguf", "q8_0", 0.02),
    (lambda: with_low_rank(levelled(dataclasses.replace(WIDE, kv_heads=2))), "gguf", "q8_0", 0.02)])
def test_a_base_and_its_adapter_are_the_model(tmp_path, make_it, to, dtype, bound):
    model = make_it()
    base, adapter = tmp_path / f"base.{to}", tmp_path / "deep" / f"adapter.{to}"
    found = export.export(model, to, base, dtype, adapter)
    assert dtype != "q8_0" or all(one.kept == one.of for path, one in found.items() if path.endswith("q"))
    back = convert.load(base)
    if to == "hf":
        stored = load_file(adapter / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert set(config["rank_pattern"].values()) == {4} and config["r"] == config["lora_alpha"] == 4
        assert config["target_modules"] == list(config["rank_pattern"]) and len(stored) == 2 * 14

        def of_layer(i, name):
            module = f"base_model.model.model.layers.{i}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"
            return stored[f"{module}.lora_B.weight"] @ np.float64(stored[f"{module}.lora_A.weight"])
    else:
        reader = gguf.GGUFReader(adapter)
        said = {key: field.contents() for key, field in reader.fields.items()}
        assert (said["general.type"], said["adapter.type"], said["adapter.lora.alpha"]) == ("adapter", "lora", 0)
        assert said["general.architecture"] == ("qwen2" if model.config.qkv_bias else "llama")
        stored = {t.name: np.asarray(t.data) for t in reader.tensors}

        def of_layer(i, name):
            tensor = convert.GGUF[name].format(i)
            if f"{tensor}.lora_a" not in stored:
                return 0.0
            both = stored[f"{tensor}.lora_b"] @ np.float64(stored[f"{tensor}.lora_a"])
            heads = convert._paired(model.config).get(name)
            return both if heads is None else convert._pair_halves(lambda: both, heads)

    assert_close(adapted(back, of_layer), computed(model), bound)
    without = np.abs(computed(back) - computed(model)).max()
    assert without > 2 * bound * np.abs(computed(model)).max()  # so it does something


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own use of transformers
def test_peft_applies_the_adapter(tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = make(CONFIGS["llama"])
    export.export(model, "hf", tmp_path / "base", "float32", tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert_close(theirs.eval()(torch.tensor(TOKENS).long()).logits.numpy(), logits(model), 1e-4)


def test_an_adapter_that_cannot_be_is_refused_by_name_and_nothing_is_left(tmp_path):
    fused, other = (dataclasses.replace(PLAIN, family=family) for family in ("phi3", "qwen3"))
    plain = levelled(dataclasses.replace(WIDE, kv_heads=2))
    for model, to, adapter, message in (
            (plain, "gguf", "a.gguf", "has no L R: leave --adapter out"),
            (make(PLAIN), "gguf", "a.bin", "let --adapter end in .gguf"),
            (make(other), "gguf", "a.gguf", "GGUF files of family 'qwen3' are not written"),
            (make(fused), "hf", "a", "'phi3', in whose files gate is a part of a larger matrix")):
        with pytest.raises(ValueError, match=message):
            export.export(model, to, tmp_path / "base.gguf", "float32", tmp_path / adapter)
        assert not list(tmp_path.iterdir())


def test_a_scale_beyond_float16_is_named_and_nothing_is_left(tmp_path):
    model = levelled(WIDE)
    model.params["blocks"][1]["gate"] = model.params["blocks"][1]["gate"].dense() * np.float32(1e9)
    with pytest.raises(ValueError, match=r"blocks.1.gate: a scale of .* float16 of Q8_0.*--dtype float32"):
        export.export(model, "gguf", tmp_path / "m.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "dtype", "size"), [("hf", "bfloat16", 3.4e38), ("gguf", "float16", 70_000.0)])
def test_a_weight_too_large_for_the_type_is_named_and_nothing_is_left(tmp_path, to, dtype, size):
    model = make(PLAIN)
    down = exact(model.params["blocks"][1]["down"])
    down[0, 0] = size
    model.params["blocks"][1]["down"] = down
    with pytest.raises(ValueError, match=rf"blocks.1.down: .*too large for {dtype}.*--dtype"):
        export.export(model, to, tmp_path / "out.gguf", dtype)
    assert not list(tmp_path.iterdir())
    export.export(model, to, tmp_path / "out.gguf", "float32")


# ---- GGUF


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_comes_back_from_gguf(tmp_path, pre):
    special = {"bos_token": "<|end|>", "eos_token": "<|end|>", "chat_template": "{{ messages }}"}
    model = make(PLAIN, byte_level(pre), special)
    export.export(model, "gguf", tmp_path / "m.gguf")
    reader = convert.read_gguf(tmp_path / "m.gguf")
    fields = tokenizer.contents(reader)
    assert fields["tokenizer.ggml.pre"] == pre and fields["tokenizer.ggml.model"] == "gpt2"
    assert len(fields["tokenizer.ggml.tokens"]) == PLAIN.vocab and fields["tokenizer.ggml.tokens"][-1] == "[PAD419]"
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|end|>"], kinds["<think>"], kinds["[PAD419]"], kinds["a"]) == (3, 4, 5, 1)
    assert fields["tokenizer.ggml.eos_token_id"] == model.tokenizer.token_to_id("<|end|>")
    assert not fields["tokenizer.ggml.add_bos_token"]
    back = convert.load(tmp_path / "m.gguf")
    assert back.special == special
    for text in TEXTS:
        assert back.tokenizer.encode(text).ids == model.tokenizer.encode(text).ids


def test_a_token_that_is_called_as_padding_is_keeps_its_name(tmp_path):
    made = byte_level("gpt-2")
    made.add_tokens(["[PAD419]"])
    export.export(make(PLAIN, made, {}), "gguf", tmp_path / "m.gguf")
    names = tokenizer.contents(convert.read_gguf(tmp_path / "m.gguf"))["tokenizer.ggml.tokens"]
    assert names[made.token_to_id("[PAD419]")] == "[PAD419]" and names[-1] == "[[PAD419]]"
    assert convert.load(tmp_path / "m.gguf").tokenizer.encode("a[PAD419]").ids == made.encode("a[PAD419]").ids


@pytest.mark.parametrize(("prefix", "bos"), [(True, True), (False, True), (True, False)])
def test_a_sentencepiece_tokenizer_comes_back_from_gguf(tmp_path, prefix, bos):
    model = make(dataclasses.replace(PLAIN, vocab=460), sentencepiece(prefix, bos), {"eos_token": "</s>"})
    export.export(model, "gguf", tmp_path / "m.gguf")
    fields = tokenizer.contents(convert.read_gguf(tmp_path / "m.gguf"))
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert fields["tokenizer.ggml.add_bos_token"] == bos and fields["tokenizer.ggml.add_space_prefix"] == prefix
    back = convert.load(tmp_path / "m.gguf")
    for text in TEXTS:
        ids = model.tokenizer.encode(text).ids
        assert back.tokenizer.encode(text).ids == ids and (ids[:1] == [1]) == bos
        assert back.tokenizer.decode(ids) == model.tokenizer.decode(ids)


def changed(part, value, base=None):
    raw = json.loads((base or byte_level("gpt-2")).to_str())
    inner = raw["model"] if part in raw["model"] else raw
    inner[part] = value(inner[part]) if callable(value) else value
    return Tokenizer.from_str(json.dumps(raw))


NFC, FIRST = {"type": "NFC"}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
STRIPPED = [{"id": 400, "content": "<mask>", "single_word": False, "lstrip": True, "rstrip": False,
             "normalized": False, "special": True}]
TWICE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}] * 2 + [
    {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {
    "<|end|>": {"id": "<|end|>", "ids": [400], "tokens": ["<|end|>"]}}}


@pytest.mark.parametrize(("text", "what"), [
    (changed("normalizer", NFC), "normalizer"), (changed("pre_tokenizer", None), "pre-tokenizer"),
    (changed("pre_tokenizer", FIRST, sentencepiece()), "pre-tokenizer"), (changed("added_tokens", STRIPPED), "added"),
    (changed("ignore_merges", True), "options"), (changed("dropout", 0.1), "options"),
    (changed("merges", []), "without merges"), (changed("post_processor", TWICE), "template"),
    (changed("merges", lambda all: all[:-1], sentencepiece()), "merges"),
    (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "kind, WordLevel"),
])
def test_a_tokenizer_that_gguf_has_no_words_for_is_refused_by_part(tmp_path, text, what):
    with pytest.raises(ValueError, match=f"no words for this tokenizer's.*{what}.*--to hf"):
        export.export(make(PLAIN, text), "gguf", tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_refuses_foreign_rope_scalings_and_says_what_holds_them(tmp_path):
    other = dataclasses.replace(CONFIGS["llama3"], rope_scaling=dataclasses.replace(SCALING, high_freq_factor=8.0))
    for config in (dataclasses.replace(CONFIGS["qwen2"], rope_scaling=SCALING), other):
        with pytest.raises(ValueError, match="rope scaling.*--to hf"):
            export.export(make(config), "gguf", tmp_path / "m.gguf")


@pytest.mark.extra
def test_transformers_reads_a_qwen2_gguf_with_our_logits_and_tokens(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    model = make(CONFIGS["qwen2"], byte_level("qwen2"), {"eos_token": "<|end|>"})
    export.export(model, "gguf", tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    assert theirs.config.model_type == "qwen2"
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    assert_close(expected, logits(convert.load(tmp_path / "m.gguf")), 1e-5)
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert encode(text)["input_ids"] == model.tokenizer.encode(text).ids


def test_rows_of_q_and_k_are_in_ggufs_pairs(tmp_path):
    """Row 2 i + j of a head in the file is row i + j e / 2 of ours."""
    model = make(PLAIN)
    export.export(model, "gguf", tmp_path / "m.gguf")
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    ours = np.asarray(DENSE(model.params["blocks"][0]["q"])).reshape(2, 12, 24)
    theirs = stored["blk.0.attn_q.weight"].reshape(2, 12, 24)
    assert_close(theirs[:, [0, 1, 2, 11]], ours[:, [0, 6, 1, 11]], 24 * 2.0**-23)
    assert "rope_freqs.weight" not in stored and stored["output_norm.weight"].dtype == np.float32


# ---- faults


@pytest.mark.parametrize(("arguments", "message"), [
    (("onnx", "out"), "unknown format 'onnx': choose one of hf, gguf"),
    (("hf", "out", "float16"), "--to hf is written in float32 or bfloat16, got 'float16'"),
    (("gguf", "out.gguf", "bfloat16"), "--to gguf is written in float32 or float16 or q8_0"),
    (("gguf", "out.gguf", "q8_0"), "Q8_0 has a scale for 32 inputs, and embed has 24: choose another --dtype"),
    (("hf", "out", "q8_0"), "--to hf is written in float32 or bfloat16, got 'q8_0'"),
    (("gguf", "out"), "let --out end in .gguf"),
])
def test_a_wrong_request_is_answered_with_what_is_possible(tmp_path, arguments, message):
    to, out, *dtype = arguments
    with pytest.raises(ValueError, match=message):
        export.export(make(PLAIN), to, tmp_path / out, *dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_what_is_there_is_never_written_over(tmp_path, to):
    kept = tmp_path / "kept.gguf"
    kept.write_text("mine")
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty.gguf").mkdir()
    for name in ("kept.gguf", "empty.gguf", "dangling.gguf"):
        with pytest.raises(ValueError, match=f"{name} exists: choose another --out, or remove it"):
            export.export(make(PLAIN), to, tmp_path / name)
    assert kept.read_text() == "mine" and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_file_that_cannot_grow_leaves_nothing_behind(tmp_path, to):
    """A limit on the size of files stands for a full disk."""
    model, limits = make(PLAIN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="out.gguf: not written, and nothing of it is left .* free some space"):
            export.export(model, to, tmp_path / "out.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    export.export(model, to, tmp_path / "out.gguf")
    convert.load(tmp_path / "out.gguf")


def test_a_model_is_written_a_part_at_a_time(tmp_path):
    """Memory for the blocks is that of one file's part, however many there are."""
    config = dataclasses.replace(PLAIN, layers=24, ffn_dim=1024)
    layer = {name: np.ones(shape, np.float32) for name, shape in (llama.shapes(config) | llama.vector_shapes(config)
                                                                  ).items()}
    block = weights.Block({name: (lambda value=value: value.copy()) for name, value in layer.items()})
    params = {"embed": np.ones((420, 24), np.float32), "norm": np.ones(24, np.float32),
              "head": np.ones((420, 24), np.float32), "blocks": [block] * config.layers}
    model = convert.Model(config, params, byte_level("gpt-2"), "large")
    one, most = sum(value.nbytes for value in layer.values()), {}
    writers = {"hf": lambda out: convert.save_hf(out, config, params, shard_bytes=one),
               "gguf": lambda out: convert.save_gguf(out, model)}
    for to, write in writers.items():
        gc.collect()
        tracemalloc.start()
        write(tmp_path / to)
        most[to] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(most.values()) < 6 * one, most  # of the 24 blocks


# ---- the built-in model


@pytest.mark.extra
@pytest.mark.slow
def test_smollm2_comes_back_from_gguf_and_from_transformers_with_its_logits_and_tokenizer(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    model = convert.load("smollm2-135m")
    text = data.load_text("enwiki")[0][:4000]
    tokens = tokenizer.encode(model.tokenizer, text)[None, :256]
    expected = np.asarray(forward(model.config, weights.whole(model.params), tokens))
    export.export(model, "gguf", tmp_path / "m.gguf")
    back = convert.load(tmp_path / "m.gguf")
    assert back.special == model.special and "<|im_end|>" == model.special["eos_token"]
    assert back.tokenizer.encode(text).ids == model.tokenizer.encode(text).ids
    assert_close(np.asarray(forward(back.config, weights.whole(back.params), tokens)), expected, 1e-6)
    export.export(model, "hf", tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert_close(theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy(), expected, 1e-3)
    assert theirs.generation_config.eos_token_id == 2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m")(text)["input_ids"] == back.tokenizer.encode(
        text).ids
