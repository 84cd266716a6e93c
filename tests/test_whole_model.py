"""whole_model.py: a committed report is that of its run's configuration, and what is missing or another's is named."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

import drawing  # noqa: E402
import whole_model  # noqa: E402

from caldera_jax.models import files  # noqa: E402


@pytest.mark.parametrize("name", whole_model.RUNS)
def test_a_committed_report_is_of_its_own_configuration_and_of_one_base(name):
    assert whole_model.record(name)["base_perplexity"] == pytest.approx(
        whole_model.record("q2")["base_perplexity"], rel=1e-6)


def test_a_missing_report_one_of_another_configuration_and_an_unknown_run_are_named(tmp_path, monkeypatch):
    found = whole_model.record("q2")
    monkeypatch.setattr(drawing, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="whole_model_q2.json is missing: python experiments/whole_model.py q2"):
        whole_model.record("q2")
    files.write_json(whole_model.path_of("q3"), found)
    with pytest.raises(ValueError, match="whole_model_q3.json is of another configuration: delete it"):
        whole_model.record("q3")
    with pytest.raises(ValueError, match="no run is called 'q5': choose from q2"):
        whole_model.main(["q2", "q5"])
    assert [path.name for path in tmp_path.iterdir()] == ["whole_model_q3.json"]  # nothing was run


def test_the_command_of_a_run_makes_its_configuration():
    chosen = whole_model.config("q2_k32_downdate_10_passes")
    assert (chosen.caldera.rank, chosen.caldera.downdate, chosen.caldera.refine_passes) == (32, True, 10)
    assert whole_model.config("q2_k32_sequential").activations == "compressed"
    assert chosen.caldera.outer_iterations == 5 and chosen.model == "smollm2-135m"
