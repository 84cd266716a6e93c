"""Files that were changed, cut off or put together wrongly: what reads them says so in a ValueError, and soon."""

import copy
import json
import random
import re
import shutil
import signal
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_export import byte_level, random_layer, sentencepiece

from caldera_jax import CalderaConfig, linear
from caldera_jax.jobs import artifact, cli, explain, report
from caldera_jax.jobs.settings import RunConfig, recorded
from caldera_jax.levels import Integers, Levelled
from caldera_jax.models import convert, files, llama, tokenizer, weights
from caldera_jax.models.data import Tokens

CONFIG = llama.LlamaConfig(vocab=420, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=24, context=32)
EXTREMES = [0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
ODD = [None, True, 0, -1, 1, 3.5, 2**32 - 1, 10**400, float("nan"), float("inf"), "", "q", "blocks.0.q", [], [1], [[]],
       {}, {"kind": "E8P"}]
counts = pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])


@contextmanager
def soon(seconds=20):
    """A hang is a failure."""
    hangs = []

    def late(*_):
        hangs.append(seconds)
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        assert not hangs, f"not done after {seconds} seconds"  # whatever was raised in the meantime


def endure(read, change, count):
    """``read``, so many times, what ``change`` has made of a file: it is done soon, or raises a ValueError."""
    refused = []

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**64 - 1))
    def each(seed):
        change(random.Random(seed))
        with soon():
            try:
                read()
            except ValueError as error:
                refused.append(str(error))

    each()
    assert refused and all(refused)


def damaged(content, rng, header):
    """Bytes with some of them changed, mostly in the header; cut off, or with some left out or put in."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        end = min(header, len(content)) if rng.random() < 0.9 else len(content)
        at, kind = rng.randrange(max(end, 1)), rng.randrange(6)
        if kind == 0:
            content[at:at + 1] = bytes([content[at] ^ 1 << rng.randrange(8)]) if content else b"x"
        elif kind == 1:
            content[at:at + 8] = rng.choice(EXTREMES).to_bytes(8, "little")
        elif kind == 2:
            content[at:at + 4] = (rng.choice(EXTREMES) & 2**32 - 1).to_bytes(4, "little")
        elif kind == 3:
            del content[at:at + rng.choice([1, 4, 8, 100])]
        elif kind == 4:
            content[at:at] = rng.randbytes(rng.choice([1, 4, 8]))
        else:
            del content[at:]
    return bytes(content)


def places(tree):
    """(container, key) of every value in a tree of JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in list(items) for place in [(tree, key), *places(value)]]


def swapped(tree, rng):
    """A copy of JSON with a value changed, removed, or put in the place of another."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 4])):
        (into, key), (source, other) = (rng.choice(places(tree)) for _ in range(2))
        kind = rng.randrange(4)
        if kind == 0:
            into[key] = copy.deepcopy(rng.choice(ODD))
        elif kind == 1:
            del into[key]
        elif kind == 2:
            into[key] = copy.deepcopy(source[other])
        elif isinstance(into, dict):
            into[f"{key}x"] = into.pop(key)
        if not places(tree):
            break
    return tree


def use(model):
    """What every command does with a model: its weights, and a text there and back."""
    for value in weights.whole(model.params)["blocks"][0].values():
        assert isinstance(value, linear.CompressedLinear) or np.asarray(value).ndim
    model.tokenizer.decode(list(tokenizer.encode(model.tokenizer, "The fox 12 ab")))
    for text in model.special.values():
        assert isinstance(text, str)
    llama.rope_frequencies(model.config.head_dim, model.config.rope_theta, model.config.rope_scaling)


# ---- dense models


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model as a Hugging Face directory in several files, and as a GGUF file of each kind of tokenizer."""
    folder, params = tmp_path_factory.mktemp("dense"), jax.tree.map(np.asarray, llama.init(jax.random.key(0), CONFIG))
    special = {"eos_token": "<|end|>", "chat_template": "{{ messages }}"}
    model = convert.Model(CONFIG, params, byte_level("gpt-2"), "tiny", special)
    convert.save_hf(folder / "hf", CONFIG, params, 20_000)
    tokenizer.to_directory(folder / "hf", model.tokenizer, special, CONFIG.context)
    convert.save_gguf(folder / "bpe.gguf", model)
    convert.save_gguf(folder / "spm.gguf", model._replace(tokenizer=sentencepiece(), special={}))
    return folder


@counts
def test_a_damaged_safetensors_file_is_refused_or_read(dense, tmp_path, count):
    place = shutil.copytree(dense / "hf", tmp_path / "hf")
    names = sorted(path.name for path in place.glob("*.safetensors"))

    def change(rng):
        for name in names:
            shutil.copy(dense / "hf" / name, place / name)
        name = rng.choice(names)
        (place / name).write_bytes(damaged((place / name).read_bytes(), rng, 600))

    endure(lambda: use(convert.load(place)), change, count)


