"""What the command line makes of a budget."""

import pytest
import tiny

from caldera_jax import LevelConfig, codebooks
from caldera_jax.jobs import cli, spread
from caldera_jax.jobs.compress import Need
from caldera_jax.jobs.options import Workers
from caldera_jax.models import convert, llama


@pytest.fixture
def told(monkeypatch):
    """A function from arguments to the RunConfig that they ask for; nothing runs."""
    seen = []

    def stop(config, *_):
        seen.append(config)
        raise ValueError("stopped")

    monkeypatch.setattr(cli, "run_compress", stop)

    def tell(*arguments):
        monkeypatch.setattr("sys.argv", ["caldera", "compress", *map(str, arguments), "--processes", "0"])
        with pytest.raises(SystemExit):
            cli.main()
        return seen[-1]

    return tell


FIXED = ["--quantizer", "e8p"]


def test_a_budget_is_bits_a_weight_or_megabytes_of_all_compressed_layers(told, tmp_path):
    model = tiny.write_model(tmp_path / "model")
    config = told(model, "--out", tmp_path / "out", "--bits", "2.3", "--allocation", "trace", *FIXED)
    assert (config.bits, config.allocation, config.level) == (2.3, "trace", None)
    weights = 24 * 24 + 2 * 12 * 24 + 24 * 24 + 3 * 40 * 24  # q; k, v; o; gate, up, down
    for more, blocks in ((["--tables", "dense"], 2), (["--blocks", "1"], 1)):
        config = told(model, "--out", tmp_path / "out", "--megabytes", "0.004", "--preset", "default", *more)
        assert config.bits == pytest.approx(32_000 / (blocks * weights)) and config.level == LevelConfig()
    plain = told(model, "--out", tmp_path / "out")
    assert plain.bits is None and plain.ranks is None and plain.level is None
    config = told(model, "--out", tmp_path / "out", "--megabytes", "1", "--ranks", "0", "8", "--preset", "paper",
                  "--downdate", "False", *FIXED)
    assert config.ranks == (0, 8) and not config.caldera.downdate


def test_a_budget_without_a_grid_of_fixed_rate_is_met_by_one_level(told, tmp_path):
    model = tiny.write_model(tmp_path / "model")
    config = told(model, "--out", tmp_path / "out", "--bits", "2", "--states", "64", "--bit-price", "0.2", "--rank",
                  "4", "--damping", "0.02", "--importance-windows", "5", "--activations", "compressed")
    assert config.level == LevelConfig(64, 0.2, 4, 0.02) and (config.bits, config.c) == (2, None)
    assert config.importance.windows == 5 and config.activations == "compressed"
    config = told(model, "--out", tmp_path / "out", "--level", "0.01", "--preset", "paper")
    assert config.level == LevelConfig() and (config.bits, config.c) == (None, 0.01)


def test_at_a_fixed_rate_importance_is_asked_for(told, tmp_path):
    model = tiny.write_model(tmp_path / "model")
    config = told(model, "--out", tmp_path / "out", "--importance", "fisher", "--importance-windows", "5",
                  "--factor-rounding", "feedback")
    assert (config.outputs, config.importance.windows, config.caldera.factor_rounding) == ("fisher", 5, "feedback")
    assert told(model, "--out", tmp_path / "out", "--importance", "none").outputs == "alike"


def test_a_trellis_and_its_draft_are_asked_for_by_name(told, tmp_path):
    model = tiny.write_model(tmp_path / "model")
    chosen = told(model, "--out", tmp_path / "out", "--quantizer", "trellis", "--draft", "e8p").caldera
    assert (chosen.q_grid, chosen.rounds.q_grid) == (codebooks.Trellis(2), codebooks.E8P())


