"""The same bytes however a run is spread; workers that die, fail or outlive the command; memory that does not grow."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from caldera_jax.jobs import artifact, calibration, spread
from caldera_jax.models import convert, files

WINDOWS = ["--calibration-windows", "5", "--calibration-window", "32", "--evaluation-windows", "3",
           "--evaluation-window", "32"]
SETTINGS = ["--rank", "0", "--q-bits", "3", "--quantizer", "uniform", "--factor-quantizer", "uniform",
            "--rotation", "none", "--outer-iterations", "1", "--inner-iterations", "1", *WINDOWS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny model, its text, and a cache of compiled programs for all tests here."""
    directory = tmp_path_factory.mktemp("spread")
    tiny.write_text(directory / "text.txt")
    tiny.write_model(directory / "model", tiny.SQUARE)
    return directory


def start(place, out, *more, devices=1, model="model", settings=SETTINGS):
    text = ["--calibration-text", str(place / "text.txt"), "--evaluation-text", str(place / "text.txt")]
    command = [sys.executable, "-m", "caldera_jax.jobs.cli", "compress", str(place / model), "--out", str(out)]
    environment = os.environ | {"CALDERA_CACHE": str(place / "cache"), "JAX_PLATFORMS": "cpu", "XLA_FLAGS":
                                f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen([*command, *settings, *text, *more], env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def run(*arguments, **more):
    """Exit code, standard output and standard error, which must come without warnings."""
    process = start(*arguments, **more)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def weight_files(directory):
    names = [*sorted(path.name for path in directory.glob("*.safetensors")), artifact.MANIFEST]
    return {name: (directory / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def alone(place):
    """A run of one process: its directory; its Moments are kept."""
    code, out, error = run(place, place / "alone", "--processes", "1", "--moments", str(place / "moments"))
    assert code == 0 and "perplexity" in out, error
    return place / "alone"


# ---- the same bytes


@pytest.mark.parametrize(("processes", "devices"), [(2, 1), pytest.param(0, 8, marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_processes_or_devices(place, alone, tmp_path, processes, devices):
    moments = tmp_path / "moments"
    code, out, error = run(place, tmp_path / "out", "--processes", str(processes), "--moments", str(moments),
                           devices=devices)
    assert code == 0 and out.count("perplexity") == 1, error
    assert weight_files(tmp_path / "out") == weight_files(alone)
    ours, theirs = ({path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
                    for folder in (moments, place / "moments"))
    assert ours == theirs and len(ours) == 8
    one, many = (files.read_json(folder / "report.json") for folder in (alone, tmp_path / "out"))
    assert one["compressed_perplexity"] == many["compressed_perplexity"]
    assert one["base_perplexity"] == many["base_perplexity"]
    assert {row["process"] for row in many["layers"]} == set(range(many["processes"])) == set(range(processes or 1))
    assert [row["error"] for row in many["layers"]] == [row["error"] for row in one["layers"]]
    words = [line for line in error.replace("\r", "\n").splitlines() if line.strip() and "/" not in line]
    assert not words, words  # progress alone: no warning, no log


@pytest.mark.slow
def test_two_processes_calibrate_on_the_compressed_model_as_one_does(place, tmp_path):
    found = []
    for processes in ("1", "2"):
        code, _, error = run(place, tmp_path / processes, "--activations", "compressed", "--processes", processes)
        assert code == 0, error
        found.append(weight_files(tmp_path / processes))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["dense", "compressed"])
def test_one_level_gives_the_same_bytes_whatever_the_processes_and_devices(place, tmp_path, activations):
    found = []
    for processes, devices in ((1, 1), (2, 1), (0, 8)):
        out = tmp_path / f"{processes}_{devices}"
        code, _, error = run(place, out, "--bits", "4", "--activations", activations, "--processes", str(processes),
                             devices=devices, settings=WINDOWS)
        assert code == 0, error
        found.append(weight_files(out))
    assert found[0] == found[1] == found[2]


# ---- ends that were not planned


def running(process, out, layers):
    """Wait until so many layers are finished; the processes of the workers."""
    while len(list((out / "unfinished").glob("blocks.*.json"))) < layers:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


linux = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")


@linux
def test_a_killed_worker_ends_the_command_and_another_number_of_processes_finishes_with_the_same_bytes(
        place, alone, tmp_path):
    out = tmp_path / "out"
    process = start(place, out, "--processes", "2")
    workers = running(process, out, 1)
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - killed < 10
    assert process.returncode == 2 and "process 1 was ended by signal 9" in said.splitlines()[-1]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    code, _, error = run(place, out, "--processes", "1")
    assert code == 0, error
    assert weight_files(out) == weight_files(alone)


@linux
def test_a_second_run_in_the_same_directory_is_refused_while_the_first_is_at_work(place, alone, tmp_path):
    out = tmp_path / "out"
    with start(place, out, "--processes", "2") as first:
        workers = running(first, out, 1)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)  # or it would be done before the second has started
        try:
            code, printed, error = run(place, out, "--processes", "2")
            assert code == 2 and not printed
            assert f"{out}: another process is at work on this run: wait" in error and "Traceback" not in error
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGCONT)
        assert first.wait(timeout=300) == 0, first.stderr.read()
    assert weight_files(out) == weight_files(alone)


@linux
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
                         ids=lambda end: end.name)
def test_workers_never_outlive_the_command(place, tmp_path, end):
    process = start(place, tmp_path / "out", "--processes", "2")
    workers = running(process, tmp_path / "out", 1)
    process.send_signal(end)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.05)


def test_a_layer_that_fails_in_one_worker_is_named_in_one_line(place, alone, tmp_path):
    folder = next((place / "moments").iterdir())
    for file in folder.iterdir():
        arrays = files.read_arrays(file)
        if file.name == "moments_001_o.safetensors":
            arrays["o.sum"] = np.full_like(arrays["o.sum"], np.nan)
        (tmp_path / folder.name).mkdir(exist_ok=True)
        files.write_arrays(tmp_path / folder.name / file.name, arrays)
    code, _, error = run(place, tmp_path / "out", "--processes", "2", "--moments", str(tmp_path))
    assert code == 2 and "blocks.1.o: the Hessian holds NaN" in error.splitlines()[-1]
    assert error.count("caldera:") == 1


@pytest.mark.parametrize(("flags", "message"), [
    (["--processes", "-1"], "must not be negative"),
    (["--coordinator", "127.0.0.1:1"], "needs --processes N and --process-id"),
    (["--coordinator", "here", "--processes", "1", "--process-id", "0"], "HOST:PORT of process 0, or auto"),
    (["--coordinator", "auto"], "found no cluster"),
    (["--process-id", "0"], "give --coordinator HOST:PORT, too"),
])
def test_wrong_numbers_of_processes_are_refused(place, tmp_path, flags, message):
    code, _, error = run(place, tmp_path / "out", *flags)
    assert code == 2 and message in error and error.count("\n") == 1


# ---- memory


def peak(place, name, blocks, *more):
    wide = dataclasses.replace(tiny.SQUARE, layers=blocks, dim=384, ffn_dim=384, head_dim=192)
    tiny.write_model(place / name, wide)
    code, _, error = run(place, place / f"{name}_out", "--processes", "1", *more, model=name)
    assert code == 0, error
    return json.loads((place / f"{name}_out" / "report.json").read_text())["peak_memory_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--blocks", "2"], []], ids=["two", "all"])
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path, more):
    """Twenty more blocks of 4.1 MB are 83 MB, every time; the peak of a busy machine varies by tens from run to run."""
    tiny.write_text(tmp_path / "text.txt")
    peak(tmp_path, "first", 2, *more)  # compiles
    assert any(peak(tmp_path, f"long_{i}", 25, *more) - peak(tmp_path, f"short_{i}", 5, *more) < 20e6 for i in range(3))


