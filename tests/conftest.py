"""What tests run under: annotations checked, four CPU devices, programs kept."""

import os
import tempfile

os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4")
)
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Workers, and the processes that tests start, share what they compile.
    PROGRAMS = tempfile.TemporaryDirectory(prefix="jax_softmax-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook("jax_softmax", CHECKER)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import jax_softmax  # noqa: E402


class Doctests:
    """Doctests anywhere, README included, start with the public names."""

    @pytest.fixture(autouse=True)
    def names(self, doctest_namespace):
        public = {n: v for n, v in vars(jax_softmax).items() if not n.startswith("_")}
        doctest_namespace.update(public, jax=jax, jnp=jnp, np=np)


def pytest_configure(config):
    # A fixture of this file would not reach the doctests outside of this folder.
    config.pluginmanager.register(Doctests())


@pytest.fixture
def x64():
    """64-bit types, for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def our_errors():
    """The library without beartype in front, so that its own messages are heard."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def strict_types():
    """No promotion of types that the code does not ask for."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def fresh_traces():
    """Nothing that was traced before, nor after: for what a test changes meanwhile."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def as_on_accelerators(monkeypatch, fresh_traces):
    """Where the code chooses by platform, what is not for CPUs, while tracing."""

    def default_of(*args, default, **others):
        return default(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", default_of)


@pytest.fixture
def as_on_gpus(monkeypatch, fresh_traces):
    """The same for GPUs, where there is something for them."""

    def gpus_of(*args, default, cuda=None, **others):
        return (cuda or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", gpus_of)


@pytest.fixture(params=["as_on_accelerators", "as_on_gpus"])
def elsewhere(request):
    """What is compiled where CPUs have loops of their own."""
    request.getfixturevalue(request.param)
    return request.param


@pytest.fixture
def as_on_one_device(monkeypatch):
    """Where the code minds that tokens may lie on several, what it does on one."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
