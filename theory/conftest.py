"""Strict promotion for the claims too, as tests/conftest.py sets it, so that they pass alone and beside the tests."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
