"""Likelihood: what a model says of data, in nats a sample: variational bounds from above, the probability flow exactly.

`elbo`, `continuous_elbo` and `log_likelihood` are of real-valued data. Images are integers, and no density of integers is finite:
`image_elbo`, `image_continuous_elbo` and `image_log_likelihood` take them as uint8, dequantize or integrate over each value
themselves, and give bits per dimension with their standard error.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jax.tree_util import Partial

from jaxdiff.codec import Codec, ends
from jaxdiff.denoiser import Denoiser, partial
from jaxdiff.level import Level, Prediction, beta_std, between, diffuse, learned_std, logsnr, posterior_std
from jaxdiff.sampling import sample_keys
from jaxdiff.schedules import Schedule

Array = jax.Array
# (x0, x, prediction, level, std) -> log p(x0 | x) of every entry.
Decoder = Callable[[Array, Array, Prediction, Level, Array], Array]
Trace = Callable[[Array, Callable[[Array], Array], Array], tuple[Array, Array]]


class Bound(NamedTuple):
    """An upper bound on -log p(x0) by term, [B] each: of the prior, of all steps between, of the decoder."""

    prior: Array
    diffusion: Array
    decoder: Array

    @property
    def total(self) -> Array:
        """The bound itself, [B]."""
        return self.prior + self.diffusion + self.decoder


class Bits(NamedTuple):
    """Bits per dimension: the mean over images, its standard error (NaN for one image), each image's [B], and its terms.

    `terms` is a `Bound` in bits per dimension, or None for an exact likelihood.
    """

    mean: Array
    stderr: Array
    each: Array
    terms: Bound | None = None


class Variance(NamedTuple):
    """The model's reverse variance: `step(t, s, prediction)`, a `Std`, and the decoder's `last(before, t, prediction)`.

    The posterior's variance is 0 on the way from the last level to data, so `last` is told the level before.
    """

    step: Callable[[Level, Level, Prediction], Array]
    last: Callable[[Level, Level, Prediction], Array]


def learned_last_std(before: Level, t: Level, prediction: Prediction) -> Array:
    """The decoder's learned deviation: between `posterior_std(before, t)` and t.sigma, in their logarithms.

    Source: Nichol and Dhariwal 2021 (Improved DDPM), eq. 15, the last step's posterior variance replaced by the one before.
    """
    share = (prediction.aux + 1) / 2
    return jnp.exp((1 - share) * jnp.log(posterior_std(before, t)) + share * jnp.log(t.sigma))


def last_std(before: Level, t: Level, prediction: Prediction) -> Array:
    """The deviation of x0 from x / alpha at the last level, sigma / alpha, of its shape: for grids as fine as one likes."""
    return t.sigma / t.alpha


# The posterior's deviation between levels, and for the decoder what the last level itself has.
fixed = Variance(posterior_std, last_std)
# In DDPM's tables the decoder has the posterior's deviation of the step before, under either fixed variance.
small = Variance(posterior_std, posterior_std)
large = Variance(beta_std, posterior_std)
learned = Variance(learned_std, learned_last_std)


def bits_per_dim(nats: Array, dims: int) -> Array:
    """Nats a sample as bits per dimension: nats / (dims log 2), of the shape of `nats`."""
    return nats / (dims * np.log(2))


def prior_kl(x0: Array, level: Level, data_std: float | Array = 1.0) -> Array:
    """KL(q(x_T | x0) || N(0, hypot(alpha data_std, sigma)^2)), nats [B]: what the noisiest level still knows of x0 [B, ...].

    Source: DDPM eq. 5, the first term; the prior is the one that sampling starts from.
    """
    prior = jnp.hypot(level.alpha * data_std, level.sigma)
    ratio = level.sigma / prior
    return _sum(jnp.square(level.alpha * x0 / prior) / 2 + (jnp.square(ratio) - 1) / 2 - jnp.log(ratio))


def step_kl(x0: Array, prediction: Prediction, t: Level, s: Level, std: Callable = posterior_std) -> Array:
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) in nats, of every entry [B, ...], the model's deviation being `std(t, s, prediction)`.

    Levels are [] or [B, 1, ..., 1] with s less noisy than t, and sigma_s > 0. Source: DDPM eq. 8; the means differ by
    alpha_s k^2 (x0 - the predicted x0), with k^2 = 1 - SNR_t / SNR_s.
    """
    true, model = posterior_std(t, s), std(t, s, prediction)
    apart = s.alpha * -jnp.expm1(logsnr(t) - logsnr(s)) * (x0 - prediction.x0)
    return jnp.log(model / true) + (jnp.square(true / model) - 1) / 2 + jnp.square(apart / model) / 2


