"""The report's plots as SVG text that takes its text color from the page, and its pictures as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito's colors, told apart with impaired color vision and on dark and light pages alike.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b0a000", "#8e6bbf", "#7f7f7f", "#a0522d")
TRUTH_COLOR = "#ffffff"
# Stands for the page's text color until the SVG is written.
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    # Names are no formulas, and the page's background shows through.
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_WIDTH = 4.4  # inches; a phone's width at 72 points per inch, nearly
_LONGEST_NAME = 24  # letters
_PICTURE_SIDE = 420  # pixels


def color(index: int) -> str:
    """The color of a candidate."""
    return COLORS[index % len(COLORS)]


def short(name: str) -> str:
    """A candidate's name as it fits a plot."""
    name = name.removeprefix("nnUNetTrainer") or name
    # Matplotlib keeps names that start with an underscore out of legends.
    name = f" {name}" if name.startswith("_") else name
    if len(name) <= _LONGEST_NAME:
        return name
    # Names of one trainer with several plans differ at the end.
    half = (_LONGEST_NAME - 3) // 2
    return f"{name[:half]}...{name[-half:]}"


def box_plot(values: np.ndarray, names: Sequence[str], title: str) -> str:
    """One box per candidate, its cases as dots.

    Args:
        values: (candidates, cases).
        names: Of the candidates.
        title: Of the axis.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.7 + 0.34 * len(names)), layout="constrained")
        axes = figure.subplots()
        rows = [row[~np.isnan(row)] for row in values]
        ink = {"color": _INK, "linewidth": 0.8}
        axes.boxplot(
            rows, orientation="horizontal", widths=0.6, showfliers=False, medianprops=ink, boxprops=ink,
            whiskerprops=ink, capprops=ink,
        )  # fmt: skip
        jitter = np.random.default_rng(0).uniform(-0.18, 0.18, values.shape[1])
        for i, row in enumerate(values):
            axes.plot(row, i + 1 + jitter, ".", color=color(i), alpha=0.6, markersize=4)
        axes.set_yticks(range(1, len(names) + 1), [short(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel(title)
        return _svg(figure, title)


def scatter(reference: np.ndarray, others: np.ndarray, names: Sequence[str], title: str) -> str:
    """Every case: the reference on one axis, the other candidates on the other.

    Args:
        reference: (cases,).
        others: (candidates - 1, cases).
        names: Of all candidates, the reference first.
        title: Of the quantity.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _WIDTH), layout="constrained")
        axes = figure.subplots()
        for i, row in enumerate(others):
            axes.plot(reference, row, ".", color=color(i + 1), label=short(names[i + 1]), alpha=0.8)
        ends = [np.fmin.reduce([*reference, *others.flat]), np.fmax.reduce([*reference, *others.flat])]
        if np.all(np.isfinite(ends)):
            axes.plot(ends, ends, color=_INK, linewidth=0.6)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel(f"{short(names[0])}: {title}")
        axes.set_ylabel(f"others: {title}")
        axes.legend(frameon=False, fontsize=8)
        return _svg(figure, f"scatter {title}")


def curves(series: Mapping[str, Sequence[Sequence[float]]], colors: Mapping[str, str], title: str) -> str:
    """Lines by epoch; those of one name (its folds) share a color.

    Args:
        series: Name to its lines.
        colors: Name to color.
        title: Of the axis.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        for name, lines in series.items():
            for i, line in enumerate(lines):
                axes.plot(line, color=colors[name], linewidth=1, alpha=0.9, label=short(name) if i == 0 else None)
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.legend(frameon=False, fontsize=8)
        return _svg(figure, f"curves {title} {' '.join(series)}")


def contour_picture(image: np.ndarray, maps: Sequence[tuple[np.ndarray, str]], pixel_aspect: float) -> bytes:
    """An image with the outlines of label maps on it, as PNG.

    Args:
        image: (H, W), or (H, W, 3) between 0 and 1.
        maps: Label maps (H, W), each with its color; drawn in this order.
        pixel_aspect: Height of a pixel over its width.
    """
    height, width = image.shape[0] * pixel_aspect, image.shape[1]
    scale = _PICTURE_SIDE / max(height, width)
    # At least a pixel, of very thin planes too.
    figure = Figure(figsize=(max(1, width * scale) / 100, max(1, height * scale) / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.imshow(image, cmap="gray", aspect="auto")
    axes.axis("off")
    for labels, line_color in maps:
        for value in np.unique(labels[labels > 0]):
            # A border of background, so that outlines close at the edge of the image.
            inside = np.pad((labels == value).astype(float), 1)
            places = [np.arange(-1, side + 1) for side in labels.shape]
            axes.contour(places[1], places[0], inside, levels=[0.5], colors=[line_color], linewidths=1.0)
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)
    file = io.BytesIO()
    canvas.print_png(file)
    return file.getvalue()


def _svg(figure: Figure, salt: str) -> str:
    # The salt keeps the identifiers of the page's figures apart, and alike from run to run.
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
