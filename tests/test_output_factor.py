"""The output factor: its basis is worth what Hadamard's inequality says, and on a diagonal one nothing."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

import output_factor  # noqa: E402


def factor(size, seed):
    a = np.random.default_rng(seed).standard_normal((size, 3 * size)) * np.linspace(0.5, 2, size)[:, None]
    return a @ a.T / (3 * size) + 0.5 * np.ones((size, size))


def test_the_basis_of_g_saves_the_bits_of_hadamards_inequality(monkeypatch):
    monkeypatch.setattr(output_factor, "importance", lambda raw: raw)  # neither floor nor shrinkage
    g = factor(12, 0)
    saved = output_factor.excess("diagonal", g, g) - output_factor.excess("full", g, g)
    assert saved == pytest.approx((np.sum(np.log2(np.diag(g))) - np.linalg.slogdet(g)[1] / np.log(2)) / (2 * len(g)))
    assert saved > 0.1


def test_a_diagonal_factor_is_its_own_basis_and_a_factor_of_elsewhere_can_lose():
    diagonal = np.diag(np.diag(factor(12, 0)))
    assert output_factor.excess("full", diagonal, diagonal) == pytest.approx(
        output_factor.excess("diagonal", diagonal, diagonal))
    ours, theirs = factor(12, 0), diagonal
    assert output_factor.excess("full", ours, theirs) > output_factor.excess("diagonal", ours, theirs)
