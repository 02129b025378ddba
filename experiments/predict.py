"""Images classified by the model of a saved run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from experiments import data, report, run_folder
from experiments.command import BadInput
from experiments.images import pixels
from jax_softmax import softmax


@dataclass(frozen=True)
class Predict:
    """Classify PNG files, or the first test images, with a saved run."""

    run: Path
    """The folder of the run."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """PNG files; without any, the first ten test images of the run's data set."""
    data_dir: Path | None = None
    """Where the run's data set is, if the test images are wanted."""


def predict(settings: Predict) -> None:
    """Print label, probability and runner-up of each image."""
    model, config = run_folder.load(settings.run)
    names, shape = config["class_names"], tuple(config["image_shape"])
    if settings.images:
        images = np.stack([_read_image(path, shape) for path in settings.images])
        titles = [str(path) for path in settings.images]
    else:
        dataset = data.load(config["dataset"], settings.data_dir)
        run_folder.check_data(settings.run, dataset)
        images = dataset.test_images[:10]
        titles = [
            f"test image {i} ({names[label]})"
            for i, label in enumerate(dataset.test_labels[:10])
        ]
    probs = np.asarray(softmax(model.logits(pixels(images))))
    best, second = np.argsort(-probs, axis=-1, kind="stable")[:, :2].T
    width = max(map(len, titles))
    for title, row, i, j in zip(titles, probs, best, second, strict=True):
        report.say(
            f"{title:<{width}}  {names[i]} {row[i]:.1%}, then {names[j]} {row[j]:.1%}"
        )


def _read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            if file.mode.startswith("I"):  # 16 bits of grey
                file = Image.fromarray(np.rint(np.asarray(file) / 257).astype(np.uint8))
            image = np.asarray(file.convert("RGB" if len(shape) == 3 else "L"))
    except UnidentifiedImageError:
        raise BadInput(f"{path} is not an image: give PNG files.") from None
    except Exception as error:  # of a damaged or huge file Pillow can raise anything
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path} cannot be read ({reason}): give PNG files.") from None
    if image.shape != shape:
        (height, width), (wanted_height, wanted_width) = image.shape[:2], shape[:2]
        raise BadInput(
            f"{path} is {width} x {height} pixels, but the run was trained on "
            f"{wanted_width} x {wanted_height}: resize it first."
        )
    return image
