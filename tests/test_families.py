"""What differs between families: read and written by the table, refused by name, and gone through by every command.

Their logits, caches and files stand beside Llama's in ``test_llama``, ``test_generate`` and ``test_convert``.
"""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_export
import tiny
from safetensors.numpy import load_file, save_file
from test_convert import write_gguf
from test_llama import forward, make, sample

from caldera_jax import CalderaConfig, LevelConfig
from caldera_jax.jobs import artifact, calibration, cli, evaluate, export, generate
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.finetune import FinetuneConfig, finetune
from caldera_jax.jobs.settings import Importance, RunConfig
from caldera_jax.jobs.student import TrainConfig
from caldera_jax.models import convert, families, files, llama, weights
from caldera_jax.models.data import Tokens

FAMILIES = tiny.FAMILIES
GEMMA_2, GEMMA_3, PHI_3 = "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"
MIXTRAL, QWEN_3_MOE = "MixtralForCausalLM", "Qwen3MoeForCausalLM"
every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def raw(architecture, **change):
    """A config.json that is silent where it can be."""
    sizes = {"vocab_size": 99, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 32,
             "intermediate_size": 40}
    return {"architectures": [architecture]} | sizes | change


# ---- the forward pass


def numbers(config):
    """The fields in which a family's configuration differs from the defaults of LlamaConfig."""
    later = {f.name: f.default for f in dataclasses.fields(config) if not f.repr and f.name != "family"}
    named = later | {"sliding_window": None, "rope_scaling": None}
    return {name: value for name, value in named.items() if getattr(config, name) != value}


@pytest.mark.parametrize(("name", "field"), [
    *((name, field) for name, config in FAMILIES.items() for field in numbers(config) if field != "experts"),
    ("gemma3", "local layers")])
def test_every_number_of_a_family_matters_to_its_logits(name, field):
    """So that agreement with another program is agreement in each."""
    config = FAMILIES[name]
    change = {field: numbers(config).get(field)}
    if field == "experts_per_token":
        change = {field: 1}
    if field == "local layers":
        change = {"local": config.local[::-1]}
    elif field == "sliding_window" and config.local:
        change = {"sliding_window": 64}  # as long as the context: none
    params, tokens = make(config), sample(config)
    gap = np.abs(forward(config, params, tokens) - forward(dataclasses.replace(config, **change), params, tokens))
    assert gap.max() > 1e-2


@every_family
def test_every_gain_matters_to_the_logits(config):
    params, tokens = make(config), sample(config)
    expected = forward(config, params, tokens)
    for name in config.row.norms:
        blocks = [block | {name: block[name][::-1]} for block in params["blocks"]]
        assert np.abs(forward(config, params | {"blocks": blocks}, tokens) - expected).max() > 1e-3, name


def test_blocks_of_a_kind_share_one_program():
    config = dataclasses.replace(FAMILIES["gemma3"], context=63)  # of this test alone
    assert [config.at(i) for i in range(4)] == [config.at(0), config.at(0), config.at(2), config.at(0)]
    assert config.at(0) != config.at(2) and config.at(0).at(1) == config.at(0)
    before = calibration.forward._cache_size()
    evaluate.perplexity(config, make(config), sample(config, 2, 16))
    assert calibration.forward._cache_size() - before == 2
    assert tiny.CONFIG.at(1) is tiny.CONFIG


