"""Guidance keeps alpha * x0 + sigma * eps == x, and does what it says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from oracles import gaussian, mixture

from jaxdiff import guidance, schedules, targets
from jaxdiff.level import Level, diffuse, logsnr

X = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32) * 2
LEVELS = {
    "cosine": schedules.cosine(jnp.float32(0.6)),
    "edm": schedules.edm(jnp.float32(3)),
    "a level a sample": schedules.straight(jnp.asarray([0.1, 0.4, 0.9, 1.0]).reshape(4, 1, 1)),
}
COND, UNCOND = gaussian(1.0, 0.1), gaussian(0.0, 0.5)


def with_aux(denoise, aux):
    return lambda x, level: denoise(x, level)._replace(aux=aux)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 4.0])
def test_classifier_free_mixes_and_keeps_the_identity(level, scale):
    p = guidance.classifier_free(COND, UNCOND, scale)(X, level)
    c, u = COND(X, level), UNCOND(X, level)
    np.testing.assert_allclose(p.x0, (1 - scale) * u.x0 + scale * c.x0, atol=2e-5)
    np.testing.assert_allclose(p.eps, (1 - scale) * u.eps + scale * c.eps, atol=2e-5)
    np.testing.assert_allclose(diffuse(level, p.x0, p.eps), X, atol=1e-4)


def test_scale_one_is_conditional_and_zero_unconditional():
    level = LEVELS["cosine"]
    for scale, want in ((1.0, COND), (0.0, UNCOND)):
        p = guidance.classifier_free(COND, UNCOND, scale)(X, level)
        np.testing.assert_allclose(p.x0, want(X, level).x0, atol=1e-6)
        np.testing.assert_allclose(p.eps, want(X, level).eps, atol=1e-6)


def test_the_scale_may_differ_between_samples():
    level = LEVELS["cosine"]
    scales = jnp.asarray([0.0, 1.0, 2.0, 3.0]).reshape(4, 1, 1)
    p = guidance.classifier_free(COND, UNCOND, scales)(X, level)
    for i in range(4):
        one = guidance.classifier_free(COND, UNCOND, float(i))(X[i : i + 1], level)
        np.testing.assert_allclose(p.x0[i : i + 1], one.x0, atol=1e-5)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("n", [3, 4])
def test_a_scale_a_sample_that_would_be_one_a_column_is_refused(traced, n):
    """X is [4, 2, 3]: three numbers would pass in silence, one a column, and four would not say what is wrong."""
    scales, level = jnp.arange(float(n)), LEVELS["cosine"]
    makers = [
        lambda w: guidance.classifier_free(COND, UNCOND, w),
        lambda w: guidance.classifier_free(COND, UNCOND, Partial(lambda w, level: w, w)),
        lambda w: guidance.rescale(COND, UNCOND, w),
        lambda w: guidance.projected(COND, UNCOND, w),
        lambda w: guidance.classifier(UNCOND, log_prob, w),
    ]
    for make in makers:
        ask = jax.jit(lambda w, make=make: make(w)(X, level)) if traced else lambda w, make=make: make(w)(X, level)
        with pytest.raises(ValueError, match=rf"scale of shape \({n},\) is neither .* which here is \({n}, 1, 1\)"):
            ask(scales)
    # Where a sample is one number, one a sample is [B].
    x = X[:, 0, 0]
    c, u = COND(x, level), UNCOND(x, level)
    p = guidance.classifier_free(COND, UNCOND, jnp.arange(4.0))(x, level)
    np.testing.assert_allclose(p.x0, u.x0 + np.arange(4) * (c.x0 - u.x0), atol=2e-5)


def test_aux_is_the_conditional_branchs():
    p = guidance.classifier_free(with_aux(COND, "cond"), with_aux(UNCOND, "uncond"), 3.0)(X, LEVELS["cosine"])
    assert p.aux == "cond"
    assert guidance.clip(with_aux(COND, "cond"), -1, 1)(X, LEVELS["cosine"]).aux == "cond"


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_clip_keeps_the_bounds_and_the_identity(level):
    free, clipped = UNCOND(X, level), guidance.clip(UNCOND, -0.02, 0.03)(X, level)
    assert (free.x0 < -0.02).any() and (free.x0 > 0.03).any()
    np.testing.assert_array_equal(clipped.x0, np.clip(free.x0, np.float32(-0.02), np.float32(0.03)))
    np.testing.assert_allclose(diffuse(level, clipped.x0, clipped.eps), X, atol=1e-5)
    inside = guidance.clip(UNCOND, -100.0, 100.0)(X, level)
    np.testing.assert_allclose(inside.eps, free.eps, atol=2e-5)


def test_guidance_is_a_traced_argument():
    traces = []

    @jax.jit
    def x0(denoise, x):
        traces.append(1)
        return denoise(x, LEVELS["cosine"]).x0

    outs = [x0(guidance.clip(guidance.classifier_free(COND, UNCOND, w), -hi, hi), X) for w, hi in ((1.0, 1.0), (2.0, 0.5))]
    assert len(traces) == 1 and jnp.abs(outs[1]).max() == 0.5


def per_sample(schedule, *t):
    return schedule(jnp.asarray(t).reshape(4, 1, 1))


ALL_LEVELS = {
    "vp": schedules.cosine(jnp.float32(0.6)),
    "ve": schedules.edm(jnp.float32(3)),
    "straight": schedules.straight(jnp.float32(0.7)),
    "vp a sample": per_sample(schedules.cosine, 0.1, 0.5, 0.9, 1.0),
    "ve a sample": per_sample(schedules.edm, 0.1, 1.0, 3.0, 20.0),
    "straight a sample": LEVELS["a level a sample"],
}
DIRECTION = jnp.asarray(np.random.default_rng(1).standard_normal((1, 2, 3)), jnp.float32)
# Two networks whose x0 has a spread within a sample, at alpha = 0 too.
SHARP, VAGUE = gaussian(DIRECTION, 0.1), gaussian(0.3 - DIRECTION[..., ::-1] / 2, 0.5)


def log_prob(x, level):
    """What a classifier might say: far from log-linear in x."""
    return -((x * DIRECTION).sum((1, 2)) ** 2) / 2


def by_level(slope, level):
    """A scale that depends on the level, of its shape; `slope` is traced."""
    return 1 + slope * jax.nn.sigmoid(logsnr(level))


def guided(scale):
    """Every function of the module that guides, at some setting that changes what the parts say."""
    return {
        "classifier_free": guidance.classifier_free(SHARP, VAGUE, scale),
        "autoguidance": guidance.autoguidance(SHARP, VAGUE, scale),
        "interval": guidance.interval(guidance.classifier_free(SHARP, VAGUE, scale), SHARP, -2.0, 1.0),
        "rescale": guidance.rescale(SHARP, VAGUE, scale, 0.7),
        "rescale of x0": guidance.rescale(SHARP, VAGUE, scale, 0.7, targets.x0),
        "projected": guidance.projected(SHARP, VAGUE, scale, 0.3, 0.5),
        "clip": guidance.clip(guidance.classifier_free(SHARP, VAGUE, scale), -1.0, 1.0),
        "dynamic_clip": guidance.dynamic_clip(guidance.classifier_free(SHARP, VAGUE, scale), 0.8),
        "classifier": guidance.classifier(VAGUE, log_prob, scale),
    }


@pytest.mark.parametrize("level", ALL_LEVELS.values(), ids=ALL_LEVELS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, Partial(by_level, 3.0)], ids=["0", "1", "4", "by level"])
def test_each_of_them_keeps_the_identity(level, scale):
    for name, denoise in guided(scale).items():
        p = denoise(X, level)
        assert p.x0.shape == p.eps.shape == X.shape and p.x0.dtype == p.eps.dtype == np.float32, name
        # The tolerance is float32's, of the larger of the two terms.
        size = 1 + jnp.abs(level.alpha * p.x0).max() + jnp.abs(level.sigma * p.eps).max()
        np.testing.assert_array_less(jnp.abs(diffuse(level, p.x0, p.eps) - X) / size, 2e-6, err_msg=name)


@pytest.mark.parametrize("name", guided(2.0))
def test_samples_do_not_know_each_other(name):
    """A sample alone, at its own level and scale, is what it is in a batch: norms, quantiles and gradients are each sample's."""
    level = ALL_LEVELS["ve a sample"]
    together = guided(jnp.asarray([0.5, 2.0, 3.0, 4.0]).reshape(4, 1, 1))[name](X, level)
    for i, scale in enumerate((0.5, 2.0, 3.0, 4.0)):
        alone = guided(scale)[name](X[i : i + 1], Level(*(a[i, 0, 0] for a in level)))
        np.testing.assert_allclose(together.x0[i : i + 1], alone.x0, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(together.eps[i : i + 1], alone.eps, rtol=1e-5, atol=2e-5)


def test_a_scale_may_be_a_function_of_the_level():
    level = ALL_LEVELS["vp a sample"]
    p = guidance.classifier_free(COND, UNCOND, Partial(by_level, 3.0))(X, level)
    for i in range(4):
        one = Level(*(a[i, 0, 0] for a in level))
        want = guidance.classifier_free(COND, UNCOND, by_level(3.0, one))(X[i : i + 1], one)
        np.testing.assert_allclose(p.x0[i : i + 1], want.x0, atol=1e-5)
    # Any function will do: here no guidance at small noise.
    p = guidance.classifier_free(COND, UNCOND, lambda level: jnp.where(logsnr(level) > 0, 1.0, 5.0))(X, level)
    np.testing.assert_allclose(p.x0[:1], COND(X, level).x0[:1], atol=1e-6)
    assert np.abs(p.x0[2:] - COND(X, level).x0[2:]).min() > 0.01


def test_a_network_guided_by_itself_is_itself():
    for level in ALL_LEVELS.values():
        for scale in (0.0, 1.0, 7.0):
            p = guidance.autoguidance(COND, COND, scale)(X, level)
            np.testing.assert_allclose(p.x0, COND(X, level).x0, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(p.eps, COND(X, level).eps, rtol=1e-6, atol=1e-6)


def test_autoguidance_is_its_published_mix_with_the_main_networks_aux():
    """D_w = w D_1 + (1 - w) D_0, Karras et al. 2024, section 2."""
    level = LEVELS["edm"]
    p = guidance.autoguidance(with_aux(COND, "main"), with_aux(UNCOND, "weak"), 2.25)(X, level)
    np.testing.assert_allclose(p.x0, 2.25 * COND(X, level).x0 - 1.25 * UNCOND(X, level).x0, atol=1e-5)
    assert p.aux == "main"


def test_guidance_stays_in_its_interval_exactly():
    wide = guidance.classifier_free(COND, UNCOND, 4.0)
    for lam, inside in ((-2.01, False), (-1.99, True), (0.0, True), (0.99, True), (1.01, False), (4.0, False)):
        level = schedules.of_logsnr(jnp.float32(lam))
        p, want = guidance.interval(wide, COND, -2.0, 1.0)(X, level), (wide if inside else COND)(X, level)
        # Compiled by lax.cond, so equal up to how it is fused; the two networks are far apart.
        np.testing.assert_allclose(p.x0, want.x0, rtol=1e-5)
        np.testing.assert_allclose(p.eps, want.eps, rtol=1e-5, atol=1e-5)
        assert np.abs(wide(X, level).eps - COND(X, level).eps).max() > 1e-2
    for lo, hi, inside in ((-np.inf, -2.0, True), (-2.0, np.inf, False)):
        pure = Level(jnp.float32(0), jnp.float32(1))
        p, want = guidance.interval(wide, COND, lo, hi)(X, pure), (wide if inside else COND)(X, pure)
        np.testing.assert_allclose(p.x0, want.x0, rtol=1e-6)


def test_both_ends_belong_to_the_interval():
    level = schedules.cosine(jnp.float32(0.3))
    lam = logsnr(level)
    for lo, hi, x0 in (
        (lam, 99.0, 1.0),
        (-99.0, lam, 1.0),
        (jnp.nextafter(lam, 99.0), 99.0, 0.0),
        (-99.0, jnp.nextafter(lam, -99.0), 0.0),
    ):
        p = guidance.interval(gaussian(1.0, 0.0), gaussian(0.0, 0.0), lo, hi)(X, level)
        np.testing.assert_array_equal(p.x0, x0)


def test_the_published_sigma_interval_is_that_of_logsnr():
    """Kynkäänniemi et al. 2024: EDM2-S, sigma in (0.28, 2.90], written in our docstring as logsnr in [-2.13, 2.55]."""
    denoise = guidance.interval(gaussian(1.0, 0.0), gaussian(0.0, 0.0), -2.13, 2.55)
    for sigma, inside in ((0.27, 0), (0.285, 1), (2.89, 1), (2.91, 0), (40.0, 0)):
        np.testing.assert_array_equal(denoise(X, schedules.edm(jnp.float32(sigma))).x0, inside)


@pytest.mark.parametrize("aux", [None, "array"])
def test_each_sample_has_its_own_level_in_the_interval(aux):
    def with_kind(denoise, value):
        return with_aux(denoise, None if aux is None else {"v": jnp.full((4, 5), value), "w": jnp.full((4,), value)})

    level = per_sample(schedules.edm, 0.1, 1.0, 2.0, 20.0)
    wide = guidance.classifier_free(with_kind(COND, 1.0), UNCOND, 4.0)
    p = guidance.interval(wide, with_kind(COND, 0.0), -2.0, 1.0)(X, level)
    inside = np.asarray([False, True, True, False])
    np.testing.assert_array_equal(p.x0[inside], wide(X, level).x0[inside])
    np.testing.assert_array_equal(p.x0[~inside], COND(X, level).x0[~inside])
    np.testing.assert_array_equal(p.eps[inside], wide(X, level).eps[inside])
    if aux is not None:
        np.testing.assert_array_equal(p.aux["w"], inside)
        np.testing.assert_array_equal(p.aux["v"], np.tile(inside[:, None], (1, 5)))


def counted(calls, name, denoise):
    def call(x, level):
        jax.debug.callback(lambda: calls.append(name))
        return denoise(x, level)

    return call


def test_outside_the_interval_the_guided_network_is_not_evaluated():
    calls = []
    cond, uncond = counted(calls, "cond", COND), counted(calls, "uncond", UNCOND)
    denoise = guidance.interval(guidance.classifier_free(cond, uncond, 3.0), cond, -2.0, 1.0)
    run = jax.jit(lambda denoise, x, level: denoise(x, level).x0)
    for sigma, want in ((20.0, ["cond"]), (1.0, ["cond", "uncond"]), (0.01, ["cond"])):
        calls.clear()
        run(denoise, X, schedules.edm(jnp.float32(sigma))).block_until_ready()
        jax.effects_barrier()
        assert sorted(calls) == want, sigma
    # In a scan over a grid too, as `solve` runs it.
    calls.clear()
    grid = schedules.edm(jnp.asarray([20.0, 10.0, 1.0, 0.1], jnp.float32))
    jax.lax.scan(lambda x, level: (denoise(x, level).x0, None), jnp.asarray(X), grid)[0].block_until_ready()
    jax.effects_barrier()
    assert sorted(calls) == ["cond"] * 4 + ["uncond"]


def of_pairs(cond, uncond):
    """The denoiser of twice the batch: cond's prediction of its even rows, uncond's of the odd ones."""

    def both(x, level):
        parts = (
            f(x[i::2], level if level.sigma.ndim == 0 else Level(*(a[i::2] for a in level))) for i, f in enumerate((cond, uncond))
        )
        return jax.tree.map(lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]), *parts)

    return both


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, jnp.asarray([0.0, 1.0, 2.0, 3.0]).reshape(4, 1, 1)], ids=str)
def test_at_once_is_classifier_free_guidance(level, scale):
    cond, uncond = with_aux(COND, jnp.arange(4.0)), with_aux(UNCOND, jnp.full(4, 9.0))
    both = of_pairs(cond, uncond)
    want = guidance.classifier_free(cond, uncond, scale)(X, level)
    chex.assert_trees_all_close(guidance.at_once(cond, both, scale)(X, level), want, atol=1e-6)


