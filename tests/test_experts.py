"""Mixtures of experts: who is asked, what the calibration sees of it, what is made of experts that are hardly asked.

Logits, caches and files of their families stand beside the others' in ``test_llama``, ``test_generate``,
``test_convert`` and ``test_families``.
"""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from test_compress import interrupt_after, weight_files
from test_llama import forward, make, sample

from caldera_jax import CalderaConfig, LevelConfig, hessian
from caldera_jax.jobs import artifact, calibration, cli, evaluate, level
from caldera_jax.jobs.calibration import OutputFisher
from caldera_jax.jobs.compress import compress, memory_need
from caldera_jax.jobs.report import Clock
from caldera_jax.jobs.settings import Importance, RunConfig
from caldera_jax.jobs.work import Work
from caldera_jax.levels import Curve
from caldera_jax.models import convert, files, llama, weights
from caldera_jax.models.data import Tokens

EXPERTS = {name: config for name, config in tiny.FAMILIES.items() if config.experts}
every_family = pytest.mark.parametrize("config", EXPERTS.values(), ids=EXPERTS)


def first_block(config, dtype=np.float64):
    """Block 0, the inputs of its layers, and what its router sees: every row is some expert's, and no row is zero."""
    params, tokens = make(config, dtype=dtype), sample(config, 3, 24)
    x = llama.embed(config, params, tokens)
    _, inputs = jax.jit(llama.block, static_argnums=0)(config.at(0), params["blocks"][0], x, jnp.arange(24))
    flat = {name: np.asarray(of).reshape(-1, of.shape[-1]) for name, of in inputs.items()}
    z = np.max([flat[f"up_{e}"] for e in range(config.experts)], axis=0)
    z = np.where(z == 0, np.min([flat[f"up_{e}"] for e in range(config.experts)], axis=0), z)
    return params, tokens, flat, z


def asked(config, router, z):
    """By sorting, row after row: [tokens, experts] weights."""
    found = np.zeros((len(z), config.experts))
    for row, logits in zip(found, z @ np.asarray(router, np.float64).T, strict=True):
        shares = np.exp(logits) / np.exp(logits).sum()
        chosen = sorted(range(config.experts), key=lambda e: -shares[e])[:config.experts_per_token]
        row[chosen] = shares[chosen] / (shares[chosen].sum() if config.renormalised else 1)
    return found


def hidden(block, z, e):
    """What enters an expert's down, before its weight."""
    gate = z @ np.asarray(block[f"gate_{e}"]).T
    return gate / (1 + np.exp(-gate)) * (z @ np.asarray(block[f"up_{e}"]).T)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Directory of a tiny Mixtral whose second block never asks its last expert, with text beside it."""
    config = dataclasses.replace(EXPERTS["mixtral"], dim=24, heads=2, kv_heads=2, head_dim=12, ffn_dim=24)
    params = jax.tree.map(np.array, make(config))
    params["embed"][:, 0] = 1.0  # by it alone the router of block 1 knows to leave expert 3 alone
    for block in params["blocks"]:
        for name in (*llama.linears(config), "router"):
            block[name][0 if llama.kind_of(name) in ("o", "down") else (slice(None), 0)] = 0.0
    params["blocks"][1]["router"][3] = -100.0 * np.eye(24)[0]
    folder = tmp_path_factory.mktemp("experts")
    tiny.write_text(folder / "text.txt")
    return tiny.write_model(folder / "model", config, params)


UNASKED = {f"blocks.1.{kind}_3" for kind in ("gate", "up", "down")}
CALDERA = CalderaConfig(rank=3, outer_iterations=1, inner_iterations=1)
KINDS = {"rate": {"caldera": CALDERA}, "plan": {"caldera": CALDERA, "bits": 4.0, "ranks": (0, 2)},
         "level": {"bits": 3.0, "level": LevelConfig(), "importance": Importance(2)}}


@pytest.fixture(scope="module", params=KINDS)
def run(request, source):
    text = str(source.parent / "text.txt")
    return RunConfig(str(source), calibration=Tokens(text, 6, 32), evaluation=Tokens(text, 3, 32),
                     **KINDS[request.param])


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """An uninterrupted run: its directory and its report."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, compress(run, out)


