"""What `jaxdiff.compiling` gives XLA."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import compiling

CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="options of the CPU's compiler")


@CPU
def test_an_option_that_this_jax_does_not_have_is_left_out(monkeypatch):
    monkeypatch.setattr(compiling, "CPU", {"xla_cpu_of_no_version": "1"})
    assert compiling.options.__wrapped__() == {}


@CPU
def test_convolutions_are_eigen_s_and_reductions_ynnpack_s_where_there_is_a_choice():
    if "xla_cpu_experimental_ynn_fusion_type" not in compiling.options():
        pytest.skip("this jaxlib has no such choice")
    x, kernel = jnp.ones((2, 16, 16, 32)), jnp.ones((3, 3, 32, 32))

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def by_ynnpack(function, *args):
        return "ynn_fusion" in compiling.jit(function).jitted().lower(*args).compile().as_text()

    assert not by_ynnpack(conv, x, kernel) and not by_ynnpack(lambda a, b: a @ b, kernel[0, 0], kernel[0, 0])
    assert by_ynnpack(lambda x: x.sum((0, 1, 2)), x)


def test_within_another_jit_it_is_a_plain_one_and_outside_the_same_numbers():
    @compiling.jit
    def twice(x, by=2.0):
        return by * x

    x = jnp.arange(3.0)
    np.testing.assert_array_equal(twice(x), [0, 2, 4])
    np.testing.assert_array_equal(jax.jit(lambda x: twice(x, by=3.0) + 1)(x), [1, 4, 7])
    np.testing.assert_array_equal(jax.jit(lambda y: y + twice(x))(x), [0, 3, 6])  # of what is known, and not traced
    assert jax.eval_shape(lambda: twice(x)).shape == (3,)
    np.testing.assert_array_equal(jax.grad(lambda x: twice(x).sum())(x), [2, 2, 2])
    assert twice.__name__ == "twice" and twice.jitted()._cache_size() == 1


def test_making_one_does_not_look_for_devices():
    """A module may make one at import, before jax.distributed.initialize."""
    code = (
        "import jaxdiff, jax; from jax._src import xla_bridge as b;"
        "jaxdiff.compiling.jit(lambda x: x); assert not b.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@CPU
@pytest.mark.parametrize("shape, kernel, given", [
    ((2, 9, 8), (3, 8, 4), {}), ((2, 8, 8, 6), (3, 3, 6, 10), {"window_strides": (2, 2)}), ((1, 6, 6, 6, 4), (3, 3, 3, 4, 5), {}),
    ((2, 7, 7, 4), (3, 3, 4, 6), {"lhs_dilation": (2, 2)}), ((2, 7, 7, 4), (3, 3, 4, 6), {"rhs_dilation": (2, 2)}),
    ((2, 8, 8, 8), (3, 3, 4, 8), {"feature_group_count": 2}), ((2, 8, 8, 6), (3, 3, 1, 6), {"feature_group_count": 6}),
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
])  # fmt: skip
def test_a_convolution_and_its_gradients_are_those_of_jax(shape, kernel, given):
    a, b = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((shape, kernel)))
    space = "DHW"[5 - len(shape) :]
    numbers = f"N{space}C", f"{space}IO", f"N{space}C"
    given = {"window_strides": (1,) * len(space), "padding": "SAME", "dimension_numbers": numbers} | given
    if "lhs_dilation" in given:
        given["padding"] = ((1, 1),) * len(space)

    def run(a, b):
        out, back = jax.vjp(lambda a, b: jax.lax.conv_general_dilated(a, b, **given), a, b)
        return out, *back(jnp.cos(out))

    for ours, plain in zip(compiling.jit(run)(a, b), jax.jit(run)(a, b)):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=2e-5)
