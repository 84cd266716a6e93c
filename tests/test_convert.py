"""Model files: round trips, agreement of GGUF with Hugging Face, and a clear refusal of everything else."""

import dataclasses
import json
import sys

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from caldera_jax.models import convert, data, llama, tokenizer, weights
from caldera_jax.models.llama import LinearRopeScaling, Llama3RopeScaling, LlamaConfig

SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
PLAIN = LlamaConfig(vocab=50, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64, norm_eps=1e-5, context=256)
CONFIGS = {
    "llama": PLAIN,
    "tied": dataclasses.replace(PLAIN, tied=True, kv_heads=4),
    "llama3": dataclasses.replace(PLAIN, rope_theta=5e5, rope_scaling=SCALING, head_dim=16),
    "linear": dataclasses.replace(PLAIN, rope_scaling=LinearRopeScaling(2.5)),
    "mistral": dataclasses.replace(PLAIN, sliding_window=16),
    "qwen2": dataclasses.replace(PLAIN, qkv_bias=True),
}
HF = CONFIGS | tiny.FAMILIES
read = lambda model: (model[0], weights.whole(model[1]))
forward = jax.jit(llama.forward, static_argnums=0)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 50, (2, 24)))


def make(config, dtype=np.float32):
    return jax.tree.map(lambda p: np.asarray(p).astype(dtype), llama.init(jax.random.key(0), config))


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# ---- Hugging Face directories


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_saving_and_loading_is_exact_whatever_the_shards(tmp_path, dtype, shard_bytes):
    params = make(PLAIN, dtype)
    convert.save_hf(tmp_path, PLAIN, params, shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes < 2**30)
    config, loaded = read(convert.from_hf(tmp_path))
    assert config == PLAIN and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
    assert_equal_trees(loaded, params)


@pytest.mark.parametrize("config", HF.values(), ids=HF.keys())
def test_every_configuration_and_all_its_arrays_survive_their_files(tmp_path, config):
    params = make(config)
    convert.save_hf(tmp_path, config, params)
    found, loaded = read(convert.from_hf(tmp_path))
    assert found == config
    assert_equal_trees(loaded, params)


def test_a_configuration_that_no_architecture_describes_is_not_written(tmp_path):
    mixture = dataclasses.replace(PLAIN, qkv_bias=True, sliding_window=8)
    with pytest.raises(ValueError, match="no Hugging Face architecture"):
        convert.save_hf(tmp_path, mixture, make(mixture))


def test_a_model_is_not_written_over_another(tmp_path):
    convert.save_hf(tmp_path, PLAIN, make(PLAIN))
    with pytest.raises(ValueError, match="already holds"):
        convert.save_hf(tmp_path, PLAIN, make(PLAIN))


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
SAVED = {
    "Llama": {"rope_theta": 5e4, "tie_word_embeddings": True}, "Mistral": {"sliding_window": 5}, "Qwen2": {},
    "Qwen3": {"head_dim": 10},
    "Gemma2": {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0,
               "final_logit_softcapping": 5.0},
    "Gemma3Text": {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 20, "sliding_window_pattern": 3,
                   "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default",
                                                                                      "rope_theta": 50.0}}},
    "Phi3": {"sliding_window": 6}, "Olmo2": {},
    "Granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
                "logits_scaling": 1.7},
}  # fmt: skip


@pytest.mark.extra
@pytest.mark.parametrize("kind", SAVED)
def test_what_transformers_saves_gives_the_same_logits(tmp_path, kind):
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=36, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=52, max_position_embeddings=64, pad_token_id=None, **SAVED[kind])
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    model.set_attn_implementation("eager")  # others leave out soft caps
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor(np.array(TOKENS))).logits.numpy()
    assert expected.std() > 0.1
    config, params = read(convert.from_hf(tmp_path))
    np.testing.assert_allclose(forward(config, params, TOKENS), expected, atol=1e-4)


LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip


def test_llama_2_configuration_is_read():
    expected = LlamaConfig(32000, 4096, 32, 32, 32, 128, 11008, 10_000.0, None, 1e-5, False, 4096)
    assert convert.config_from_hf(LLAMA_2) == expected