@counts
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_a_changed_json_file_of_a_model_is_refused_or_read(dense, tmp_path, name, count):
    place = shutil.copytree(dense / "hf", tmp_path / "hf")
    whole = json.loads((place / name).read_text())
    if name == "config.json":
        whole["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 8192}

    def change(rng):
        text = json.dumps(swapped(whole, rng))
        (place / name).write_bytes(damaged(text.encode(), rng, 10**6) if rng.random() < 0.2 else text.encode())

    endure(lambda: use(convert.load(place)), change, count)


@counts
def test_a_changed_tokenizer_json_is_refused_or_read(dense, tmp_path, count):
    whole = json.loads((dense / "hf" / "tokenizer.json").read_text())
    vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]

    def change(rng):
        whole["model"] |= {"vocab": {}, "merges": []}  # of which there are so many that nothing else would be changed
        new = swapped(whole, rng)
        if isinstance(new.get("model"), dict):
            of_words = swapped({"vocab": vocabulary, "merges": merges}, rng) if rng.random() < 0.5 else {
                "vocab": vocabulary, "merges": merges}
            new["model"] |= of_words
        text = json.dumps(new).encode()
        (tmp_path / "tokenizer.json").write_bytes(damaged(text, rng, 10**6) if rng.random() < 0.1 else text)

    def read():
        found = tokenizer.from_directory(tmp_path)
        found.decode(list(tokenizer.encode(found, "The fox 12 ab")))

    endure(read, change, count)


@counts
@pytest.mark.parametrize("name", ["bpe", "spm"])
def test_a_damaged_gguf_file_is_refused_or_read(dense, tmp_path, name, count):
    whole, place = (dense / f"{name}.gguf").read_bytes(), tmp_path / "m.gguf"
    header = convert.read_gguf(dense / f"{name}.gguf").data_offset

    def change(rng):
        place.write_bytes(damaged(whole, rng, rng.choice([64, 700, header])))

    endure(lambda: use(convert.load(place)), change, count)


@counts
@pytest.mark.parametrize("name", ["bpe", "spm"])
def test_changed_metadata_of_a_gguf_file_are_refused_or_read(dense, name, count):
    """Short lists, ids beyond them, one field in the place of another."""
    whole, found = tokenizer.contents(convert.read_gguf(dense / f"{name}.gguf")), {}
    lists = [key for key, value in whole.items() if isinstance(value, list)]

    def change(rng):
        found.clear()
        found.update(whole)
        for key in rng.sample(sorted(whole), rng.choice([1, 1, 2])):
            kind = rng.randrange(5)
            if kind == 0:
                found[key] = rng.choice(ODD + EXTREMES)
            elif kind == 1:
                del found[key]
            elif kind == 2:
                found[key] = whole[rng.choice(sorted(whole))]
            else:
                key = rng.choice(lists)
                end, value = rng.randrange(len(whole[key]) + 1), list(whole[key])
                value[rng.randrange(len(value))] = rng.choice(ODD + EXTREMES + [value[0]])
                found[key] = whole[key][:end] if kind == 3 else value

    def read():
        tokenizer.special_from_fields(found)
        rebuilt = tokenizer.from_fields(found)
        rebuilt.decode(list(tokenizer.encode(rebuilt, "The fox 12 ab")))

    endure(read, change, count)


