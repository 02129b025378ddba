"""The lines that the README shows, in a language model of flax.nnx."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_softmax import mean_linear_cross_entropy

VOCABULARY, FEATURES = 53, 8


class LanguageModel(nnx.Module):
    """As small as one can be: a word predicts the next."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.mix = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, tokens):
        return nnx.tanh(self.mix(self.embed(tokens)))


def fused_loss(model, tokens):
    hidden, labels = model(tokens[:, :-1]), tokens[:, 1:]
    embedding = model.embed.embedding[...]
    return mean_linear_cross_entropy(
        hidden, embedding, labels, where=labels != 0, tied=True
    )


def loss_on_logits(model, tokens):
    labels = tokens[:, 1:]
    logits = model.embed.attend(model(tokens[:, :-1]))
    rows = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (rows * (labels != 0)).sum() / (labels != 0).sum()


def test_a_language_model_trains_by_the_fused_loss_as_on_logits():
    tokens = jnp.arange(1, 25).reshape(2, 12).at[:, -2:].set(0)  # padded

    def trained(loss):
        model = LanguageModel(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            value, grads = nnx.value_and_grad(loss)(model, tokens)
            optimizer.update(model, grads)
            return value

        losses = [float(step(model, optimizer)) for _ in range(20)]
        return losses, jax.tree.leaves(nnx.state(model, nnx.Param))

    losses, params = trained(fused_loss)
    others, other_params = trained(loss_on_logits)
    assert losses[-1] < 0.2 * losses[0]
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    for one, other in zip(params, other_params, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
