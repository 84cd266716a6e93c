"""Files that are whole or not there: arrays as safetensors, records as JSON, each written aside and then renamed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save


def write(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to the disk, rename.  Raises OSError where the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """One safetensors file."""
    write(path, save({name: np.asarray(value, order="C") for name, value in arrays.items()}))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What ``write_arrays`` wrote; ValueError naming a file that is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or not a safetensors file ({error})") from error


def whole(path: Path) -> bool:
    """Whether a safetensors file is there and as long as its header says."""
    try:
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False


def write_json(path: Path, value: Any) -> None:
    """One JSON file."""
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote; ValueError naming a file that is missing or damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: missing or not readable as JSON ({error})") from error


def sha256(content: bytes | np.ndarray | Path) -> str:
    """Hexadecimal SHA-256 of bytes, of an array's bytes, or of a file."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(np.ascontiguousarray(content).tobytes() if isinstance(content, np.ndarray) else content
                          ).hexdigest()
