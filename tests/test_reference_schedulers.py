"""The same steps as diffusers' schedulers, given the same model outputs and noise. Skipped where diffusers is not installed.

Theirs end with a step to sigma = 0, which several take at a higher order or with other rules; ours end with the denoiser's x0.
So the noisy samples before that are compared, and the last x0 where theirs is the denoiser's too.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxdiff import solvers, targets
from jaxdiff.denoiser import denoiser
from jaxdiff.level import Level

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")
diffusers = pytest.importorskip("diffusers", reason="a reference implementation; not a dependency")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of their NumPy
SHAPE, N = (2, 3, 3), 10
TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
NOISE = np.random.default_rng(1).standard_normal((1, *SHAPE))


def said(x, library):
    """A stand-in for a network of unit-scale x: its epsilon, the same for both libraries; levels only enter through the solver."""
    return 0.6 * x + 0.3 * library.sin(2 * x)


@Partial
def network(x, logsnr):
    return said(x, jnp), None


@Partial
def fixed(key, shape, dtype):
    return jnp.asarray(NOISE[0], dtype)


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    for name in ("euler_ancestral_discrete", "k_dpm_2_ancestral_discrete", "dpmsolver_multistep", "edm_euler"):
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(NOISE))


def start(sigma=1.0):
    return np.random.default_rng(0).standard_normal((1, *SHAPE)) * float(sigma)


def steps(scheduler):
    """Sets their N steps; the sigmas, which they round to float32, are then what both libraries compute with in float64."""
    scheduler.set_timesteps(N)
    scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def theirs(scheduler, x, every=1):
    """x after every `every`-th of their steps."""
    x, out = torch.from_numpy(x), []
    for t in scheduler.timesteps:
        x = scheduler.step(said(scheduler.scale_model_input(x, t), torch), t, x).prev_sample
        out.append(x.numpy())
    return out[every - 1 :: every]


def ours(solver, levels, x):
    """x after every step of ours, and at last x0."""
    keys, out = jax.random.split(jax.random.key(0), 1), []
    state, step = solver.init(jnp.asarray(x)), jax.jit(solver.step)
    for n in range(len(levels.alpha)):
        t = jax.tree.map(lambda a, n=n: a[n], levels)
        if n + 1 == len(levels.alpha):
            return [*out, solver.final(state, t)]
        state, _ = step(keys, state, t, jax.tree.map(lambda a, n=n: a[n + 1], levels))
        out.append(state.x)


def preserving(scheduler):
    """The levels of their sigma / alpha, with alpha^2 + sigma^2 = 1."""
    ratio = jnp.asarray(scheduler.sigmas.numpy())
    ratio = ratio[ratio > 0]
    return Level(1 / jnp.sqrt(1 + ratio**2), ratio / jnp.sqrt(1 + ratio**2))


def close(got, want, tolerance=1e-5):
    for n, (a, b) in enumerate(zip(got, want)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"step {n}")


EXPLODING = {  # theirs, ours, evaluations a step
    "euler": ("EulerDiscreteScheduler", solvers.euler, 1),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", lambda d: solvers.euler_ancestral(d, 1.0, fixed), 1),
    "heun": ("HeunDiscreteScheduler", solvers.heun, 2),
    "dpm2": ("KDPM2DiscreteScheduler", solvers.dpm2, 2),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", lambda d: solvers.dpm2_ancestral(d, 1.0, fixed), 2),
    "lms": ("LMSDiscreteScheduler", solvers.lms, 1),
}


@pytest.mark.parametrize("name", EXPLODING)
def test_exploding(name, x64):
    """Of LMS all but the last step, down to sigma = 0, where theirs extrapolates."""
    kind, make, every = EXPLODING[name]
    scheduler = getattr(diffusers, kind)(**TABLE)
    steps(scheduler)
    sigma = np.unique(scheduler.sigmas.numpy())[:0:-1]  # two-stage ones repeat theirs; without the last, 0
    levels = Level(jnp.ones(len(sigma)), jnp.asarray(sigma))
    x = start(levels.sigma[0])
    want = theirs(scheduler, x, 1)
    # Of two-stage ones the steps' ends: every second, and the last step has one stage.
    want = want if every == 1 else [*want[1::2], want[-1]][: len(levels.sigma)]
    got = ours(make(denoiser(network, targets.eps)), levels, x)
    assert len(got) == len(want) == N
    close(got[: -1 if name == "lms" else None], want)


MULTISTEP = {  # theirs, their options, ours
    "2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, solvers.dpmpp_2m),
    "2m, SDE": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
        lambda d: solvers.dpmpp_2m(d, 1.0, fixed),
    ),
    "3m": ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}, solvers.dpmpp_3m),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}, solvers.deis),
    "deis, 2": ("DEISMultistepScheduler", {"solver_order": 2}, lambda d: solvers.deis(d, 2)),
    "unipc, 1": ("UniPCMultistepScheduler", {"solver_order": 1}, lambda d: solvers.unipc(d, 1)),
    "unipc, 2": ("UniPCMultistepScheduler", {"solver_order": 2}, lambda d: solvers.unipc(d, 2)),
    "unipc, 3": ("UniPCMultistepScheduler", {"solver_order": 3}, solvers.unipc),
}


@pytest.mark.parametrize("name", MULTISTEP)
def test_preserving(name, x64):
    """Of those of order 3 all but the last two steps: there theirs lowers its order.

    Their second step of 3M, where two levels are known, is by choice the midpoint's or the exponential one ("heun"), which is ours.
    """
    kind, options, make = MULTISTEP[name]
    scheduler = getattr(diffusers, kind)(**TABLE, **options, final_sigmas_type="zero") if kind[:4] != "DEIS" else None
    scheduler = scheduler or getattr(diffusers, kind)(**TABLE, **options)
    steps(scheduler)
    levels, order = preserving(scheduler), options["solver_order"]
    want = theirs(scheduler, start())
    got = ours(make(denoiser(network, targets.eps)), levels, start())
    assert len(got) >= N
    whole = min(len(want), len(got)) - {1: 0, 2: 1, 3: 2}[order]
    close(got[:whole], want[:whole])


def test_dpmpp_2s(x64):
    """Theirs takes its midpoints from the grid; on one even in logsnr they are where ours puts them."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **TABLE, solver_order=2, use_exponential_sigmas=True, final_sigmas_type="zero"
    )
    steps(scheduler)
    levels = preserving(scheduler)
    want = theirs(scheduler, start(), 2)
    got = ours(solvers.dpmpp_2s(denoiser(network, targets.eps)), jax.tree.map(lambda a: a[::2], levels), start())
    close(got[:4], want[:4])


def test_edm(x64):
    """Their EDM schedulers, with the preconditioned network that ours is."""
    for kind, make in (("EDMEulerScheduler", solvers.euler), ("EDMDPMSolverMultistepScheduler", solvers.dpmpp_2m)):
        scheduler = getattr(diffusers, kind)(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
        steps(scheduler)
        sigma = jnp.asarray(scheduler.sigmas.numpy()[:-1])
        levels = Level(jnp.ones_like(sigma), sigma)
        x = start(levels.sigma[0])
        d = denoiser(Partial(lambda u, logsnr: (said(u, jnp), None)), targets.edm(0.5), 0.5)
        close(ours(make(d), levels, x), theirs(scheduler, x))
