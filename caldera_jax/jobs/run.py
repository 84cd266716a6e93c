"""What is on the disk of a run that goes on: every layer is written when it is finished, and never made twice.

``OUT/unfinished`` holds the run's own description, one safetensors file and one record for each finished layer, and the
Moments; it is gone when the report is written.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from caldera_jax.jobs import artifact, report, spread
from caldera_jax.linear import CompressedLinear
from caldera_jax.models import files, llama
from caldera_jax.models.convert import Model
from caldera_jax.models.weights import Block


def moments_hash(identity: dict[str, Any]) -> str:
    """Name of the folder of kept Moments: of all that they depend on."""
    config = identity["config"]
    dense, cap = config["activations"] == "dense", config.get("token_cap", 0.0)  # the first ones had none
    inputs = [identity["model_sha256"], identity["calibration_sha256"], *([cap] if cap else [])]
    return report.config_hash(inputs if dense else identity)


class Run:
    """The output directory of one run, which all its processes see: what is finished, and where the next part goes.

    Until the report is written, or its first process has ended, no other run may have the directory.
    """

    def __init__(self, out: Path, identity: dict[str, Any]):
        self.out, self.identity, self.work = out, identity, out / "unfinished"
        self._lock = FileLock(self.work / "lock", is_singleton=True)  # the system releases it when the process ends
        if spread.rank() == 0:
            self._claim(identity)
        spread.barrier()

    @property
    def moments_hash(self) -> str:
        """Name of the folder of kept Moments."""
        return moments_hash(self.identity)

    def _claim(self, identity: dict[str, Any]) -> None:
        out = self.out
        known = self._read(self.work / "run.json")
        if known is None and (out / artifact.MANIFEST).exists():
            known = artifact.read_manifest(out)["run"]
        if known is None and out.exists() and not self._empty():
            raise ValueError(f"{out} exists and holds something else: choose another --out")
        if known is not None and _told(known) != _told(identity):
            raise ValueError(f"{out} belongs to another run ({_difference(_told(known), _told(identity))}): choose "
                             "another --out, or remove it to start over")
        if not self._read(out / "report.json"):
            self.work.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(f"{out}: another process is at work on this run: wait until it has ended, or choose "
                                 "another --out") from None
            files.write_json(self.work / "run.json", identity)

    def _empty(self) -> bool:
        """Whether there is nothing but, at most, the traces of a run cut off before it had written anything."""
        traces = {self.work, self.work / "lock", self.work / "run.json.tmp"}
        return self.out.is_dir() and set(self.out.rglob("*")) <= traces

    def _read(self, path: Path) -> Any:
        return files.read_json(path) if path.is_file() else None

    def report(self) -> dict[str, Any] | None:
        """The report, if this run is finished; its directory of unfinished work is removed."""
        if not self.complete() or not (path := self.out / "report.json").is_file():
            return None
        done = report.read(path)
        shutil.rmtree(self.work, ignore_errors=True)
        return done

    def complete(self) -> bool:
        """Whether the artifact is whole (its report may still be missing)."""
        return (self.out / artifact.MANIFEST).is_file()

    def recall(self, name: str) -> Any:
        """A record kept by ``remember``, or None."""
        return self._read(self.work / f"{name}.json")

    def remember(self, name: str, value: Any) -> None:
        """Keep a record of the run for a later start."""
        if spread.rank() == 0:
            self.keep(name, value)

    def keep(self, name: str, value: Any) -> None:
        """``remember`` what this process alone has made."""
        files.write_json(self.work / f"{name}.json", report.plain(value))

    def records(self) -> list[dict[str, Any]]:
        """What was recorded of each layer, in order."""
        rows = {path: self.recall(path) for path in artifact.read_manifest(self.out)["layers"]}
        if missing := [path for path, row in rows.items() if row is None]:
            raise ValueError(f"{self.work}: the record of {missing[0]} is gone, and the report needs it: remove "
                             f"{self.out} and start again (the model itself is whole: `caldera eval {self.out}`)")
        for path, row in rows.items():
            files.checked(row, report.Layer, self.work / f"{path}.json")
        return [{name: value for name, value in row.items() if name != "meta"} for row in rows.values()]

    def layer(self, path: str) -> CompressedLinear | None:
        """A finished layer; None where there is none, or where its file is damaged and it must be made again."""
        try:
            kept = self.recall(path)
            return kept and artifact.layer_from(files.read_arrays(self.work / f"{path}.safetensors"), kept["meta"])
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            tqdm.write(f"{path}: kept, but not readable ({error}); compressing it again")
            return None

    def finished(self, path: str) -> CompressedLinear:
        """A layer that has been finished; ValueError where it is gone or damaged since."""
        if (layer := self.layer(path)) is None:
            raise ValueError(f"{self.work / path}: finished once, now gone or damaged: run the same command again")
        return layer

    def keep_layer(self, path: str, layer: CompressedLinear, row: dict[str, Any]) -> None:
        """Write a finished layer: arrays first, and then the record that makes it count."""
        files.write_arrays(self.work / f"{path}.safetensors", artifact.layer_arrays(layer))
        self.keep(path, {**row, "meta": artifact.layer_meta(layer)})

    def wait(self, names: list[str]) -> None:
        """Wait until all processes have kept these records."""
        self.wait_for([self.work / f"{name}.json" for name in names])

    def wait_for(self, paths: list[Path]) -> None:
        """Wait, for as long as it takes, until these files are there: messages between processes may be no further than
        half an hour apart."""
        while not all(path.is_file() for path in paths):
            time.sleep(0.2)
        spread.barrier()

    def block(self, config: llama.LlamaConfig, index: int, dense: Mapping[str, Any]) -> Block:
        """The block with its linear layers as they were compressed; each is read from the disk when it is asked for."""
        paths = {name: partial(self.finished, f"blocks.{index}.{name}") for name in llama.linears(config)}
        return Block({name: paths.get(name, partial(dense.__getitem__, name)) for name in dense})

    def write(self, model: Model, layers: list[str]) -> None:
        """Write the artifact: every block's file, the rest, the manifest."""
        if spread.rank() == 0:
            for index, block in enumerate(model.params["blocks"]):
                files.write_arrays(self.out / artifact.block_file(index), self._arrays(index, block, layers))
            blocks = [path for path in layers if path not in model.params]
            metas = {path: self._read(self.work / f"{path}.json")["meta"] for path in blocks}
            artifact.finish(self.out, model, metas, self.identity)
        spread.barrier()

    def _arrays(self, index: int, block: Mapping[str, Any], layers: list[str]) -> dict[str, np.ndarray]:
        """All arrays of a block, by name; those of its finished layers as they lie on the disk."""
        arrays = {}
        for name in block:
            if (path := f"blocks.{index}.{name}") in layers:
                stored = files.read_arrays(self.work / f"{path}.safetensors")
                arrays |= {f"{name}.{field}": array for field, array in stored.items()}
            else:
                arrays[name] = np.asarray(block[name])
        return arrays

    def finish(self, summary: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Write the report and drop the unfinished work."""
        if spread.rank() == 0:
            files.write_json(self.out / "report.json", summary())
            self._lock.release(force=True)
            shutil.rmtree(self.work, ignore_errors=True)  # another may have found the report, and done so
        spread.barrier()
        return files.read_json(self.out / "report.json")


def _told(identity: dict[str, Any]) -> dict[str, Any]:
    """With the settings that the first runs did not have."""
    return identity | {"config": {"tables": "dense", "counted": "layers", **identity["config"]}}


def _difference(known: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first setting that differs, in words."""
    def flat(value, prefix=""):
        if isinstance(value, list):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            return {prefix: value}
        parts = (flat(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items())
        return {name: leaf for part in parts for name, leaf in part.items()}

    a, b = flat(known), flat(wanted)
    name = next(key for key in [*b, *a] if a.get(key, "absent") != b.get(key, "absent"))
    return f"its {name.removeprefix('config.')} is {a.get(name, 'absent')!r}, this run's {b.get(name, 'absent')!r}"