def test_at_once_evaluates_one_network_at_every_scale_and_at_one_that_of_the_batch_alone():
    calls = []
    cond, both = counted(calls, "cond", COND), counted(calls, "both", of_pairs(COND, UNCOND))
    ask = jax.jit(chex.assert_max_traces(lambda scale, x, level: guidance.at_once(cond, both, scale)(x, level).x0, n=1))
    for scale, want in ((1.0, "cond"), (3.0, "both"), (0.0, "both")):
        calls.clear()
        ask(scale, X, LEVELS["edm"]).block_until_ready()
        jax.effects_barrier()
        assert calls == [want]


def numpy_rescale(cond, uncond, scale, share):
    """Lin et al. 2024, eqs. 13 to 16, sample by sample."""
    out = []
    for pos, neg in zip(np.asarray(cond, np.float64), np.asarray(uncond, np.float64)):
        cfg = neg + scale * (pos - neg)  # 13
        rescaled = cfg * (pos.std() / cfg.std())  # 14, 15
        out.append(share * rescaled + (1 - share) * cfg)  # 16
    return np.stack(out)


@pytest.mark.parametrize(
    "level", [ALL_LEVELS["vp"], ALL_LEVELS["straight"], ALL_LEVELS["vp a sample"]], ids=["vp", "straight", "each"]
)
@pytest.mark.parametrize("target", [targets.v, targets.x0, targets.eps, targets.flow], ids=lambda t: t.__name__)
def test_rescale_is_the_published_one_in_every_target(level, target):
    if target is targets.eps:
        level = ALL_LEVELS["ve"]  # noise tells nothing of the data at alpha = 0
    c, u = SHARP(X, level), VAGUE(X, level)
    y_c, y_u = (targets.regress(target, level, p.x0, p.eps) for p in (c, u))
    p = guidance.rescale(SHARP, VAGUE, 7.5, 0.7, target)(X, level)
    want = numpy_rescale(y_c, y_u, 7.5, 0.7)
    np.testing.assert_allclose(targets.regress(target, level, p.x0, p.eps), want, rtol=2e-4, atol=2e-4)
    assert np.abs(want - np.asarray(y_u + 7.5 * (y_c - y_u))).max() > 0.01