def gaussian_decoder(x0: Array, x: Array, prediction: Prediction, level: Level, std: Array) -> Array:
    """log N(x0; the predicted x0, std^2) of every entry, for real-valued data. Source: DDPM eq. 5, the last term."""
    return -jnp.square((x0 - prediction.x0) / std) / 2 - jnp.log(std) - np.log(2 * np.pi) / 2


def discretised_decoder(lo: Array, hi: Array, values: int = 256) -> Decoder:
    """The decoder of integers: the mass of N(predicted x0, std^2) nearest to each of `values` equal steps from `lo` to `hi`.

    The first and last value take the tails, so the masses sum to one. `lo` and `hi` broadcast with x0. Source: DDPM eq. 13.
    """
    return Partial(_discretised, values, lo, hi)


def _discretised(values, lo, hi, x0, x, prediction, level, std):
    width = (hi - lo) / (values - 1)
    below, above = ((x0 - prediction.x0 + side * width / 2) / std for side in (-1, 1))
    first, final = x0 < lo + width / 2, x0 > hi - width / 2
    # On the side of the tail, where a difference of two numbers near one would have no digits.
    flip = below + above > 0
    a, b = jnp.where(flip, -above, below), jnp.where(flip, -below, above)
    inner = log_ndtr(b) + jnp.log(-jnp.expm1(jnp.minimum(log_ndtr(a) - log_ndtr(b), -1e-7)))
    return jnp.where(first, log_ndtr(above), jnp.where(final, log_ndtr(-below), inner))


def bayes_decoder(lo: Array, hi: Array, values: int = 256) -> Decoder:
    """The decoder that asks no network: p(x0 | x) by Bayes' rule over `values` equal steps from `lo` to `hi`, all as likely.

    Good where the least noise is no wider than a step. Source: Kingma et al. 2021 (VDM), eq. 14 and appendix.
    """
    return Partial(_bayes, values, lo, hi)


# Of noise up to this many steps wide, what lies further than this many from the nearest is below exp(-20): nothing in float32.
_NARROW, _WINDOW = 2.5, 16


def _bayes(values, lo, hi, x0, x, prediction, level, std):
    # In steps: where x / alpha is, the value nearest to it, and how many deviations of the noise one step is.
    width = (hi - lo) / (values - 1)
    place = (x / level.alpha - lo) / width
    nearest = jax.lax.stop_gradient(jnp.clip(jnp.round(place), 0, values - 1))
    step = width * level.alpha / level.sigma

    def log(k):
        """The log density of x given the k-th value, less that given the nearest: a difference without loss of digits."""
        return jnp.square(step) * (k - nearest) * ((place - nearest) - (k - nearest) / 2)

    @jax.checkpoint  # for the gradient each share is computed again, and none of them kept
    def add(total, k):
        return total + jnp.where((k >= 0) & (k < values), jnp.exp(log(jnp.clip(k, 0, values - 1))), 0)

    def shares(first, count):
        return jax.lax.scan(lambda total, i: (add(total, first + i), None), jnp.zeros_like(x), jnp.arange(count))[0]

    narrow = (step * _NARROW >= 1).all()
    near, every = Partial(shares, nearest - _WINDOW, 2 * _WINDOW + 1), Partial(shares, 0, values)
    return log(jnp.round((x0 - lo) / width)) - jnp.log(jax.lax.cond(narrow, lambda: near(), lambda: every()))