def test_a_block_is_read_when_it_is_asked_for_and_not_kept(place):
    model = convert.load(place / "model")
    block = model.params["blocks"][0]
    assert block["q"] is not block["q"]
    np.testing.assert_array_equal(block["q"], dict(block)["q"])
    with pytest.raises(KeyError):
        block["nothing"]


# ---- the parts


@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (2, 1), (3, 2), (1, 8), (4, 4), (11, 1)])
@pytest.mark.parametrize("windows", [1, 3, 8, 13, 64])
def test_every_window_has_one_owner_and_the_sums_one_order(monkeypatch, processes, devices, windows):
    monkeypatch.setattr(spread, "count", lambda: processes)
    monkeypatch.setattr(spread.jax, "local_device_count", lambda: devices)
    merge, owned, folded = lambda a, b: f"({a}{b})", [], []
    for rank in range(processes):
        monkeypatch.setattr(spread, "rank", lambda rank=rank: rank)
        own = spread.own_shards(windows)
        assert len(own) <= devices
        owned += [rank for device in own for shard in device for _ in range(windows)[shard]]
        parts = [spread.fold([str(list(range(windows)[shard])) for shard in device], merge) for device in own]
        folded += [spread.fold(parts, merge)] if parts else []
    assert owned == spread.window_owners(windows) and len(owned) == windows
    shards = [str(list(range(windows * i // 8, windows * (i + 1) // 8))) for i in range(8)]
    assert spread.fold(folded, merge) == spread.fold(shards, merge)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_layers_are_spread_evenly_and_each_has_one_worker(workers):
    costs = [331.0, 110.0, 110.0, 331.0, 884.0, 884.0, 1475.0]
    chosen = spread.assign([costs] * 30, workers)
    load = [sum(c for group in chosen for c, w in zip(costs, group, strict=True) if w == i) for i in range(workers)]
    assert sum(load) == 30 * sum(costs) and max(load) <= 1.05 * sum(load) / workers + 1475 * (workers > 4)
    assert spread.assign([costs] * 30, workers) == chosen


def test_work_on_devices_stops_where_a_part_fails(monkeypatch):
    done = []

    def work(items):
        for item in items:
            if item == "fails":
                raise ValueError("this part")
            done.append(item)
            time.sleep(0.02)

    monkeypatch.setattr(spread.jax, "local_devices", lambda: [None, None])
    with pytest.raises(ValueError, match="this part"):
        spread.on_devices(work, [range(500), ["fails"]])
    assert len(done) < 100


def test_the_error_that_is_told_is_that_of_the_part_that_failed(monkeypatch):
    """And not that of another one, which finds itself stopped before its first item and with nothing to add up."""
    failing = threading.Event()

    def work(items):
        if (first := next(items)) == "fails":
            failing.set()
            raise ValueError("this part")
        return spread.fold([first, *items], max)

    def late():
        failing.wait()
        time.sleep(0.1)
        yield from range(3)

    monkeypatch.setattr(spread.jax, "local_devices", lambda: [None, None])
    with pytest.raises(ValueError, match="this part"):
        spread.on_devices(work, [late(), ["fails"]])


def test_moments_of_fewer_windows_than_shards_are_those_of_the_windows(place):
    model = convert.load(place / "model")
    tokens = np.random.default_rng(0).integers(0, 256, (3, 16)).astype(np.int32)
    for (_, few), (_, one) in zip(calibration.collect(model.config, model.params, tokens),
                                  calibration.collect(model.config, model.params, tokens.reshape(3, 16)), strict=True):
        for name in few:
            assert int(few[name].count) == 48
            np.testing.assert_array_equal(few[name].sum, one[name].sum)


@pytest.mark.parametrize(("membership", "files", "expected"), [
    ("0::/", {}, 9216),
    ("0::/", {"memory.max": "max", "memory.current": 1000}, 9216),
    ("0::/", {"memory.max": 5000, "memory.current": 1000}, 4000),
    ("0::/", {"memory.max": 5000, "memory.current": 4900, "memory.stat": "anon 9\ninactive_file 3000\n"}, 3100),
    ("0::/", {"memory.max": 5000, "memory.current": 6000}, 0),
    ("0::/a/b", {"a/b/memory.max": "max", "a/b/memory.current": 7,
                  "a/memory.max": 5000, "a/memory.current": 900}, 4100),
    ("0::/host/name", {"memory.max": 5000, "memory.current": 1000}, 4000),  # a container that sees its own files alone
    ("0::/../other", {"memory.max": 5000, "memory.current": 1000}, 4000),
    ("4:cpu,memory:/a\n3:pids:/p\n1:name=systemd:/", {
        "memory/a/memory.limit_in_bytes": 6000, "memory/a/memory.usage_in_bytes": 2000,
        "memory/a/memory.stat": "inactive_file 5\ntotal_inactive_file 500\n"}, 4500),
    ("4:memory:/docker/x", {"memory/memory.limit_in_bytes": 6000, "memory/memory.usage_in_bytes": 2000}, 4000),
    ("4:memory:/", {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": 2000}, 9216),
    ("no such line", {"memory.max": 5000, "memory.current": 1000}, 9216),
    (None, {"memory.max": 5000, "memory.current": 1000}, 9216),
])
def test_available_memory_is_what_the_machine_and_every_control_group_leave(tmp_path, membership, files, expected):
    given = {f"groups/{name}": str(value) for name, value in files.items()}
    given["proc/meminfo"] = "MemTotal: 20 kB\nMemAvailable:    9 kB\nHugePages_Total: 0\n"
    given |= {} if membership is None else {"proc/self/cgroup": membership + "\n"}
    for name, content in given.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert spread.available_memory(tmp_path / "proc", tmp_path / "groups") == expected
    assert spread.available_memory(tmp_path / "nowhere", tmp_path / "groups") > 10**8  # all that there is