# ---- who is asked


@every_family
def test_a_router_asks_the_likeliest_experts_by_their_share(config):
    params, _, _, z = first_block(config)
    router = params["blocks"][0]["router"]
    found = llama.route(config, router, jnp.asarray(z)[None])[0]
    np.testing.assert_allclose(found, asked(config, router, z), atol=1e-12)
    assert np.all(np.sum(np.asarray(found) > 0, axis=1) == config.experts_per_token)
    assert np.allclose(np.sum(found, axis=1), 1) == config.renormalised


@every_family
def test_an_expert_sees_its_tokens_alone_and_its_down_sees_them_by_their_weight(config):
    params, _, inputs, z = first_block(config)
    block = jax.tree.map(np.asarray, params["blocks"][0])
    for e, weight in enumerate(asked(config, block["router"], z).T[:, :, None]):
        np.testing.assert_allclose(inputs[f"up_{e}"], np.where(weight > 0, z, 0), atol=1e-12)
        np.testing.assert_allclose(inputs[f"down_{e}"], weight * hidden(block, z, e), atol=1e-12)


def test_with_equal_experts_and_weights_that_sum_to_1_a_block_is_the_dense_one():
    config = EXPERTS["qwen3_moe"]
    dense = dataclasses.replace(tiny.FAMILIES["qwen3"], rope_theta=config.rope_theta, dim=config.dim, layers=2)
    params, tokens = make(dense, dtype=np.float64), sample(config)
    router = np.random.default_rng(0).standard_normal((config.experts, config.dim))

    def alike(block):
        mlp = {name: block[name] for name in ("gate", "up", "down")}
        return {"router": router, **{name: block[name] for name in block.keys() - mlp.keys()},
                **{f"{name}_{e}": w for name, w in mlp.items() for e in range(config.experts)}}

    of_experts = params | {"blocks": [alike(block) for block in params["blocks"]]}
    np.testing.assert_allclose(forward(config, of_experts, tokens), forward(dense, params, tokens), atol=1e-11)


# ---- files


@pytest.mark.parametrize(("name", "router", "down", "gate"), [
    ("mixtral", "block_sparse_moe.gate", "block_sparse_moe.experts.3.w2", "block_sparse_moe.experts.3.w1"),
    ("olmoe", "mlp.gate", "mlp.experts.3.down_proj", "mlp.experts.3.gate_proj"),
    ("qwen3_moe", "mlp.gate", "mlp.experts.3.down_proj", "mlp.experts.3.gate_proj")])
def test_experts_are_in_files_one_by_one(name, router, down, gate, tmp_path):
    config = EXPERTS[name]
    params = make(config)
    convert.save_hf(tmp_path, config, params)
    tensors = {key.removeprefix("model.layers.1.").removesuffix(".weight"): value
               for key, value in load_file(tmp_path / "model.safetensors").items()}
    for key, part in ((router, "router"), (down, "down_3"), (gate, "gate_3")):
        np.testing.assert_array_equal(tensors[key], params["blocks"][1][part])
    assert sum(".experts." in key for key in tensors) == 2 * 3 * config.experts
    read, found = convert.from_hf(tmp_path)
    assert read == config and weights.whole(found)["blocks"][0].keys() == params["blocks"][0].keys()


