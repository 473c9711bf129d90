"""The networks of the speed benchmarks, and the peer: diffusers' UNet2DModel with the same weights, and a training step in PyTorch.

The network is that of configs/cifar.py, 35,746,307 parameters, or one of another width or image size. It hears the row of the table
of noise levels, as diffusers' does: so one set of weights is the same function in both, which `check_same` holds before anything
is timed. PyTorch and diffusers are imported inside functions only: without them `torch_is_here` is False, and benchmarks leave out
the peer.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import cifar
from jaxdiff import experiment
from jaxdiff.experiment import Experiment
from jaxdiff.interop import mapping, scheduler, unet2d
from jaxdiff.models.parts import group_count
from jaxdiff.times import grid
from jaxdiff.training import TrainState, init_state, make_optimizer

# How the peer is called in a table.
PEER = "PyTorch"
# The parts of the U-Net that have norms, by role.
NORMED = {"block": "ResBlock", "attend": "Attention", "leave": "Leave"}


def torch_is_here() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


def config_of(channels: int = 128, size: int = 32, dropout: float = 0.1) -> ConfigDict:
    """configs/cifar.py with another width and image size, its network hearing the row of the table.

    Below 128 channels all norms have the groups of the first level's, for diffusers' have one number of them.
    """
    config = cifar.get_config()
    config.model.time = scheduler.hears(scheduler.DEFAULTS)
    if channels < 128:
        config.model.update({role: f"{part}(groups={group_count(channels)})" for role, part in NORMED.items()})
    config.model.channels, config.model.dropout, config.data.shape = channels, dropout, (size, size, 3)
    return config


def drawn(built: Experiment, seed: int = 0) -> Any:
    """Parameters of an experiment, float32, drawn on the host: there is a program to compile otherwise.

    A kernel's deviation is fan_in^-1/2, so that activations keep their size, and no layer is zero, as some are before training.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = rng.standard_normal(shape.shape, np.float32)
        if len(shape.shape) > 1:
            return noise / np.float32(np.sqrt(np.prod(shape.shape[:-1])))
        return np.float32(path[-1].key == "scale") + np.float32(0.1) * noise

    shapes = jax.eval_shape(built.init, jax.random.key(0))
    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(leaf, shapes))


def count(params: Any) -> int:
    """How many numbers there are in a tree."""
    return sum(a.size for a in jax.tree.leaves(params))


def forward(built: Experiment) -> Callable[..., jax.Array]:
    """The network (params, x [B, H, W, 3], logsnr [B, 1, 1, 1]) -> [B, H, W, 3], to be jitted."""

    def apply(params, x, logsnr):
        return built.net(params, None)(x, logsnr)[0]

    return apply


def noisy(batch: int, size: int = 32, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x [B, size, size, 3] float32 of unit variance, rows of the table int64 [B], their logsnr float32 [B, 1, 1, 1])."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 1000, batch)
    config = cifar.get_config()
    levels = grid(experiment.build(config).schedule(None), (rows + 1) / 1000)
    logsnr = 2 * np.log(levels.alpha / levels.sigma)
    return rng.standard_normal((batch, size, size, 3), np.float32), rows, logsnr.astype(np.float32).reshape(-1, 1, 1, 1)


def images(batch: int, size: int = 32, seed: int = 2) -> np.ndarray:
    """uint8 [B, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), np.uint8)


def state_of(config: ConfigDict, built: Experiment, params: Any) -> tuple[TrainState, Any]:
    """(the state before the first step, the optimizer), of parameters at hand; the state holds copies, so it may be donated."""
    optimizer = make_optimizer(config.optimizer)
    copied = built._replace(init=lambda key: jax.tree.map(jnp.array, params))
    return init_state(copied, optimizer, config.training.ema, jax.random.key(0)), optimizer


def threads() -> int:
    """A thread a core, or what OMP_NUM_THREADS says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("OMP_NUM_THREADS") or cores)