def elbo(
    key: Array,
    denoise: Denoiser,
    x0: Array,
    levels: Level,
    variance: Variance = fixed,
    decoder: Decoder = gaussian_decoder,
    terms: int = 0,
    data_std: float | Array = 1.0,
) -> Bound:
    """The discrete variational bound on -log p(x0) in nats: x0 is [B, ...], `levels` a sampler's grid [T], noisiest first.

    0 < `terms` < T - 1 draws so many of the T - 1 steps for each sample, stratified, more often where a step is long, instead of
    all: the same mean, more variance. key is one or [B]. Raises ValueError for a grid that is no grid, integers, or such a number.
    Source: DDPM eq. 5.
    """
    _check(x0, levels, 2)
    _check_terms("elbo", terms, 0)
    denoise, keys = partial(denoise), sample_keys(key, x0.shape[0])
    levels = Level(*(jnp.asarray(a, x0.dtype) for a in levels))
    intervals = levels.alpha.size - 1
    count = terms if 0 < terms < intervals else intervals
    ones = (1,) * (x0.ndim - 1)
    edges = _edges(levels, data_std)

    def at(i):
        return Level(*(a[i].reshape(-1, *ones) for a in levels))

    def noisy(n, level):
        eps = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, n), x0.shape[1:], x0.dtype))(keys)
        return diffuse(level, x0, eps)

    def chosen(n):
        """Each sample's n-th step and one over how often it is drawn, [B] each."""
        if count == intervals:
            return jnp.full(x0.shape[0], n), 1.0
        share = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, intervals + 1 + n)))(keys)
        i = jnp.clip(jnp.searchsorted(edges, (share + n) / count, side="right") - 1, 0, intervals - 1)
        return i, 1 / (count * (edges[i + 1] - edges[i]))

    def term(total, n):
        i, weight = chosen(n)
        t, s = at(i), at(i + 1)
        return total + weight * _sum(step_kl(x0, denoise(noisy(n, t), t), t, s, variance.step)), None

    total, _ = jax.lax.scan(term, jnp.zeros(x0.shape[0], x0.dtype), jnp.arange(count))
    before, last = at(jnp.array([-2])), at(jnp.array([-1]))
    x = noisy(intervals, last)
    p = denoise(x, last)
    log = decoder(x0, x, p, last, jnp.broadcast_to(variance.last(before, last, p), x0.shape))
    return Bound(prior_kl(x0, at(jnp.array([0])), data_std), total, -_sum(log))


def _edges(levels: Level, data_std: float | Array) -> Array:
    """Where the steps of a grid [T] lie in [0, 1], [T], if each is as wide as it is to be drawn often.

    Half of a width is the step's own term in the bound of uncorrelated Gaussian data, (SNR_s - SNR_t) Var(x0 | x_t) / 2; the other
    half is the same for all, so that no weight is above twice the uniform one.
    """
    snr = jnp.square(jnp.mean(jnp.asarray(data_std)) * levels.alpha / levels.sigma)
    size = (snr[1:] - snr[:-1]) / (1 + snr[:-1])
    edges = jnp.cumsum(size / size.sum() + 1 / size.size)
    return jnp.concatenate([jnp.zeros(1, edges.dtype), edges / edges[-1]])


