"""Running a solver: one `lax.scan` over a grid of levels, with one key a sample."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.level import Level, Prediction
from jaxdiff.solvers import Noise, Solver

Array = jax.Array


def sample_keys(key: Array, n: int) -> Array:
    """n keys, one a sample, [n]: from one key by folding in each sample's index, or [n] keys as they are.

    Sample i's noise so never depends on how many others are drawn with it. Raises ValueError where the counts differ.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # a legacy jax.random.PRNGKey
    if key.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
    if key.shape != (n,):
        raise ValueError(f"need one key or one for each of the {n} samples, got keys of shape {key.shape}")
    return key


def prior(key: Array, level: Level, shape: tuple[int, ...], data_std: float = 1.0, noise: Noise = jax.random.normal) -> Array:
    """Where sampling starts: noise with the variance of the noisy data at `level`, of `shape` [B, ...]; key is one or [B].

    The standard deviation is hypot(alpha data_std, sigma): exactly DDPM's N(0, I), and EDM's sigma_max to 2e-5.
    """
    keys = sample_keys(key, shape[0])
    fresh = jax.vmap(lambda k: noise(k, shape[1:], jnp.result_type(float)))(keys)
    return jnp.hypot(level.alpha * data_std, level.sigma) * fresh


def solve(key: Array, solver: Solver, x: Array, levels: Level) -> tuple[Any, Prediction]:
    """Takes x [B, ...], already at levels[0], along the grid [N]: (state at levels[-1], predictions [N - 1, B, ...]).

    Any grid will do, upward too. Intervals of zero length are skipped at run time, so grids padded to one length share one
    compiled program, at a cost that follows the true number of steps; their predictions are zero. Predictions that the caller
    drops cost nothing under jit. `key` is one key or [B].
    """
    keys = sample_keys(key, x.shape[0])
    levels = Level(*(jnp.asarray(a, x.dtype) for a in levels))
    state, n = solver.init(x), levels.alpha.size - 1
    first = jax.tree.map(lambda a: a[0], levels)
    told = jax.eval_shape(solver.step, keys, state, first, first)[1]

    def move(state, inputs):
        i, t, s = inputs
        return solver.step(jax.vmap(lambda k: jax.random.fold_in(k, i))(keys), state, t, s)

    def stretch(state, inputs):
        return jax.lax.scan(_unless_still(move, told), state, inputs)

    # A skipped interval costs an accelerator a launch (30 us on one), so stretches of them are skipped at once: of N intervals at
    # most 2 sqrt(N) are looked at for nothing.
    length = max(int(np.ceil(np.sqrt(n))), 1)
    count = -(-n // length)
    rows = np.minimum(np.arange(count * length + 1), n)
    number = np.arange(count * length).reshape(count, length)
    before, after = (
        jax.tree.map(lambda a, cut=cut: a[rows[cut]].reshape(count, length), levels) for cut in (slice(None, -1), slice(1, None))
    )
    several = jax.tree.map(lambda a: jax.ShapeDtypeStruct((length, *a.shape), a.dtype), told)
    state, predictions = jax.lax.scan(_unless_still(stretch, several), state, (number, before, after))
    return state, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], predictions)


def _unless_still(move, told):
    """The scan body `move`, or where t and s are the same no move: the state as it is and predictions of zeros like `told`."""

    def step(state, inputs):
        _, t, s = inputs

        def stay(state, inputs):
            return state, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), told)

        return jax.lax.cond(((t.alpha == s.alpha) & (t.sigma == s.sigma)).all(), stay, move, state, inputs)

    return step


def sample(key: Array, solver: Solver, x: Array, levels: Level) -> Array:
    """Takes x [B, ...] from levels[0] to clean data, x0 [B, ...]: `solve`, then the solver's estimate at the last level.

    Sources: DDPM algorithm 2, DDIM eq. 12, EDM algorithms 1 and 2, by the solver. `key` is one key or [B].
    """
    state, _ = solve(key, solver, x, levels)
    return solver.final(state, jax.tree.map(lambda a: jnp.asarray(a[-1], x.dtype), levels))