# ---- compressed models


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """An artifact of random codes, some layers of free rate, with a report."""
    folder, params = tmp_path_factory.mktemp("compressed"), jax.tree.map(np.asarray,
                                                                         llama.init(jax.random.key(0), CONFIG))
    layers = {name: random_layer(i, *shape, 2) for i, (name, shape) in enumerate(llama.shapes(CONFIG).items())}
    (m, n), zeros = llama.shapes(CONFIG)["o"], np.zeros
    of_level = Levelled(np.float32(0.1), np.ones((m, n), np.int32), *(zeros(k, np.int32) for k in (m, n, m, n)))
    layers["o"] = linear.CompressedLinear(of_level, None, None, (), (), (m, n), (Integers(1), None, None))
    block = params["blocks"][0] | layers
    arrays = {name: np.asarray(value) for name, value in block.items() if name not in layers}
    for name, layer in layers.items():
        arrays |= {f"{name}.{field}": value for field, value in artifact.layer_arrays(layer).items()}
    files.write_arrays(folder / artifact.block_file(0), arrays)
    config = RunConfig("tiny", CalderaConfig(rank=2), Tokens("text", 4, 32), Tokens("text", 3, 32))
    run = {"config": report.plain(config), **{f"{name}_sha256": "0" for name in ("model", "calibration", "evaluation")}}
    model = convert.Model(CONFIG, params, byte_level("gpt-2"), "tiny", {"eos_token": "<|end|>"})
    artifact.finish(folder, model, {f"blocks.0.{name}": artifact.layer_meta(layer) for name, layer in layers.items()},
                    run)
    rows = [{"path": f"blocks.0.{name}", "shape": list(layer.shape), "rank": 2, "q_bits": 2.0, "factor_bits": [4, 4.0],
             "error": 0.1, "bits": 100, "bits_per_weight": 2.0, "damping": 0.01, "seconds": 1.0, "predicted_loss": 1.0,
             "loss": 1.0} for name, layer in layers.items()]
    stage = {"seconds": 1.0, "compile_seconds": 1.0, "peak_memory_bytes": 1}
    files.write_json(folder / "report.json", {
        "model": "tiny", "config": report.plain(config), "layers": rows, "stages": {"load": stage, "evaluate": stage},
        "base_perplexity": 9.0, "compressed_perplexity": 9.5, "evaluated_tokens": 93, "compressed_weights": 2000,
        "bits_per_weight": 2.0, "stored_bytes": 500, "model_bytes": 10**4, "disk_bytes": 10**4, "mean_layer_error": 0.1,
        "max_layer_error": 0.1, "allocation": "gradient", "budget_bits_per_weight": 2.0, "dearest_bits_per_weight": 4.0,
        "predicted_loss": 7.0, "loss": 7.0, "level": 0.1, "lost": 0.05, "divergence": 0.05, "predicted_damage": 0.05})
    return folder


@counts
def test_a_changed_manifest_is_refused_or_read(compressed, tmp_path, count):
    """With its digest made anew, as a program would that changes it."""
    place = shutil.copytree(compressed, tmp_path / "out")
    whole = json.loads((place / artifact.MANIFEST).read_text())

    def change(rng):
        new = {name: value for name, value in whole.items() if name != "sha256"}
        part = rng.choice(["layers", "model_config", "run", None])
        new = swapped(new, rng) if part is None else new | {part: swapped(new[part], rng)}
        if rng.random() < 0.5:
            new["sha256"] = artifact.digest(new)
        (place / artifact.MANIFEST).write_text(json.dumps(new))

    def read():
        use(artifact.load(place))
        recorded(artifact.read_manifest(place)["run"]["config"])

    endure(read, change, count)


@counts
def test_damaged_arrays_of_a_compressed_model_are_refused_or_read(compressed, tmp_path, count):
    """Of which the manifest holds the SHA-256: with that made anew, too."""
    place = shutil.copytree(compressed, tmp_path / "out")
    manifest = json.loads((place / artifact.MANIFEST).read_text())
    names = [artifact.block_file(0), artifact.REST, artifact.TOKENIZER]

    def change(rng):
        for name in names:
            shutil.copy(compressed / name, place / name)
        path = place / rng.choice(names[:2])
        if rng.random() < 0.5:
            path.write_bytes(damaged(path.read_bytes(), rng, 3000))
        else:
            arrays = load_file(path)
            one, other = (rng.choice(sorted(arrays)) for _ in range(2))
            flat = arrays[one].ravel()
            arrays[one] = rng.choice([arrays[other], flat[:-1], flat, np.zeros(3, np.float32)])
            arrays |= {f"{one}x": arrays.pop(one)} if rng.random() < 0.2 else {}
            save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)
        new = manifest | {"files": {name: files.sha256(place / name) for name in names}}
        files.write_json(place / artifact.MANIFEST, new | {"sha256": artifact.digest(new)})

    endure(lambda: use(artifact.load(place)), change, count)


@counts
def test_inspect_of_a_changed_report_is_refused_or_shown(compressed, tmp_path, capsys, count):
    place = shutil.copytree(compressed, tmp_path / "out")
    whole = json.loads((place / "report.json").read_text())

    def change(rng):
        text = json.dumps(swapped(whole, rng)).encode()
        (place / "report.json").write_bytes(damaged(text, rng, 10**6) if rng.random() < 0.2 else text)

    def read():
        cli.inspect(place)
        explain.report_of(place)
        capsys.readouterr()

    endure(read, change, count)


