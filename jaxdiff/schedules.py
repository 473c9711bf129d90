"""Schedules, t -> Level: which curve in the (alpha, sigma) plane the noise follows. t is a label; 0 is data.

Each works on arrays of any shape, in the precision of the arrays JAX makes (float64 under x64). None returns a
negative alpha: float32 cos(pi/2) is -4e-8, whose logsnr would be NaN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff.level import Level

Array = jax.Array
Schedule = Callable[[Array], Level]

__all__ = [
    "cosine",
    "cosine_beta",
    "edm",
    "learned",
    "linear_beta",
    "scaled_linear_beta",
    "shifted",
    "sigmoid",
    "straight",
    "subvp",
    "ve",
    "vp",
]


class Learned(NamedTuple):
    """A schedule with parameters: `init(key) -> params`, `at(params) -> Schedule`.

    Its log signal-to-noise ratio is ends[0] + (ends[1] - ends[0]) * interior(params, t), where `params["ends"]` [2] holds the
    values at t = 0 and t = 1: a caller may treat the gradients of the ends and of the interior apart.
    """

    init: Callable[[Array], Any]
    at: Callable[[Any], Schedule]


def of_logsnr(logsnr: Array) -> Level:
    """The variance preserving level of a log signal-to-noise ratio, of its shape: alpha^2 = sigmoid(logsnr), sigma^2 = 1 - alpha^2.

    Source: VDM, eqs. 2 and 3.
    """
    logsnr = jnp.asarray(logsnr) * 1.0
    return Level(jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr)))


def cosine(t: Array) -> Level:
    """The circle alpha = cos(pi t / 2), sigma = sin(pi t / 2) for t in [0, 1]; alpha is exactly 0 at t = 1.

    Source: Salimans and Ho 2022, section 2, the continuous form of Nichol and Dhariwal's cosine schedule.
    """
    t = jnp.asarray(t)
    return Level(jnp.sin(jnp.pi / 2 * (1 - t)), jnp.sin(jnp.pi / 2 * t))


def straight(t: Array) -> Level:
    """The straight line alpha = 1 - t, sigma = t for t in [0, 1]: flow matching, rectified flow, SiT.

    Source: Lipman et al. 2023, eq. 22 with sigma_min = 0, time reversed; Liu et al. 2023, eq. 1.
    """
    t = jnp.asarray(t)
    return Level(1 - t, t)


def edm(sigma: Array) -> Level:
    """Variance exploding, labelled by its own noise: alpha = 1, sigma = t for any t >= 0.

    Source: Karras et al. 2022 (EDM), table 1, column "Ours": sigma(t) = t, s(t) = 1.
    """
    sigma = jnp.asarray(sigma)
    return Level(jnp.ones_like(sigma), sigma)


def linear_beta(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """DDPM's schedule: betas linear from `first` to `last` over `steps` steps, on t in [0, 1], the table's row i at t = i / steps.

    Between the rows log alpha_bar is interpolated. Source: DDPM section 4. Raises ValueError for steps < 1 or betas outside
    0 < first <= last < 1.
    """
    if steps < 1 or not 0 < first <= last < 1:
        raise ValueError(f"linear_beta needs steps >= 1 and 0 < first <= last < 1, got {steps=}, {first=}, {last=}")
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-np.linspace(first, last, steps)))])
    return Partial(_table, log_alpha_bar)


def scaled_linear_beta(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Schedule:
    """Latent diffusion's table: betas whose square roots are linear from that of `first` to that of `last`; row i at t = i / steps.

    Between the rows log alpha_bar is interpolated. Source: the public code of Rombach et al. 2022 (there called "linear"), with the
    ends of Stable Diffusion. Raises ValueError for steps < 1 or betas outside 0 < first <= last < 1.
    """
    if steps < 1 or not 0 < first <= last < 1:
        raise ValueError(f"scaled_linear_beta needs steps >= 1 and 0 < first <= last < 1, got {steps=}, {first=}, {last=}")
    beta = np.linspace(np.sqrt(first), np.sqrt(last), steps) ** 2
    return Partial(_table, np.concatenate([[0.0], np.cumsum(np.log1p(-beta))]))


def cosine_beta(steps: int = 1000, s: float = 0.008, largest: float = 0.999) -> Schedule:
    """Improved DDPM's cosine table, alpha_bar ~ cos^2(pi/2 (t + s) / (1 + s)) with betas at most `largest`; row i at t = i / steps.

    Between the rows log alpha_bar is interpolated. Source: Nichol and Dhariwal 2021, eq. 17 and the clipping below it. Raises
    ValueError for steps < 1, s < 0 or `largest` outside 0 < largest < 1.
    """
    if steps < 1 or s < 0 or not 0 < largest < 1:
        raise ValueError(f"cosine_beta needs steps >= 1, s >= 0 and 0 < largest < 1, got {steps=}, {s=}, {largest=}")
    f = np.cos(np.pi / 2 * (np.arange(steps + 1) / steps + s) / (1 + s)) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], largest)
    return Partial(_table, np.concatenate([[0.0], np.cumsum(np.log1p(-beta))]))


def _table(log_alpha_bar: Array, t: Array) -> Level:
    t = jnp.asarray(t) * 1.0
    rows = jnp.arange(len(log_alpha_bar), dtype=t.dtype)
    # The logarithm is interpolated, and sigma comes from expm1: near t = 0, 1 - alpha_bar has no digits in float32.
    log = jnp.interp(t * (len(log_alpha_bar) - 1), rows, jnp.asarray(log_alpha_bar, t.dtype))
    return Level(jnp.exp(log / 2), jnp.sqrt(-jnp.expm1(log)))


def sigmoid(start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
    """The sigmoid schedule on t in [0, 1]: alpha^2 falls from 1 to 0 along a piece of the logistic function S.

    alpha^2 = (S(end / tau) - S(m)) / (S(end / tau) - S(start / tau)), m = (start + t (end - start)) / tau; sigma^2 = 1 - alpha^2.
    Source: Jabri et al. 2022, section 2.4 and algorithm 3; Chen 2023, algorithm 1 (whose floor of 1e-9 is left out: alpha is
    exactly 0 at t = 1). Raises ValueError for start >= end or tau <= 0.
    """
    if not (start < end and tau > 0):
        raise ValueError(f"sigmoid needs start < end and tau > 0, got {start=}, {end=}, {tau=}")
    return Partial(_sigmoid, start / tau, end / tau)


def _sigmoid(start: Array, end: Array, t: Array) -> Level:
    t = jnp.asarray(t) * 1.0
    m = (1 - t) * start + t * end
    data, noise = _share(1 - t, end - start, m, start), _share(t, end - start, m, end)
    # The smaller one has the digits; the larger is what it leaves of 1, which rounding cannot make fall and rise again.
    return Level(jnp.sqrt(jnp.where(data < 0.5, data, 1 - noise)), jnp.sqrt(jnp.where(data < 0.5, 1 - data, noise)))


def _share(t: Array, width: Array, m: Array, end: Array) -> Array:
    # S(b) - S(a) = sinh((b - a) / 2) / (2 cosh(a / 2) cosh(b / 2)), and the quotient of two such differences is
    # sinh(t width / 2) / sinh(width / 2) * cosh(end / 2) / cosh(m / 2): differences of S itself have no digits near the ends.
    # Every exponential below is of a number <= 0, so a small tau overflows nowhere.
    rest = jnp.exp((jnp.abs(end) - jnp.abs(m) - (1 - t) * width) / 2)
    lean = (1 + jnp.exp(-jnp.abs(end))) / (1 + jnp.exp(-jnp.abs(m)))
    return rest * lean * (jnp.expm1(-t * width) / jnp.expm1(-width))


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The variance preserving SDE on t in [0, 1], beta(t) linear: alpha^2 = exp(-integral of beta), sigma^2 = 1 - alpha^2.

    Source: Song et al. 2021, eq. 33. Raises ValueError unless 0 <= beta_min <= beta_max and beta_max > 0.
    """
    _betas("vp", beta_min, beta_max)
    return Partial(_vp, beta_min, beta_max)