def test_of_free_rate_embedding_and_head_come_to_the_level_and_megabytes_are_of_the_whole_model(told, tmp_path):
    model = tiny.write_model(tmp_path / "model")
    weights = llama.all_weights(convert.load(model).config) - (2 * 2 + 1) * 24  # but the norms
    for arguments, kind, counted in (
            (["--bits", "2"], "level", "layers"), (["--level", "0.01"], "level", "layers"),
            (["--megabytes", "0.01"], "level", "model"), (["--megabytes", "0.01", "--tables", "8"], "8", "model"),
            (["--megabytes", "0.01", "--counted", "layers"], "level", "layers"),
            (["--megabytes", "0.01", "--tables", "dense"], "dense", "layers"),
            (["--bits", "2", "--blocks", "1"], "dense", "layers"), (["--bits", "2", *FIXED], "dense", "layers"),
            (["--bits", "2", "--blocks", "1", "--tables", "level"], "level", "layers"), ([], "dense", "layers")):
        config = told(model, "--out", tmp_path / "out", *arguments)
        assert (config.tables, config.counted) == (kind, counted), arguments
    assert told(model, "--out", tmp_path / "out", "--megabytes", "0.01").bits == pytest.approx(80_000 / weights)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--bits", "2.3", "--megabytes", "40"], "--bits and --megabytes each say how small"),
    (["--bits", "2.3", "--level", "0.1"], "--bits and --level each say how small"),
    (["--allocation", "trace", *FIXED], "give --bits or --megabytes"),
    (["--ranks", "0", *FIXED], "give --bits or --megabytes"),
    (["--bits", "2.3", "--preset", "paper", *FIXED], "add --downdate False"),
    (["--megabytes", "40", "--preset", "paper", *FIXED], "add --downdate False"),
    (["--megabytes", "-1"], "give a positive number"),
    (["--bits", "2.3", "--rank", "8", *FIXED], "--rank: a budget of fixed rates chooses it"),
    (["--megabytes", "40", "--q-bits", "2", *FIXED], "--q-bits: a budget of fixed rates chooses it"),
    (["--bits", "2.3", "--factor-bits", "2", *FIXED], "--factor-bits: a budget of fixed rates chooses it"),
    (["--bits", "2.3", "--q-bits", "2"], "--q-bits: of fixed rates, and with --bits each weight has a rate of its own"),
    (["--level", "1", "--rotation", "none", "--ranks", "8"], "--ranks, --rotation: of fixed rates"),
    (["--states", "8"], "--states: of one level for all weights"),
    (["--importance", "fisher", "--states", "8"], "--states: of one level for all weights"),
    (["--bits", "2", "--importance", "fisher"], "at a level it counts always"),
    (["--bits", "2", "--importance", "fisher", *FIXED], "leave out --importance, or the budget"),
    (["--bits", "2", "--importance", "none"], "--importance: of fixed rates"),
    (["--importance-windows", "5"], "or --importance fisher"),
    (["--quantizer", "trellis", "--draft", "e8p", "--rank", "0"], "--draft: the grid of Q in the rounds"),
    (["--importance", "fisher", "--rotation", "orthogonal"], "use --rotation hadamard, got 'orthogonal'"),
    (["--level", "1", *FIXED], "--level: of one level for all weights"),
    (["--bits", "2.3", "--states", "7"], "states must be one of 1, 4, 8"),
    (["--bits", "2.3", "--importance-windows", "0"], "importance_windows must be at least 1"),
    (["--level", "0"], "the level c must be positive"),
    (["--bits", "0"], "give a positive number"), (["--bits", "0", *FIXED], "give a positive number"),
    (["--bits", "2.3", "--activations", "compressed", *FIXED], "activations='dense'"),
])
def test_a_budget_that_contradicts_itself_is_refused_in_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["caldera", "compress", "no-such-model", "--out", "nowhere", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(("name", "value"), [("bits", 1.0), ("megabytes", 0.0001)])
def test_too_small_a_budget_says_the_least_in_bits_and_megabytes(monkeypatch, capsys, tmp_path, name, value):
    model = str(tiny.write_model(tmp_path / "model"))
    text = str(tiny.write_text(tmp_path / "text.txt"))
    windows = [flag for part, count in (("calibration", 4), ("evaluation", 3)) for flag in (
        f"--{part}-text", text, f"--{part}-windows", str(count), f"--{part}-window", "32")]
    monkeypatch.setattr("sys.argv", ["caldera", "compress", model, "--out", str(tmp_path / "out"), f"--{name}",
                                     str(value), *windows, "--quantizer", "uniform", "--processes", "0"])
    with pytest.raises(SystemExit):
        cli.main()
    error = capsys.readouterr().err
    assert "a weight, 0.0" in error and "MB) of the cheapest choice: raise it" in error
    assert not (tmp_path / "out").exists()


def test_inspect_writes_the_page_in_place_of_the_table_and_beside_the_theory(monkeypatch, capsys, tmp_path):
    written = []
    monkeypatch.setattr(cli.page, "write", lambda *arguments: written.append(arguments))
    monkeypatch.setattr(cli.explain, "report_of", lambda _: {})
    monkeypatch.setattr(cli, "theory_table", lambda *arguments: print("theory"))
    monkeypatch.setattr(cli, "keep_programs", lambda: None)
    for more, last in (([], f"written: {tmp_path / 'page.html'}"), (["--theory"], "theory")):
        monkeypatch.setattr("sys.argv", ["caldera", "inspect", str(tmp_path), "--report", str(tmp_path / "page.html"),
                                         "--moments", str(tmp_path / "moments"), *more])
        cli.main()
        assert written.pop() == (tmp_path, tmp_path / "page.html", tmp_path / "moments") and not written
        assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.parametrize(("available", "processes", "started", "told"), [
    (40, None, 6, ""), (8, None, 2, ""), (3, None, 1, "about 5.0 GB of memory are needed, 2.0 of them"), (3, 4, 4, ""),
])
def test_so_many_processes_start_as_memory_holds_beside_the_streams(monkeypatch, capsys, available, processes, started,
                                                                  told):
    seen = []
    monkeypatch.setattr(spread, "available_memory", lambda: available * 10**9)
    monkeypatch.setattr(spread, "cores", lambda: list(range(6)))
    monkeypatch.setattr(spread, "accelerated", lambda: False)
    monkeypatch.setattr(spread, "launch", lambda arguments, count: seen.append(count))
    assert cli.start(Workers(processes), lambda: Need(3 * 10**9, 2 * 10**9)) and seen == [started]
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == bool(told)
