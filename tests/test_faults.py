"""Commands that are killed, and commands that are asked what they cannot do."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from test_compress import weight_files

from caldera_jax import cli, files

COMPRESS = ["compress", "model", "--rank", "4", "--outer-iterations", "3", "--processes", "1", "--calibration-text",
            "text.txt", "--calibration-windows", "8", "--calibration-window", "32", "--evaluation-text", "text.txt",
            "--evaluation-windows", "6", "--evaluation-window", "32"]
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
    return subprocess.Popen([sys.executable, "-m", "caldera_jax.cli", *command, "--out", out], cwd=place,
                            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            start_new_session=True)


# ---- killed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
@pytest.mark.parametrize("command", [COMPRESS, FINETUNE], ids=["compress", "finetune"])
def test_killed_at_twenty_random_times_it_ends_with_the_bytes_of_an_unbroken_run(place, command):
    name = command[0]
    begun = time.monotonic()
    assert start(place, command, f"{name}_whole").wait() == 0
    lasts, clock, kills, attempt, at = time.monotonic() - begun, random.Random(0), 0, 0, set()
    while kills < 20:
        out = place / f"{name}_{attempt}"
        process = start(place, command, out.name)
        try:
            process.wait(clock.uniform(0, lasts))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            kills += process.wait() != 0
            at.add(len(list(out.rglob("*"))))  # how far it was
        else:
            attempt += 1
            assert process.returncode == 0
            assert weight_files(out) == weight_files(place / f"{name}_whole")
    assert start(place, command, out.name).wait() == 0
    assert weight_files(out) == weight_files(place / f"{name}_whole")
    assert len(at) > 5, at
