"""Figures show what the rows give, and name every line where it can be read."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from bench import figure, goals
from bench.cases import CPU_DEFAULT
from bench.rows import Measured

EXACT, FAST = goals.OURS["cpu"]


def test_a_figure_shows_times_over_the_plain_layer(monkeypatch, tmp_path) -> None:
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", lambda fig: drawn.append(fig))
    m = Measured("made up")
    for T, N, dtype, bare, ours in (
        (64, 8, "fp32", 10.0, 30.0),
        (512, 8, "fp32", 10.0, 15.0),
        (64, 2, "fp32", 20.0, 30.0),
        (64, 8, "bf16", 5.0, 10.0),
        (512, 8, "bf16", 5.0, 20.0),
    ):
        name = replace(CPU_DEFAULT, T=T, P=N, dtype=dtype).name
        m.times |= {(name, "bare"): bare, (name, EXACT): ours, (name, "auto-exact"): 1.0}
    assert [path.name for path in figure.draw(m, tmp_path)] == ["made up_rows.png", "made up_adapters.png"]
    shown = [
        [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in fig.axes] for fig in drawn
    ]
    assert shown[0] == [
        {"ours, exact": [[64, 3.0], [512, 1.5]], "F.linear alone": [[64, 1.0], [512, 1.0]]},
        {"ours, exact": [[64, 2.0], [512, 4.0]], "F.linear alone": [[64, 1.0], [512, 1.0]]},
    ]
    assert shown[1] == [{"ours, exact": [[2, 1.5], [8, 3.0]], "F.linear alone": [[2, 1.0], [8, 1.0]]}]  # one bf16 point
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["fp32", "bf16"]
    names = [text.get_text() for text in drawn[0].axes[0].texts]
    assert sorted(names) == ["F.linear alone", "ours, exact"]


def test_nothing_is_drawn_of_nothing(tmp_path) -> None:
    assert figure.draw(Measured("made up"), tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("heights", [[0.5], [0.0, 0.5, 1.0], [0.5] * 9, [0.0] * 4, [1.0] * 4, [0.2, 0.21, 0.3]])
def test_labels_stand_apart(heights) -> None:
    places = figure._apart(heights)
    assert len(places) == len(heights)
    assert all(high - low > 0.999 * figure.GAP for low, high in pairwise(places))
    assert -1e-9 < places[0] <= places[-1] < 1 + 1e-9
    if heights[-1] - heights[0] == 1:
        assert places == pytest.approx(heights)  # far enough already
    if heights[0] == heights[-1] == 0.5:
        assert sum(places) / len(places) == pytest.approx(0.5)
