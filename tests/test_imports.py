"""Imports point one way: the method, then models, then jobs; and no module imports one that comes after it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "caldera_jax"
ORDER = """
lattice bitshift trellis entropy packing hadamard kernels codebooks hessian objective incoherence ldlq regression lplr
decompose levels linear allocate
models.files models.families models.llama models.configuration models.tokenizer models.weights models.data
models.convert
jobs.report jobs.spread jobs.artifact jobs.settings jobs.export jobs.run jobs.calibration jobs.evaluate jobs.generate
jobs.harness jobs.student jobs.training jobs.finetune jobs.work jobs.level jobs.plan jobs.compress jobs.explain
jobs.facts jobs.markup jobs.page jobs.presets jobs.options jobs.cli
""".split()


def _imported(path):
    """Dotted names of all that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _place(name):
    """The module of the package, as it stands in ``ORDER``, that a dotted name is of; None for names from elsewhere."""
    root, *parts = name.split(".")
    if root != "caldera_jax" or not parts:
        return None
    found = ".".join(parts[:2]) if parts[0] in ("models", "jobs") else parts[0]
    return found if found in ORDER else None


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.stem != "__init__" or path.parent.name == "kernels":
            own = _place(".".join(["caldera_jax", *path.relative_to(PACKAGE).with_suffix("").parts]))
            assert own, f"{path.relative_to(PACKAGE)} has no place in the order: give it one here"
            yield path, own


def test_every_module_imports_only_modules_before_it():
    wrong = {f"{own} imports {other}" for path, own in _modules() for other in map(_place, _imported(path))
             if other and other != own and ORDER.index(other) > ORDER.index(own)}
    assert not wrong, "; ".join(sorted(wrong))


def test_the_method_imports_neither_models_nor_jobs_and_models_no_jobs():
    wrong = {f"{own} imports {name}" for path, own in _modules() for name in _imported(path)
             if name.startswith("caldera_jax.jobs") and not own.startswith("jobs.")
             or name.startswith("caldera_jax.models") and "." not in own}
    assert not wrong, "; ".join(sorted(wrong))


def test_the_top_level_holds_the_method_and_no_more_than_a_reader_keeps_in_mind():
    top = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert len(top) <= 18 and top | {"kernels"} == {name for name in ORDER if "." not in name}


def test_the_package_imports_neither_experiments_nor_theory_nor_tests():
    roots = {name.split(".")[0] for path in PACKAGE.rglob("*.py") for name in _imported(path)}
    assert "jax" in roots and not roots & {"experiments", "theory", "tests", "oracles", "matrices"}