def test_old_and_new_rope_keys_mean_the_same():
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
    old = convert.config_from_hf(LLAMA_2 | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = convert.config_from_hf(LLAMA_2 | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert (
        old
        == new
        == dataclasses.replace(
            convert.config_from_hf(LLAMA_2), rope_theta=5e5, rope_scaling=Llama3RopeScaling(32.0, 1.0, 4.0, 8192)
        )
    )


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_rope_scaling_is_read_in_every_spelling_and_a_factor_of_1_is_none(key):
    old = convert.config_from_hf(LLAMA_2 | {"rope_scaling": {key: "linear", "factor": 4}})
    new = convert.config_from_hf(LLAMA_2 | {"rope_parameters": {key: "linear", "factor": 4.0, "rope_theta": 1e4}})
    assert old == new == dataclasses.replace(convert.config_from_hf(LLAMA_2), rope_scaling=LinearRopeScaling(4.0))
    assert convert.config_from_hf(LLAMA_2 | {"rope_scaling": {"factor": 1.0}}).rope_scaling is None


def test_mistral_window_is_4096_unless_the_file_says_otherwise():
    mistral = LLAMA_2 | {"architectures": ["MistralForCausalLM"]}
    assert convert.config_from_hf(mistral).sliding_window == 4096
    assert convert.config_from_hf(mistral | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        ({"architectures": None}, "none named"),
        *(({"rope_scaling": {key: kind, "factor": 4.0}}, f"rope scaling '{kind}' is not supported")
          for kind in ("yarn", "dynamic", "longrope") for key in ("type", "rope_type")),
        ({"rope_scaling": {"factor": 4.0}}, "a rope scaling by 4.0 without a rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor as a number, got None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "needs a positive factor, got 0"),
        ({"rope_scaling": "linear"}, "rope_scaling: 'linear' is no object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}}, "own for full_attention"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"type": "default"}}, "differ in type"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"architectures": 5}, "architectures: 5 is no list"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false' is no truth value"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps as a number, got nan"),
        ({"rope_theta": 0}, "rope_theta must be positive"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor as a number, got None"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_size": "4096"}, "hidden_size as a positive integer, got '4096'"),
        ({"rms_norm_eps": None}, "rms_norm_eps as a number, got None"),
        ({"vocab_size": None}, "vocab_size as a positive integer, got None"),
        ({"num_key_value_heads": 5}, "do not divide"),
    ],
)
def test_an_unsupported_configuration_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        convert.config_from_hf(LLAMA_2 | change)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(Q), f"{Q} is missing"),
        (lambda t: t.update({"model.layers.0.mlp.experts": t[Q]}), "does not use: model.layers.0.mlp.experts"),
        (
            lambda t: t.update({Q: t[Q][:-1].copy()}),
            rf"{Q} has shape \(31, 32\), the configuration asks for \(32, 32\)",
        ),
        (lambda t: t.update({Q: t[Q].astype(np.int8)}), f"{Q} is I8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    convert.save_hf(tmp_path, PLAIN, make(PLAIN))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert.from_hf(tmp_path)


def test_a_tied_head_may_be_stored_if_it_equals_the_embedding(tmp_path):
    config, params = CONFIGS["tied"], make(CONFIGS["tied"])
    convert.save_hf(tmp_path, config, params)
    tensors = load_file(tmp_path / "model.safetensors") | {"lm_head.weight": params["embed"]}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal_trees(read(convert.from_hf(tmp_path))[1], params)
    save_file(tensors | {"lm_head.weight": params["embed"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        convert.from_hf(tmp_path)


def test_damaged_or_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        convert.from_hf(tmp_path)
    convert.save_hf(tmp_path, PLAIN, make(PLAIN), shard_bytes=20_000)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"{last.name}: damaged"):
        convert.from_hf(tmp_path)
    last.unlink()
    with pytest.raises(ValueError, match=f"no {last.name}"):
        convert.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        convert.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: not a JSON object"):
        convert.from_hf(tmp_path)


@pytest.mark.parametrize("left", [True, False])
def test_beside_an_index_the_single_file_is_the_model_as_in_transformers_and_that_is_said(tmp_path, capsys, left):
    """Whether the index's files are another model, or are gone."""
    params, other = make(PLAIN), make(PLAIN, np.float16)
    convert.save_hf(tmp_path, PLAIN, other, shard_bytes=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    convert.save_hf(tmp_path / "single", PLAIN, params)
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "model.safetensors")
    for shard in [] if left else shards:
        shard.unlink()
    assert_equal_trees(read(convert.from_hf(tmp_path))[1], params)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "model.safetensors is read, as transformers does, and model.safeten" in said


def test_a_tensor_in_two_files_or_not_where_the_index_says_is_named(tmp_path):
    convert.save_hf(tmp_path, PLAIN, make(PLAIN), shard_bytes=20_000)
    index, files = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("*.safetensors"))
    whole, last = json.loads(index.read_text()), load_file(files[-1])
    name = next(name for name, file in whole["weight_map"].items() if file == files[0].name)
    save_file(last | {name: load_file(files[0])[name]}, files[-1])
    with pytest.raises(ValueError, match=f"tensor {name} is in {files[0].name} and in {files[-1].name}"):
        convert.from_hf(tmp_path)
    save_file(last, files[-1])
    missing = {"model.other.weight": files[0].name, name: files[-1].name}
    for tensor, file in missing.items():
        index.write_text(json.dumps(whole | {"weight_map": whole["weight_map"] | {tensor: file}}))
        with pytest.raises(ValueError, match=f"tensor {tensor} is not in {file}, where it should be"):
            convert.from_hf(tmp_path)
    for bad in (None, [], {name: [1]}):
        index.write_text(json.dumps(whole | {"weight_map": bad}))
        with pytest.raises(ValueError, match="weight_map.*is no"):
            convert.from_hf(tmp_path)


def test_a_save_that_was_cut_off_is_no_model_and_can_be_repeated(tmp_path):
    def cut_off():
        raise KeyboardInterrupt

    params = make(PLAIN)
    last = weights.Block({name: cut_off for name in params["blocks"][1]})
    with pytest.raises(KeyboardInterrupt):
        convert.save_hf(tmp_path, PLAIN, params | {"blocks": [params["blocks"][0], last]}, shard_bytes=20_000)
    with pytest.raises(ValueError, match="no config.json"):
        convert.from_hf(tmp_path)
    convert.save_hf(tmp_path, PLAIN, params, shard_bytes=20_000)
    assert_equal_trees(read(convert.from_hf(tmp_path))[1], params)


# ---- GGUF


def write_gguf(path, config, params, kind=None, architecture="llama", extra=None, more=(), **options):
    """``params`` as llama.cpp's converter lays them out: of llama, rows of q and k in interleaved rotary pairs."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)

    def interleave(weight, heads):
        return np.concatenate([part[np.arange(len(part)).reshape(2, -1).T.ravel()] for part in np.split(weight, heads)])

    def add(name, value):
        if kind is not None and value.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))

    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
             "down": "ffn_down", "attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}  # fmt: skip
    names = {part: f"{name}.weight" for part, name in names.items()}
    names |= {f"{part}_bias": f"attn_{part}.bias" for part in "qkv"}
    add("token_embd.weight", params["embed"])
    add("output_norm.weight", params["norm"])
    if not config.tied:
        add("output.weight", params["head"])
    for i, block in enumerate(params["blocks"]):
        if architecture == "llama":
            block = block | {"q": interleave(block["q"], config.heads), "k": interleave(block["k"], config.kv_heads)}
        for part, value in block.items():
            add(f"blk.{i}.{names[part]}", value)
    if config.rope_scaling is not None:
        plain, scaled = (
            llama.rope_frequencies(config.head_dim, config.rope_theta, s) for s in (None, config.rope_scaling)
        )
        add("rope_freqs.weight", (plain / scaled).astype(np.float32))
    for name, value in more:
        add(name, value)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return path


@pytest.mark.parametrize("name", ["llama", "tied", "llama3", "qwen2"])
def test_gguf_and_hugging_face_files_give_the_same_model(tmp_path, name):
    config, params = CONFIGS[name], make(CONFIGS[name])
    convert.save_hf(tmp_path / "hf", config, params)
    path = write_gguf(tmp_path / "m.gguf", config, params, architecture="qwen2" if config.qkv_bias else "llama")
    found, from_gguf = read(convert.from_gguf(convert.read_gguf(path)))
    found = dataclasses.replace(found, norm_eps=config.norm_eps)  # GGUF keeps a float32
    assert found == config
    assert_equal_trees(from_gguf, read(convert.from_hf(tmp_path / "hf"))[1])


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "bfloat16"])
def test_rows_of_embedding_and_head_are_read_as_they_are_in_the_whole(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(convert, "STEP", 8)
    if kind == "bfloat16":
        convert.save_hf(tmp_path, PLAIN, make(PLAIN, ml_dtypes.bfloat16))
        _, params = convert.from_hf(tmp_path)
    else:
        path = write_gguf(tmp_path / "m.gguf", PLAIN, make(PLAIN), gguf.GGMLQuantizationType[kind])
        _, params = convert.from_gguf(convert.read_gguf(path))
    for table in (params["embed"], params["head"]):
        assert isinstance(table, weights.Table) and table.shape == (50, 32)
        whole = np.asarray(table)
        assert table.dtype == whole.dtype
        for tokens in (np.asarray(TOKENS), np.array([49, 0, 7, 8, 49]), np.zeros((0, 5), int)):
            np.testing.assert_array_equal(table[tokens], whole[tokens])
        assert table.nbytes == whole.nbytes
        for bad in ([50], [3, -1]):
            with pytest.raises(IndexError, match="of an embedding or head of 50 rows"):
                table[np.array(bad)]


def test_a_file_that_is_replaced_or_gone_is_named_not_read(tmp_path):
    convert.save_hf(tmp_path, PLAIN, make(PLAIN))
    _, params = convert.from_hf(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    for change in (lambda file: file.write_bytes(file.read_bytes() + b" "), lambda file: file.unlink()):
        change(files[0])
        for read in (lambda: params["embed"][np.array([1])], lambda: params["blocks"][0]["q"]):
            with pytest.raises(ValueError, match="gone or replaced since the model was opened"):
                read()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_a_quantized_gguf_gives_the_rounded_weights(tmp_path, name):
    """Quantizers work along a row, so rounding commutes with the permutation of rows."""
    kind, params = gguf.GGMLQuantizationType[name], make(PLAIN)
    rounded = lambda p: gguf.quants.dequantize(gguf.quants.quantize(p, kind), kind) if p.ndim == 2 else p
    path = write_gguf(tmp_path / "m.gguf", PLAIN, params, kind)
    config, loaded = read(convert.from_gguf(convert.read_gguf(path)))
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, rounded(y))
    expected = forward(config, jax.tree.map(rounded, params), TOKENS)
    np.testing.assert_allclose(forward(config, loaded, TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architecture": "gemma"}, "architecture 'gemma'"),
        ({"architecture": "qwen2"}, "tensor blk.0.attn_q.bias is missing"),
        ({"architecture": "qwen2", "extra": {"qwen2.expert_count": 8}}, "expert_count = 8.*'qwen2'"),
        *(({"extra": {"llama.rope.scaling.type": kind}}, f"rope scaling '{kind}'") for kind in ("yarn", "longrope")),
        ({"extra": {"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0}}, "rope scaling is told twice"),
        ({"extra": {"llama.rope.scaling.factor": 4.0}, "more": [("rope_freqs.weight", np.ones(4, np.float32))]},
         "rope scaling is told twice"),
        ({"extra": {"llama.rope.scaling.factor": -2.0}}, "needs a positive factor"),
        ({"extra": {"llama.logit_scale": 0.5}}, "GGUF logit_scale = 0.5"),
        ({"extra": {"llama.expert_count": 8}}, "GGUF expert_count = 8"),
        ({"extra": {"llama.attention.sliding_window": "a"}}, "sliding_window as a positive integer, got 'a'"),
        ({"extra": {"llama.rope.scaling.type": 7}}, "rope scaling 7"),
        ({"more": [("blk.0.attn_q.bias", np.zeros(32, np.float32))]}, "does not use: blk.0.attn_q.bias"),
        ({"more": [("rope_freqs.weight", np.array([1, 1, 2, 3], np.float32))]}, "rope_freqs.weight is not Llama 3"),
    ],
)
def test_an_unsupported_gguf_is_refused_by_name(tmp_path, options, message):
    path = write_gguf(tmp_path / "m.gguf", PLAIN, make(PLAIN), **options)
    with pytest.raises(ValueError, match=message):
        convert.from_gguf(convert.read_gguf(path))


@pytest.mark.parametrize(("told", "factor"), [
    ({"llama.rope.scale_linear": 4.0}, 4.0), ({"llama.rope.scaling.factor": 4.0}, 4.0),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
    ({"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 4.0}, 4.0),
    ({"llama.rope.scale_linear": 1.0}, None), ({"llama.rope.scaling.factor": 0.0}, None), ({}, None),
    ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None)])
def test_linear_rope_scaling_of_a_gguf_is_computed_and_a_factor_of_1_or_0_is_none(tmp_path, told, factor):
    path = write_gguf(tmp_path / "m.gguf", PLAIN, make(PLAIN), extra=told)
    assert convert.from_gguf(convert.read_gguf(path))[0].rope_scaling == (factor and LinearRopeScaling(factor))


@pytest.mark.parametrize("empty", [False, True])
def test_all_parts_of_a_split_gguf_are_read(tmp_path, empty):
    """Also where the first has the metadata alone."""
    params = make(PLAIN)
    write_gguf(tmp_path / "m.gguf", PLAIN, params, split_max_tensors=8, small_first_shard=empty)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert parts[0].name == f"m-00001-of-{len(parts):05d}.gguf" and len(parts) == 3 + empty
    assert_equal_trees(read(convert.from_gguf(convert.read_gguf(parts[0])))[1], params)
    with pytest.raises(ValueError, match=f"part 2 of {len(parts)} of a GGUF file: give the first.*-00001-of-"):
        convert.read_gguf(parts[1])
    whole = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(ValueError, match=f"{parts[2].name}: not part 3 of"):
        convert.read_gguf(parts[0])
    parts[2].unlink()
    with pytest.raises(ValueError, match=f"its part 3 of {len(parts)} is not there: put {parts[2].name} beside it"):
        convert.read_gguf(parts[0])
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "m.gguf", PLAIN, params, split_max_tensors=8, small_first_shard=empty,
               more=[("extra", np.ones(3, np.float32))])
    parts[2].write_bytes(whole)
    parts[-1].write_bytes((tmp_path / "other" / parts[-1].name).read_bytes())
    with pytest.raises(ValueError, match="should hold another number"):
        convert.read_gguf(parts[0])
    renamed = parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(ValueError, match="part 1 of .*called NAME-00001-of-"):
        convert.read_gguf(renamed)


def test_lengths_beyond_the_end_of_a_gguf_file_are_refused_at_once(tmp_path):
    """Of a list of 2^40 or 2^20 bytes, of a text of 2^60, and of more blocks than can be counted."""
    for count in (2**40, 2**20, 2**60):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_array("list", list(b"abc")) if count != 2**60 else writer.add_string("list", "abc")
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
            write()
        whole = (tmp_path / "m.gguf").read_bytes()
        if count != 2**60:  # of bytes: four to a number before
            at = whole.index(b"list") + 8
            whole = whole[:at] + (0).to_bytes(4, "little") + whole[at + 4:]
        end = whole.rindex((3).to_bytes(8, "little"))
        (tmp_path / "m.gguf").write_bytes(whole[:end] + count.to_bytes(8, "little") + whole[end + 8:])
        with pytest.raises(ValueError, match="m.gguf: not a readable GGUF file"):
            convert.read_gguf(tmp_path / "m.gguf")
    many = write_gguf(tmp_path / "n.gguf", dataclasses.replace(PLAIN, layers=2**32 - 1), make(PLAIN))
    with pytest.raises(ValueError, match="blk.2.attn_q.weight is missing"):
        convert.from_gguf(convert.read_gguf(many))


@pytest.mark.parametrize("keep", [3, 100, 2000, -100])
def test_a_gguf_file_cut_short_is_refused(tmp_path, keep):
    path = write_gguf(tmp_path / "m.gguf", PLAIN, make(PLAIN))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="m.gguf: not a readable GGUF"):
        convert.read_gguf(path)


# ---- load


def save_tokenizer(path, size):
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")).save(str(path / "tokenizer.json"))


def test_load_reads_a_directory_with_its_tokenizer(tmp_path):
    convert.save_hf(tmp_path, PLAIN, make(PLAIN))
    with pytest.raises(ValueError, match="no tokenizer.json"):
        convert.load(tmp_path)
    save_tokenizer(tmp_path, 50)
    model = convert.load(tmp_path)
    assert model.config == PLAIN and model.name == str(tmp_path) and model.tokenizer.get_vocab_size() == 50
    save_tokenizer(tmp_path, 51)
    with pytest.raises(ValueError, match="51 tokens, the model only 50 embeddings, none for token 50, 'w50'"):
        convert.load(tmp_path)


@pytest.mark.parametrize("template", [None, "from a file"])
def test_load_knows_the_special_tokens_in_every_spelling_of_tokenizer_config(tmp_path, template):
    convert.save_hf(tmp_path, PLAIN, make(PLAIN))
    save_tokenizer(tmp_path, 50)
    assert convert.load(tmp_path).special == {}
    raw = {"bos_token": {"__type": "AddedToken", "content": "w1"}, "eos_token": "w2", "pad_token": None,
           "chat_template": "from the configuration"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(raw))
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    expected = {"bos_token": "w1", "eos_token": "w2", "chat_template": template or raw["chat_template"]}
    assert convert.load(tmp_path).special == expected


def test_a_sliding_window_that_others_do_not_see_is_said_in_one_line(tmp_path, capsys):
    """Read from config.json, read from GGUF's key, and missing in a GGUF file that calls itself Mistral."""
    windowed, special = CONFIGS["mistral"], {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    convert.save_hf(tmp_path / "hf", windowed, make(windowed))
    save_tokenizer(tmp_path / "hf", 50)
    convert.load(tmp_path / "hf")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "hf: each token sees the last 16 only (sliding_window), which other" in said
    convert.load(tmp_path / "hf")
    assert not capsys.readouterr().err
    key = "llama.attention.sliding_window"
    for name, more, message in (("a", {key: 16}, "a.gguf: each token sees the last 16 only"),
                                ("b", {"general.name": "Mistral-7B-v0.1"}, "b.gguf: the file names no sliding window"),
                                ("c", {key: 0}, ""), ("d", {key: 256}, "")):
        lists = {"tokens": ["a", "b", "ab", *(f"w{i}" for i in range(47))], "merges": ["a b"]}
        extra = special | {f"tokenizer.ggml.{key}": value for key, value in lists.items()} | more
        convert.load(write_gguf(tmp_path / f"{name}.gguf", PLAIN, make(PLAIN), extra=extra))
        said = capsys.readouterr().err
        assert said.count("\n") == bool(message) and message in said


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/place", "a.gguf"])
def test_an_unknown_model_is_told_what_is_accepted(name):
    with pytest.raises(ValueError, match=r"unknown model .*smollm2-135m.*\.gguf.*directory.*hub id"):
        convert.load(name)


def test_a_hub_id_without_huggingface_hub_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'caldera-jax\[hub\]'"):
        convert.load("org/name")


@pytest.mark.extra
def test_a_hub_id_is_fetched_and_a_failure_explained(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="the hub extra is what is tested")
    convert.save_hf(tmp_path, PLAIN, make(PLAIN))
    save_tokenizer(tmp_path, 50)
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: asked.update(options) or {
        "org/name": str(tmp_path)}[name])
    assert convert.load("org/name").config == PLAIN
    kept = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
            "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    others = ["consolidated.safetensors", "consolidated.safetensors.index.json", "original/params.json",
              "original/model.safetensors", "onnx/config.json", "pytorch_model.bin", "README.md"]
    assert list(hub.utils.filter_repo_objects([*kept, *others], **asked)) == kept
    with pytest.raises(ValueError, match="'org/other' is no path here, and could not be fetched from the hub"):
        convert.load("org/other")


def test_the_built_in_model_loads_and_knows_the_capital_of_france():
    model = convert.load("smollm2-135m")
    assert model.config == LlamaConfig(
        vocab=49152, dim=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn_dim=1536, rope_theta=100_000.0,
        norm_eps=model.config.norm_eps, tied=True, context=8192)  # fmt: skip
    assert model.config.norm_eps == pytest.approx(1e-5)
    tokens = tokenizer.encode(model.tokenizer, "The capital of France is")
    logits = forward(model.config, weights.whole(model.params), tokens[None])
    assert model.tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
    assert model.tokenizer.get_vocab_size() == 49152 and data.fetch_model("smollm2-135m").suffix == ".gguf"


def test_a_saved_index_lists_every_tensor(tmp_path):
    convert.save_hf(tmp_path, PLAIN, make(PLAIN), shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {name: file.name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == stored
