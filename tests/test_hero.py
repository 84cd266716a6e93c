"""The README's figure: it says what the committed records say, and its words are beside the curves, not over them."""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

import drawing  # noqa: E402
import hero  # noqa: E402
import whole_model  # noqa: E402


@pytest.fixture(scope="module")
def dense_and_curves():
    """What is drawn, from the committed records."""
    return hero.curves()


@pytest.fixture
def figure(dense_and_curves):
    """The figure as it is drawn."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = hero.draw(*dense_and_curves)
    figure.canvas.draw()
    yield figure
    pyplot.close(figure)


def test_every_curve_falls_and_stays_above_the_dense_model(dense_and_curves):
    dense, curves = dense_and_curves
    for curve in curves:
        bits, perplexity = zip(*curve.points, strict=True)
        assert list(bits) == sorted(bits) and list(perplexity) == sorted(perplexity, reverse=True), curve.label
        assert min(perplexity) > dense, curve.label


@pytest.mark.parametrize(("label", "names", "least"), [
    ("Q alone", ("q2", "q3", "q4"), 2e-3), ("CALDERA", ("q2_k16", "q2_k32", "q2_k64"), 2e-3),
    ("k = 32", ("q2_k32",), 0.03)])  # the model whose signs are trained was compressed anew
def test_what_the_whole_model_runs_measured_as_well_agrees(label, names, least, dense_and_curves):
    (curve,) = [c for c in dense_and_curves[1] if c.label.startswith(label)]
    for point, name in zip(curve.points, names, strict=False):
        found = whole_model.record(name)
        assert point == pytest.approx((found["bits_per_weight"], found["compressed_perplexity"]), rel=least)


def test_it_is_drawn_from_committed_records_and_names_the_first_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="results of preset 'full' are missing"):
        hero.curves()


def test_all_points_and_words_are_inside_and_no_word_is_on_another_one_or_on_a_point(figure, dense_and_curves):
    (panel,), (_, curves) = figure.axes, dense_and_curves
    frame, points = panel.get_window_extent(), panel.transData.transform([p for c in curves for p in c.points])
    boxes = [text.get_window_extent() for text in panel.texts if text.get_text()]
    assert len(boxes) == 1 + sum(1 + len(c.names) for c in curves)
    assert all(frame.contains(*p) for p in points)
    assert all(frame.contains(*corner) for box in boxes for corner in (box.min, box.max))
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(*p) for box in boxes for p in points)


def test_its_words_are_legible_and_it_is_there(figure):
    (panel,) = figure.axes
    assert min(text.get_fontsize() for text in [*panel.texts, *panel.get_xticklabels(), *panel.get_yticklabels()]
               if text.get_text()) >= 9
    assert list(figure.get_size_inches()) == [7, 4] and (drawing.FIGURES / "hero.png").is_file()
