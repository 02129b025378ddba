"""What a run has learned: its gradient beside paper, its pictures, its calibration."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.data import Dataset
from experiments.files import save_json
from experiments.images import pixels
from jax_softmax import SoftmaxRegression, closed_form


def gradient_gap(
    model: SoftmaxRegression, images: np.ndarray, labels: np.ndarray
) -> str:
    """How far autodiff is from the gradient on paper, in a sentence."""

    @jax.jit
    def compared(
        model: SoftmaxRegression, images: Array, y: Array
    ) -> tuple[Array, Array]:
        x = pixels(images)
        autodiff = jax.grad(SoftmaxRegression.objective)(model, x, y)
        on_paper = SoftmaxRegression(*closed_form.regression_gradient(*model, x, y))
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), autodiff, on_paper)
        sizes = jax.tree.map(lambda a: jnp.abs(a).max(), on_paper)
        return jnp.stack(gaps).max(), jnp.stack(sizes).max()

    gap, size = compared(model, images, labels[: len(images)])
    return (
        f"Gradient of one batch: autodiff and closed form differ by {gap:.1e} at most "
        f"(largest entry {size:.1e})"
    )


def draw(
    out: Path,
    metrics: Sequence[dict[str, Any]],
    model: SoftmaxRegression,
    dataset: Dataset,
    stop: Callable[[], None],
) -> str:
    """The pictures, until told to stop; and in a sentence, how calibrated it is."""
    from experiments import calibration, pictures

    images, labels = dataset.test_images, dataset.test_labels
    names = dataset.class_names
    logits, predictions = jax.device_get(_predicted(model, images))
    stop()
    if metrics:
        pictures.curves(metrics, out / "curves.png")
    stop()
    pictures.misclassified(
        images, labels, predictions, names, out / "misclassified.png"
    )
    stop()
    pictures.weights(np.asarray(model.w), images.shape[1:], names, out / "weights.png")
    stop()
    pictures.confusion(labels, predictions, names, out / "confusion.png")
    stop()
    found = calibration.calibration(logits, labels)
    calibration.draw_reliability({"validation images": found}, out / "reliability.png")
    save_json(out / "calibration.json", calibration.as_json(found))
    return calibration.sentence(found)


@jax.jit
def _predicted(model: SoftmaxRegression, images: Array) -> tuple[Array, Array]:
    """Logits and most likely classes."""
    logits = model.logits(pixels(images))
    return logits, logits.argmax(-1)
