"""An epoch of the book's setting: fit against plain JAX, torch and the limits.

Every contender makes one pass over the 60,000 images in fresh order by batches of 256,
the short last one included: uint8 in memory, scaled in the step, SGD at 0.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from experiments import data, report, torch_peer
from experiments.command import above_zero, make_folder, quickened, results_folder
from experiments.files import save_json
from experiments.images import pixels
from experiments.measure import Contender, compiled, interleave, ratio
from jax_softmax import SoftmaxRegression, evaluate, fit
from jax_softmax._shuffle import epoch_order

BATCH, RATE = 256, 0.1
FIT, PLAIN, FULL = "fit", "plain JAX scan", "full-batch value and grad"
TUNED, BOOK = "torch, tuned", "torch, the book's loop"
EVALUATE, READ = "evaluate 10,000 images", "read 10,000 images as f32"
TARGETS = ((FIT, PLAIN, 0.5), (FIT, FULL, 2.0), (FIT, TUNED, 0.4), (EVALUATE, READ, 2))


@dataclass(frozen=True)
class Settings:
    """Time an epoch of training, its parts and its rivals; write table and JSON."""

    out: Path | None = None
    """Where train.json goes; by default experiments/results/train, with --quick
    runs/train-quick."""
    dataset: str = "fashion_mnist"
    """As for experiments.fashion_mnist."""
    data_dir: Path | None = None
    """As for experiments.fashion_mnist."""
    seconds: float = 30.0
    """For all contenders together."""
    quick: bool = False
    """A few rounds only."""


def run(settings: Settings) -> None:
    """Measure, print, save."""
    above_zero(settings, "seconds")
    settings = quickened(settings, seconds=1.0)
    out = results_folder("train", settings.out, quick=settings.quick)
    dataset = data.load(settings.dataset, settings.data_dir)
    make_folder(out)
    contenders = whole_epochs(dataset) | parts(dataset)
    if torch_peer.INSTALLED:
        contenders |= torch_epochs(dataset)
    timings = interleave(contenders, seconds=settings.seconds)
    rows = [
        {
            "what": name,
            "milliseconds": 1e3 * timing.median,
            "fastest": 1e3 * min(timing.seconds),
            "compile_seconds": timing.compile_seconds,
        }
        for name, timing in timings.items()
    ]
    for row in rows:
        report.say(
            f"{row['what']:<36}{row['milliseconds']:9.2f} ms   "
            f"fastest {row['fastest']:9.2f} ms"
        )
    ratios = [
        {"of": a, "to": b, "ratio": ratio(timings[a], timings[b]), "target": target}
        for a, b, target in TARGETS
        if b in timings
    ]
    for row in ratios:
        report.say(
            f"{row['of']} / {row['to']}: {row['ratio']:.2f} (target {row['target']})"
        )
    path = out / "train.json"
    rounds = len(next(iter(timings.values())).seconds)
    facts = {"environment": report.environment(), "rounds": rounds}
    save_json(path, facts | {"rows": rows, "ratios": ratios})
    report.say(f"Files: {path}")


def plain_objective(model: SoftmaxRegression, x: Array, y: Array) -> Array:
    """As anyone would write it with optax."""
    logits = x @ model.w + model.b
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def start(dataset: data.Dataset) -> SoftmaxRegression:
    features = dataset.train_images[0].size
    return SoftmaxRegression.init(jax.random.key(0), features, len(dataset.class_names))


def whole_epochs(dataset: data.Dataset) -> dict[str, Contender]:
    """fit as it is used, and a scan over batches of jax.random.permutation."""
    model, rows = start(dataset), len(dataset.train_labels)
    images, labels = map(jnp.asarray, (dataset.train_images, dataset.train_labels))
    optimizer = optax.sgd(RATE)
    epochs = fit(
        model,
        images,
        labels,
        optimizer=optimizer,
        key=jax.random.key(1),
        epochs=10**6,
        batch_size=BATCH,
        transform=pixels,
    )

    def plain_epoch(model: Any, key: Array, images: Array, labels: Array) -> Any:
        def step(state: Any, rows: Array) -> Any:
            model, opt_state = state
            loss, gradient = jax.value_and_grad(plain_objective)(
                model, pixels(images[rows]), labels[rows]
            )
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(model, updates), opt_state), loss

        order = jax.random.permutation(key, rows)
        full = rows - rows % BATCH
        state = model, optimizer.init(model)
        state, losses = lax.scan(step, state, order[:full].reshape(-1, BATCH))
        state, last = step(state, order[full:])
        return state, losses.sum() + last

    def full_batch(model: Any, x: Array, labels: Array) -> Any:
        return jax.value_and_grad(plain_objective)(model, x, labels)

    features = jax.block_until_ready(jax.jit(pixels)(images))
    return {
        FIT: Contender(lambda: next(epochs)),
        PLAIN: compiled(plain_epoch, model, jax.random.key(1), images, labels),
        FULL: compiled(full_batch, model, features, labels),
    }


def parts(dataset: data.Dataset) -> dict[str, Contender]:
    """What an epoch is made of, each by itself."""
    rows = len(dataset.train_labels)
    images = jnp.asarray(dataset.train_images)
    on_host = np.asarray(images)
    order = epoch_order(jax.random.key(1), 1, rows)
    test = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    features = jax.block_until_ready(jax.jit(pixels)(test[0]))
    model = start(dataset)

    def evaluated() -> Any:
        return jax.block_until_ready(evaluate(model, *test, transform=pixels))

    return {
        EVALUATE: Contender(evaluated),
        READ: compiled(lambda x: x.max(-1), features),
        "shuffle by NumPy": Contender(lambda: epoch_order(jax.random.key(1), 2, rows)),
        "shuffle by jax.random.permutation": compiled(
            lambda key: jax.random.permutation(key, rows), jax.random.key(1)
        ),
        "gather by NumPy": Contender(_gather(on_host, order)),
        "gather by XLA": compiled(lambda x, rows: x[rows], images, jnp.asarray(order)),
    }


def _gather(images: np.ndarray, order: np.ndarray) -> Callable[[], Any]:
    flat, blocks = images.reshape(len(images), -1), np.array_split(order, 4)
    return lambda: [flat.take(rows, axis=0, mode="clip") for rows in blocks][-1]


def torch_epochs(dataset: data.Dataset) -> dict[str, Contender]:
    """torch on tensors in memory, and by the book's DataLoader."""
    torch: Any = import_module("torch")  # a peer, only where it is installed

    images, labels = (
        torch.from_numpy(array.copy())
        for array in (dataset.train_images, dataset.train_labels.astype(np.int64))
    )
    rows, flat = len(labels), images.reshape(len(images), -1)

    def trainer() -> Callable[[Any, Any], None]:
        layer = torch.nn.Linear(flat.shape[1], len(dataset.class_names))
        sgd = torch.optim.SGD(layer.parameters(), lr=RATE)

        def step(x: Any, y: Any) -> None:
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(layer(x), y).backward()
            sgd.step()

        return step

    tuned, book = trainer(), trainer()

    def tuned_epoch() -> None:
        for batch in torch.randperm(rows).split(BATCH):
            tuned(flat[batch].float().mul_(1 / 255), labels[batch])

    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(flat.float() / 255, labels),
        batch_size=BATCH,
        shuffle=True,
    )

    def book_epoch() -> None:
        for x, y in loader:
            book(x, y)

    return {TUNED: Contender(tuned_epoch), BOOK: Contender(book_epoch)}
