"""What a person wants to see of a trained image classifier."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TRAIN, VALIDATION, ACCURACY = "#1f77b4", "#d62728", "#2ca02c"


def curves(metrics: Sequence[dict[str, float]], path: Path) -> None:
    """Losses and validation accuracy by epoch, as in the book."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
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
    axes.legend()
    figure.savefig(path, dpi=120)


def misclassified(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    names: Sequence[str],
    path: Path,
) -> None:
    """The first errors: the true label above the predicted one."""
    wrong = np.flatnonzero(labels != predictions)[:24]
    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.subplots(3, 8)
    for axes in grid.flat:
        axes.axis("off")
    shown = zip(images[wrong], labels[wrong], predictions[wrong], strict=True)
    for axes, (image, true, predicted) in zip(grid.flat, shown, strict=False):
        axes.imshow(image, cmap="gray")
        axes.set_title(f"{names[true]}\n{names[predicted]}", fontsize=9)
    title = "Misclassified test images: true label above, predicted label below"
    figure.suptitle(title if len(wrong) else "No test image is misclassified")
    figure.savefig(path, dpi=120)


def weights(w: np.ndarray, shape: Sequence[int], names: Sequence[str], path: Path):
    """The weights of each class as an image: red speaks for it, blue against."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.subplots(2, (len(names) + 1) // 2, squeeze=False)
    images = w.T.reshape(-1, *shape)
    if len(shape) == 3:
        images = images.mean(-1)
    limit = np.abs(images).max()
    for axes in grid.flat:
        axes.axis("off")
    shown = None
    for axes, image, name in zip(grid.flat, images, names, strict=False):
        shown = axes.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_title(name, fontsize=10)
    if shown is not None:
        figure.colorbar(shown, ax=grid, label="weight", shrink=0.8)
    figure.savefig(path, dpi=120)


def confusion(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], path: Path
) -> None:
    """How many test images of each class were taken for each class."""
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predictions), 1)
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.subplots()
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
    figure.colorbar(shown, ax=axes, label="share of the true label", shrink=0.8)
    figure.savefig(path, dpi=120)