def test_rescale_takes_v_by_default_and_the_conditional_branchs_aux():
    level = ALL_LEVELS["vp"]
    named = guidance.rescale(with_aux(SHARP, "cond"), with_aux(VAGUE, "uncond"), 7.5, 0.7, targets.v)(X, level)
    p = guidance.rescale(with_aux(SHARP, "cond"), with_aux(VAGUE, "uncond"), 7.5)(X, level)
    np.testing.assert_array_equal(p.x0, named.x0)
    assert p.aux == named.aux == "cond"
    assert np.abs(p.x0 - guidance.rescale(SHARP, VAGUE, 7.5, 0.7, targets.x0)(X, level).x0).max() > 0.01


def test_v_and_x0_rescale_alike_where_there_is_no_data():
    """At alpha = 0 v is -x0: what over-exposes there is the same in both."""
    pure = Level(jnp.float32(0), jnp.float32(1))
    v, x0 = (guidance.rescale(SHARP, UNCOND, 5.0, 0.7, target)(X, pure) for target in (targets.v, targets.x0))
    np.testing.assert_allclose(v.x0, x0.x0, rtol=1e-5)
    np.testing.assert_allclose(v.x0, (0.7 / 5 + 0.3) * 5 * jnp.broadcast_to(DIRECTION, X.shape), rtol=1e-5)
    np.testing.assert_allclose(v.eps, X, rtol=1e-6)


