"""CALDERA (arXiv 2405.18886) in functional JAX: weight matrices as Q + LR, low rank and low precision."""

from caldera_jax.codebooks import E8P, Codebook, Dithered, Half, NormalFloat, ResidualE8P, Trellis, Uniform
from caldera_jax.decompose import CalderaConfig, Decomposition, Trace, caldera
from caldera_jax.hessian import HessianFactors, Moments
from caldera_jax.levels import LevelConfig
from caldera_jax.linear import CompressedLinear, apply, compress_matrix, level
from caldera_jax.objective import rate_distortion_error, rate_distortion_limit, rate_gap, relative_error

__all__ = ["E8P", "CalderaConfig", "Codebook", "CompressedLinear", "Decomposition", "Dithered", "Half",
           "HessianFactors", "LevelConfig", "Moments", "NormalFloat", "ResidualE8P", "Trace", "Trellis", "Uniform",
           "apply", "caldera", "compress_matrix", "level", "rate_distortion_error", "rate_distortion_limit",
           "rate_gap", "relative_error"]