def torch_network(config: ConfigDict, params: Any, device: str = "cpu") -> Any:
    """diffusers' UNet2DModel of the same function, channels_last, in evaluation mode; on a CPU with a thread a core."""
    import diffusers
    import torch

    if device == "cpu" and jax.default_backend() != "cpu":
        raise SystemExit(f"the peer is on the CPU and JAX on a {jax.default_backend()}: no comparison; set JAX_PLATFORMS=cpu")
    torch.set_num_threads(threads())
    said = {k: v for k, v in unet2d.settings(config, params).items() if not k.startswith("_")}
    model = diffusers.UNet2DModel(**said)
    tensors = mapping.save(params, unet2d.rows(config, params))
    model.load_state_dict({name: torch.tensor(a) for name, a in tensors.items()})
    return model.to(device).to(memory_format=torch.channels_last).eval()


def torch_images(x: np.ndarray, device: str = "cpu") -> Any:
    """[B, H, W, C] as torch's [B, C, H, W] in channels_last, which is the same memory."""
    import torch

    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).to(device)


def torch_forward(model: Any, x: Any, rows: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(x, rows).sample


def check_same(config: ConfigDict, params: Any, model: Any, bound: float = 1e-4) -> float:
    """How far apart what both say of two images is, as a share of the largest number said. Raises AssertionError above `bound`."""
    import torch

    size = config.data.shape[0]
    x, rows, logsnr = noisy(2, size)
    ours = np.asarray(jax.jit(forward(experiment.build(config)))(params, x, logsnr))
    theirs = torch_forward(model.eval(), torch_images(x), torch.from_numpy(rows)).permute(0, 2, 3, 1).numpy()
    apart, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    if not (largest > 0.1 and apart < bound * largest):
        raise AssertionError(f"the two networks differ by {apart:.2e}, where the largest number is {largest:.2e}")
    return float(apart / largest)


def table(config: ConfigDict, device: str = "cpu") -> tuple[Any, Any]:
    """alpha and sigma of the table's rows, torch's float32 [1000] each."""
    import torch

    levels = grid(experiment.build(config).schedule(None), np.arange(1, 1001) / 1000)
    return tuple(torch.tensor(np.asarray(a, np.float32), device=device) for a in levels)


def torch_loss(model: Any, x0: Any, eps: Any, rows: Any, alpha: Any, sigma: Any) -> Any:
    """DDPM's simple loss at rows of the table, [] (Ho et al. 2020, eq. 14); alpha and sigma are the table's columns [1000]."""
    import torch

    x = alpha[rows, None, None, None] * x0 + sigma[rows, None, None, None] * eps
    return torch.nn.functional.mse_loss(model(x, rows).sample, eps)


def torch_step(model: Any, config: ConfigDict, device: str = "cpu") -> Callable[[Any], Any]:
    """The function (images uint8 [B, 3, H, W]) -> loss [] that does what our training step does, `model` in training mode.

    Flips, levels and noise drawn anew, dropout, the gradient clipped by its norm, Adam, and the average.
    """
    import torch

    model.train()
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    adam = torch.optim.Adam(parameters, lr=config.optimizer.learning_rate, fused=True)
    decay = float(config.training.ema[0])
    alpha, sigma = table(config, device)

    def step(images: Any) -> Any:
        flip = torch.rand(len(images), 1, 1, 1, device=device) < 0.5
        x0 = torch.where(flip, images.flip(3), images).float() / 127.5 - 1
        rows = torch.randint(0, 1000, (len(images),), device=device)
        adam.zero_grad(set_to_none=True)
        loss = torch_loss(model, x0, torch.randn_like(x0), rows, alpha, sigma)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip, foreach=True)
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        return loss.detach()

    return step


def torch_sampler(model: Any, config: ConfigDict, steps: int) -> tuple[Callable[[Any], Any], list[int]]:
    """(diffusers' DDIM loop, a function of noise [B, 3, H, W] -> images, and the rows of the table it asks the network at)."""
    import diffusers
    import torch

    table = {k: v for k, v in scheduler.write(config).items() if k not in ("_class_name", "variance_type")}
    walk = diffusers.DDIMScheduler(**table)
    walk.set_timesteps(steps)

    def sample(x: Any) -> Any:
        with torch.inference_mode():
            for t in walk.timesteps:
                # Where it clips, its noise is told to agree with the clipped image, as ours does.
                x = walk.step(model(x, t).sample, t, x, use_clipped_model_output=config.sampling.clip).prev_sample
        return x

    return sample, [int(t) for t in walk.timesteps]
