"""Target rows and denoisers: the 2x2 system inverts wherever its determinant says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from oracles import gaussian, network

from jaxdiff import schedules, targets, times
from jaxdiff.denoiser import LOGSNR_LIMIT, clip_logsnr, denoiser, network_input
from jaxdiff.level import Level, diffuse, logsnr

SCHEDULES = {
    "cosine": (schedules.cosine, 0.002, 0.998),
    "straight": (schedules.straight, 0.002, 0.998),
    "linear_beta": (schedules.linear_beta(), 0.001, 1.0),
    "edm": (schedules.edm, 0.002, 80.0),
}
# row, and its determinant as a function of alpha and sigma
TARGETS = {
    "eps": (targets.eps, lambda a, s: a),
    "x0": (targets.x0, lambda a, s: -s),
    "v": (targets.v, np.hypot),
    "flow": (targets.flow, np.add),
    "edm": (targets.edm(0.5), lambda a, s: -np.hypot(s, 0.5 * a) / 0.5),
}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return np.dtype(request.param)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["one level", "a level a sample"])
def test_every_row_inverts_under_every_schedule(name, schedule, per_sample, dtype):
    target, det = TARGETS[name]
    curve, first, last = SCHEDULES[schedule]
    rng = np.random.default_rng(0)
    x0, eps = (jnp.asarray(rng.standard_normal((5, 4, 4, 3)), dtype) for _ in range(2))
    t = np.geomspace(first, last, 5)
    for level in [curve(jnp.asarray(t.reshape(5, 1, 1, 1), dtype))] if per_sample else map(curve, jnp.asarray(t, dtype)):
        assert level.alpha.dtype == dtype
        x = diffuse(level, x0, eps)
        y = targets.regress(target, level, x0, eps)
        p = targets.invert(target, level, x, y)
        a, b = target(level)
        assert a.shape == b.shape == level.alpha.shape
        got = targets.determinant(target, level)
        np.testing.assert_allclose(got, det(*map(np.asarray, level)), rtol=50 * np.finfo(dtype).eps)
        # The error that rounding of x and y can make: the inverse's entries times the size of what they multiply.
        size = np.abs(x).max() + np.abs(y).max()
        atol = 20 * np.finfo(dtype).eps * size / np.abs(got) * (1 + np.abs(a) + np.abs(b) + level.alpha + level.sigma)
        assert (np.abs(p.x0 - x0) <= atol).all() and (np.abs(p.eps - eps) <= atol).all()
        back = diffuse(level, p.x0, p.eps)
        assert (np.abs(back - x) <= atol * np.maximum(level.alpha, level.sigma)).all()


def test_singularities_are_where_the_determinant_is_zero():
    noise, data = Level(jnp.float32(0), jnp.float32(1)), Level(jnp.float32(1), jnp.float32(0))
    assert targets.determinant(targets.eps, noise) == 0 and targets.determinant(targets.x0, data) == 0
    for target in (targets.v, targets.flow, targets.edm(0.5)):
        for level in (noise, data):
            assert abs(targets.determinant(target, level)) >= 1
    assert targets.determinant(targets.x0, noise) == -1 and targets.determinant(targets.eps, data) == 1


def test_v_is_salimans_and_hos():
    level = schedules.cosine(jnp.float32(0.3))
    np.testing.assert_allclose(targets.v(level), (-level.sigma, level.alpha), rtol=1e-6)


def test_edm_row_is_the_papers_preconditioning(x64):
    """EDM eq. 7: D = c_skip x + c_out F, with table 1's coefficients, at alpha = 1."""
    sd, sigma = 0.5, np.asarray([0.002, 0.3, 1.0, 80.0]).reshape(4, 1)
    rng = np.random.default_rng(1)
    x, f = rng.standard_normal((2, 4, 3))
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / np.sqrt(sigma**2 + sd**2)
    p = targets.invert(targets.edm(sd), schedules.edm(jnp.asarray(sigma)), jnp.asarray(x), jnp.asarray(f))
    np.testing.assert_allclose(p.x0, c_skip * x + c_out * f, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("data_std", [0.5, 2.0])
def test_edm_target_and_network_input_have_unit_variance_at_every_level(data_std, x64):
    level = Level(*(jnp.asarray(a) for a in np.random.default_rng(2).uniform(0.01, 2, (2, 50))))
    a, b = targets.edm(data_std)(level)
    np.testing.assert_allclose(a**2 * data_std**2 + b**2, 1, rtol=1e-12)
    x_std = np.hypot(level.alpha * data_std, level.sigma)
    np.testing.assert_allclose(network_input(jnp.asarray(x_std), level, data_std)[0], 1, rtol=1e-12)


def test_the_network_sees_unit_scale_and_finite_logsnr():
    x = jnp.ones((2, 3))
    level = Level(jnp.asarray([[0.0], [1.0]]), jnp.asarray([[1.0], [0.0]]))
    seen, snr = network_input(x, level, 0.5)
    np.testing.assert_allclose(seen, [[1] * 3, [2] * 3])
    np.testing.assert_array_equal(snr, [[-LOGSNR_LIMIT], [LOGSNR_LIMIT]])
    level = schedules.edm(jnp.float32(3))
    np.testing.assert_allclose(network_input(x, level)[1], logsnr(level))


def test_clip_logsnr_shows_only_the_trained_range():
    net = clip_logsnr(lambda x, snr: (snr, None), -5.0, 5.0)
    seen, _ = net(None, jnp.asarray([-30.0, -2.0, 30.0]))
    np.testing.assert_array_equal(seen, [-5, -2, 5])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_network_serves_every_schedule(name, schedule, x64):
    """A network that knows only unit-scale x and logsnr is the closed-form denoiser under every curve and every row."""
    target, _ = TARGETS[name]
    curve, first, last = SCHEDULES[schedule]
    exact = gaussian(0.3, 0.25)
    built = denoiser(network(exact, target, 0.5), target, 0.5)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((6, 4)))
    level = curve(jnp.asarray(np.geomspace(first, last, 6).reshape(6, 1)))
    p, q = built(x, level), exact(x, level)
    np.testing.assert_allclose(p.x0, q.x0, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(p.eps, q.eps, rtol=1e-8, atol=1e-8)


def test_aux_passes_through_and_parameters_are_traced():
    traces = []

    def net(scale, x, snr):
        return scale * x, {"variance": snr}

    @jax.jit
    def x0(denoise, x, level):
        traces.append(1)
        p = denoise(x, level)
        return p.x0, p.aux["variance"]

    level = times.grid(schedules.cosine, np.asarray([0.5]))
    level = Level(level.alpha[0], level.sigma[0])
    built = [denoiser(Partial(net, scale), targets.x0, data_std) for scale, data_std in ((1.0, 1.0), (2.0, 0.5))]
    out = [x0(denoise, jnp.ones((2, 3)), level) for denoise in built]
    assert len(traces) == 1
    np.testing.assert_allclose(out[0][0], 1, rtol=1e-6)
    np.testing.assert_allclose(out[1][0], 2 / np.sqrt(0.5 * 0.25 + 0.5), rtol=1e-6)
    np.testing.assert_allclose(out[0][1], 0, atol=1e-6)
