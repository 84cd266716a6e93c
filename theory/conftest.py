"""Strict promotion for the claims too, as tests/conftest.py sets it, so that they pass alone and beside the tests."""

import sys
from pathlib import Path

import jax

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from programs import few_programs  # noqa: E402, F401

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
