"""One style for all figures: what a reader on a laptop can read, at the size it is drawn."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from saeutils.notebook import plots


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_figures_fit_a_column_with_letters_of_ten_points(n):
    fig, axes = plots.panels(n)
    axes[0].set(xlabel="step", title="error")
    assert fig.get_figwidth() <= 10 and len(axes) == n
    assert axes[0].xaxis.label.get_size() == axes[0].title.get_size() == 10
    plt.close(fig)


def test_colours_and_line_styles_vary_together():
    frame = pd.DataFrame([{"x": x, "y": x + i, "arm": f"arm {i}"} for i in range(6) for x in range(3)])
    fig, (ax,) = plots.panels(1)
    plots.lines(ax, frame, "x", "y", "arm")
    assert len({line.get_color() for line in ax.lines}) == len({str(line._unscaled_dash_pattern) for line in ax.lines}) == 6
    assert {line.get_color() for line in ax.lines} <= set(plots.COLOURS)
    plt.close(fig)


def test_points_are_joined_along_what_was_varied():
    frame = pd.DataFrame({"cost": [0.3, 0.1, 0.2], "gain": [1, 2, 3], "strength": [1, 2, 3], "arm": "one"})
    fig, axes = plots.panels(2)
    plots.lines(axes[0], frame, "cost", "gain", "arm")
    plots.lines(axes[1], frame, "cost", "gain", "arm", along="strength")
    assert [list(ax.lines[0].get_xdata()) for ax in axes] == [[0.1, 0.2, 0.3], [0.3, 0.1, 0.2]]
    plt.close(fig)


def test_importing_sets_nothing():
    import subprocess
    import sys

    code = "import matplotlib as m; before = dict(m.rcParams); import saeutils.notebook.plots; assert dict(m.rcParams) == before"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_name_without_points_keeps_its_colour_and_leaves_the_legend():
    frame = pd.DataFrame([{"x": x, "y": x, "arm": arm} for arm in ("a", "c") for x in range(3)])
    fig, axes = plots.panels(2)
    plots.lines(axes[0], frame, "x", "y", "arm", order=["a", "b", "c"])
    plots.lines(axes[1], pd.concat([frame, frame.assign(arm="b")]), "x", "y", "arm", order=["a", "b", "c"])
    assert axes[0].get_legend_handles_labels()[1] == ["a", "c"] and axes[1].get_legend_handles_labels()[1] == ["a", "b", "c"]
    assert [line.get_color() for line in axes[0].lines] == [line.get_color() for line in axes[1].lines]
    plt.close(fig)