def continuous_elbo(
    key: Array,
    denoise: Denoiser,
    x0: Array,
    levels: Level,
    terms: int = 128,
    decoder: Decoder = gaussian_decoder,
    data_std: float | Array = 1.0,
) -> Bound:
    """The variational bound on -log p(x0) in nats for infinitely many steps between the ends of `levels` [N]; x0 is [B, ...].

    `levels` fall from noise to data as a sampler's grid does, and only the first and the last matter: the bound does not depend on
    the path, and here it is even in logsnr, where the integrand is bounded. The integral is `terms` stratified draws a sample, so
    its mean is exact. The decoder's deviation is sigma / alpha at the last. key is one or [B]. Raises ValueError for levels that do
    not fall or hold alpha = 0, integers, and terms < 1. Source: VDM eqs. 11 and 17, section 5.1 for the path.
    """
    _check(x0, levels, 2, data=True)
    _check_terms("continuous_elbo", terms, 1)
    denoise, keys = partial(denoise), sample_keys(key, x0.shape[0])
    first, last = (Level(*(jnp.asarray(a[i], x0.dtype) for a in levels)) for i in (0, -1))
    ones = (1,) * (x0.ndim - 1)

    def noise(n):
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, n), x0.shape[1:], x0.dtype))(keys)

    def term(total, n):
        share = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, terms + 1 + n)))(keys)
        level, eps = between(first, last, ((share + n) / terms).reshape(-1, *ones)), noise(n)
        return total + _sum(jnp.square(eps_error(denoise(diffuse(level, x0, eps), level), level, x0, eps))), None

    total, _ = jax.lax.scan(term, jnp.zeros(x0.shape[0], x0.dtype), jnp.arange(terms))
    x = diffuse(last, x0, noise(terms))
    log = decoder(x0, x, denoise(x, last), last, jnp.broadcast_to(last.sigma / last.alpha, x0.shape))
    return Bound(prior_kl(x0, first, data_std), total * (logsnr(last) - logsnr(first)) / (2 * terms), -_sum(log))


def diffusion_term(denoise: Denoiser, schedule: Schedule, t: Array, x0: Array, eps: Array) -> Array:
    """The integrand of the continuous bound, -dlogsnr/dt (eps - its prediction)^2 / 2, of every entry [B, ...]; t [B, 1, ..., 1].

    Source: VDM eq. 17.
    """

    def along(t):
        level = schedule(t)
        return logsnr(level), level

    _, slope, level = jax.jvp(along, (t,), (jnp.ones_like(t),), has_aux=True)
    return -slope * jnp.square(eps_error(denoise(diffuse(level, x0, eps), level), level, x0, eps)) / 2


def eps_error(prediction: Prediction, level: Level, x0: Array, eps: Array) -> Array:
    """eps less its prediction, [B, ...], without loss of digits at any level; x0 and eps are the true ones."""
    # From the error of x0 where there is more noise than data: there eps and its prediction are nearly equal, elsewhere x0's are.
    from_data = (prediction.x0 - x0) * level.alpha / level.sigma
    return jnp.where(level.alpha < level.sigma, from_data, eps - prediction.eps)


