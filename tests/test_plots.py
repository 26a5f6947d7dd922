"""Plots: what is drawn, that nothing global is touched, and what input that cannot be drawn gets."""

import struct
import sys

import numpy as np
import pytest
import torch

from gavamoe_hf import plots
from gavamoe_hf.plots import plot_latent_space, plot_training_curve


@pytest.fixture
def figure_class():
    return pytest.importorskip("matplotlib.figure").Figure


def blobs(count=40, size=4, num_clusters=2, seed=0):
    """Pairs of clusters far apart."""
    rng = np.random.default_rng(seed)
    clusters = np.arange(count) % num_clusters
    return 20.0 * np.eye(max(size, num_clusters))[clusters, :size] + rng.normal(size=(count, size)), clusters


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_draws_a_png_of_a_panel_each(figure_class, tmp_path, monkeypatch):
    # Importing pyplot chooses a backend for the whole process
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    latents, clusters = blobs()
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plot_latent_space({"K = 2": (torch.tensor(latents), torch.tensor(clusters))}, one)
    plot_latent_space({"K = 2": (latents, clusters), "K = 3": blobs(num_clusters=3)}, two)
    assert png_size(one)[0] == 4.6 * 150
    assert png_size(two)[0] == 2 * 3.0 * 150
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]
    again = tmp_path / "again.png"
    plot_latent_space({"K = 2": (latents, clusters)}, again)
    assert again.read_bytes() == one.read_bytes()


def test_legend_colours_and_limits(figure_class):
    axis = figure_class().subplots()
    points = np.array([[0.0, 0.0], [1.0, 4.0], [2.0, 2.0]])
    plots._draw_panel(axis, points, np.array([0, 9, 1]), np.array([0.5, 0.25, *[0.0] * 7, 0.25]))
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    # Down the columns, so that rows read 0 1 2, 3 4 5, ...
    shares = {0: "50%", 1: "25%", 9: "25%"}
    order = [0, 3, 6, 9, 1, 4, 7, 2, 5, 8]
    assert texts == [f"{cluster}: {shares.get(cluster, '0%')}" for cluster in order]

    from matplotlib.colors import to_rgb

    drawn = {
        tuple(point): tuple(colour[:3])
        for collection in axis.collections
        for point, colour in zip(collection.get_offsets().tolist(), collection.get_facecolors(), strict=False)
    }
    # The tenth cluster has the second's colour and another marker
    blue, orange = to_rgb("#0072B2"), to_rgb("#E69F00")
    assert drawn == {(0.0, 0.0): blue, (2.0, 2.0): orange, (1.0, 4.0): orange}
    assert sorted(
        len(collection.get_offsets()) for collection in axis.collections if len(collection.get_offsets())
    ) == [
        1,
        2,
    ]
    # A square about the points' middle, (1, 2)
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    assert left + right == pytest.approx(2) and bottom + top == pytest.approx(4)
    assert right - left == pytest.approx(top - bottom) and top > 4 and bottom < 0


def test_shares_are_of_all_pairs_and_panels_draw_the_same_ones(figure_class, tmp_path, monkeypatch):
    laid_out, drawn = [], []

    def embed(latents, perplexity, seed):
        laid_out.append(latents)
        return latents[:, :2]

    def draw(axis, points, clusters, shares):
        drawn.append((clusters, shares))

    monkeypatch.setattr(plots, "_embed", embed)
    monkeypatch.setattr(plots, "_draw_panel", draw)
    latents = np.arange(400.0).reshape(100, 4)
    clusters = np.repeat([0, 1], [75, 25])
    plot_latent_space({"a": (latents, clusters), "b": (latents, 1 - clusters)}, tmp_path / "plot.png", max_pairs=10)
    assert laid_out[0].shape == (10, 4) and np.array_equal(laid_out[0], laid_out[1])
    rows = laid_out[0][:, 0].astype(int) // 4
    assert len(set(rows)) == 10
    assert drawn[0][0].tolist() == clusters[rows].tolist() and drawn[1][0].tolist() == (1 - clusters[rows]).tolist()
    assert drawn[0][1].tolist() == [0.75, 0.25] and drawn[1][1].tolist() == [0.25, 0.75]
    plot_latent_space({"a": (latents, clusters)}, tmp_path / "plot.png", max_pairs=10, seed=1)
    assert not np.array_equal(laid_out[0], laid_out[2])


@pytest.mark.parametrize(("count", "size"), [(40, 4), (40, 1), (5, 3)])
def test_layout_keeps_neighbours_together(count, size):
    latents, clusters = blobs(count, size)
    points = plots._embed(latents, perplexity=30.0, seed=0)
    assert points.shape == (count, 2) and np.isfinite(points).all()
    assert np.array_equal(points, plots._embed(latents, perplexity=30.0, seed=0))
    if count > 5:
        distances = np.linalg.norm(points[:, None] - points, axis=-1) + np.diag([np.inf] * count)
        assert np.mean(clusters[distances.argmin(axis=1)] == clusters) > 0.9


def with_nan():
    latents, clusters = blobs()
    latents[3, 1], latents[7, 0] = np.nan, np.inf
    return latents, clusters


@pytest.mark.parametrize(
    ("panel", "message"),
    [
        (blobs(count=4), "'K = 2': expected at least 5 pairs to lay out, but got 4"),
        (with_nan(), "expected finite latent means, but those of 2 of 40 pairs are not"),
        ((np.full((9, 3), 0.1), np.zeros(9, dtype=int)), "all 9 are equal: the latent has collapsed"),
        ((blobs()[0], blobs()[1][:-1]), r"but got shapes \(40, 4\) and \(39,\)"),
        ((blobs()[0][:, 0], blobs()[1]), r"but got shapes \(40,\) and \(40,\)"),
        ((blobs()[0], blobs()[1] / 2), "expected clusters as indices from 0, but got float64"),
        ((blobs()[0], blobs()[1] - 1), "expected clusters as indices from 0, but -1 is among them"),
    ],
)
def test_refuses_what_cannot_be_drawn(figure_class, panel, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_latent_space({"K = 2": panel}, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_refuses_no_panels_and_too_few_pairs(figure_class, tmp_path):
    with pytest.raises(ValueError, match="Expected at least one panel"):
        plot_latent_space({}, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="Expected `max_pairs` of at least 5, but got 4"):
        plot_latent_space({"a": blobs()}, tmp_path / "plot.png", max_pairs=4)


def test_names_the_extra_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"\.\[plots\]\""):
        plot_latent_space({"a": blobs()}, tmp_path / "plot.png")


def test_training_curve(tmp_path):
    history = [{"nll": 3.0, "epoch": 0.5}, {"nll": 2.0, "epoch": 1.0}, {"eval_nll": 2.5, "epoch": 1.0}, {"loss": 9}]
    plot_training_curve(history, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="neither"):
        plot_training_curve([{"loss": 1.0, "epoch": 1}], tmp_path / "none.png")