@pytest.mark.parametrize(("change", "message"), [
    (lambda r: r.pop("layers"), "report.json: there is no layers"),
    (lambda r: r.update(layers=[]), "report.json: no layers"),
    (lambda r: r["layers"].pop(), "report.json: its layers are not those of manifest.json"),
    (lambda r: r["layers"][3].pop("error"), r"report.json: layers\[3\]: there is no error"),
    (lambda r: r["layers"][3].update(shape=[1, "x"]), r"layers\[3\]: shape\[1\]: 'x' is no integer"),
    (lambda r: r["stages"].update(load=1.0), "stages: load: 1.0 is no object"),
    (lambda r: r.pop("predicted_loss"), "there is no predicted_loss"),
    (lambda r: r.pop("lost"), "there is no lost"),
    (lambda r: r.update(allocation="none"), "allocation: 'none' is no"),
    (lambda r: r.update(base_perplexity=True), "base_perplexity: True is no number"),
])
def test_a_field_of_a_report_that_is_missing_or_odd_is_named_by_every_command(
        compressed, tmp_path, monkeypatch, capsys, change, message):
    place = shutil.copytree(compressed, tmp_path / "out")
    changed = files.read_json(place / "report.json")
    change(changed)
    files.write_json(place / "report.json", changed)
    for more in ([], ["--theory"], ["--report", str(tmp_path / "page.html")]):
        monkeypatch.setattr("sys.argv", ["caldera", "inspect", str(place), *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert stop.value.code == 2 and not said.out and said.err.count("\n") == 1
        assert re.search(message, said.err)


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m["model_config"].pop("vocab"), "model_config: .*vocab"),
    (lambda m: m["model_config"].update(norm_eps="x"), "model_config: norm_eps: 'x' is no number"),
    (lambda m: m["model_config"].update(dim=24), "embed has shape .420, 16., and .* asks for .420, 24."),
    (lambda m: m["model_config"].update(layers=2), "block_001.safetensors: missing"),
    (lambda m: m["model_config"].update(rope_scaling={"factor": 0.0}), "rope_scaling: .*positive factor"),
    (lambda m: m["layers"]["blocks.0.q"].update(shape=[24, 16]), r"q has shape .*24, 16.* asks for \(16, 16\)"),
    (lambda m: m["layers"].update({"blocks.7.q": m["layers"]["blocks.0.q"]}), "layers has blocks.7.q, which"),
    (lambda m: m["layers"]["blocks.0.q"]["grids"].pop(), "grids: .* is no tuple"),
    (lambda m: m["layers"]["blocks.0.q"]["grids"][0].update(kind="E9P"), "q: a grid of kind 'E9P', and known are"),
    (lambda m: m["layers"]["blocks.0.q"]["grids"].reverse(), "q: q has shape .*, and the layer's asks for"),
    (lambda m: m["layers"].pop("blocks.0.q"), "block_000.safetensors: .*q"),
    (lambda m: m.update(special={"eos_token": 5}), "special: eos_token: 5 is no text"),
    (lambda m: m["run"]["config"].update(blocks="x"), "configuration: RunConfig: blocks: 'x' is no"),
    (lambda m: m["run"]["config"].pop("model"), "configuration: RunConfig: .*model"),
    (lambda m: m["run"].pop("model_sha256"), "manifest.json: run: there is no model_sha256"),
])
def test_a_field_of_a_manifest_that_is_missing_or_odd_is_named(compressed, tmp_path, change, message):
    place = shutil.copytree(compressed, tmp_path / "out")
    changed = files.read_json(place / artifact.MANIFEST)
    change(changed)
    files.write_json(place / artifact.MANIFEST, changed | {"sha256": artifact.digest(changed)})
    with pytest.raises(ValueError, match=message):
        use(artifact.load(place))
        recorded(artifact.read_manifest(place)["run"]["config"])


def test_an_exported_gguf_file_with_a_sliding_window_says_that_others_ignore_it(
        compressed, tmp_path, monkeypatch, capsys):
    place = shutil.copytree(compressed, tmp_path / "out")
    changed = files.read_json(place / artifact.MANIFEST)
    changed["model_config"]["sliding_window"] = 8
    files.write_json(place / artifact.MANIFEST, changed | {"sha256": artifact.digest(changed)})
    for to, lines in (("gguf", 1), ("hf", 0)):
        out = str(tmp_path / f"m.{to}")
        monkeypatch.setattr("sys.argv", ["caldera", "export", str(place), "--to", to, "--out", out])
        cli.main()
        assert capsys.readouterr().err.count("sees the last 8 only, which is in the file") == lines


def test_what_was_not_changed_is_read(dense, compressed, capsys):
    for model in (convert.load(dense / "hf"), convert.load(dense / "bpe.gguf"), convert.load(dense / "spm.gguf"),
                  artifact.load(compressed)):
        use(model)
    cli.inspect(compressed)
    assert capsys.readouterr().out.count("blocks.0.") == 7
