"""The same numbers as diffusers' schedulers and U-Net, given the same weights, model outputs and noise.

Where theirs differs by design, the test says so. Skipped where diffusers is not installed; nothing is downloaded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules, solvers, targets, times
from jaxdiff.denoiser import denoiser
from jaxdiff.sampling import solve

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")
diffusers = pytest.importorskip("diffusers", reason="a reference implementation; not a dependency")

from ml_collections import ConfigDict

from jaxdiff.interop import mapping, unet2d
from jaxdiff.models.unet import TIME_PER_LOGSNR, UNet

SHAPE = (2, 3, 3)
TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def said(x, i):
    """A stand-in for a network: its epsilon at the table's row i, smooth in x, the same function for both libraries."""
    return 0.7 * x + 0.2 * x**2 / (1 + x**2) - 0.001 * i


def theirs(scheduler, x, eta=None, noise=None, final=True):
    """Their loop: x after every step, in NumPy."""
    x, out = torch.from_numpy(x), []
    for n, t in enumerate(scheduler.timesteps):
        y = said(x, int(t) + 1)
        if eta is not None:
            x = scheduler.step(y, t, x, eta=eta, variance_noise=torch.from_numpy(noise[n]) if eta else None).prev_sample
        else:
            x = scheduler.step(y, t, x, generator=torch.Generator().manual_seed(n)).prev_sample
        out.append(x.numpy())
    return np.stack(out)


def ours(make, rows, x, noise=None):
    """Our loop over the same rows of the table, then the denoiser's x0, which is their step to alpha = 1."""
    levels = times.grid(schedules.linear_beta(), np.asarray(rows) / 1000)
    x = jnp.asarray(x)
    out, state = [], None
    for n, i in enumerate(rows):
        # Eager, one step at a time, so that the step's noise and row can be handed over.
        drawn = (lambda key, shape, dtype: jnp.zeros(shape, dtype)) if noise is None else constant(noise[n])
        solver = make(denoiser(lambda u, snr, i=i: (said(u, float(i)), None), targets.eps), drawn)
        state = solver.init(x) if state is None else state
        t = jax.tree.map(lambda a, n=n: jnp.asarray(a[n]), levels)
        if n + 1 == len(rows):
            out.append(solver.final(state, t))
        else:
            s = jax.tree.map(lambda a, n=n: jnp.asarray(a[n + 1]), levels)
            state, _ = solver.step(jax.random.split(jax.random.key(0), len(x)), state, t, s)
            out.append(state.x)
    return np.stack([np.asarray(a) for a in out])


def constant(noise):
    """The one sample's noise, whatever the key (the batch is one)."""
    return lambda key, shape, dtype: jnp.asarray(noise, dtype).reshape(shape)


def start(seed=0):
    return np.random.default_rng(seed).standard_normal((1, *SHAPE)).astype(np.float32)


def drawn(steps):
    """The noise that their generator, seeded with the step's number, gives."""
    return [torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(n)).numpy() for n in range(steps)]


@pytest.mark.parametrize("n", [1, 5, 7, 10, 30, 50, 250, 1000])
def test_strided_times_are_their_timesteps(n):
    for spacing in ("leading", "trailing", "linspace"):
        scheduler = diffusers.DDIMScheduler(**TABLE, timestep_spacing=spacing)
        scheduler.set_timesteps(n)
        rows = np.round(times.strided(1000, n, spacing) * 1000).astype(int)
        np.testing.assert_array_equal(scheduler.timesteps.numpy() + 1, rows)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(variance):
    scheduler = diffusers.DDPMScheduler(**TABLE, variance_type=variance, clip_sample=False)
    scheduler.set_timesteps(25)  # "leading", whose last step is row 1; elsewhere their large variance adds noise to x0 itself
    make = {"fixed_small": solvers.ddpm, "fixed_large": solvers.ddpm_large}[variance]
    rows = scheduler.timesteps.numpy() + 1
    got = ours(lambda d, noise: make(d, noise=noise), rows, start(), drawn(25))
    np.testing.assert_allclose(got, theirs(scheduler, start()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(eta, spacing):
    """With 25 steps: where 1000 is not divisible, theirs steps to t - 1000 // n, which is not the next of its own timesteps."""
    scheduler = diffusers.DDIMScheduler(**TABLE, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(25)
    noise = drawn(25)
    noise[-1] = 0 * noise[-1]  # its deviation is 0 there
    got = ours(lambda d, noise: solvers.ddim(d, eta, noise), times.strided(1000, 25, spacing) * 1000, start(), noise)
    np.testing.assert_allclose(got, theirs(scheduler, start(), eta, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpmpp_2m(kind):
    """Their grid leaves the last row of n + 1 out, so it is handed ours; its last step, to sigma = 0, is first order as ours."""
    rows = (times.strided(1000, 20, "trailing") * 1000).round().astype(int)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TABLE, algorithm_type=kind, solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(timesteps=(rows - 1).tolist())
    eta = 1.0 if kind.startswith("sde") else 0.0
    got = ours(lambda d, noise: solvers.dpmpp_2m(d, eta, noise), rows, start(), drawn(20))
    want = theirs(scheduler, start())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_solve_gives_what_their_loop_gives():
    """The same through `solve` in one scan, for a network that does not read the row."""
    scheduler = diffusers.DDIMScheduler(**TABLE, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(20)
    x = torch.from_numpy(start())
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(said(x, 0), t, x).prev_sample
    levels = times.grid(schedules.linear_beta(), times.strided(1000, 20, "trailing"))
    d = denoiser(lambda u, snr: (said(u, 0), None), targets.eps)
    state, _ = solve(jax.random.key(0), solvers.ddim(d), jnp.asarray(start()), levels)
    np.testing.assert_allclose(state.x, x.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_unet_is_theirs():
    """The configuration of google/ddpm-cifar10-32 with fewer levels and blocks, every weight random and mapped by name.

    Theirs takes a time where ours takes logsnr; both make the same sines of TIME_PER_LOGSNR * logsnr.
    """
    other = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        center_input_sample=False,
        time_embedding_type="positional",
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(128, 256),
        layers_per_block=1,
        downsample_padding=0,
        attention_head_dim=None,
        norm_num_groups=32,
        norm_eps=1e-6,
    ).eval()
    model = UNet(multipliers=(1, 2), blocks=1)
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
    snr = np.asarray([-3.3, 5.1], np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x), jnp.asarray(snr))
    rng = np.random.default_rng(0)

    def draw(a):
        scale = 1 / np.sqrt(np.prod(a.shape[:-1])) if len(a.shape) > 1 else 0.3
        return (rng.standard_normal(a.shape) * scale).astype(np.float32)

    params = jax.tree.map(draw, shapes)
    config = ConfigDict({"model": {"multipliers": (1, 2), "blocks": 1}, "process": {"drop_label": 0.0}})
    state = mapping.save(params, unet2d.rows(config, params))
    other.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})
    with torch.no_grad():
        time = torch.from_numpy(TIME_PER_LOGSNR * snr)
        want = other(torch.from_numpy(np.moveaxis(x, -1, 1).copy()), time).sample.numpy()
    got = jax.jit(model.apply)(params, x, snr.reshape(2, 1, 1, 1))
    np.testing.assert_allclose(got, np.moveaxis(want, 1, -1), rtol=1e-4, atol=1e-4)
    assert np.abs(want).max() > 0.1
