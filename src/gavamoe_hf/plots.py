"""Plots, as PNG files. They need the extra `plots`, which is imported where a plot is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .version import install_hint

LATENT_SPACE_FILE = "latent_space.png"
TRAINING_CURVE_FILE = "training_curve.png"

# Okabe and Ito (jfly.uni-koeln.de/color): told apart with any colour vision. The pale ones come last.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_MARKERS = "os^Dv"  # the next one whenever the colours are used up
_LEGEND_COLUMNS = 3  # as many as a panel is wide, or panels would be moved apart
_MIN_PAIRS = 5
DPI = 150


def plot_latent_space(
    panels: Mapping[str, tuple[Any, Any]],
    path: str | os.PathLike[str],
    title: str = "Latent space of user-item pairs (t-SNE)",
    max_pairs: int = 2000,
    perplexity: float = 30.0,
    seed: int = 0,
) -> None:
    """
    Draws the latent means of pairs in two dimensions (t-SNE), coloured by cluster, one panel for each model: the
    paper's figure 5, which compares numbers of clusters K. The legend has each cluster's share of all the pairs given.

    Distances between groups of points, and the groups' sizes, mean little in a t-SNE; that colours do not mix means
    that clusters lie apart. A perplexity above a third of the pairs is lowered to that.

    Args:
        panels (`Mapping[str, tuple[array, array]]`):
            For each panel its title, such as `"K = 3"`, the latent means `(num_pairs, latent_size)` and the clusters
            `(num_pairs,)` of pairs, as arrays or CPU tensors.
        path (`str` or `os.PathLike`): The PNG file, 150 dpi, in a folder that exists; written whole or not at all.
        title (`str`, *optional*): Title of the figure.
        max_pairs (`int`, *optional*, defaults to 2000):
            Of more pairs, so many are drawn by lot: the same ones in panels of equally many pairs.
        perplexity (`float`, *optional*, defaults to 30.0): Of the t-SNE: about how many neighbours a pair has.
        seed (`int`, *optional*, defaults to 0): Seed of the lot and of the t-SNE.

    Raises:
        `ImportError`: without matplotlib.
        `ValueError`: for panels of fewer than 5 pairs, with values that are not finite, whose latents are all equal
            (the latent has collapsed, and there is nothing to lay out), or whose shapes do not fit together.
    """
    figure_class = import_figure()
    if not panels:
        raise ValueError("Expected at least one panel, title -> (latent means, clusters), but got none.")
    if max_pairs < _MIN_PAIRS:
        raise ValueError(f"Expected `max_pairs` of at least {_MIN_PAIRS}, but got {max_pairs}.")
    checked = {name: _checked_panel(name, *panel) for name, panel in panels.items()}
    columns = len(checked) if len(checked) <= 3 else 2 if len(checked) == 4 else 3
    rows = -(-len(checked) // columns)
    width = 4.6 if columns == 1 else 3.0
    legend_lines = max(-(-(clusters.max() + 1) // _LEGEND_COLUMNS) for _, clusters in checked.values())
    height = 0.5 + (width + 0.25 + 0.18 * legend_lines) * rows
    # A bare Figure, not pyplot: no backend is chosen and nothing global is touched
    figure = figure_class(figsize=(width * columns, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11)
    figure.supxlabel("Colour: cluster of the pair, with its share of all pairs", fontsize=8, color="#555555")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, (latents, clusters)) in zip(axes, checked.items(), strict=False):
        chosen = _subsample(len(latents), max_pairs, seed)
        points = _embed(latents[chosen], perplexity, seed)
        _draw_panel(axis, points, clusters[chosen], np.bincount(clusters) / len(clusters))
        axis.set_title(name, fontsize=10)
    for axis in axes[len(checked) :]:
        axis.set_axis_off()
    _save(figure, Path(path))


def plot_training_curve(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """
    Draws the negative log-likelihood of a token in stage 2, in nats, over the epochs: of the batches trained on, and of
    the validation split.

    Args:
        history (`Sequence[Mapping[str, Any]]`): The trainer's log, as in `training_log.json`.
        path (`str` or `os.PathLike`): The PNG file, written whole or not at all.

    Raises:
        `ImportError`: without matplotlib.
        `ValueError`: for a log without losses.
    """
    figure_class = import_figure()
    curves = {
        label: [(entry["epoch"], entry[name]) for entry in history if name in entry]
        for name, label in (("nll", "training batches"), ("eval_nll", "validation"))
    }
    if not any(curves.values()):
        raise ValueError("Expected a log with `nll` or `eval_nll`, but it has neither.")
    figure = figure_class(figsize=(6, 4), layout="constrained")
    axis = figure.add_subplot()
    for (label, points), colour in zip(curves.items(), COLOURS, strict=False):
        if points:
            axis.plot(*zip(*points, strict=True), label=label, color=colour, marker="o" if len(points) < 30 else "")
    axis.set_xlabel("epoch")
    axis.set_ylabel("negative log-likelihood of a token, nats")
    axis.set_title("Stage 2", fontsize=10)
    axis.legend(frameon=False)
    _save(figure, Path(path))


def _save(figure: Any, path: Path) -> None:
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, dpi=DPI, format="png")
    os.replace(beside, path)


def import_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib, which plots need, but it is not installed. " + install_hint("plots")
        ) from error
    return Figure


def _checked_panel(name: str, latents: Any, clusters: Any) -> tuple[np.ndarray, np.ndarray]:
    latents, clusters = np.asarray(latents, dtype=float), np.asarray(clusters)
    if latents.ndim != 2 or clusters.shape != latents.shape[:1]:
        raise ValueError(
            f"Panel {name!r}: expected latent means (num_pairs, latent_size) and clusters (num_pairs,), but got shapes "
            f"{latents.shape} and {clusters.shape}."
        )
    if clusters.dtype.kind not in "iu" or clusters.min(initial=0) < 0:
        got = f"{clusters.min()} is among them" if clusters.dtype.kind in "iu" else f"got {clusters.dtype} values"
        raise ValueError(f"Panel {name!r}: expected clusters as indices from 0, but {got}.")
    if len(latents) < _MIN_PAIRS:
        raise ValueError(f"Panel {name!r}: expected at least {_MIN_PAIRS} pairs to lay out, but got {len(latents)}.")
    broken = int((~np.isfinite(latents)).any(axis=1).sum())
    if broken:
        raise ValueError(
            f"Panel {name!r}: expected finite latent means, but those of {broken} of {len(latents)} pairs are not. "
            "The rating model diverged: train stage 1 again with a lower learning rate."
        )
    if np.ptp(latents, axis=0).max() == 0:
        raise ValueError(
            f"Panel {name!r}: expected latent means that differ, but all {len(latents)} are equal: the latent has "
            "collapsed. Train stage 1 again, with a lower `beta` for example."
        )
    return latents, clusters


def _subsample(count: int, max_pairs: int, seed: int) -> np.ndarray:
    """Rows to draw, in random order, so that no cluster lies on top of the others."""
    return np.random.default_rng(seed).permutation(count)[:max_pairs]


def _embed(latents: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """Positions `(num_pairs, 2)`."""
    from sklearn.manifold import TSNE

    perplexity = min(perplexity, (len(latents) - 1) / 3)
    start = "pca" if latents.shape[1] > 1 else "random"
    return TSNE(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(latents)


def _draw_panel(axis: Any, points: np.ndarray, clusters: np.ndarray, shares: np.ndarray) -> None:
    size = float(np.clip(12000 / len(points), 6, 30))
    colours = np.array([COLOURS[cluster % len(COLOURS)] for cluster in range(len(shares))])
    markers = np.array([_MARKERS[cluster // len(COLOURS) % len(_MARKERS)] for cluster in range(len(shares))])
    for marker in dict.fromkeys(markers):
        drawn = markers[clusters] == marker
        axis.scatter(*points[drawn].T, s=size, c=colours[clusters[drawn]], marker=marker, linewidths=0, alpha=0.75)
    handles = [
        axis.scatter([], [], s=30, c=colours[cluster], marker=markers[cluster], label=f"{cluster}: {share:.0%}")
        for cluster, share in enumerate(shares)
    ]
    columns = min(len(handles), _LEGEND_COLUMNS)
    axis.legend(
        # Legends fill column by column; this order reads row by row
        handles=[handle for column in range(columns) for handle in handles[column::columns]],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=columns,
        frameon=False,
        fontsize=8,
        handletextpad=0.0,
    )
    # A square of one scale: across and down mean the same
    centre, half = (points.max(axis=0) + points.min(axis=0)) / 2, 0.54 * np.ptp(points, axis=0).max()
    axis.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half), aspect="equal")
    axis.set_anchor("N")  # what is left of the height goes to the legend
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("#DDDDDD")
