"""What a person wants to see of a trained image classifier.

Many small images are one montage in one pair of axes: matplotlib takes 20 ms for each
pair, and twice that where it arranges them itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from experiments.files import save_figure

TRAIN, VALIDATION, ACCURACY = "#1f77b4", "#d62728", "#2ca02c"


def curves(metrics: Sequence[dict[str, float]], path: Path) -> None:
    """Losses and validation accuracy by epoch, as in the book."""
    figure, axes = _axes((6, 4), (0.11, 0.13, 0.86, 0.83))
    epochs = [row["epoch"] for row in metrics]
    marker = "o" if len(epochs) == 1 else ""
    for name, color, style in (
        ("train_loss", TRAIN, "-"),
        ("validation_loss", VALIDATION, "--"),
        ("validation_accuracy", ACCURACY, "-."),
    ):
        values = [row[name] for row in metrics]
        label = name.replace("_", " ")
        axes.plot(epochs, values, style, color=color, marker=marker, label=label)
    axes.set(xlabel="epoch", ylabel="loss in nats, or accuracy", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    save_figure(path, figure)


def misclassified(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    names: Sequence[str],
    path: Path,
) -> None:
    """The first errors: the true label above the predicted one."""
    wrong = np.flatnonzero(labels != predictions)[:24]
    figure, axes = _axes((11, 6), (0.01, 0.01, 0.98, 0.91))
    pairs = zip(labels[wrong].tolist(), predictions[wrong].tolist(), strict=True)
    titles = [f"{names[true]}\n{names[predicted]}" for true, predicted in pairs]
    if titles:
        _montage(axes, images[wrong] / 255, titles, columns=8, fontsize=9, cmap="gray")
    title = "Misclassified test images: true label above, predicted label below"
    figure.suptitle(title if len(wrong) else "No test image is misclassified")
    save_figure(path, figure)


def weights(w: np.ndarray, shape: Sequence[int], names: Sequence[str], path: Path):
    """The weights of each class as an image: red speaks for it, blue against."""
    figure, axes = _axes((10, 4.6), (0.01, 0.02, 0.86, 0.96))
    images = w.T.reshape(-1, *shape)
    if len(shape) == 3:
        images = images.mean(-1)
    limit = np.abs(images).max()
    shown = _montage(
        axes,
        images,
        names,
        columns=(len(names) + 1) // 2,
        fontsize=10,
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
    )
    figure.colorbar(shown, cax=figure.add_axes((0.89, 0.1, 0.02, 0.8)), label="weight")
    save_figure(path, figure)


def confusion(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], path: Path
) -> None:
    """How many test images of each class were taken for each class."""
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predictions), 1)
    figure, axes = _axes((7, 6.2), (0.19, 0.17, 0.64, 0.76))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(
            column, row, f"{count}", ha="center", va="center", color=color, fontsize=8
        )
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right")
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted label", ylabel="true label")
    axes.set_title("Test images by true and predicted label", fontsize=11)
    bar = figure.add_axes((0.86, 0.25, 0.03, 0.65))
    figure.colorbar(shown, cax=bar, label="share of the true label")
    save_figure(path, figure)


def _axes(
    inches: tuple[float, float], place: tuple[float, float, float, float]
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=inches)
    return figure, figure.add_axes(place)


def _montage(
    axes: Axes,
    images: np.ndarray,
    titles: Sequence[str],
    *,
    columns: int,
    fontsize: float,
    **style: Any,
) -> AxesImage:
    """Images in rows, each below its title, with space for two lines of it."""
    axes.axis("off")
    axes.set_anchor("N")
    height, width = images.shape[1:3]
    above, between = round(0.4 * height), round(0.15 * width)
    rows = -(-len(images) // columns)
    tall, wide = height + above, width + between
    empty = 1.0 if images.ndim == 4 else np.nan
    sheet = np.full((rows * tall, columns * wide, *images.shape[3:]), empty)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(number, columns)
        y, x = row * tall + above, column * wide
        sheet[y : y + height, x : x + width] = image
        axes.text(
            x + width / 2 - 0.5,
            y - 1.2,
            title,
            ha="center",
            va="bottom",
            fontsize=fontsize,
        )
    return axes.imshow(sheet, interpolation="nearest", **style)
