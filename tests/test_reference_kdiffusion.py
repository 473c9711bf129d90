"""The same numbers as k-diffusion's samplers, given the same denoiser and noise. Skipped where k-diffusion is not installed."""

import importlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxdiff import schedules, solvers, times
from jaxdiff.level import Level, Prediction
from jaxdiff.sampling import sample, solve

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")
found = importlib.util.find_spec("k_diffusion")
if found is None:
    pytest.skip("k-diffusion, a reference implementation, is not installed", allow_module_level=True)
for name in ("torchsde", "torchdiffeq", "scipy"):
    pytest.importorskip(name, reason="k-diffusion's samplers need it")

SHAPE, N = (2, 3), 9
NOISE = np.random.default_rng(1).standard_normal(SHAPE)


@pytest.fixture(scope="module")
def theirs():
    """Their module of samplers alone: the package itself would import a training stack."""
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = list(found.submodule_search_locations)
    package.utils = utils
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    before = {name: sys.modules.get(name) for name in ("k_diffusion", "k_diffusion.utils", "k_diffusion.sampling")}
    sys.modules.update({"k_diffusion": package, "k_diffusion.utils": utils})
    yield importlib.import_module("k_diffusion.sampling")
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def said(x, sigma, numpy):
    """Their "denoised", of either library's arrays: smooth in x and sigma, and no Gaussian's."""
    return x / (1 + sigma**2) + 0.3 * numpy.sin(2 * x / (1 + sigma)) / (1 + sigma)


@Partial
def denoise(x, level):
    x0 = said(x, level.sigma, jnp)
    return Prediction(x0, (x - x0) / level.sigma)


@Partial
def fixed(key, shape, dtype):
    return jnp.asarray(NOISE, dtype)


ROWS = {  # ours, theirs, what theirs is given
    "euler": (solvers.euler, "sample_euler", {}),
    "euler_ancestral": (lambda d: solvers.euler_ancestral(d, 1.0, fixed), "sample_euler_ancestral", "noise"),
    "euler_ancestral, eta": (lambda d: solvers.euler_ancestral(d, 0.6, fixed), "sample_euler_ancestral", {"eta": 0.6}),
    "heun": (solvers.heun, "sample_heun", {}),
    "dpm2": (solvers.dpm2, "sample_dpm_2", {}),
    "dpm2_ancestral": (lambda d: solvers.dpm2_ancestral(d, 1.0, fixed), "sample_dpm_2_ancestral", "noise"),
    "dpmpp_2s_ancestral": (lambda d: solvers.dpmpp_2s_ancestral(d, 1.0, fixed), "sample_dpmpp_2s_ancestral", "noise"),
    "dpmpp_2s": (solvers.dpmpp_2s, "sample_dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp_2s, SDE": (lambda d: solvers.dpmpp_2s(d, 1.0, fixed), "sample_dpmpp_sde", "noise"),
    "dpmpp_2m": (solvers.dpmpp_2m, "sample_dpmpp_2m", {}),
    "dpmpp_2m, SDE": (lambda d: solvers.dpmpp_2m(d, 1.0, fixed), "sample_dpmpp_2m_sde", "noise"),
    "dpmpp_3m": (solvers.dpmpp_3m, "sample_dpmpp_3m_sde", {"eta": 0.0}),
    "dpmpp_3m, SDE": (lambda d: solvers.dpmpp_3m(d, 1.0, fixed), "sample_dpmpp_3m_sde", "noise"),
}


def run_theirs(theirs, name, given, x, sigmas, **more):
    drawn = torch.from_numpy(NOISE)
    more |= {} if given == {} else {"noise_sampler": lambda a, b: drawn}
    more |= given if isinstance(given, dict) else {}
    model = lambda x, sigma, **kwargs: said(x, sigma[0], torch)  # noqa: E731
    return getattr(theirs, name)(
        model, torch.from_numpy(x), torch.cat([torch.from_numpy(sigmas), torch.zeros(1, dtype=torch.float64)]), disable=True, **more
    )


def start(sigmas):
    return np.random.default_rng(0).standard_normal((3, *SHAPE)) * sigmas[0]


def levels(sigmas):
    return schedules.edm(jnp.asarray(sigmas))


@pytest.mark.parametrize("name", ROWS)
def test_the_sampler_is_theirs(name, theirs, x64):
    make, their_name, given = ROWS[name]
    sigmas = times.karras(N, 0.05, 20.0)
    want = run_theirs(theirs, their_name, given, start(sigmas), sigmas)
    got = sample(jax.random.key(0), make(denoise), jnp.asarray(start(sigmas)), levels(sigmas))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-9, atol=1e-9)


def test_on_a_variance_preserving_curve_it_is_theirs_on_the_curve_scaled(theirs, x64):
    """x / alpha and sigma / alpha are all they know; the half-logsnr solvers and DDIM take the same steps on any curve."""
    sigmas = times.karras(N, 0.05, 20.0)
    vp = Level(1 / np.sqrt(1 + sigmas**2), sigmas / np.sqrt(1 + sigmas**2))
    scaled = Partial(lambda x, level: denoise(x / level.alpha, Level(jnp.ones_like(level.alpha), level.sigma / level.alpha)))
    x = start(sigmas) * vp.alpha[0]
    for name in ("euler", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m, SDE", "euler_ancestral"):
        make, their_name, given = ROWS[name]
        want = run_theirs(theirs, their_name, given, start(sigmas), sigmas)
        got = sample(jax.random.key(0), make(scaled), jnp.asarray(x), vp)
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms(order, theirs, x64):
    """Before the last step: theirs extrapolates down to sigma = 0, where ours takes the denoiser's x0."""
    sigmas, seen = times.karras(N, 0.05, 20.0), []
    run_theirs(theirs, "sample_lms", {}, start(sigmas), sigmas, order=order, callback=lambda told: seen.append(told["x"].numpy()))
    state, _ = solve(jax.random.key(0), solvers.lms(denoise, order), jnp.asarray(start(sigmas)), levels(sigmas))
    np.testing.assert_allclose(state.x, seen[-1], rtol=1e-5, atol=1e-5)  # theirs integrates numerically


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2"])
def test_churn(name, theirs, x64, monkeypatch):
    """EDM's algorithm 2; the noise is raised within [S_min, S_max] only."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.from_numpy(NOISE).expand_as(x))
    sigmas = times.karras(N, 0.05, 20.0)
    churn = {"s_churn": 2.5, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.007}
    want = run_theirs(theirs, name, {}, start(sigmas), sigmas, **churn)
    make = {"sample_euler": solvers.euler, "sample_heun": solvers.heun, "sample_dpm_2": solvers.dpm2}[name]
    ours = solvers.churned(denoise, make, 2.5 / N, (0.1, 8.0), 1.007, fixed)
    got = sample(jax.random.key(0), ours, jnp.asarray(start(sigmas)), levels(sigmas))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-9, atol=1e-9)
    plain = sample(jax.random.key(0), make(denoise), jnp.asarray(start(sigmas)), levels(sigmas))
    assert np.abs(np.asarray(plain) - want.numpy()).max() > 1e-3