def test_the_configuration_of_a_whole_model_is_none_of_a_block_where_blocks_differ():
    config = FAMILIES["gemma2"]
    params, x = make(config), jnp.zeros((1, 3, config.dim), jnp.float32)
    cache = llama.empty_cache(config, 1, 3)
    for call in (lambda config: llama.block(config, params["blocks"][0], x, jnp.arange(3)),
                 lambda config: llama.cached_block(config, params["blocks"][0], x, cache, jnp.arange(3)[None])):
        call(config.at(0))
        with pytest.raises(ValueError, match=r"blocks of this model differ: .*config\.at\(index\)"):
            call(config)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_the_embedding_of_gemma_is_scaled_by_the_root_of_its_width_rounded_to_its_own_type(stored):
    config, tokens = FAMILIES["gemma2"], sample(FAMILIES["gemma2"])
    params = jax.tree.map(lambda p: np.asarray(p).astype(stored), make(config))
    scale = np.sqrt(42.0).astype(stored).astype(np.float32)
    expected = params["embed"][tokens].astype(np.float32) * scale
    np.testing.assert_array_equal(llama.embed(config, params, tokens), expected)
    streams = calibration.embed(config, params, tokens)
    np.testing.assert_array_equal(np.concatenate([shard for device in streams for shard in device]), expected)
    assert (scale == np.float32(np.sqrt(42.0))) == (stored == np.float32)


@pytest.mark.extra
def test_the_scaled_embedding_is_that_of_transformers_in_bfloat16():
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    config, tokens = FAMILIES["gemma2"], sample(FAMILIES["gemma2"])
    params = jax.tree.map(lambda p: np.asarray(p).astype(ml_dtypes.bfloat16), make(config))
    theirs = gemma.Gemma2TextScaledWordEmbedding(config.vocab, config.dim, 0, embed_scale=config.dim**0.5)
    theirs.weight.data = torch.tensor(params["embed"].astype(np.float32)).to(torch.bfloat16)
    expected = theirs(torch.tensor(tokens)).detach().float().numpy()
    ours = np.asarray(llama.embed(config, params, tokens)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(ours.astype(np.float32), expected)


# ---- config.json


@pytest.mark.extra
@pytest.mark.parametrize("architecture", families.ARCHITECTURES)
def test_where_config_json_is_silent_the_defaults_are_those_of_transformers(architecture):
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    silent = raw(architecture)
    theirs = transformers.AutoConfig.for_model(families.ARCHITECTURES[architecture].model_type, **silent).to_dict()
    assert convert.config_from_hf(theirs | {"architectures": [architecture]}) == convert.config_from_hf(silent)


def test_gemma_3_is_read_in_its_old_words_and_in_its_new_ones():
    pattern = ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]
    linear = {"rope_type": "linear", "factor": 8.0}
    old = raw(GEMMA_3, sliding_window_pattern=3, rope_theta=5e5, rope_local_base_freq=100, rope_scaling=linear)
    new = raw(GEMMA_3, layer_types=pattern, _sliding_window_pattern=3, rope_parameters={
        "full_attention": linear | {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 100}})
    found = convert.config_from_hf(old)
    assert found == convert.config_from_hf(new)
    assert found.local == (True, True, False, True) and (found.rope_theta, found.local_theta) == (5e5, 100.0)
    assert found.rope_scaling == llama.LinearRopeScaling(8.0) and found.at(0).rope_scaling is None
    assert found.at(0).rope_theta == 100 and found.at(2).sliding_window is None
    assert convert.config_from_hf(raw(GEMMA_3, num_hidden_layers=7)).local == (True,) * 5 + (False, True)
    assert convert.config_from_hf(raw(GEMMA_2)).local == (True, False) * 2


def test_a_silent_granite_multiplies_by_1_and_its_scores_too():
    config = convert.config_from_hf(raw("GraniteForCausalLM"))
    scales = config.embed_scale, config.residual_scale, config.attention_scale, config.logit_divisor
    assert scales == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(("name", "modules"), [
    ("qwen3", "input_layernorm post_attention_layernorm self_attn.k_norm self_attn.q_norm"),
    ("gemma2", "input_layernorm post_attention_layernorm post_feedforward_layernorm pre_feedforward_layernorm"),
    ("olmo2", "post_attention_layernorm post_feedforward_layernorm self_attn.k_norm self_attn.q_norm"),
    ("phi3", "input_layernorm post_attention_layernorm"),
])
def test_norms_have_the_names_of_transformers(name, modules, tmp_path):
    convert.save_hf(tmp_path, FAMILIES[name], make(FAMILIES[name]))
    names = sorted(load_file(tmp_path / "model.safetensors"))
    layer = [name.removeprefix("model.layers.3.").removesuffix(".weight") for name in names if ".3." in name]
    assert " ".join(name for name in layer if "norm" in name) == modules


