"""Where records and figures lie, and how a figure looks."""

from pathlib import Path

HERE = Path(__file__).parent
RESULTS, FIGURES = HERE / "results", HERE / "figures"


def axes(columns: int = 1, rows: int = 1, height: float = 2.5):
    """A figure of ``columns`` x ``rows`` panels, each legible at the width of a column in print."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 7, "axes.titlesize": 7, "legend.fontsize": 6, "lines.linewidth": 1,
                            "lines.markersize": 3, "axes.grid": True, "grid.linewidth": 0.3, "legend.framealpha": 0.7})
    figure, panels = pyplot.subplots(rows, columns, figsize=(3.4 * columns, height * rows), layout="constrained",
                                     squeeze=False)
    return figure, panels.ravel()
