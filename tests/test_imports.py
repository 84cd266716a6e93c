"""Imports point one way (design.md), and the package never imports experiments or theory."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "caldera_jax"
ORDER = ("files report spread lattice packing hadamard kernels codebooks hessian objective incoherence ldlq regression "
         "lplr decompose linear models artifact export run calibration evaluate generate harness finetune allocate "
         "compress explain page cli").split()


def _imported(path):
    """Top-level modules of the package that a file imports, and the other roots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            bare = node.module == "caldera_jax"
            names = [f"{node.module}.{alias.name}" if bare else node.module for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".") for name in names)


def test_every_module_imports_only_modules_before_it():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        assert own in ORDER, f"{own} has no place in the order: give it one here"
        wrong += [f"{own} imports {name[1]}" for name in _imported(path) if name[0] == "caldera_jax" and len(name) > 1
                  and name[1] != own and ORDER.index(name[1]) >= ORDER.index(own)]
    assert not wrong, "; ".join(sorted(set(wrong)))


def test_the_package_imports_neither_experiments_nor_theory_nor_tests():
    roots = {name[0] for path in PACKAGE.rglob("*.py") for name in _imported(path)}
    assert "jax" in roots and not roots & {"experiments", "theory", "tests", "oracles", "matrices"}
