"""The check of an accelerator: its record is whole, what fails is told, and a wrong kernel is found out."""

import json
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caldera_jax.jobs import cli
from caldera_jax.jobs.presets import PRESETS
from caldera_jax.kernels import e8p, hadamard, matmul
from caldera_jax.models import files

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

import accelerator  # noqa: E402
import devices  # noqa: E402
import drawing  # noqa: E402

SMOKE = accelerator.Config(preset="smoke", limit=600.0)
REPORT = {"base_perplexity": 9.0, "compressed_perplexity": 10.0, "bits_per_weight": 3.0, "mean_layer_error": 0.2,
          "stages": {"load": {"seconds": 1.0}}, "seconds": {"total": 2.0, "compile": 1.0}}
RUN = accelerator.Run(SMOKE, accelerator.SIZES["smoke"], devices.Peaks(1e9, 1e10, 1e10, "a guess"), math.inf)


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Records of a test go to its own folder."""
    monkeypatch.setattr(drawing, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def pretend(run, command, *arguments):
    """``says`` without the work."""
    if command == "compress":
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir()
        files.write_json(out / "report.json", REPORT)
    return f"written: {arguments[0]}"


def numbers(value):
    """All of a record."""
    if isinstance(value, dict | list):
        return [x for item in (value.values() if isinstance(value, dict) else value) for x in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def told(found, name):
    """The rows of a part by name."""
    return {row["name"]: row for row in found["parts"][name]["rows"]}


def test_smoke_writes_a_whole_finite_record_without_absolute_paths(results, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "says", pretend)
    accelerator.measure(SMOKE)
    text = (results / "accelerator_cpu_smoke.json").read_text()
    found = json.loads(text)
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(accelerator.PARTS, "ok")
    assert all(math.isfinite(x) for x in numbers(found)) and "nan" not in text and '"inf"' not in text
    assert not re.search(r'(?<![\w/.])/[\w.]', text) and str(Path.home()) not in text
    assert found["versions"]["jax"] == jax.__version__ and found["machine"]["devices"] and found["config_hash"]
    assert found["peaks"]["source"] == "measured here"
    timed = [row for part in ("encode", "apply", "method") for row in found["parts"][part]["rows"]]
    assert len(timed) == 5 and all(row["seconds"] > 0 and row["compile_seconds"] > 0 for row in timed)
    assert all(0 < row[of] < 20 for row in timed for of in ("of_flops", "of_memory"))  # what is small lies in a cache
    assert all(part["seconds"] > 0 and part["peak_host_bytes"] > 0 and part["peak_device_bytes"] == "not told"
               for part in found["parts"].values())
    ours, other = found["parts"]["layer"]["rows"]
    assert 0 < other["difference"] == abs(other["relative_error"] / ours["relative_error"] - 1) < 0.05
    printed = capsys.readouterr().out
    assert all(row["name"] in printed for part in found["parts"].values() for row in part["rows"])
    assert "! " not in printed


def test_what_fails_is_recorded_without_paths_and_the_rest_goes_on(results, monkeypatch, capsys):
    def broken(run):
        raise RuntimeError(f"no such thing as {Path(__file__).resolve()}")
        yield

    def half(run):
        yield "good", lambda: {"seconds": 1.0, "compile_seconds": 0.0}
        yield "bad", lambda: 1 / 0
        yield "not a number", lambda: {"relative_error": math.nan, "ok": math.nan <= 1}

    parts = {**accelerator.PARTS, "encode": broken, "apply": half, "layer": lambda run: iter(())}
    monkeypatch.setattr(accelerator, "PARTS", parts)
    monkeypatch.setattr(devices, "measured", lambda *sizes: 1 / 0)
    monkeypatch.setenv("CALDERA_CACHE", str(results / "nothing"))
    config = accelerator.Config(("encode", "apply", "layer", "job"), "smoke", "smollm2-135m")
    accelerator.measure(config)
    assert accelerator.path_of(config).name == "accelerator_cpu_encode-apply-layer-job_smoke.json"
    found = json.loads(accelerator.path_of(config).read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == {
        "encode": "not ok: 1 rows, the first preparation", "apply": "not ok: 2 rows, the first bad", "layer": "ok",
        "job": "skipped: smollm2-135m is not in the cache: `caldera fetch smollm2-135m`, or give --model and --text"}
    [row] = found["parts"]["encode"]["rows"]
    assert row["error"] == "RuntimeError" and row["message"] == "no such thing as test_accelerator.py"
    assert any('File "test_accelerator.py", line' in line for line in row["traceback"])
    bad = told(found, "apply")
    assert bad["bad"]["error"] == "ZeroDivisionError" and bad["not a number"]["relative_error"] == "nan"
    assert found["peaks"]["source"] == "not measured: division by zero" and "! bad" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        accelerator.main(config)
    assert end.value.code


def test_a_part_stops_between_rows_when_its_share_is_over_and_others_have_what_is_left(monkeypatch):
    seconds, moments = iter(range(0, 1000, 10)), []
    monkeypatch.setattr(accelerator.time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(devices, "measured", lambda *sizes: (RUN.peaks, 1e-6))

    def slow(run):
        moments.append(run.until)
        for i in range(100):
            yield f"row {i}", dict

    monkeypatch.setattr(accelerator, "PARTS", dict.fromkeys(accelerator.PARTS, slow))
    found = accelerator.measure(accelerator.Config(("encode", "apply", "method"), "smoke", limit=60.0))
    assert [part["status"] for part in found["parts"].values()] == [
        "stopped: out of time after 0 rows", "stopped: out of time after 1 rows", "skipped: out of time"]
    assert moments[0] == pytest.approx(10 + 25 / 155 * 50) and moments[1] < 60


@pytest.mark.parametrize(("module", "name", "wrong"), [
    (e8p, "encode", lambda f: lambda x: (f(x)[0], f(x)[1] ^ 1)),  # a code of another value
    (e8p, "encode", lambda f: lambda x: f(1.1 * x)),  # not the nearest
    (hadamard, "transform", lambda f: lambda x, inverse: f(x, False)),  # never inverse
    (matmul, "multiply", lambda f: lambda x, parts, stages, m: 1.0001 * f(x, parts, stages, m)),
    (matmul, "multiply", lambda f: lambda x, parts, stages, m: jnp.nan * f(x, parts, stages, m))])
def test_a_wrong_kernel_is_found_out(module, name, wrong, monkeypatch):
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    rows = {label: measure for label, measure in accelerator.check_kernels(RUN)
            if f".{name} " in label and "float32" in label}
    found = {label: measure()["ok"] for label, measure in rows.items()}
    assert found == {label: label.endswith("float32") and name == "transform" for label in rows} and len(found) > 0


def test_another_codeword_that_is_as_near_is_counted_and_no_error(monkeypatch):
    zeros = lambda seed, shape, dtype, size: (jnp.zeros(shape, dtype), np.zeros(shape))
    monkeypatch.setattr(accelerator, "gaussian", zeros)  # 1/4 in every entry, or -1/4
    rows, encode = [], e8p.encode
    for nudge in (-1e-3, 1e-3):
        monkeypatch.setattr(e8p, "encode", lambda x, nudge=nudge: encode(x + nudge))
        rows.append(accelerator.check_encode((2, 8), jnp.float32, 0))
    assert all(row["ok"] and row["relative_error"] == 0 and row["codes"] == 2 for row in rows)
    assert sorted(row["codes_differ"] for row in rows) == [0, 2]


def test_the_job_asks_caldera_for_what_it_knows(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # the commands run in this process
    asked = {}

    def compress(config, out, moments):
        asked["compress"] = config
        out.mkdir()
        files.write_json(out / "report.json", REPORT)

    def generate(model, prompts, sampling, held, kept, show):
        asked["generate"] = (Path(model).name, prompts, sampling)
        raise ValueError("no model")

    monkeypatch.setattr(cli, "run_compress", compress)
    monkeypatch.setattr(cli, "table", lambda report: "")
    monkeypatch.setattr(cli.generate, "run", generate)
    found = {}
    with pytest.raises(SystemExit):
        for name, measure in accelerator.job(RUN):
            found[name] = measure()
    row = found["caldera compress random"]
    assert (row["bits_per_weight"], row["seconds"], row["compile_seconds"]) == (3.0, 2.0, 1.0)
    preset, asked_for = PRESETS["smoke"], asked["compress"]
    assert (asked_for.caldera, asked_for.blocks) == (preset.caldera, preset.blocks)
    assert Path(asked_for.model).name == "random" and asked_for.calibration.text == asked_for.evaluation.text
    assert asked["generate"] == ("out", ("The capital is",), cli.generate.Sampling(8))


@pytest.mark.slow
def test_the_job_is_done_by_processes_of_their_own():
    run = RUN._replace(until=time.perf_counter() + 300)
    compress, generate = (measure() for _, measure in accelerator.job(run))
    assert 0 < compress["mean_layer_error"] < 1 and compress["bits_per_weight"] > 2 and compress["seconds"] > 0
    assert "tokens/s" in generate["said"]
    with pytest.raises(RuntimeError, match="caldera inspect ended with 2: caldera: nowhere"):
        accelerator.says(run, "inspect", "nowhere")


def test_every_device_has_finite_peaks_of_a_named_source_and_fractions_of_them_are_what_they_say():
    for kind, peaks in devices.DEVICES.items():
        assert all(0 < x < 1e16 and math.isfinite(x) for x in peaks[:3]) and len(peaks.source) > 10
        assert peaks.float32 < peaks.half and peaks.memory < peaks.float32, kind
        row = devices.rated(peaks, {"seconds": 1e-3}, 1e-3 * peaks.half / 2, 1e-3 * peaks.memory / 4, jnp.bfloat16)
        assert row["of_flops"] == pytest.approx(0.5) and row["of_memory"] == pytest.approx(0.25)
    assert {"NVIDIA H100 80GB HBM3", "TPU v5 lite"} < devices.DEVICES.keys()


def test_copies_in_turn_outgrow_a_cache_and_are_other_arrays():
    one = {"a": jnp.ones(1000, jnp.float32)}
    copies = devices.in_turn(one, 10_000)
    assert len(copies) == 3 and copies[0] is one and len(devices.in_turn(one, 1e9)) == 48
    places = {copy["a"].unsafe_buffer_pointer() for copy in copies}
    assert len(places) == 3 and len(devices.in_turn(one, 0)) == 1


def test_paths_are_cut_and_rates_stay():
    clean = accelerator.clean
    assert clean(["/home/me/x.py", 'File "/a b/c.py"', "3 tokens/s of 1/2, ./here", Path("x").name]) == [
        "x.py", 'File "a b/c.py"', "3 tokens/s of 1/2, ./here", "x"]
    assert clean((partial(float, "inf")(), 1.0)) == ["inf", 1.0]
