"""Figures of a run."""

import random
from pathlib import Path
from typing import Any

import pytest

from diffdeploy.bench.plot import plot, require_plot
from diffdeploy.errors import InputError
from tests.support.benchmarks import make_report


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_figure_is_drawn(suffix: str, tmp_path: Path) -> None:
    names = random.Random(0).sample([f"candidate {number}" for number in range(40)], 12)
    report = make_report({"naive": 10.0, **{name: 2.0 + number for number, name in enumerate(names)}})
    file = tmp_path / f"figure{suffix}"
    plot(report, file)
    assert file.stat().st_size > 10_000
    first = file.read_bytes()
    plot(report, file)
    assert file.read_bytes() == first


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Axes, as they are made."""
    import matplotlib.figure

    made: list[Any] = []
    axes_of = matplotlib.figure.Figure.subplots

    def subplots(*arguments: Any, **settings: Any) -> Any:
        made.append(axes_of(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(matplotlib.figure.Figure, "subplots", subplots)
    return made


def test_lines_are_told_apart_without_colour(tmp_path: Path, drawn: list[Any]) -> None:
    plot(make_report({"naive": 10.0, **{f"c{number}": 2.0 + number for number in range(13)}}), tmp_path / "x.svg")
    (axes,) = drawn[0][0]
    styles = [
        (line.get_marker(), str(line._dash_pattern), line.get_markersize())
        for line in axes.get_lines()
        if line.get_marker() not in ("None", "_", None) and len(line.get_xdata()) == 2
    ]
    assert len(styles) == 14
    assert len(set(styles)) == 14
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("matrix-product limit" in label for label in labels)
    limit = next(line for line in axes.get_lines() if "limit" in str(line.get_label()))
    assert list(limit.get_ydata()) == pytest.approx([10.0, 100.0])  # 2 and 20 GFLOP at 200 GFLOP/s, in ms
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_one_length_has_its_limit_across_the_figure(tmp_path: Path, drawn: list[Any]) -> None:
    """A line from one point to itself would not be seen."""
    report = make_report({"naive": 10.0})
    plot(report.model_copy(update={"results": report.results[:1]}), tmp_path / "x.svg")
    (axes,) = drawn[0][0]
    limit = next(line for line in axes.get_lines() if "limit" in str(line.get_label()))
    assert list(limit.get_ydata()) == pytest.approx([10.0, 10.0])
    assert list(limit.get_xdata()) == [0, 1]  # in shares of the width


def test_figures_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file names that end in \.svg or \.png"):
        require_plot(tmp_path / "figure.pdf")
    with pytest.raises(InputError, match="no candidate has a latency"):
        plot(make_report({"naive": 1.0}, results=[]), tmp_path / "figure.svg")
