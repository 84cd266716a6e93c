"""One way to record a run: configuration and its hash, seed, versions, machine, compile and steady seconds, memory."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax

from caldera_jax import allocate
from caldera_jax.models import files

PACKAGES = ("caldera-jax", "jax", "jaxlib", "numpy", "scipy", "optax", "orbax-checkpoint", "safetensors", "tokenizers",
            "gguf")


class Layer(TypedDict):
    """What a report says of a compressed layer, as far as it is read again."""

    path: str
    shape: tuple[int, int]
    rank: int
    q_bits: float
    factor_bits: tuple[float, float]
    error: float
    bits: int
    bits_per_weight: float
    damping: float
    peak: NotRequired[float]
    tokens: NotRequired[int]
    seconds: float
    predicted_loss: NotRequired[float]
    loss: NotRequired[float]


class Stage(TypedDict):
    """What it says of a part of the run."""

    seconds: float
    compile_seconds: float
    peak_memory_bytes: int


class Report(TypedDict):
    """A report."""

    model: str
    config: dict
    layers: list[Layer]
    tables: NotRequired[list[Layer]]
    stages: dict[str, Stage]
    base_perplexity: float
    compressed_perplexity: float
    evaluated_tokens: int
    compressed_weights: int
    bits_per_weight: float
    model_bits_per_weight: NotRequired[float]
    stored_bytes: int
    model_bytes: int
    disk_bytes: int
    mean_layer_error: float
    max_layer_error: float
    finetune: NotRequired[list[dict]]


class Planned(TypedDict):
    """What the report of a run with a budget of fixed rates says, too."""

    allocation: allocate.Rule
    budget_bits_per_weight: float
    dearest_bits_per_weight: float
    predicted_loss: float
    loss: float


class AtLevel(TypedDict):
    """What that of a run at one level says, too."""

    level: float
    budget_bits_per_weight: float | None
    lost: float
    divergence: NotRequired[float]
    predicted_damage: NotRequired[float]


def read(path: Path) -> dict[str, Any]:
    """A report; ValueError naming a file that is missing or damaged, or a field of it that is not as it was written."""
    found = files.read_json(path)
    for mark, kind in {"model": Report, "allocation": Planned, "level": AtLevel}.items():
        if kind is Report or mark in found:
            files.checked(found, kind, path)
    if not found["layers"]:
        raise ValueError(f"{path}: no layers: restore the file, or compress the model again")
    return found


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as what JSON can hold; a dataclass that stands for a choice keeps its name.

    A field that came ``later`` is left out where it says what was done before, so that older records keep their hash.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
                  if not (f.metadata.get("later") and getattr(value, f.name) == f.default)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that change with any field of the configuration."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:12]


def provenance(config: Any, seed: int) -> dict[str, Any]:
    """What a record needs besides its results: config, config_hash, seed, versions, machine."""
    installed = {name: _version(name) for name in PACKAGES}
    return {"config": plain(config), "config_hash": config_hash(config), "seed": seed,
            "versions": {"python": platform.python_version(), **installed}, "machine": machine()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory and the devices JAX sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"system": platform.system(), "processor": _processor(), "cores": cores, "memory_bytes": memory,
            "devices": [device.device_kind for device in jax.devices()]}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Clock:
    """Seconds and peak memory by stage, with the seconds of tracing and compiling told apart."""

    def __init__(self, stages: dict[str, dict[str, float]] | None = None):
        self.stages: dict[str, dict[str, float]] = dict(stages or {})  # of the process that this one goes on from
        self.compiling: dict[int, float] = {}  # seconds by thread
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float | int, **_: Any) -> None:
        if event.endswith(("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")):
            thread = threading.get_ident()
            self.compiling[thread] = self.compiling.get(thread, 0.0) + seconds

    def add(self, name: str, seconds: float) -> None:
        """Seconds of a stage that was timed without ``stage``."""
        total = self.stages.setdefault(name, {"seconds": 0.0, "compile_seconds": 0.0, "peak_memory_bytes": 0})
        total["seconds"] += seconds
        total["peak_memory_bytes"] = max(total["peak_memory_bytes"], peak_memory())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a part of the run; parts of the same name add up.  Compiling in several threads adds up, too."""
        _reset_peak()
        start, compiled = time.perf_counter(), sum(self.compiling.values())
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)
            self.stages[name]["compile_seconds"] += sum(self.compiling.values()) - compiled

    @contextmanager
    def part(self) -> Iterator[dict[str, float]]:
        """Time what this thread does; yields the record, which is filled at the end."""
        compiled = lambda: self.compiling.get(threading.get_ident(), 0.0)
        start, before = time.perf_counter(), compiled()
        record = {"seconds": 0.0, "compile_seconds": 0.0}
        yield record
        record["seconds"] = time.perf_counter() - start
        record["compile_seconds"] = min(compiled() - before, record["seconds"])


def seconds(stages: dict[str, dict[str, float]]) -> dict[str, float]:
    """Seconds by stage, their total, and how much of it was compilation."""
    by_stage = {name: round(stage["seconds"], 3) for name, stage in stages.items()}
    compiling = sum(stage["compile_seconds"] for stage in stages.values())
    return {**by_stage, "total": round(sum(by_stage.values()), 3), "compile": round(compiling, 3)}


def peak_memory() -> int:
    """Largest resident set of this process, in bytes, since the current stage began (since its start off Linux)."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed: the peak then counts from the start of the process
