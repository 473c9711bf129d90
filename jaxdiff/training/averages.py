"""Averages of parameters over training: what each step keeps of one, and averages of other widths put together afterwards.

Power-function averages are of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2),
section 3 and appendix C. After T updates such an average holds theta(t) with density p(t) = (gamma + 1) t^gamma / T^(gamma + 1)
on [0, T], so its width, the deviation of t over T, stays the same share of the training however long that goes on.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import names
from jaxdiff.errors import InputError

# What a config may name; the other functions here are for what is done after training.
__all__ = ["exponential", "power"]

Array = jax.Array
Decay = Callable[[Any], Array]  # updates done before this one, an int [] -> the share of the average that this one keeps, []

WIDEST = math.sqrt(1 / 12)  # the width at gamma = 0, where every step counts the same


def exponential(decay: float) -> Decay:
    """The decay of an exponential average, min(decay, (1 + step) / (10 + step)), which forgets the random start soon.

    Raises InputError for a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise InputError(f"decay={decay} of an exponential average is not in [0, 1)")

    def at(step) -> Array:
        return jnp.minimum(decay, (1 + step) / (10 + step))

    return at


def power(std: float) -> Decay:
    """The decay (1 - 1/t)^(gamma + 1) at update t = step + 1 of the power-function average of width std (EDM2, section 3.1).

    At the first update it is 0: the average does not depend on where it started. Raises InputError as `exponent` does.
    """
    exponent_plus_one = exponent(std) + 1

    def at(step) -> Array:
        # Through log1p: after a million updates float32 keeps two digits of the 1/t in 1 - 1/t, and the power multiplies the error.
        t = jnp.asarray(step, float) + 1
        return jnp.exp(exponent_plus_one * jnp.log1p(-1 / t))

    return at


def exponent(std: float) -> float:
    """The gamma >= 0 of width std: the root of std^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (EDM2, section 3.1).

    The width is the standard deviation of t under p, divided by T. Raises InputError for a std outside (0, sqrt(1/12)]: at
    sqrt(1/12) gamma is 0, and a wider average would hold the oldest steps most.
    """
    if not 0 < std <= WIDEST:
        raise InputError(f"std={std} of a power average is not in (0, {WIDEST:.6f}]")
    # With y = gamma + 7/3 the cubic is y^3 - (s + 1/3) y + (4 s/3 + 2/27) = 0, s = 1/std^2. Its three roots are real here and the
    # largest is the cosine form's first; written in std, not in s, so that a tiny std does not overflow.
    scale = 1 + std**2 / 3
    cosine = -math.sqrt(3) * std * (2 + std**2 / 9) / scale**1.5
    root = 2 * math.sqrt(scale / 3) / std * math.cos(math.acos(cosine) / 3)
    return max(root - 7 / 3, 0.0)  # rounding may fall below 0 at the widest


def named(text: str | float) -> Decay:
    """The decay function that an entry of `training.ema` names: "0.9999" or a number, or a call such as "power(0.05)".

    Raises InputError for another name, a name without its number, and a number out of range.
    """
    try:
        decay = float(text)
    except ValueError:
        function = names.named(sys.modules[__name__], str(text), "training.ema")
        if "(" not in str(text):
            raise InputError(f'training.ema={text!r} lacks its number, as in "power(0.05)"') from None
        return function
    return exponential(decay)


def width(text: str | float) -> float | None:
    """The std of an entry of `training.ema` that is a power average, such as "power(0.05)"; None for an exponential one."""
    if not str(text).startswith("power"):
        return None
    named(text)
    _, args, kwargs = names.parse(sys.modules[__name__], str(text), "training.ema")
    return float(args[0] if args else kwargs["std"])


def weights(stored: Sequence[tuple[float, float]], step_count: float, std: float) -> np.ndarray:
    """The coefficients, float64 [len(stored)], that sum stored power averages to nearly the one of width std at step_count updates.

    Each stored average is (its number of updates, its std). The sum's profile is the nearest in least squares on [0, step_count]
    (EDM2, section 3.2 and appendix C). Raises InputError, a ValueError, for no averages, for one that is later than step_count or
    has no update, and as `exponent` does.
    """
    if not stored:
        raise InputError("no stored averages to combine")
    for count, width in stored:
        if not 0 < count <= step_count:
            raise InputError(f"the average stored at step {count} with std={width} is not in (0, {step_count}], the steps wanted")
    counts = np.asarray([count for count, _ in stored], np.float64)
    gammas = np.asarray([exponent(width) for _, width in stored])
    products = _inner(counts[:, None], gammas[:, None], counts, gammas)
    target = _inner(counts, gammas, np.float64(step_count), np.float64(exponent(std)))
    # Profiles scaled to norm 1: an early one's norm is else far above a late one's, and the condition number with it. What is
    # then below the tolerance is rounding (200 snapshots of two widths reach 1e-7); the same average given twice is shared evenly.
    norms = np.sqrt(np.diag(products))
    solution, *_ = np.linalg.lstsq(products / norms / norms[:, None], target / norms, rcond=1e-12)
    return solution / norms


def combine(weights: Iterable[float], trees: Iterable[Any]) -> Any:
    """The sum of weight * tree over pytrees of equal structure and shapes, in the first one's dtypes, NumPy on the host.

    Summed in float64; `trees` may be a generator, and no tree is held while the next is made. Raises ValueError where the
    numbers of weights and trees, or the trees' structures or shapes, differ, or there is no tree.
    """
    coefficients = [float(weight) for weight in weights]
    sums: list[np.ndarray] = []
    dtypes: list[Any] = []
    structure: Any = None
    count = 0
    for tree in trees:
        if count == len(coefficients):
            raise ValueError(f"more trees than the {len(coefficients)} weights")
        leaves, treedef = jax.tree.flatten(tree)
        if structure is None:
            structure = treedef
            sums = [np.zeros(np.shape(leaf), np.float64) for leaf in leaves]
            dtypes = [leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype for leaf in leaves]
        if treedef != structure or [np.shape(leaf) for leaf in leaves] != [total.shape for total in sums]:
            raise ValueError(f"tree {count} has another structure or other shapes than the first")
        _add(sums, coefficients[count], leaves)
        count += 1
        del tree, leaves  # a loop holds the last one while the next is made
    if structure is None or count < len(coefficients):
        raise ValueError(f"{count} trees for {len(coefficients)} weights")
    return jax.tree.unflatten(structure, [total.astype(dtype) for total, dtype in zip(sums, dtypes)])


def _add(sums: list[np.ndarray], weight: float, leaves: list[Any]) -> None:
    for total, leaf in zip(sums, leaves):
        total += weight * np.asarray(leaf).astype(np.float64)


def _inner(count, gamma, other_count, other_gamma):
    # The integral over [0, the smaller T] of p q. Only the ratio of the two T comes under a power, and that of the later
    # profile: T^(gamma + 1) itself overflows.
    early, late = np.minimum(count, other_count), np.maximum(count, other_count)
    of_late = np.where(count >= other_count, gamma, other_gamma)
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * (early / late) ** of_late / late
