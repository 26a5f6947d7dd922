"""The figures of a study, as PNG files. They need the extra `plots`, which is imported where a figure is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import COLOURS, DPI, import_figure

ABLATION_FILE, SPARSITY_FILE, GATES_FILE, ALPHA_FILE = "ablation.png", "sparsity.png", "gates.png", "alpha.png"
_MARKERS = "os^Dv<>P"
_HATCHES = ("", "///", "...")
_COLUMNS = 3
_ERROR_BARS = "Points and bars are means over the seeds, error bars their range."


def plot_ablations(rows: Sequence[Any], labels: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """
    Draws a panel of bars for each metric, a group of bars for each model and a bar for each protocol (figure 3).

    Args:
        rows (`Sequence[Row]`): Rows of the table of ablations.
        labels (`dict[str, str]`): What to draw, and the label of its axis, with the unit.
        path (`str` or `os.PathLike`): The PNG file; written whole or not at all.

    Raises:
        `ImportError`: without matplotlib.
        `ValueError`: without rows.
    """
    models, protocols = _unique(rows, "label"), _unique(rows, "protocol")
    figure, axes = _panels(labels, rows)
    width = 0.8 / len(protocols)
    for axis, metric in zip(axes, labels, strict=False):
        for number, protocol in enumerate(protocols):
            found = {row.label: row.scores[metric] for row in rows if row.protocol == protocol and metric in row.scores}
            places = [models.index(model) + (number - (len(protocols) - 1) / 2) * width for model in found]
            axis.bar(
                places,
                [score["mean"] for score in found.values()],
                width,
                yerr=_errors(list(found.values())),
                color=COLOURS[number],
                hatch=_HATCHES[number % len(_HATCHES)],
                edgecolor="white",
                error_kw={"ecolor": "black", "capsize": 3, "elinewidth": 1},
                label=protocol,
            )
        # A word a line, so that the names stand upright beside one another
        names = [model.replace(" ", "\n").replace("-", "-\n") for model in models]
        axis.set_xticks(range(len(models)), names, fontsize=8)
    _finish(figure, axes, len(labels), "Model", path)


def plot_lines(
    rows: Sequence[Any],
    labels: Mapping[str, str],
    path: str | os.PathLike[str],
    across: str,
    lines: str,
    axis_label: str,
) -> None:
    """
    Draws a panel for each metric, a line in it for each method or protocol.

    Args:
        rows (`Sequence[Row]`): Rows of one table.
        labels (`dict[str, str]`): As in [`plot_ablations`].
        path (`str` or `os.PathLike`): The PNG file; written whole or not at all.
        across (`str`): The attribute of a row that goes across, in the rows' order, at even distances.
        lines (`str`): The attribute of a row that says which line it belongs to.
        axis_label (`str`): What goes across.

    Raises:
        `ImportError`: without matplotlib.
        `ValueError`: without rows.
    """
    places, names = _unique(rows, across), _unique(rows, lines)
    figure, axes = _panels(labels, rows)
    for axis, metric in zip(axes, labels, strict=False):
        for number, name in enumerate(names):
            found = {
                getattr(row, across): row.scores[metric]
                for row in rows
                if getattr(row, lines) == name and metric in row.scores
            }
            # A little apart, so that no error bar hides another
            shift = 0.06 * (number - (len(names) - 1) / 2)
            axis.errorbar(
                [places.index(place) + shift for place in found],
                [score["mean"] for score in found.values()],
                yerr=_errors(list(found.values())),
                color=COLOURS[number % len(COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)],
                linestyle=("-", "--", "-.", ":")[number % 4],
                markersize=5,
                linewidth=1.4,
                capsize=3,
                label=name,
            )
        axis.set_xticks(range(len(places)), places)
        axis.set_xlim(-0.4, len(places) - 0.6)
    _finish(figure, axes, len(labels), axis_label, path)


def _panels(labels: Mapping[str, str], rows: Sequence[Any]) -> tuple[Any, Any]:
    """A figure with a panel for each metric and one place more, for the legend."""
    figure_class = import_figure()
    if not rows:
        raise ValueError("Expected at least one row to draw, but no cell is finished yet.")
    height = -(-(len(labels) + 1) // _COLUMNS)
    # A bare Figure, not pyplot: no backend is chosen and nothing global is touched
    figure = figure_class(figsize=(3.0 * _COLUMNS, 2.7 * height), layout="constrained", facecolor="white")
    axes = figure.subplots(height, _COLUMNS, squeeze=False).ravel()
    for axis, label in zip(axes, labels.values(), strict=False):
        axis.set_ylabel(label, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Any, axes: Any, count: int, axis_label: str, path: str | os.PathLike[str]) -> None:
    for axis in axes[:count]:
        axis.set_xlabel(axis_label, fontsize=8)
    for axis in axes[count:]:
        axis.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    axes[count].legend(handles, names, loc="center", frameon=False, fontsize=9)
    figure.supxlabel(_ERROR_BARS, fontsize=8, color="#555555")
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, dpi=DPI, format="png")
    os.replace(beside, path)


def _errors(scores: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Distances from the mean to the least and to the greatest, `(2, num_scores)`."""
    below = [score["mean"] - score["min"] for score in scores]
    above = [score["max"] - score["mean"] for score in scores]
    # Rounding may leave a mean a little outside
    return np.maximum(np.array([below, above]), 0.0)


def _unique(rows: Sequence[Any], attribute: str) -> list[str]:
    return list(dict.fromkeys(getattr(row, attribute) for row in rows))