def hutchinson(key: Array, f: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """(f(x), an unbiased estimate [B] of the trace of each sample's Jacobian) with one random sign an entry.

    keys are [B]. Source: Grathwohl et al. 2019 (FFJORD), eq. 7.
    """
    sign = jax.vmap(lambda k: jax.random.rademacher(k, x.shape[1:], x.dtype))(key)
    value, moved = jax.jvp(f, (x,), (sign,))
    return value, _sum(sign * moved)


def exact_trace(key: Array, f: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """(f(x), the trace [B] of each sample's Jacobian), one derivative an entry: for data of few dimensions; key is not used."""
    dims = int(np.prod(x.shape[1:]))

    def column(total, i):
        direction = jnp.broadcast_to(jnp.zeros(dims, x.dtype).at[i].set(1).reshape(x.shape[1:]), x.shape)
        return total + _sum(direction * jax.jvp(f, (x,), (direction,))[1]), None

    return f(x), jax.lax.scan(column, jnp.zeros(x.shape[0], x.dtype), jnp.arange(dims))[0]


def log_likelihood(
    key: Array,
    denoise: Denoiser,
    x0: Array,
    levels: Level,
    trace: Trace = hutchinson,
    data_std: float | Array = 1.0,
) -> Array:
    """log p(x0) in nats [B] of the probability flow's own density: x0 [B, ...], `levels` a sampler's grid [N], noisiest first.

    The density is of x0 = x / alpha at the least noisy level. One Runge-Kutta step of order 4 an interval, four evaluations and
    as many `trace`s (`hutchinson`, unbiased, or `exact_trace`). key is one or [B]. Raises ValueError for integers, and for levels
    that do not fall or hold alpha = 0. Source: Song et al. 2021, eq. 39; the divergence of the flow is
    D dlog(sigma) + alpha / 2 dlogsnr tr(dx0/dx), whose first part is integrated exactly.
    """
    _check(x0, levels, 2, data=True)
    denoise, keys = partial(denoise), sample_keys(key, x0.shape[0])
    dims = int(np.prod(x0.shape[1:]))
    # Upward, from data to noise.
    alpha, sigma = (jnp.asarray(a, x0.dtype)[::-1] for a in levels)

    def step(state, at):
        t, s = at
        # Between two levels the path is geometric: any path will do, and here logsnr is linear.
        da, ds = jnp.log(s.alpha / t.alpha), jnp.log(s.sigma / t.sigma)

        def slope(r, x):
            level = between(t, s, r)

            def data(x):
                return denoise(x, level).x0

            p0, spread = trace(keys, data, x)
            eps = (x - level.alpha * p0) / level.sigma
            return level.alpha * da * p0 + level.sigma * ds * eps, level.alpha * (da - ds) * spread

        x, total = state
        f1, g1 = slope(0.0, x)
        f2, g2 = slope(0.5, x + f1 / 2)
        f3, g3 = slope(0.5, x + f2 / 2)
        f4, g4 = slope(1.0, x + f3)
        return (x + (f1 + 2 * f2 + 2 * f3 + f4) / 6, total + (g1 + 2 * g2 + 2 * g3 + g4) / 6), None

    start = (alpha[0] * x0, jnp.zeros(x0.shape[0], x0.dtype))
    (x, total), _ = jax.lax.scan(step, start, (Level(alpha[:-1], sigma[:-1]), Level(alpha[1:], sigma[1:])))
    prior = jnp.hypot(alpha[-1] * data_std, sigma[-1])
    noise = -_sum(jnp.square(x / prior)) / 2 - dims * (jnp.log(prior) + np.log(2 * np.pi) / 2)
    return noise + total + dims * (jnp.log(sigma[-1] / sigma[0]) + jnp.log(alpha[0]))


def image_elbo(
    key: Array,
    denoise: Denoiser,
    codec: Codec,
    images: Array,
    levels: Level,
    variance: Variance = fixed,
    terms: int = 0,
    data_std: float | Array = 1.0,
) -> Bits:
    """The discrete bound in bits per dimension on uint8 images [B, H, W, C], its decoder the discretised Gaussian (DDPM eq. 13).

    `terms`, `levels`, `variance` and key as in `elbo`; the codec is one that scales pixels. Raises ValueError for other images.
    """
    z, lo, hi = _encoded(codec, images)
    bound = elbo(key, denoise, z, levels, variance, discretised_decoder(lo, hi), terms, data_std)
    return _bits(bound, z)


def image_continuous_elbo(
    key: Array,
    denoise: Denoiser,
    codec: Codec,
    images: Array,
    levels: Level,
    terms: int = 128,
    data_std: float | Array = 1.0,
) -> Bits:
    """The continuous-time bound in bits per dimension on uint8 images [B, H, W, C], its decoder by Bayes' rule (VDM eq. 14).

    The other arguments as in `continuous_elbo`. Raises ValueError for other images.
    """
    z, lo, hi = _encoded(codec, images)
    bound = continuous_elbo(key, denoise, z, levels, terms, bayes_decoder(lo, hi), data_std)
    return _bits(bound, z)


def image_log_likelihood(
    key: Array,
    denoise: Denoiser,
    codec: Codec,
    images: Array,
    levels: Level,
    trace: Trace = hutchinson,
    data_std: float | Array = 1.0,
) -> Bits:
    """Bits per dimension of uint8 images [B, H, W, C], by the exact density of images uniformly dequantized: a bound on theirs.

    Each value is spread over the width of one step, centred. The other arguments as in `log_likelihood`. Raises ValueError for
    other images. Source: Theis et al. 2016, section 3.1, for dequantization; Song et al. 2021, appendix D.2.
    """
    z, lo, hi = _encoded(codec, images)
    width = jnp.broadcast_to((hi - lo) / 255, z.shape)
    k_spread, k_trace = (jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(sample_keys(key, z.shape[0])) for i in range(2))
    spread = jax.vmap(lambda k: jax.random.uniform(k, z.shape[1:], z.dtype, -0.5, 0.5))(k_spread)
    nats = -log_likelihood(k_trace, denoise, z + width * spread, levels, trace, data_std) - _sum(jnp.log(width))
    each = bits_per_dim(nats, int(np.prod(z.shape[1:])))
    return Bits(each.mean(), stderr(each), each)


def stderr(each: Array) -> Array:
    """The standard error of the mean of [B] figures, []; NaN for a single one."""
    return jnp.std(each, ddof=1) / np.sqrt(each.size) if each.size > 1 else jnp.full((), jnp.nan, each.dtype)


def _bits(bound: Bound, z: Array) -> Bits:
    terms = Bound(*(bits_per_dim(term, int(np.prod(z.shape[1:]))) for term in bound))
    return Bits(terms.total.mean(), stderr(terms.total), terms.total, terms)


def _encoded(codec: Codec, images: Array) -> tuple[Array, Array, Array]:
    """The images and black and white [1, ..., 1, C] as the process sees them. Raises ValueError for what is not uint8."""
    kind = getattr(images, "dtype", type(images).__name__)
    if not hasattr(images, "dtype") or not np.issubdtype(np.dtype(kind), np.integer):
        raise ValueError(f"a likelihood of images takes integers from 0 to 255 (uint8), got {kind}; they are dequantized here")
    if kind != np.uint8:
        if isinstance(images, jax.core.Tracer):
            raise ValueError(f"inside jit a likelihood of images takes uint8 alone, got {kind}: their values are not known there")
        if not ((np.asarray(images) >= 0) & (np.asarray(images) <= 255)).all():
            raise ValueError(f"a likelihood of images takes integers from 0 to 255, got {kind} values outside")
        images = jnp.asarray(images, jnp.uint8)
    z = codec.encode(jax.random.key(0), jnp.asarray(images))
    if z.shape != images.shape:
        raise ValueError("a likelihood of images needs a codec that scales pixels; in a latent space there is none")
    return z, *ends(codec, images.shape[1:])


def _check(x0: Array, levels: Level, least: int, data: bool = False) -> None:
    """Raises ValueError for integers, and where known levels are no falling grid of at least `least` with noise everywhere.

    With `data`, there must be some data everywhere too. Levels that jit traces are not known.
    """
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"this likelihood is of real numbers, got {x0.dtype}; for images there is image_{{elbo,log_likelihood}}")
    if jnp.ndim(levels.alpha) != 1 or jnp.size(levels.alpha) < least:
        raise ValueError(f"a likelihood needs a grid of at least {least} levels, got shape {jnp.shape(levels.alpha)}")
    if any(isinstance(a, jax.core.Tracer) for a in levels):
        return
    # In NumPy: within jit, JAX would trace even what is known.
    alpha, sigma = (np.asarray(a, np.float64) for a in levels)
    if not (sigma > 0).all():
        raise ValueError("a likelihood needs sigma > 0 at every level: at sigma = 0 its density is not finite")
    if data and not (alpha > 0).all():
        raise ValueError("this likelihood needs alpha > 0 at every level: from pure noise there is no logsnr to follow")
    if not (np.diff(alpha / sigma) > 0).all():
        raise ValueError(
            "a likelihood needs levels that fall from noise to data: the log signal-to-noise ratio must rise all the way"
        )


def _check_terms(name: str, terms: int, least: int) -> None:
    if isinstance(terms, bool) or not isinstance(terms, int | np.integer) or terms < least:
        raise ValueError(f"{name} needs a whole number of terms, at least {least}, got {terms!r}")


def _sum(a: Array) -> Array:
    return a.reshape(a.shape[0], -1).sum(1)