def test_a_gemma_without_local_layers_needs_no_window():
    config = convert.config_from_hf(raw(GEMMA_2, layer_types=["full_attention"] * 4, sliding_window=None))
    assert config.sliding_window is None and not any(config.local)
    assert convert.config_from_hf(convert.config_to_hf(config)) == config


LONG = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}


@pytest.mark.parametrize(("architecture", "change", "message"), [
    ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias = True is not supported"),
    ("Qwen3ForCausalLM", {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
    ("Qwen3ForCausalLM", {"layer_types": ["sliding_attention"] * 4}, "layer_types has sliding_attention"),
    ("Qwen3ForCausalLM", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    (GEMMA_2, {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported, only 'gelu_pytorch_tanh'"),
    (GEMMA_2, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    (GEMMA_2, {"attention_bias": True}, "attention_bias"),
    (GEMMA_2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA_2, {"sliding_window_pattern": 3}, "sliding_window_pattern = 3 is not supported"),
    (GEMMA_2, {"sliding_window": None}, "sliding_window as a positive integer, got None"),
    (GEMMA_2, {"query_pre_attn_scalar": 144.5}, "query_pre_attn_scalar as a positive integer, got 144.5"),
    (GEMMA_2, {"attn_logit_softcapping": 0}, "attention_cap must be positive"),
    (GEMMA_2, {"final_logit_softcapping": "x"}, "final_logit_softcapping as a number, got 'x'"),
    (GEMMA_2, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers = 4"),
    (GEMMA_2, {"layer_types": ["chunked_attention"] * 4}, "layer_types has chunked_attention, and supported are"),
    (GEMMA_2, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "of its own for full_attention"),
    (GEMMA_2, {"num_hidden_layers": 2**50}, "num_hidden_layers = 1125899906842624, more than any model has"),
    (GEMMA_3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
    (GEMMA_3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA_3, {"sliding_window_pattern": 2, "layer_types": ["full_attention"] * 4}, "pattern = 2 and layer_types diff"),
    (GEMMA_3, {"_sliding_window_pattern": 2}, "_sliding_window_pattern = 2 and layer_types differ"),
    (GEMMA_3, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "has factor, rope_type; needed: full_att"),
    (GEMMA_3, {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "LinearRopeScaling.*of sliding_attention is not supported"),
    (GEMMA_3, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
    (GEMMA_3, {"rope_local_base_freq": 0}, "local_theta must be positive"),
    (PHI_3, {"partial_rotary_factor": 0.75}, "partial_rotary_factor 0.75 is not supported, only 1"),
    (PHI_3, {"rope_scaling": LONG | {"type": "longrope"}}, "rope scaling 'longrope' is not supported"),
    (PHI_3, {"rope_scaling": LONG | {"type": "su"}}, "rope scaling 'su' is not supported"),
    (PHI_3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear' is not .*supported: 'default'"),
    ("Olmo2ForCausalLM", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
    ("Olmo2ForCausalLM", {"attention_bias": True}, "attention_bias"),
    ("GraniteForCausalLM", {"mlp_bias": True}, "mlp_bias"),
    ("GraniteForCausalLM", {"attention_bias": True}, "attention_bias"),
    ("GraniteForCausalLM", {"residual_multiplier": 0}, "residual_scale must be positive"),
    ("GraniteForCausalLM", {"logits_scaling": None}, "logits_scaling as a number, got None"),
    ("GemmaForCausalLM", {}, "'GemmaForCausalLM' is not supported; supported: .*Gemma2ForCausalLM"),
    ("Gemma3ForConditionalGeneration", {}, "'Gemma3ForConditionalGeneration' is not supported"),
    (MIXTRAL, {"num_experts_per_tok": 9}, "experts_per_token must be from 1 to the number of experts; got 9 of 8"),
    (MIXTRAL, {"num_local_experts": 0}, "num_local_experts as a positive integer, got 0"),
    (MIXTRAL, {"num_experts": 4, "num_local_experts": 8}, "num_experts = 4 and num_local_experts = 8 differ"),
    (MIXTRAL, {"layer_types": ["sliding_attention"] * 4}, "layer_types has sliding_attention"),
    (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
    ("OlmoeForCausalLM", {"attention_bias": True}, "attention_bias"),
    ("OlmoeForCausalLM", {"sliding_window": 64}, "sliding_window = 64 is not supported"),
    (QWEN_3_MOE, {"mlp_only_layers": [2]}, r"mlp_only_layers = \[2\] is not supported; a model without it is needed"),
    (QWEN_3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
    (QWEN_3_MOE, {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
    (QWEN_3_MOE, {"attention_bias": True}, "attention_bias = True is not supported"),
    (QWEN_3_MOE, {"norm_topk_prob": "yes"}, "norm_topk_prob"),
    (QWEN_3_MOE, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64 is not supported"),
    (QWEN_3_MOE, {"moe_intermediate_size": None}, "moe_intermediate_size as a positive integer, got None"),
    (QWEN_3_MOE, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
    ("Qwen2MoeForCausalLM", {}, "'Qwen2MoeForCausalLM' is not supported"),
    ("GraniteMoeForCausalLM", {}, "'GraniteMoeForCausalLM' is not supported"),
])
def test_what_a_family_does_not_compute_is_refused_by_name(architecture, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        convert.config_from_hf(raw(architecture, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"family": "gpt"}, "unknown family 'gpt': known are llama, "),
    ({"logit_cap": 3.0}, "family 'llama' have no logit_cap"),
    ({"local": (True, False), "sliding_window": 3}, "family 'llama' have no local"),
    ({"experts": 4}, "family 'llama' have no experts"),
    ({"family": "olmoe"}, "experts_per_token must be from 1 to the number of experts; got 0 of 0"),
    ({"family": "olmoe", "experts": 4, "experts_per_token": 5}, "got 5 of 4"),
    ({"family": "gemma2", "local": (True,)}, "an entry for each of the 2 blocks"),
    ({"family": "gemma2", "local": (True, False)}, "a sliding_window where one is true"),
])
def test_a_configuration_that_no_family_has_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.CONFIG, **change)


# ---- files


def test_fused_tensors_are_written_fused_and_their_rows_are_read_alone(tmp_path):
    config = dataclasses.replace(FAMILIES["phi3"], dim=400, ffn_dim=2000, layers=1)
    params = make(config)
    convert.save_hf(tmp_path, config, params)
    tensors = load_file(tmp_path / "model.safetensors")
    block = jax.tree.map(np.asarray, params["blocks"][0])
    of = lambda name: tensors[f"model.layers.0.{name}.weight"]
    np.testing.assert_array_equal(of("self_attn.qkv_proj"), np.concatenate([block[name] for name in "qkv"]))
    np.testing.assert_array_equal(of("mlp.gate_up_proj"), np.concatenate([block["gate"], block["up"]]))
    assert len(tensors) == 3 + 4 + 2
    read = convert.from_hf(tmp_path)[1]["blocks"][0]
    read["k"]  # what is kept of a first reading
    tracemalloc.start()
    found = read["k"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, block["k"])
    assert found.nbytes <= peak < 2.5 * found.nbytes < 0.6 * of("self_attn.qkv_proj").nbytes


def test_a_fused_tensor_of_another_height_is_refused(tmp_path):
    config, name = FAMILIES["phi3"], "model.layers.2.self_attn.qkv_proj.weight"
    convert.save_hf(tmp_path, config, make(config))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: tensors[name][:-1].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} has shape \(99, 42\), the configuration asks for \(100, 42\)"):
        convert.from_hf(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_files_of_other_families_are_refused_by_name_both_ways(tmp_path, name):
    config = FAMILIES[name]
    params = jax.tree.map(np.asarray, make(config))
    write_gguf(tmp_path / "in.gguf", tiny.CONFIG, jax.tree.map(np.asarray, make(tiny.CONFIG)), architecture=name)
    with pytest.raises(ValueError, match=f"GGUF architecture '{name}' is not supported, only 'llama' and 'qwen2'"):
        convert.from_gguf(convert.read_gguf(tmp_path / "in.gguf"))
    tokens = convert.load(tiny.write_model(tmp_path / "model")).tokenizer
    with pytest.raises(ValueError, match=f"family '{name}' are not written, .*--to hf"):
        export.export(convert.Model(config, params, tokens, name), "gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_llamas_are_known_and_kept_by_the_same_words_as_before_there_were_families():
    text = ("LlamaConfig(vocab=256, dim=24, layers=2, heads=2, kv_heads=1, head_dim=12, ffn_dim=40, "
            "rope_theta=10000.0, rope_scaling=None, norm_eps=1e-05, tied=False, context=64, sliding_window=None, "
            "qkv_bias=False)")
    assert repr(tiny.CONFIG) == text and str(tiny.CONFIG) == text
    before = ["vocab", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "rope_theta", "rope_scaling",
              "norm_eps", "tied", "context", "sliding_window", "qkv_bias"]
    assert list(tiny.CONFIG.told()) == before  # and so a manifest of then is one of now
    assert artifact._config(tiny.CONFIG.told(), "here") == tiny.CONFIG


@every_family
def test_a_manifest_keeps_all_of_a_family(config):
    kept = json.loads(json.dumps(config.told()))
    assert kept["family"] == config.family and artifact._config(kept, "here") == config
    assert f"family='{config.family}'" in repr(config) and len({repr(c) for c in FAMILIES.values()}) == len(FAMILIES)
    with pytest.raises(ValueError, match="here: .*family 'llama' have no|here: family"):
        artifact._config({**kept, "logit_cap": 2.0, "family": "llama"}, "here")


@pytest.mark.extra
@every_family
def test_transformers_reads_what_is_exported_with_our_logits_and_tokens(config, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    config = dataclasses.replace(config, vocab=420)
    params = jax.tree.map(np.asarray, make(config))
    model = convert.Model(config, params, test_export.byte_level("gpt-2"), "a/tiny one", {"eos_token": "<|end|>"})
    export.export(model, "hf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(test_export.TOKENS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(forward(config, model.params, jnp.asarray(test_export.TOKENS)), expected, atol=1e-4)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in test_export.TEXTS:
        assert read(text)["input_ids"] == model.tokenizer.encode(text).ids


# ---- what the commands make of it


def losses(config):
    """Params, tokens, and the loss of each but the first by the whole model at once."""
    params, tokens = make(config, dtype=np.float64), sample(config, 3, 24)
    logits = np.asarray(jax.nn.log_softmax(forward(config, params, tokens)))
    return params, tokens, -np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)[..., 0]


@every_family
def test_losses_block_by_block_are_those_of_the_whole_model(config):
    params, tokens, expected = losses(config)
    np.testing.assert_allclose(evaluate.token_losses(config, params, tokens), expected, rtol=1e-9)


@pytest.mark.extra
@every_family
def test_tasks_are_scored_with_the_losses_of_the_whole_model(config):
    pytest.importorskip("lm_eval", reason="tasks need lm_eval")
    from caldera_jax.jobs import harness

    params, tokens, expected = losses(config)
    for (found, _), row in zip(harness.score(config, params, tokens.tolist(), 23), expected, strict=True):
        np.testing.assert_allclose(-found, row, rtol=1e-9)


@every_family
def test_moments_are_those_of_what_enters_each_layer(config):
    params, tokens = make(config, dtype=np.float64), sample(config, 2, 24)
    x, positions = llama.embed(config, params, tokens), jnp.arange(24)
    for index, moments in calibration.collect(config, params, tokens):
        x, inputs = jax.jit(llama.block, static_argnums=0)(config.at(index), params["blocks"][index], x, positions)
        for name, values in inputs.items():
            flat = np.asarray(values).reshape(-1, values.shape[-1])
            expected = flat.T @ flat / len(flat)
            np.testing.assert_allclose(moments[name].mean(), expected, atol=1e-5 * np.abs(expected).max())


@every_family
def test_gradients_are_finite_and_every_layer_has_some(config):
    params, tokens = make(config), sample(config, 2, 12)
    loss = lambda params: jnp.sum(jax.nn.log_softmax(llama.forward(config, params, tokens))[..., 0])
    gradient = jax.grad(loss)(params)
    assert all(bool(jnp.isfinite(leaf).all()) and bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient))
    found = calibration.output_fisher(config, params, tokens, jax.random.key(0), range(2))
    assert len(found) == config.layers * len(llama.linears(config))
    assert all(np.isfinite(of.rows).all() and of.rows.max() > 0 and of.trace > 0 for of in found.values())


E8P = CalderaConfig(rank=3, outer_iterations=1, inner_iterations=1)


@pytest.fixture(scope="module", params=["gemma3", "phi3", "olmoe"])
def source(request, tmp_path_factory):
    """Directory of a dense model of one shape for all layers, with its text beside it."""
    config = FAMILIES[request.param]
    config = dataclasses.replace(config, dim=24, heads=2, kv_heads=2, head_dim=12, ffn_dim=24, layers=2,
                                 local=config.local[1:3])
    folder = tmp_path_factory.mktemp(request.param)
    tiny.write_text(folder / "text.txt")
    return tiny.write_model(folder / "model", config, jax.tree.map(np.asarray, make(config)))


@pytest.mark.parametrize("kind", ["level", pytest.param("e8p", marks=pytest.mark.slow)])
def test_a_model_is_compressed_read_evaluated_trained_and_exported(source, kind, tmp_path, capsys, monkeypatch):
    text = str(source.parent / "text.txt")
    given = {"bits": 4.0, "level": LevelConfig(), "importance": Importance(2)} if kind == "level" else {"caldera": E8P}
    run = RunConfig(str(source), calibration=Tokens(text, 6, 32), evaluation=Tokens(text, 3, 32), **given)
    out = tmp_path / "out"
    row = compress(run, out)
    base, model = convert.load(source), artifact.load(out)
    assert model.config == base.config and artifact.base(out).config == base.config
    for arguments, says in (
            (["inspect", str(out), "--theory"], "blocks.1.down"),
            (["eval", str(out), "--processes", "0"], f"perplexity {row['compressed_perplexity']:.4f}"),
            (["generate", str(out), "the code", "--tokens", "4", "--compare"], "tokens are the same"),
            (["export", str(out), "--to", "hf", "--out", str(tmp_path / "hf")], "written")):
        monkeypatch.setattr("sys.argv", ["caldera", *arguments])
        cli.main()
        assert says in capsys.readouterr().out, arguments
    exported = convert.load(tmp_path / "hf")
    assert exported.config == base.config
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    tokens = sample(base.config, 2, 30)
    ours, theirs, dense = (np.asarray(forward(m.config, weights.whole(m.params), tokens))
                           for m in (model, exported, base))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.abs(ours - dense).max() > 1e-3
    prompt = [tokens[0, :9]]
    sampling = generate.Sampling(8)
    np.testing.assert_array_equal(generate.complete(model.config, model.params, prompt, sampling),
                                  generate.complete(exported.config, exported.params, prompt, sampling))
    if kind == "e8p":
        tuned = finetune(FinetuneConfig(str(out), TrainConfig(epochs=1, reconstruct=1, sign_rate=1e-2, validate=2),
                                        Tokens(text, 12, 32), 4), tmp_path / "tuned")
        assert artifact.load(tmp_path / "tuned").config == base.config
        assert tuned["compressed_perplexity"] <= 1.05 * row["compressed_perplexity"]
    assert files.read_json(out / artifact.MANIFEST)["model_config"]["family"] == base.config.family
