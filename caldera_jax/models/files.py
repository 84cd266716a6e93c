"""Files that are whole or not there: arrays as safetensors, records as JSON, each written aside and then renamed."""

import hashlib
import json
import os
import typing
from pathlib import Path
from types import UnionType
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
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: missing or not a safetensors file ({error})") from error


def stamp(path: Path) -> tuple[int, int] | None:
    """What is another once a file was replaced: its time and size; None where there is none."""
    found = path.stat() if path.is_file() else None
    return found and (found.st_mtime_ns, found.st_size)


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
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: missing or not readable as JSON ({error})") from error


def checked(value: Any, kind: Any, at: Any) -> Any:
    """``value``, of a file, if it fits this type hint (a list is a tuple, an integer a float); ValueError naming the
    place otherwise.  A TypedDict tells fields that must be there, and some that may."""
    origin, of = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any or origin is typing.Literal and value in of:
        return value
    if type(value) is int and kind in (int, float) and abs(value) < 2**63:
        return kind(value)
    if typing.is_typeddict(kind):
        fields = checked(value, dict, at)
        if missing := kind.__required_keys__ - fields.keys():
            raise ValueError(f"{at}: there is no {', '.join(sorted(missing))}: {_RESTORE}")
        hints = typing.get_type_hints(kind)
        return fields | {name: checked(fields[name], hints[name], f"{at}: {name}") for name in hints if name in fields}
    if origin is dict and of and type(value) is dict:
        return {name: checked(item, of[1], f"{at}: {name}") for name, item in value.items()}
    if origin in (list, tuple) and of and isinstance(value, list | tuple) and (
            origin is list or of[-1] is ... or len(of) == len(value)):
        each = of if origin is tuple and of[-1] is not ... else of[:1] * len(value)
        return origin(item if type(item) is one is not int else checked(item, one, f"{at}[{i}]")
                      for i, (item, one) in enumerate(zip(value, each, strict=True)))
    if origin in (typing.Union, UnionType):
        for one in of:
            try:
                return checked(value, one, at)
            except ValueError:
                continue
    elif not of and kind is not int and isinstance(value, kind):
        return value
    said = repr(value)
    raise ValueError(f"{at}: {said if len(said) < 60 else said[:57] + '...'} is no {_called(kind)}: {_RESTORE}")


_RESTORE = "the file was changed or damaged, or is of another version: restore it, or make it again"


def _called(kind: Any) -> str:
    plain = {int: "integer", float: "number", str: "text", bool: "truth value", dict: "object", list: "list"}
    return plain.get(kind) or (kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind))


def made(kind: Any, fields: dict[str, Any], at: Any) -> Any:
    """The dataclass of these fields; ValueError naming the place where one is missing, unknown or of another type."""
    hints = typing.get_type_hints(kind)
    fields = {name: checked(value, hints.get(name, Any), f"{at}: {name}") for name, value in fields.items()}
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{at}: {error}: {_RESTORE}") from error


def sha256(content: bytes | np.ndarray | Path) -> str:
    """Hexadecimal SHA-256 of bytes, of an array's bytes, or of a file."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(np.ascontiguousarray(content).tobytes() if isinstance(content, np.ndarray) else content
                          ).hexdigest()
