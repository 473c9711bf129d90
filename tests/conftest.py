"""What every test shares: loud rank promotion, one compile cache for the session, and float64 on request."""

import os
import tempfile

# Set before jax is imported; the tests are small, and threads of several workers only get in each other's way.
os.environ.setdefault("JAX_PLATFORMS", os.environ.get("JAXDIFF_TEST_PLATFORMS", "cpu"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "jaxdiff-test-xla-cache"))

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# jax.enable_x64 replaced jax.experimental.enable_x64 within the supported range.
_enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # type: ignore[attr-defined]


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """What one file compiled no other needs; kept to the end, it would fill a small machine's memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 for the length of one test."""
    with _enable_x64(True):
        yield


def ends_of_each(config, items):
    """Of every test the first and the last of its cases: all code is called, but not on all the numbers."""
    cases: dict[tuple[str, str], list] = {}
    for item in items:
        cases.setdefault((str(item.path), getattr(item, "originalname", item.name)), []).append(item)
    few = {id(item) for each in cases.values() for item in (each[0], each[-1])}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in few])
    items[:] = [item for item in items if id(item) in few]


def pytest_collection_modifyitems(config, items):
    if os.environ.get("JAXDIFF_TEST_FEW"):
        ends_of_each(config, items)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and jax.default_backend() != "gpu":
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU (set JAXDIFF_TEST_PLATFORMS=cuda,cpu)"))
