"""Commands that are killed, and commands that are asked what they cannot do."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from safetensors.numpy import save
from test_compress import weight_files

from caldera_jax.jobs import cli
from caldera_jax.models import files

MODEL = ["compress", "model", "--processes", "1", "--calibration-text", "text.txt", "--calibration-windows", "8",
         "--calibration-window", "32", "--evaluation-text", "text.txt", "--evaluation-windows", "6",
         "--evaluation-window", "32"]
COMPRESS = [*MODEL, "--rank", "4", "--outer-iterations", "600"]
LEVEL = [*MODEL, "--bits", "3.5", "--states", "256", "--activations", "compressed"]
FINETUNE = ["finetune", "compressed", "--ranks", "2", "--reconstruct", "1", "--epochs", "4", "--validate", "3",
            "--text", "text.txt", "--windows", "22", "--window", "32", "--aside", "6"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny model, its text, it compressed, and a cache of compiled programs."""
    folder = tmp_path_factory.mktemp("faults")
    tiny.write_text(folder / "text.txt", 400)
    tiny.write_model(folder / "model", tiny.SQUARE)
    assert start(folder, COMPRESS, "compressed").wait() == 0
    return folder


def start(place: Path, command: list[str], out: str) -> subprocess.Popen:
    """The command, in a session of its own."""
    environment = os.environ | {"CALDERA_CACHE": str(place / "cache"), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-m", "caldera_jax.jobs.cli", *command, "--out", out], cwd=place,
                            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            start_new_session=True)


# ---- killed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
@pytest.mark.parametrize(("name", "command"), [("fixed", COMPRESS), ("level", LEVEL), ("finetune", FINETUNE)])
def test_killed_at_twenty_random_times_it_ends_with_the_bytes_of_an_unbroken_run(place, name, command):
    whole, clock, kills, attempt, states = place / f"{name}_whole", random.Random(0), 0, 0, set()
    assert start(place, command, whole.name).wait() == 0
    while kills < 20:
        out = place / f"{name}_{attempt}"
        process = start(place, command, out.name)
        for _ in range(clock.randint(1, 12)):  # by what it has done: most of so small a run is one wait for a compiler
            writing(process, out)
        try:
            process.wait(clock.uniform(0, 0.3))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            kills += process.wait() != 0
            states.add(found(out))
        else:
            attempt += 1
            assert process.returncode == 0
            assert weight_files(out) == weight_files(whole)
    assert start(place, command, out.name).wait() == 0
    assert weight_files(out) == weight_files(whole)
    assert len(states) > 5, sorted(map(len, states))


