"""A GPU's quotients on a CPU: off by up to 2 ULP, as those of an H100 may be."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

LOOPS = ("scan", "while", "cond")


def divides_within_2_ulp_only(f):
    """f, operation by operation, with every quotient but exact ones moved."""

    def run(*args):
        args = jax.tree.map(jnp.asarray, args)
        program, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        rng = np.random.default_rng(0)
        out = evaluated(program.jaxpr, program.consts, jax.tree.leaves(args), rng)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run


def evaluated(jaxpr, consts, args, rng):
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        name, params = equation.primitive.name, equation.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        assert name not in LOOPS, f"a quotient in a {name} would be exact"
        if inner is not None and name != "reduce":
            outputs = evaluated(inner.jaxpr, inner.consts, inputs, rng)
        else:
            outputs = equation.primitive.bind(*inputs, **params)
            if not equation.primitive.multiple_results:
                outputs = [outputs]
        if name == "div":
            outputs = [moved(outputs[0], inputs[1], rng)]
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(variable) for variable in jaxpr.outvars]


def moved(quotient, divisor, rng):
    q = np.asarray(quotient)
    exact = np.frexp(np.abs(np.asarray(divisor)))[0] == 0.5  # a power of two
    ulp = np.where(np.isfinite(q) & ~exact, np.spacing(np.abs(q)), 0)
    return jnp.asarray(q + ulp * rng.integers(-2, 3, q.shape), q.dtype)