@pytest.mark.parametrize("level", ALL_LEVELS.values(), ids=ALL_LEVELS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_without_their_dials_they_are_classifier_free_guidance(level, scale):
    plain = guidance.classifier_free(SHARP, VAGUE, scale)(X, level)
    same = (
        guidance.rescale(SHARP, VAGUE, scale, 0.0),
        guidance.projected(SHARP, VAGUE, scale, 1.0),
        guidance.projected(SHARP, VAGUE, scale, parallel=1.0, radius=1e6),
    )
    for denoise in same:
        p = denoise(X, level)
        np.testing.assert_allclose(p.x0, plain.x0, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(p.eps, plain.eps, rtol=1e-5, atol=4e-5)


def test_scale_one_is_the_conditional_network_in_all_of_them():
    for level in ALL_LEVELS.values():
        for denoise in (guidance.rescale(SHARP, VAGUE, 1.0, 0.7), guidance.projected(SHARP, VAGUE, 1.0, 0.0, 0.1)):
            np.testing.assert_allclose(denoise(X, level).x0, SHARP(X, level).x0, rtol=1e-5, atol=1e-5)


def numpy_projected(cond, uncond, scale, parallel, radius):
    """Sadat et al. 2025, algorithm 1 without momentum, sample by sample."""
    out = []
    for c, u in zip(np.asarray(cond, np.float64), np.asarray(uncond, np.float64)):
        d = c - u
        d = d * min(1.0, radius / np.linalg.norm(d))
        unit = c / np.linalg.norm(c)
        along = (d * unit).sum() * unit
        out.append(c + (scale - 1) * (d - along + parallel * along))
    return np.stack(out)


@pytest.mark.parametrize("level", ALL_LEVELS.values(), ids=ALL_LEVELS)
@pytest.mark.parametrize("parallel, radius", [(0.0, np.inf), (0.0, 0.4), (0.5, 1.5), (1.0, 0.4), (-0.5, 2.0)])
def test_projected_is_the_published_algorithm(level, parallel, radius):
    c, u = SHARP(X, level).x0, VAGUE(X, level).x0
    p = guidance.projected(SHARP, VAGUE, 8.0, parallel, radius)(X, level)
    np.testing.assert_allclose(p.x0, numpy_projected(c, u, 8.0, parallel, radius), rtol=1e-4, atol=1e-4)


def test_projected_leaves_x0_of_cond_at_a_right_angle_and_within_the_radius():
    level = ALL_LEVELS["vp"]
    c = SHARP(X, level)
    moved = guidance.projected(with_aux(SHARP, "cond"), with_aux(VAGUE, "uncond"), 2.0, 0.0, 0.2)(X, level)
    step = np.asarray(moved.x0 - c.x0)
    np.testing.assert_allclose((step * c.x0).sum((1, 2)), 0, atol=1e-5)
    norms = np.sqrt((step**2).sum((1, 2)))
    assert (norms <= 0.2 + 1e-6).all() and (norms > 0.05).all() and moved.aux == "cond"


def test_nothing_to_project_and_nothing_to_rescale_is_finite():
    """Equal networks, an x0 of zero, a radius of zero, one number a sample: no division by zero."""
    level, zero = ALL_LEVELS["straight"], gaussian(0.0, 0.0)
    for cond, uncond in ((SHARP, SHARP), (zero, VAGUE), (zero, zero)):
        for radius in (0.0, 1.0, np.inf):
            p = guidance.projected(cond, uncond, 5.0, 0.5, radius)(X, level)
            assert np.isfinite(p.x0).all() and np.isfinite(p.eps).all()
    p = guidance.projected(SHARP, VAGUE, 5.0, 0.5, 0.0)(X, level)
    np.testing.assert_array_equal(p.x0, SHARP(X, level).x0)
    one = X[:, :1, 0]
    p = guidance.rescale(COND, UNCOND, 5.0)(one, level)
    np.testing.assert_allclose(p.x0, guidance.classifier_free(COND, UNCOND, 5.0)(one, level).x0, rtol=1e-5, atol=1e-5)
    # Nor in the derivatives, which the flow's likelihood takes.
    for denoise, x in (
        (guidance.rescale(COND, UNCOND, 5.0), one),
        (guidance.projected(SHARP, SHARP, 5.0), X),
        (guidance.projected(zero, SHARP, 5.0, 0.0, 0.1), X),
    ):
        x = jnp.asarray(x)
        assert np.isfinite(jax.grad(lambda x, denoise=denoise: denoise(x, level).x0.sum())(x)).all()
        assert np.isfinite(jax.jvp(lambda x, denoise=denoise: denoise(x, level).x0, (x,), (x,))[1]).all()


def numpy_dynamic_clip(x0, q):
    """Saharia et al. 2022, section 2.3, sample by sample: s = the percentile of |x0|; if s > 1, clip to [-s, s] and divide by s."""
    out = []
    for one in np.asarray(x0, np.float64):
        s = max(np.quantile(np.abs(one), q), 1.0)
        out.append(np.clip(one, -s, s) / s)
    return np.stack(out)


@pytest.mark.parametrize("level", ALL_LEVELS.values(), ids=ALL_LEVELS)
@pytest.mark.parametrize("q", [0.3, 0.9, 0.995, 1.0])
def test_dynamic_clip_is_the_published_one(level, q):
    wide = guidance.classifier_free(SHARP, VAGUE, 5.0)
    p = guidance.dynamic_clip(with_aux(wide, "wide"), q)(X, level)
    np.testing.assert_allclose(p.x0, numpy_dynamic_clip(wide(X, level).x0, q), rtol=1e-5, atol=1e-5)
    assert np.abs(p.x0).max() <= 1 + 1e-6 and p.aux == "wide"


def test_dynamic_clip_of_what_lies_in_the_range_changes_nothing():
    level = ALL_LEVELS["vp"]
    small = guidance.clip(SHARP, -1.0, 1.0)
    np.testing.assert_array_equal(guidance.dynamic_clip(small)(X, level).x0, small(X, level).x0)
    # At the percentile 0 it clips to [-1, 1], as `clip` does.
    wide = guidance.classifier_free(SHARP, VAGUE, 5.0)
    p, want = guidance.dynamic_clip(wide, 0.0)(X, level), guidance.clip(wide, -1.0, 1.0)(X, level)
    assert np.abs(wide(X, level).x0).min() < 1 < np.abs(wide(X, level).x0).max()
    np.testing.assert_allclose(p.x0, want.x0, atol=1e-6)
    np.testing.assert_allclose(p.eps, want.eps, atol=1e-5)


def test_dynamic_clip_measures_in_the_units_of_the_ends():
    """Data standardised channel by channel: the same as scaling them to [-1, 1], clipping and scaling back."""
    level = ALL_LEVELS["ve"]
    lo, hi = jnp.asarray([[[-1.0, -2.0, 0.0]]]), jnp.asarray([[[3.0, 2.0, 0.5]]])
    wide = guidance.classifier_free(SHARP, VAGUE, 5.0)
    p = guidance.dynamic_clip(wide, 0.9, lo, hi)(X, level)
    unit = (wide(X, level).x0 - (lo + hi) / 2) / ((hi - lo) / 2)
    want = numpy_dynamic_clip(unit, 0.9) * np.asarray(hi - lo) / 2 + np.asarray(hi + lo) / 2
    np.testing.assert_allclose(p.x0, want, rtol=1e-5, atol=1e-5)
    assert (p.x0 >= lo - 1e-5).all() and (p.x0 <= hi + 1e-5).all()


# Two overlapping clouds, so that the classifier's gradient is neither 0 nor that of a straight edge.
WEIGHTS, MEANS, STDS = np.asarray([0.3, 0.7]), np.asarray([[1.0, -0.5, 0.3], [-0.8, 0.9, 0.1]]), np.asarray([0.4, 0.9])


def log_posterior(k, x, level):
    """log p(component k | x) of the mixture at a level, in closed form; x [B, D], level [] or [B, 1]."""
    alpha, sigma = (jnp.reshape(a, (-1, 1)) for a in level)
    var = alpha**2 * STDS[None] ** 2 + sigma**2
    off = x[:, None] - alpha[:, None] * MEANS[None]
    log = jnp.log(WEIGHTS)[None] - x.shape[-1] / 2 * jnp.log(var) - (off**2).sum(-1) / var / 2
    return jax.nn.log_softmax(log, axis=-1)[:, k]


MIXTURE_LEVELS = {
    "vp": (schedules.cosine, [0.6] * 5),
    "ve": (schedules.edm, [3.0] * 5),
    "straight": (schedules.straight, [0.9] * 5),
    "straight a sample": (schedules.straight, [0.02, 0.3, 0.5, 0.9, 0.999]),
    "vp a sample": (schedules.cosine, [0.02, 0.3, 0.5, 0.8, 0.98]),
    "ve a sample": (schedules.edm, [0.02, 0.5, 1.0, 5.0, 80.0]),
}


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("name", MIXTURE_LEVELS)
def test_the_true_classifier_at_scale_one_makes_the_conditional_denoiser(x64, name, k):
    schedule, t = MIXTURE_LEVELS[name]
    level = schedule(jnp.asarray(t).reshape(5, 1)) if len(set(t)) > 1 else schedule(jnp.asarray(t[0]))
    data, noise = np.random.default_rng(2).standard_normal((2, 5, 3))
    x = diffuse(level, data, noise)
    free = mixture(jnp.asarray(WEIGHTS), jnp.asarray(MEANS), jnp.asarray(STDS))
    p = guidance.classifier(free, Partial(log_posterior, k), 1.0)(x, level)
    want = gaussian(jnp.asarray(MEANS[k])[None], STDS[k] ** 2)(x, level)
    np.testing.assert_allclose(p.x0, want.x0, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(p.eps, want.eps, atol=1e-10, rtol=1e-10)
    assert np.abs(free(x, level).x0 - want.x0).max() > 1e-2
    # At scale 0 nothing, and between and beyond a straight line: the mix of the two.
    for scale in (0.0, 2.5):
        q = guidance.classifier(free, Partial(log_posterior, k), scale)(x, level)
        mix = guidance.classifier_free(gaussian(jnp.asarray(MEANS[k])[None], STDS[k] ** 2), free, scale)(x, level)
        np.testing.assert_allclose(q.x0, mix.x0, atol=1e-9, rtol=1e-9)
        np.testing.assert_allclose(q.eps, mix.eps, atol=1e-9, rtol=1e-9)


def nan_at_no_data(x, level):
    """A classifier that looks at the logsnr, and so says NaN at alpha = 0."""
    return (x * jnp.tanh(logsnr(level)) * logsnr(level)).sum((1, 2)) * 0.0 + log_prob(x, level)


@pytest.mark.parametrize("classify", [log_prob, nan_at_no_data])
def test_classifier_guidance_is_nothing_where_there_is_no_data(classify):
    """Of the four levels the last is alpha = 0, where x tells nothing of the label; the others are guided."""
    level, free = ALL_LEVELS["straight a sample"], with_aux(VAGUE, "free")
    p, plain = guidance.classifier(free, classify, 3.0)(X, level), VAGUE(X, level)
    assert level.alpha[3, 0, 0] == 0 and np.isfinite(p.x0).all() and np.isfinite(p.eps).all() and p.aux == "free"
    np.testing.assert_array_equal(p.x0[3], plain.x0[3])
    np.testing.assert_array_equal(p.eps[3], plain.eps[3])
    assert (np.abs(p.x0[:3] - plain.x0[:3]).max((1, 2)) > 1e-4).all()
    alone = guidance.classifier(VAGUE, classify, 3.0)(X, Level(jnp.float32(0), jnp.float32(1)))
    np.testing.assert_array_equal(alone.eps, X)


def test_classifier_guidance_divides_by_no_sigma():
    p = guidance.classifier(lambda x, level: SHARP(x, Level(level.alpha, level.sigma + 1)), log_prob, 3.0)
    clean = p(X, Level(jnp.float32(1), jnp.float32(0)))
    assert np.isfinite(clean.x0).all() and np.isfinite(clean.eps).all()


def test_a_classifier_of_the_wrong_shape_is_refused():
    for wrong in (lambda x, level: x.sum(), lambda x, level: x.sum(1), lambda x, level: log_prob(x, level)[:, None]):
        with pytest.raises(ValueError, match=r"log_prob is one number a sample, of shape \(4,\)"):
            guidance.classifier(VAGUE, wrong, 1.0)(X, LEVELS["edm"])


NAN, INF = float("nan"), float("inf")
BAD = {
    "scale=nan": lambda: guidance.classifier_free(SHARP, VAGUE, NAN),
    "scale=inf": lambda: guidance.autoguidance(SHARP, VAGUE, np.float32(INF)),
    "scale=-inf": lambda: guidance.classifier_free(SHARP, VAGUE, np.asarray([1.0, -INF]).reshape(2, 1, 1)),
    "scale=nan ": lambda: guidance.rescale(SHARP, VAGUE, NAN),
    "share=nan": lambda: guidance.rescale(SHARP, VAGUE, 2.0, NAN),
    "scale=inf ": lambda: guidance.projected(SHARP, VAGUE, INF),
    "parallel=inf": lambda: guidance.projected(SHARP, VAGUE, 2.0, INF),
    "radius=nan": lambda: guidance.projected(SHARP, VAGUE, 2.0, 0.0, NAN),
    "radius=-1.0": lambda: guidance.projected(SHARP, VAGUE, 2.0, 0.0, -1),
    "lo=nan": lambda: guidance.interval(SHARP, VAGUE, NAN, 1.0),
    "hi=nan": lambda: guidance.interval(SHARP, VAGUE, 1.0, NAN),
    "lo=2.0 is above hi=1.0": lambda: guidance.interval(SHARP, VAGUE, 2, 1),
    "hi=nan ": lambda: guidance.clip(SHARP, -1.0, NAN),
    "percentile=99.5": lambda: guidance.dynamic_clip(SHARP, 99.5),
    "percentile=nan": lambda: guidance.dynamic_clip(SHARP, NAN),
    "lo=1.0 is not below hi=1.0": lambda: guidance.dynamic_clip(SHARP, 0.9, np.asarray([0.0, 1.0]), 1),
    "hi=inf": lambda: guidance.dynamic_clip(SHARP, 0.9, 0.0, INF),
    "scale=nan  ": lambda: guidance.classifier(SHARP, log_prob, NAN),
}


@pytest.mark.parametrize("message, make", BAD.items(), ids=BAD)
def test_numbers_that_are_none_are_refused_in_one_line(message, make):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message.strip()) and "\n" not in str(error.value)
    # Inside a jitted function a number that is no argument of it is as well known as outside.
    with pytest.raises(ValueError):
        jax.jit(lambda x: jax.tree.leaves(make())[0] + x)(1.0)


def test_traced_numbers_pass():
    @jax.jit
    def x0(w, x):
        made = (
            guidance.classifier_free(SHARP, VAGUE, w),
            guidance.interval(SHARP, VAGUE, w, w),
            guidance.rescale(SHARP, VAGUE, w, w),
            guidance.projected(SHARP, VAGUE, w, w, w),
            guidance.clip(SHARP, w, w),
            guidance.dynamic_clip(SHARP, w, -w, w),
            guidance.classifier(SHARP, log_prob, w),
        )
        return [denoise(x, LEVELS["edm"]).x0 for denoise in made]

    assert all(np.isnan(a).any() for a in (x0(NAN, X)[i] for i in (0, 2, 3, 4, 5, 6)))
    assert all(np.isfinite(a).all() for a in x0(1.0, X))


def numbers(a):
    """Every denoiser of the module with other numbers everywhere."""
    scale, wide = Partial(by_level, a), guidance.classifier_free(SHARP, VAGUE, a)
    return [
        wide,
        guidance.classifier_free(SHARP, VAGUE, scale),
        guidance.autoguidance(SHARP, VAGUE, a),
        guidance.interval(wide, SHARP, -1 - a, a),
        guidance.rescale(SHARP, VAGUE, a, a / 10),
        guidance.projected(SHARP, VAGUE, a, a / 10, a),
        guidance.clip(wide, -a / 10, a / 10),
        guidance.dynamic_clip(wide, a / 10, -a / 10, a / 10),
        guidance.classifier(VAGUE, log_prob, a),
    ]


def test_other_numbers_do_not_compile_again():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def x0(denoisers, x, level):
        return [denoise(x, level).x0 for denoise in denoisers]

    outs = [x0(numbers(a), X, LEVELS["edm"]) for a in (1.5, 2.0, 7.0)]
    for one, two in zip(*outs[:2]):
        assert np.abs(one - two).max() > 1e-4
    # And they are what they are without jit.
    for jitted, denoise in zip(outs[2], numbers(7.0)):
        np.testing.assert_allclose(jitted, denoise(X, LEVELS["edm"]).x0, rtol=1e-5, atol=1e-5)


REFERENCE = "a reference implementation; not a dependency"


def torched(*arrays):
    torch = pytest.importorskip("torch", reason=REFERENCE)
    return [torch.from_numpy(np.array(a)) for a in arrays]


@pytest.mark.parametrize("target", [targets.eps, targets.v, targets.x0], ids=lambda t: t.__name__)
def test_rescale_is_diffusers(target):
    """Theirs rescales whatever the network says and calls it noise, also for a network of v or x0; ours is told which, and is v
    unless told. Their standard deviation is over n - 1, which cancels."""
    theirs = pytest.importorskip("diffusers.guiders.guider_utils", reason=REFERENCE)
    level = ALL_LEVELS["vp"]
    y_c, y_u = (targets.regress(target, level, p.x0, p.eps) for p in (SHARP(X, level), VAGUE(X, level)))
    want = theirs.rescale_noise_cfg(*torched(y_u + 7.5 * (y_c - y_u), y_c), guidance_rescale=0.7).numpy()
    p = guidance.rescale(SHARP, VAGUE, 7.5, 0.7, target)(X, level)
    np.testing.assert_allclose(targets.regress(target, level, p.x0, p.eps), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parallel, radius", [(0.0, 0.4), (0.5, 1.5), (1.0, 15.0)])
def test_projected_is_diffusers(parallel, radius):
    """Theirs with use_original_formulation=True and guidance_scale = scale - 1. Their default adds scale times the update to
    uncond, which is the algorithm's only while the update is the whole difference; their 0 for no radius is our inf; and they
    project whatever the network says, ours is x0."""
    theirs = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance", reason=REFERENCE)
    level = ALL_LEVELS["vp"]
    pair = torched(SHARP(X, level).x0, VAGUE(X, level).x0)
    p = guidance.projected(SHARP, VAGUE, 8.0, parallel, radius)(X, level)
    want = theirs.normalized_guidance(*pair, 7.0, None, parallel, radius, use_original_formulation=True)
    np.testing.assert_allclose(p.x0, want.numpy(), rtol=1e-5, atol=1e-5)
    default = theirs.normalized_guidance(*pair, 8.0, None, parallel, radius)
    assert np.allclose(p.x0, default.numpy(), atol=1e-4) == (parallel == 1 and radius == 15)


def test_dynamic_clip_is_diffusers():
    """Theirs also has a largest s, sample_max_value, which the paper has not; it is 1 unless given, and then all is clipped to
    [-1, 1]."""
    diffusers = pytest.importorskip("diffusers", reason=REFERENCE)
    scheduler = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
    wide, level = guidance.classifier_free(SHARP, VAGUE, 5.0), ALL_LEVELS["vp"]
    want = scheduler._threshold_sample(*torched(wide(X, level).x0[..., None])).numpy()[..., 0]
    np.testing.assert_allclose(guidance.dynamic_clip(wide, 0.9)(X, level).x0, want, rtol=1e-5, atol=1e-6)
