"""Compiled programs of a test run are dropped before there are more than a process may map."""

import itertools
from pathlib import Path

import jax
import pytest

TESTS = itertools.count()
MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def few_programs():
    """Linux lets a process map 65,530 regions; a compiled program takes several, and without one XLA crashes."""
    yield
    if next(TESTS) % 20 == 0 and MAPS.is_file() and MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