def found(out: Path) -> frozenset[Path]:
    """All files of a directory that is being written."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # a folder that goes while it is read
            return frozenset(path.relative_to(out) for path in out.rglob("*"))


def writing(process: subprocess.Popen, out: Path) -> None:
    """Waits until the process changes the directory: from here on there is something to lose."""
    before = found(out)
    while found(out) == before and process.poll() is None:
        time.sleep(0.01)


# ---- bad input


def refused(monkeypatch, capsys, *arguments):
    """What a command answers that does not do what it is asked: one line, and nothing on standard output."""
    own = ["--processes", "0"] if arguments[0] == "eval" else []  # here, not in workers
    monkeypatch.setattr("sys.argv", ["caldera", *arguments, *own])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    said = printed.err.replace("\r", "\n").strip().splitlines()[-1]
    assert said.startswith("caldera: ") and "Traceback" not in printed.err
    return said


TEXT = ["--text", "text.txt", "--windows", "22", "--window", "32", "--aside", "6"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["generate", "compressed", ""], "an empty prompt"),
    (["generate", "compressed", "x" * 64], "a prompt of 64 tokens leaves no room in the model's context of 64"),
    (["generate", "nowhere", "x"], "unknown model 'nowhere'.*or the directory of a compressed model"),
    (["eval", "compressed", "--text", "empty.txt"], "empty.txt: the file is empty"),
    (["eval", "compressed", "--text", "few.txt"], "evaluation text is too short: it has 9 tokens"),
    (["eval", "compressed", "--context", "65"], "a context of 65 tokens exceeds the model's, 64"),
    (["eval", "compressed", "--context", "32", "--stride", "33"], "a stride of 33 tokens: give 1 to the context, 32"),
    (["eval", "nowhere"], "nowhere: no compressed model"),
    (["finetune", "compressed", "--out", "new", *TEXT, "--text", "empty.txt"], "empty.txt: the file is empty"),
    (["finetune", "compressed", "--out", "new", *TEXT, "--window", "65"], "windows of 65 tokens exceed"),
    (["finetune", "compressed", "--out", "new", *TEXT, "--aside", "22"], "22 of 22 windows for validation"),
    (["finetune", "compressed", "--out", "new", "--text", "enwiki+python", "--windows", "4", "--aside", "8"],
     "8 of 8 windows for validation"),
    (["finetune", "compressed", "--out", "compressed", *TEXT], "compressed is the model that is to be trained"),
    (["finetune", "compressed", "--out", "model", *TEXT], "model exists and holds something else"),
    (["finetune", "compressed", "--out", "new", *TEXT, "--preset", "rte", "--text", "few.txt"],
     "few.txt, line 1: not JSON .*each line is {\"text\": …, \"label\": …}"),
    (["finetune", "model", "--out", "new", *TEXT], "model: no compressed model"),
    (["finetune", "compressed", "--out", "new", *TEXT, "--goal", "text", "--temperature", "2", "--factor-rate", "1"],
     "--temperature, --factor-rate: of no effect with goal text, 0 ranks and trained signs"),
    (["finetune", "compressed", "--out", "new", *TEXT, "--signs", "False", "--ranks", "1", "--sign-rate", "1"],
     "--sign-rate: of no effect"),
    (["export", "compressed", "--to", "gguf", "--out", "new.bin"], "let --out end in .gguf"),
    (["export", "compressed", "--to", "hf", "--out", "model"], "model exists"),
    (["export", "compressed", "--to", "hf", "--out", "new", "--dtype", "float16"], "float16"),
    (["inspect", "model"], "model: no compressed model"),
])
def test_what_cannot_be_done_is_said_in_one_line(place, monkeypatch, capsys, arguments, message):
    (place / "empty.txt").write_text("")
    (place / "few.txt").write_text("few words")
    monkeypatch.chdir(place)
    assert re.search(message, refused(monkeypatch, capsys, *arguments))
    assert not (place / "new").exists()


def test_a_compressed_model_that_is_truncated_changed_or_of_another_base_is_named_by_every_command(
        place, tmp_path, monkeypatch, capsys):
    commands = [["generate", "copy", "x"], ["eval", "copy"], ["finetune", "copy", "--out", "new", *TEXT],
                ["export", "copy", "--to", "hf", "--out", "new"]]
    flipped = lambda content: content[:-1] + bytes([content[-1] ^ 1])
    monkeypatch.chdir(tmp_path)
    for damage in (lambda content: content[:len(content) // 2], flipped):
        for command in commands:
            shutil.copytree(place, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))
            shutil.copytree("compressed", "copy", dirs_exist_ok=True)
            block = Path("copy/block_001.safetensors")
            block.write_bytes(damage(block.read_bytes()))
            said = refused(monkeypatch, capsys, *command)
            assert "copy/block_001.safetensors: missing, or its SHA-256 differs" in said
            assert not Path("new").exists()
    shutil.copytree("compressed", "copy", dirs_exist_ok=True)
    manifest = Path("copy/manifest.json").read_text()
    for old, new in (('"norm_eps": 1e-05', '"norm_eps": 1e-04'), ('"norm_eps"', '"nosm_eps"'),
                     ('"files": {', '"filed": {')):
        assert old in manifest
        Path("copy/manifest.json").write_text(manifest.replace(old, new, 1))
        for command in commands:
            assert "copy/manifest.json: " in refused(monkeypatch, capsys, *command)
    Path("copy/manifest.json").write_text(manifest)
    for path in Path("model").glob("*.safetensors"):  # another model under the name of the base
        tensors = files.read_arrays(path)
        path.write_bytes(save({name: 2 * value for name, value in tensors.items()}))
    for command in (["eval", "copy", "--base"], ["finetune", "copy", "--out", "new", *TEXT]):
        assert "is not the model that copy was compressed from" in refused(monkeypatch, capsys, *command)
