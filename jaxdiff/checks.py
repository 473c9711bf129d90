"""What a function may be given: numbers are checked where they are known, and let pass where they are traced."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def number(name: str, value: Any, kind: str = "a finite number", fits: Callable[[Any], Any] = np.isfinite) -> Array:
    """The value as an array. Raises ValueError where it is known, and so not traced, and does not fit."""
    here = known(value)
    wrong = [] if here is None else here[~fits(here)]
    if len(wrong):
        raise ValueError(f"{name}={wrong[0]} is not {kind}")
    return jnp.asarray(value, float)


def share(name: str, value: Any) -> Array:
    """`number` of one from 0 to 1."""
    return number(name, value, "a number from 0 to 1", lambda v: (v >= 0) & (v <= 1))


def positive(name: str, value: Any) -> Array:
    """`number` of a finite one above 0."""
    return number(name, value, "a finite number above 0", lambda v: (v > 0) & np.isfinite(v))


def whole(name: str, value: Any, least: int) -> int:
    """The value as an int. Raises ValueError where it is no integer, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value} is not a whole number of at least {least}")
    return int(value)


def ordered(lo: Any, hi: Any, strictly: bool = False) -> None:
    """Raises ValueError where both are known and lo lies above hi, or with `strictly` at it."""
    a, b = known(lo), known(hi)
    if a is None or b is None:
        return
    a, b = np.broadcast_arrays(a, b)
    wrong = ~(a < b if strictly else a <= b)
    if wrong.any():
        raise ValueError(f"lo={a[wrong][0]} is {'not below' if strictly else 'above'} hi={b[wrong][0]}")


def known(value: Any) -> np.ndarray | None:
    """What the value is, float64, or None where it is traced and nobody knows."""
    try:
        return np.asarray(value, float)
    except jax.errors.TracerArrayConversionError:
        return None
