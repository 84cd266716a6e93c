"""Published numbers are whole, agree with the paper's own formula and have commands that parse; the dry run runs."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from caldera_jax.jobs import cli, presets

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.append(str(EXPERIMENTS))

import drawing  # noqa: E402
import dry_run  # noqa: E402
import published  # noqa: E402

SETTINGS, ENTRIES = published.load()
PRINTED = sorted({(e["model"], e["setting"]["rank"], e["setting"]["factor_bits"], e["setting"]["average_bits"])
                  for e in ENTRIES if e["setting"]["factor_bits"] and e["setting"]["average_bits"]})
COMMANDS = sorted({e[key] for e in ENTRIES for key in ("prepares", "reproduces") if e[key]})


class Parsed(Exception):
    """Raised where a parsed command would begin to work."""


def parse(command: str, monkeypatch):
    """What a command would do: the RunConfig of a compression, or the directory of an evaluation."""
    def stop(found, *_):
        raise Parsed(found)

    name, *arguments = shlex.split(command)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "start", lambda *_: False)
        patch.setattr(cli, "run_compress", stop)
        patch.setattr(cli.artifact, "read_manifest", stop)
        patch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(Parsed) as found:
            cli.main()
    assert name == "caldera"
    return found.value.args[0]


# ---- the published numbers


def test_every_entry_has_all_fields_and_says_that_it_was_not_reproduced():
    fields = set(published.FIELDS)
    for entry in ENTRIES:
        assert fields <= entry.keys() <= fields | {"note"} and entry["setting"].keys() == set(published.SETTING)
        assert entry["source"].startswith("arXiv 2405.18886, second hand; ") and entry["model"] in published.SHAPES
        assert isinstance(entry["value"], float) and entry["value"] > 0 and entry["unit"] in ("1", "%", "tokens/s")
        assert entry["status"].startswith("not reproduced: ")
    same = [json.dumps([e["model"], e["setting"], e["metric"], e["dataset"]]) for e in ENTRIES]
    assert len(set(same)) == len(same)


def test_an_entry_that_lacks_a_field_is_named(tmp_path, monkeypatch):
    content = json.loads(published.PATH.read_text())
    del content["entries"][3]["unit"], content["entries"][3]["setting"]["rank"]
    (tmp_path / "published.json").write_text(json.dumps(content))
    monkeypatch.setattr(published, "PATH", tmp_path / "published.json")
    with pytest.raises(ValueError, match="published.json: entry 3 has no unit, rank"):
        published.load()


@pytest.mark.parametrize("entry, change", [(2, {"reproduces": None}), (40, {"reason": None}),
                                           (2, {"reason": "none is needed"})])
def test_an_entry_has_either_a_command_that_prints_its_number_or_a_reason(entry, change, tmp_path, monkeypatch):
    content = json.loads(published.PATH.read_text())
    content["entries"][entry] |= change
    (tmp_path / "published.json").write_text(json.dumps(content))
    monkeypatch.setattr(published, "PATH", tmp_path / "published.json")
    with pytest.raises(ValueError, match=f"entry {entry} needs either a command that reproduces it or a reason"):
        published.load()


def test_only_perplexity_without_fine_tuning_is_printed_by_a_command_and_the_rest_says_why_not():
    for entry in ENTRIES:
        printable = entry["metric"] == "perplexity" and not entry["setting"]["finetuned"]
        assert bool(entry["reproduces"]) == printable == (entry["reason"] is None)
        assert printable or entry["reason"].startswith(
            {"zero-shot accuracy": "no command here runs zero-shot tasks",
             "throughput": "no command here measures the throughput of generation"}.get(
                 entry["metric"], ("no command here fine-tunes", "another method")))
    none = [e for e in ENTRIES if not e["prepares"] and not e["reproduces"]]
    assert len(none) == 16 and all(e["reason"] for e in none)  # 13 dense, 2 other methods, factors of two precisions


def test_no_table_has_lost_a_row():
    count = lambda metric: {name: sum(e["metric"] == metric and e["model"] == name for e in ENTRIES)
                            for name in published.SHAPES}
    # dense, rank 0 and the ranks on two texts, less what is not printed; of 7B four fine-tuned besides
    assert list(count("perplexity").values()) == [10 + 4, 10, 7, 9]
    assert list(count("zero-shot accuracy").values()) == [8, 8, 0, 8]
    assert list(count("throughput").values()) == [6, 0, 2, 0]


def test_perplexity_falls_with_rank_and_no_compressed_model_is_better_than_the_dense_one():
    for model in published.SHAPES:
        for text in ("Wiki2", "C4"):
            rows = {e["setting"]["rank"]: e["value"] for e in ENTRIES if e["model"] == model and e["dataset"] == text
                    and e["metric"] == "perplexity" and not e["setting"]["finetuned"]}
            falling = [rows[rank] for rank in (0, 64, 128, 256, None) if rank in rows]
            assert len(falling) >= 3 and falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("model, rank, factor_bits, printed", PRINTED)
def test_the_formula_gives_the_average_bits_that_are_printed(model, rank, factor_bits, printed):
    decimals = len(printed.partition(".")[2])
    found = published.average_bits(published.SHAPES[model], rank, 2, factor_bits)
    assert f"{found:.{decimals}f}" == printed


def test_every_rank_of_every_model_is_among_the_printed_bits():
    assert {(model, rank) for model, rank, *_ in PRINTED} == {
        (model, rank) for model in published.SHAPES for rank in (64, 128, 256)} - {("LLaMA-2 70B", 64)}


def test_the_bits_guessed_for_the_fine_tuned_rows_round_to_what_is_printed():
    shape = published.SHAPES["LLaMA-2 7B"]
    assert published.average_bits(shape, 64, 2, 16) == pytest.approx(2.395, abs=5e-4)
    assert published.average_bits(shape, 256, 2, (192 * 4 + 64 * 16) / 256) == pytest.approx(2.69, abs=5e-3)
    rows = {e["value"]: e["setting"]["average_bits"] for e in ENTRIES if e["setting"]["finetuned"]}
    assert rows[5.89] == "2.4" and rows[5.55] == "2.7"
    commands = {e["value"]: e["prepares"] for e in ENTRIES if e["setting"]["finetuned"]}
    assert "--rank 64 --factor-bits 16 " in commands[5.89] and commands[5.55] is None  # factors of one precision only


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    found = parse(command, monkeypatch)
    if command.startswith("caldera eval"):
        assert str(found) in {published.out_of(c) for c in COMMANDS} - {None}


def test_the_parser_refuses_an_option_that_does_not_exist(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(COMMANDS[0] + " --ranks 3", monkeypatch)
    assert "--ranks" in capsys.readouterr().err


def test_a_command_compresses_to_the_rank_and_bits_of_its_entry_and_evaluates_that():
    for entry in (e for e in ENTRIES if e["prepares"]):
        s, words = entry["setting"], entry["prepares"].split()
        assert words[words.index("--rank") + 1] == str(s["rank"])
        assert not s["factor_bits"] or words[words.index("--factor-bits") + 1] == str(s["factor_bits"])
        assert words[2] == entry["model"].replace(" ", "-").lower()
        assert (entry["reproduces"] or "caldera eval").startswith("caldera eval")
        assert not entry["reproduces"] or entry["reproduces"].split()[2] == published.out_of(entry["prepares"])
    for entry in (e for e in ENTRIES if e["reproduces"] and not e["prepares"]):  # the base perplexity of any run
        assert entry["setting"]["method"] == "fp16" and entry["reproduces"].startswith("caldera compress")


def test_runs_of_different_settings_do_not_share_a_directory():
    runs = {c for c in COMMANDS if c.startswith("caldera compress")}
    assert len({published.out_of(c) for c in runs}) == len(runs)


def test_the_printed_table_has_a_row_for_every_entry():
    lines = published.table().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == len(ENTRIES) + 2 and len({row.count(" | ") for row in rows}) == 1
    assert sum(line.startswith("* ") for line in lines) == len(SETTINGS)


# ---- the dry run


def test_the_dry_run_has_the_true_shapes_and_the_settings_of_the_preset_but_what_it_cuts(monkeypatch):
    config = dry_run.Config()
    assert dry_run.llama.shapes(config.model) == dry_run.llama.shapes(published.SHAPES["LLaMA-2 7B"])
    found = parse(shlex.join(["caldera", *dry_run.arguments(config, "MODEL", "text.txt", "OUT")]), monkeypatch)
    preset = presets.PRESETS["paper"]
    assert found.caldera == cli.override(preset.caldera, outer_iterations=1)
    assert found.calibration.window == preset.calibration.window and found.seed == preset.seed


@pytest.mark.slow
def test_the_dry_run_of_the_smallest_shapes_records_every_layer_and_no_path(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(drawing, "RESULTS", tmp_path)
    dry_run.main(dry_run.Config("smoke"))
    text = dry_run.path_of(dry_run.SMOKE).read_text()
    found = json.loads(text)
    assert found["config_hash"] == dry_run.report.config_hash(dry_run.SMOKE)
    assert str(tmp_path.parent) not in text and "/tmp" not in text and "caldera compress DIRECTORY" in text
    assert [row["layer"] for row in found["layers"]] == list(dry_run.llama.LINEARS)
    assert all(row["seconds_per_outer_iteration"] > 0 for row in found["layers"])
    assert found["stages"].keys() >= {"calibrate", "compress"} and found["peak_memory_bytes"] > 1e7
    # one outer iteration here: blocks x 20 iterations x the seconds of the block's layers, compilation left out
    seconds = sum(row["seconds"] - row["compile_seconds"] for row in found["layers"])
    assert found["computed"]["compress_hours"] == pytest.approx(3 * 20 * seconds / 3600, rel=1e-9)
    assert found["computed"]["status"] == "computed from one block, not measured"
    assert not found["computed"]["an_iteration_is_the_presets"] and "whole preset" in capfd.readouterr().out