@pytest.mark.extra
@pytest.mark.parametrize("renormalised", [False, True])
@every_family
def test_what_transformers_writes_has_its_logits_here_and_our_names(config, renormalised, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    if config.family != "mixtral":  # which always does
        config = dataclasses.replace(config, renormalised=renormalised)
    torch.manual_seed(0)
    raw = convert.config_to_hf(config)
    chosen = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw, initializer_range=0.3)
    theirs = transformers.AutoModelForCausalLM.from_config(chosen, attn_implementation="eager").eval()
    for name, value in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    read, params = convert.from_hf(tmp_path / "theirs")
    assert read == config
    tokens = sample(config)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.array(tokens))).logits.numpy()
    ours = forward(config, weights.whole(params), tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    convert.save_hf(tmp_path / "ours", config, params)
    names = [load_file(tmp_path / side / "model.safetensors").keys() for side in ("theirs", "ours")]
    assert names[0] == names[1]


def test_the_number_of_experts_has_two_names_that_must_agree():
    def read(**change):
        raw = convert.config_to_hf(EXPERTS["qwen3_moe"])
        del raw["num_experts"]
        return convert.config_from_hf(raw | change)

    assert read(num_local_experts=4) == read(num_experts=4) == EXPERTS["qwen3_moe"]
    assert read().experts == 128
    with pytest.raises(ValueError, match="num_local_experts = 5 and num_experts = 4 differ"):
        read(num_local_experts=5, num_experts=4)


def test_dense_models_are_told_without_a_word_of_experts():
    for config in {tiny.CONFIG, *tiny.FAMILIES.values()} - {*EXPERTS.values()}:
        assert not any("expert" in name or name == "renormalised" for name in config.told())
        assert llama.linears(config) == llama.LINEARS and "router" not in llama.block_shapes(config)


# ---- what the calibration sees


@every_family
def test_h_of_an_expert_is_that_of_its_tokens_times_how_often_it_is_asked(config):
    params, tokens, _, z = first_block(config)
    block = jax.tree.map(np.asarray, params["blocks"][0])
    _, moments = next(calibration.collect(config, params, tokens))
    for e, weight in enumerate(asked(config, block["router"], z).T):
        own = weight > 0
        share = own.mean()
        assert 0 < share < 1
        for name, rows in (("up", z[own]), ("down", weight[own, None] * hidden(block, z[own], e))):
            found, expected = moments[f"{name}_{e}"], share * rows.T @ rows / own.sum()
            np.testing.assert_allclose(found.mean(), expected, atol=1e-5 * np.abs(expected).max())
            assert (int(found.seen), int(found.count)) == (own.sum(), len(z))
    assert int(moments["qkv"].seen) == len(z)


def test_an_expert_that_no_token_asks_has_the_mean_energy_of_its_like_in_every_direction():
    rng = np.random.default_rng(0)
    sizes = {"qkv": 5, "up_0": 5, "up_1": 5, "up_2": 5, "down_0": 3, "down_1": 3, "down_2": 3}
    moments = {name: hessian.update(hessian.zero(n, jnp.float64),
                                    jnp.asarray(rng.normal(size=(2, 20, n)) * ("_1" not in name)))
               for name, n in sizes.items()}
    found = calibration._unasked(moments)
    for kind, n in (("up", 5), ("down", 3)):
        others = np.mean([np.trace(moments[f"{kind}_{e}"].mean()) for e in (0, 2)])
        np.testing.assert_allclose(found[f"{kind}_1"].mean(), others / n * np.eye(n), rtol=1e-12)
        assert int(found[f"{kind}_1"].seen) == 0 and abs(float(found[f"{kind}_1"].left_out(0.01)) - 1) < 1e-12
    assert all(found[name] is moments[name] for name in sizes if "_1" not in name)
    alone = {name: of for name, of in moments.items() if name in ("qkv", "up_1")}  # there is no like
    assert calibration._unasked(alone) == alone


@pytest.mark.parametrize("routed", [1, 2, 7])
def test_the_token_cap_is_in_medians_of_the_tokens_that_an_expert_is_asked(routed):
    rng = np.random.default_rng(0)
    x, own = np.zeros((5, 40, 6)), rng.normal(size=(5, routed, 6))
    own[:, 0] *= 1e3
    for window, rows in zip(x, own, strict=True):
        window[rng.choice(40, routed, replace=False)] = rows
    all_of_them, alone = (hessian.update(hessian.zero(6, jnp.float64), jnp.asarray(a), 4.0) for a in (x, own))
    np.testing.assert_allclose(all_of_them.sum, alone.sum, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(all_of_them.peak, alone.peak, rtol=1e-12)
    assert (int(all_of_them.count), int(all_of_them.seen)) == (200, 5 * routed)
    whole = np.trace(np.einsum("wti,wtj->ij", own, own))
    assert np.trace(all_of_them.sum) < whole / 10 if routed > 2 else np.trace(all_of_them.sum) > whole / 10


@pytest.mark.parametrize("kind", ["up", "down"])
def test_g_and_h_of_an_expert_predict_what_a_small_change_of_it_costs(kind):
    """A change of random entries, so that those of the Fisher information off its diagonal vanish in the mean; H of the
    expert's own tokens would be some four times too large."""
    config = dataclasses.replace(EXPERTS["olmoe"], experts_per_token=1, layers=1)
    params, tokens = make(config, dtype=np.float64), sample(config, 96, 24)
    fisher = calibration.output_fisher(config, params, tokens, jax.random.key(0), range(96))
    _, moments = next(calibration.collect(config, params, tokens))
    for e in range(config.experts):
        assert int(moments[f"up_{e}"].seen) < 0.4 * tokens.size
        w, h = params["blocks"][0][f"{kind}_{e}"], np.asarray(moments[f"{kind}_{e}"].mean(), np.float64)
        change = 1e-3 * np.random.default_rng(e).standard_normal(w.shape)
        g = fisher[f"blocks.0.{kind}_{e}"].importance()
        predicted = g @ np.sum((change @ h) * change, axis=1) / 2
        other = params | {"blocks": [params["blocks"][0] | {f"{kind}_{e}": w + change}]}
        found = evaluate.compare(config, params, other, tokens).divergence.mean()
        assert 0.7 < found / predicted < 1.4


def test_moments_keep_the_number_of_tokens_and_files_without_it_are_read(tmp_path):
    x = np.eye(5, 3)[[0, 3, 4, 1, 4]]
    moments = {"up_1": hessian.update(hessian.zero(3), jnp.asarray(x, jnp.float32))}
    calibration.save_moments(tmp_path / "m.safetensors", moments)
    assert int(calibration.load_moments(tmp_path / "m.safetensors")["up_1"].seen) == 2
    arrays = files.read_arrays(tmp_path / "m.safetensors")
    del arrays["up_1.seen"]
    files.write_arrays(tmp_path / "old.safetensors", arrays)
    assert int(calibration.load_moments(tmp_path / "old.safetensors")["up_1"].seen) == 5


def test_an_expert_that_no_window_of_the_gradients_asks_has_the_importance_of_its_like(tmp_path, monkeypatch):
    found = {f"blocks.0.up_{e}": OutputFisher(np.array([1.0, 3.0]) * e, 2.0 * (e > 0)) for e in range(3)}
    found |= {"blocks.1.up_0": OutputFisher(np.zeros(2), 0.0), "blocks.0.q": OutputFisher(np.zeros(2), 0.0)}
    monkeypatch.setattr(level, "output_fisher", lambda *a: found)
    config = RunConfig("smollm2-135m", bits=2.0, level=LevelConfig(), importance=Importance(2, 0.0, 0.0))
    g = level.importance(Work(config, None, None, Clock(), tmp_path), np.zeros((4, 8), np.int64), tmp_path).g
    np.testing.assert_allclose(g["blocks.0.up_2"], [1, 3])
    np.testing.assert_allclose(g["blocks.0.up_0"], [0.75, 2.25])
    assert not g["blocks.1.up_0"].any() and not g["blocks.0.q"].any()


def test_what_an_expert_takes_that_few_windows_did_not_ask_is_foretold_once_it_is_known():
    curve, done = Curve(0.1, 0, [0.0], 40), {"blocks.0.up_1": (0.1, 500)}
    (mended,) = level.corrected(LevelConfig(), {"blocks.0.up_1": curve}, done).values()
    assert curve.bits(0.1, LevelConfig()) == 40 and mended.bits(0.1, LevelConfig()) == 500


# ---- runs


def test_an_expert_that_is_never_asked_is_compressed_and_named(run, finished):
    out, row = finished
    rows = {layer["path"]: layer for layer in row["layers"]}
    assert {path for path, layer in rows.items() if layer.get("tokens") == 0} == UNASKED
    assert all(("tokens" in layer) == ("_" in path) for path, layer in rows.items())
    for e, index in itertools.product(range(4), range(2)):
        assert len({rows[f"blocks.{index}.{kind}_{e}"]["tokens"] for kind in ("gate", "up", "down")}) == 1
    assert sum(rows[f"blocks.1.up_{e}"]["tokens"] for e in range(4)) == 2 * 6 * 32
    assert all(0 < rows[path]["error"] < 0.5 for path in UNASKED)
    said = cli.table(row)
    assert "few tokens        blocks.1.gate_3: 0 tokens for 24 inputs (" in said
    layer, w = (np.asarray(p) for p in (artifact.load(out).params["blocks"][1]["up_3"].dense(),
                                        convert.load(run.model).params["blocks"][1]["up_3"]))
    assert np.linalg.norm(layer - w) < 0.5 * np.linalg.norm(w)  # as well as without data


def test_the_least_asked_of_several_experts_is_named_and_a_dense_model_has_no_such_line():
    rows = [{"path": f"blocks.{i}.{kind}_1", "shape": [8, n], "tokens": tokens}
            for i, tokens in enumerate((30, 12, 2000)) for kind, n in (("up", 16), ("down", 40))]
    (line,) = cli.few_lines({"layers": [{"path": "blocks.0.q", "shape": [8, 8]}, *rows]})
    assert "blocks.1.down_1: 12 tokens for 40 inputs (2 experts have fewer than inputs): give more --calib" in line
    assert cli.few_lines({"layers": [{"path": "blocks.0.q", "shape": [8, 8]}, *rows[4:]]}) == []


def test_what_was_cut_off_ends_with_the_same_bytes(run, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 19)
        with pytest.raises(KeyboardInterrupt):
            compress(run, tmp_path / "out")
    compress(run, tmp_path / "out")
    assert weight_files(tmp_path / "out") == weight_files(finished[0])


def test_budgets_are_met_and_the_commands_take_the_model(run, finished, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    out, row = finished
    if run.bits is not None:
        assert row["bits_per_weight"] <= run.bits
    assert json.loads((out / artifact.MANIFEST).read_text())["model_config"]["experts"] == 4
    for arguments, says in (
            (["inspect", str(out)], "blocks.1.down_3 "), (["inspect", str(out), "--theory"], "blocks.1.down_3 "),
            (["inspect", str(out), "--report", str(tmp_path / "page.html")], "written"),
            (["eval", str(out), "--base", "--processes", "0"], f"perplexity {row['compressed_perplexity']:.4f}"),
            (["generate", str(out), "the code", "--tokens", "4"], "tokens/s"),
            (["export", str(out), "--to", "hf", "--out", str(tmp_path / "hf")], "written")):
        monkeypatch.setattr("sys.argv", ["caldera", *arguments])
        cli.main()
        assert says in capsys.readouterr().out, arguments
    model, exported = artifact.load(out), convert.load(tmp_path / "hf")
    tokens = sample(model.config, 2, 30)
    ours, theirs = (np.asarray(forward(m.config, weights.whole(m.params), tokens)) for m in (model, exported))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    page = (tmp_path / "page.html").read_text()
    assert "up_3" in page and ">up<" in page.replace(" class=text", "")


def test_memory_is_that_of_all_experts():
    need = lambda experts: memory_need(dataclasses.replace(EXPERTS["mixtral"], dim=1024, ffn_dim=2048, experts=experts),
                                       (64, 512), (32, 512)).each
    assert need(128) - need(64) > 4 * 64 * 8 * (1024**2 + 2048**2)  # their Moments alone