def _vp(beta_min: Array, beta_max: Array, t: Array) -> Level:
    log = _log_alpha_bar(beta_min, beta_max, t)
    return Level(jnp.exp(log / 2), jnp.sqrt(-jnp.expm1(log)))


def subvp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The sub-VP SDE on t in [0, 1]: alpha as under `vp`, but sigma = 1 - alpha^2.

    Source: Song et al. 2021, eqs. 28 and 29. Raises ValueError unless 0 <= beta_min <= beta_max and beta_max > 0.
    """
    _betas("subvp", beta_min, beta_max)
    return Partial(_subvp, beta_min, beta_max)


def _subvp(beta_min: Array, beta_max: Array, t: Array) -> Level:
    log = _log_alpha_bar(beta_min, beta_max, t)
    return Level(jnp.exp(log / 2), -jnp.expm1(log))


def _log_alpha_bar(beta_min: Array, beta_max: Array, t: Array) -> Array:
    t = jnp.asarray(t) * 1.0
    return -t * (beta_min + t * (beta_max - beta_min) / 2)


def _betas(name: str, beta_min: float, beta_max: float) -> None:
    if not (0 <= beta_min <= beta_max and beta_max > 0):
        raise ValueError(f"{name} needs 0 <= beta_min <= beta_max and beta_max > 0, got {beta_min=}, {beta_max=}")


def ve(lo: float = 0.01, hi: float = 50.0) -> Schedule:
    """The variance exploding SDE on t in [0, 1]: alpha = 1, sigma = lo (hi / lo)^t. Raises ValueError unless 0 < lo < hi.

    Source: Song et al. 2021, appendix C, eqs. 30 and 31.
    """
    if not 0 < lo < hi:
        raise ValueError(f"ve needs 0 < lo < hi, got {lo=}, {hi=}")
    return Partial(_ve, lo, hi)


def _ve(lo: Array, hi: Array, t: Array) -> Level:
    sigma = lo * (hi / lo) ** (jnp.asarray(t) * 1.0)
    return Level(jnp.ones_like(sigma), sigma)


def shifted(schedule: Schedule, ratio: float) -> Schedule:
    """The schedule with 2 log(ratio) added to its log signal-to-noise ratio, its hypot(alpha, sigma) kept.

    For images of d x d pixels, ratio = 64 / d makes it as noisy as 64 x 64 pixels are. Source: Hoogeboom et al. 2023 (simple
    diffusion), eq. 5. Raises ValueError for ratio <= 0 or what is no schedule.
    """
    if not callable(schedule):
        raise ValueError(f"shifted needs a schedule t -> Level, got {type(schedule).__name__}")
    if not 0 < ratio < np.inf:
        raise ValueError(f"shifted needs a finite ratio > 0, got {ratio=}")
    return Partial(_shifted, schedule if isinstance(schedule, Partial) else Partial(schedule), ratio)


def _shifted(schedule: Schedule, ratio: Array, t: Array) -> Level:
    level = schedule(t)
    if not isinstance(level, Level):
        raise ValueError(f"shifted needs a schedule t -> Level, got a function that returns a {type(level).__name__}")
    alpha = ratio * level.alpha
    # A level of no data, or of no noise, stays exactly that: x / hypot(x, 0) is 1.
    norm = jnp.hypot(alpha, level.sigma)
    radius = jnp.hypot(level.alpha, level.sigma)
    return Level(radius * (alpha / norm), radius * (level.sigma / norm))


def learned(lo: float, hi: float, features: int = 1024) -> Learned:
    """A variance preserving schedule whose log signal-to-noise ratio falls from `hi` at t = 0 to `lo` at t = 1 on a learned curve.

    The ends are parameters too. The curve is a monotone network, l1(t) + l3(sigmoid(l2(l1(t)))): three linear layers of positive
    weights, `features` wide. Source: VDM, appendix H. Raises ValueError for lo >= hi or features < 1.
    """
    if not (-np.inf < lo < hi < np.inf and features >= 1):
        raise ValueError(f"learned needs finite lo < hi and features >= 1, got {lo=}, {hi=}, {features=}")
    return Learned(Partial(_init_learned, lo, hi, features), _at_learned)


def _init_learned(lo: float, hi: float, features: int, key: Array) -> dict[str, Any]:
    k_slope, k_centre = jax.random.split(key)
    # Weights are the softplus of parameters. The steps of the sigmoids begin spread over the times, each a few tenths wide.
    slope = 5 + 3 * jax.random.normal(k_slope, (features,))
    centre = jax.random.uniform(k_centre, (features,))
    one = jnp.log(jnp.expm1(1.0))
    return {
        "ends": jnp.asarray([hi, lo], jnp.float32),
        "l1": {"w": one, "b": jnp.zeros(())},
        "l2": {"w": slope, "b": -jax.nn.softplus(slope) * centre},
        # No bias: it would leave every difference of two times as it is.
        "l3": {"w": jnp.full((features,), one)},
    }


def _at_learned(params: Any) -> Schedule:
    return Partial(_learned, params)


def _learned(params: Any, t: Array) -> Level:
    share = interior(params, t)
    return of_logsnr((1 - share) * params["ends"][0] + share * params["ends"][1])


def interior(params: Any, t: Array) -> Array:
    """How far a learned curve has come at t in [0, 1], of t's shape: from exactly 0 at t = 0 to exactly 1 at t = 1.

    Source: VDM, appendix H: (f(t) - f(0)) / (f(1) - f(0)) of the monotone network f.
    """
    t = jnp.asarray(t) * 1.0
    # Two rises of positive terms, so neither end has a difference to lose its digits in, and 0 and 1 are exact.
    below, above = _rise(params, jnp.zeros_like(t), t, t), _rise(params, t, jnp.ones_like(t), 1 - t)
    return below / (below + above)


def _rise(params: Any, a: Array, b: Array, length: Array) -> Array:
    # f(b) - f(a) for b - a = length >= 0, by sigmoid(p) - sigmoid(q) = -sigmoid(p) sigmoid(-q) expm1(q - p).
    l1, l2, l3 = params["l1"], params["l2"], params["l3"]
    row = (1,) * a.ndim + (-1,)
    w1, w2, w3 = (jax.nn.softplus(layer["w"]) for layer in (l1, l2, l3))
    w2, b2, w3 = w2.reshape(row), l2["b"].reshape(row), w3.reshape(row)
    p, q = (w2 * (w1 * at[..., None] + l1["b"]) + b2 for at in (b, a))
    steps = -jax.nn.sigmoid(p) * jax.nn.sigmoid(-q) * jnp.expm1(-w2 * w1 * length[..., None])
    return w1 * length + (w3 * steps).mean(-1)
