"""The claims of theory/: each has a record of its configuration, a figure, a line in the index, and mutations."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from caldera_jax.jobs import report

THEORY = Path(__file__).parent.parent / "theory"
CLAIMS = sorted(path.stem for path in THEORY.glob("*.py") if "common.run(" in path.read_text())


def load(name: str):
    """A module of theory/, where its files find each other; imported when a test runs, as pytest collects them too."""
    if str(THEORY) not in sys.path:
        sys.path.insert(0, str(THEORY))
    return importlib.import_module(name)


def record(claim: str) -> dict:
    return json.loads((THEORY / "results" / f"{claim}.json").read_text())


def test_there_are_claims():
    assert {"ldlq_identity", "caldera_bound"} <= set(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_record_is_of_the_claims_configuration_and_is_what_the_figure_shows(claim):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    module, found = load(claim), record(claim)
    assert found["config_hash"] == report.config_hash(module.Config()), f"run python theory/{claim}.py"
    assert (THEORY / "figures" / f"{claim}.png").is_file()
    figure = module.draw(found)
    assert all(axis.has_data() for axis in figure.axes)
    pyplot.close(figure)


def test_the_index_names_every_claim_and_no_file_that_is_not_there():
    rows = [line for line in (THEORY / "README.md").read_text().splitlines() if line.startswith("|")]
    named = [name for row in rows for name in re.findall(r"`(\w+)\.py`", row)]
    assert sorted(named) == CLAIMS


def test_every_record_and_figure_belongs_to_a_claim():
    kept = {path.stem for folder in ("results", "figures") for path in (THEORY / folder).glob("*.*")}
    assert kept - {"mutations"} == set(CLAIMS)


def test_every_mutation_still_finds_its_text_once_and_its_test():
    mutations = load("mutations")
    for mutation in mutations.MUTATIONS:
        text = (THEORY.parent / mutation.file).read_text()
        assert mutations.broken(text, mutation) != text
        claim, test = mutation.test.split("::")
        assert f"def {test}(" in (THEORY / f"{claim}.py").read_text(), mutation.test


def test_the_record_of_the_mutations_is_of_this_list_and_all_were_caught():
    mutations, found = load("mutations"), record("mutations")
    assert found["config_hash"] == report.config_hash(mutations.MUTATIONS), "run python theory/mutations.py"
    assert all(row["caught"] for row in found["rows"]) and len(found["rows"]) == len(mutations.MUTATIONS)


def test_every_claim_is_broken_in_the_package_and_in_its_own_formulas():
    mutations = load("mutations").MUTATIONS
    for claim in CLAIMS:
        broken = {mutation.file.split("/")[0] for mutation in mutations if mutation.test.startswith(f"{claim}::")}
        assert broken == {"caldera_jax", "theory"}, claim
