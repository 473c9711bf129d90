"""How programs are compiled: `jax.jit` with the options that measurements pay for."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# XLA's CPU backend hands products, convolutions and reductions to YNNPACK where it has it (jax 0.10 and later have). Its reductions
# are the faster ones, its convolutions are not: 0.75 of the speed of the Eigen ones forward, and down to 0.25 in the gradient by
# the kernel (docs/performance.md). So it keeps the reductions.
CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    # Elementwise code is 1.2 times as fast at the full width of AVX-512; a processor without it is not affected.
    "xla_cpu_prefer_vector_width": "512",
}


@functools.cache
def options() -> dict[str, str]:
    """The compiler options for the backend in use; those that this version of JAX does not have are left out."""
    return dict(item for item in CPU.items() if _known(*item)) if jax.default_backend() == "cpu" else {}


def _known(name: str, value: str) -> bool:
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options={name: value}).lower().compile()
    except RuntimeError:  # "No such compile option"
        return False
    return True


@jax.jit
def _zero() -> jax.Array:
    return jnp.zeros(())


def jit(function: Callable, **given: Any) -> Callable:
    """`jax.jit` of a function with `options()`; within another jit, which says how all of it is compiled, without them.

    JAX is not asked for its devices before the first call, so a module may make one. `jitted()` of what is returned is JAX's own.
    """
    made = functools.cache(lambda: jax.jit(function, compiler_options=options() or None, **given))
    within = jax.jit(function, **given)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Within a jit all is traced, also where no argument is; within a gradient what depends on its arguments.
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in (_zero(), *jax.tree.leaves((args, kwargs))))
        return (within if traced else made())(*args, **kwargs)

    call.jitted = made  # type: ignore[attr-defined]
    return call
