"""The same numbers as score_sde's DDPM and DDPM++, by a forward pass in torch that is here, through a file that torch wrote.

Theirs hear 999 t and see x as it is; their score is -output / std, so the output is eps. Skipped where torch is not installed.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from score_sde_layout import Spec, checkpoint, filled

import jaxdiff as jd
from jaxdiff import experiment, solvers, times
from jaxdiff.denoiser import denoiser
from jaxdiff.interop import score_sde, workdir
from jaxdiff.level import Level

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")
from torch.nn import functional as F

SPECS = {
    "ddpm++": Spec(multipliers=(1, 2, 2), attention=(1,)),
    "ddpm++, odd groups": Spec(16, (1, 3), attention=(0,), blocks=2),
    "ddpm": Spec(plusplus=False, blocks=2),
}


class Theirs:
    """Their network: a walk through its modules in their order, which is all that tells what comes next."""

    def __init__(self, spec):
        self.spec = spec
        self.modules = [(kind, {name: torch.from_numpy(a) for name, a in held.items()}) for kind, held in filled(spec)]

    def __call__(self, x, label):
        """x [B, C, H, W], label [B] -> eps."""
        modules, spec = iter(self.modules), self.spec
        half = spec.channels // 2
        angle = label[:, None] * 10000.0 ** (-torch.arange(half) / (half - 1))
        emb = linear(next(modules), torch.cat([angle.sin(), angle.cos()], 1))
        emb = linear(next(modules), F.silu(emb))
        h = conv(next(modules)[1], "", x)
        skips = [h]
        levels = len(spec.multipliers)
        for level in range(levels):
            for _ in range(spec.blocks):
                h = self.block(next(modules), h, emb)
                h = self.attend(next(modules), h) if level in spec.attention else h
                skips.append(h)
            if level < levels - 1:
                h = self.block(next(modules), h, emb, "down")
                skips.append(h)
        h = self.middle(modules, h, emb)
        for level in reversed(range(levels)):
            for _ in range(spec.blocks + 1):
                h = self.block(next(modules), torch.cat([h, skips.pop()], 1), emb)
            h = self.attend(next(modules), h) if level in spec.attention else h
            h = self.block(next(modules), h, emb, "up") if level else h
        h = F.silu(self.norm(next(modules)[1], "", h))
        return conv(next(modules)[1], "", h)

    def middle(self, modules, h, emb):
        h = self.block(next(modules), h, emb)
        h = self.attend(next(modules), h)
        return self.block(next(modules), h, emb)

    def norm(self, held, name, x):
        groups = min(x.shape[1] // 4, 32) if self.spec.plusplus else 32
        return F.group_norm(x, groups, held[f"{name}weight"], held[f"{name}bias"], 1e-6)

    def block(self, module, x, emb, change=None):
        kind, held = module
        if kind == "Downsample":
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), held["Conv_0.weight"], held["Conv_0.bias"], stride=2)
        if kind == "Upsample":
            return conv(held, "Conv_0.", F.interpolate(x, scale_factor=2.0))
        resize = {"up": lambda a: F.interpolate(a, scale_factor=2.0), "down": lambda a: F.avg_pool2d(a, 2), None: lambda a: a}[
            change
        ]
        h = conv(held, "Conv_0.", resize(F.silu(self.norm(held, "GroupNorm_0.", x))))
        h = h + F.linear(F.silu(emb), held["Dense_0.weight"], held["Dense_0.bias"])[:, :, None, None]
        h = conv(held, "Conv_1.", F.silu(self.norm(held, "GroupNorm_1.", h)))
        x = resize(x)
        x = conv(held, "Conv_2.", x) if "Conv_2.weight" in held else nin(held, "NIN_0.", x) if "NIN_0.W" in held else x
        return (x + h) / math.sqrt(2) if self.spec.plusplus else x + h

    def attend(self, module, x):
        _, held = module
        h = self.norm(held, "GroupNorm_0.", x)
        q, k, v = (nin(held, f"NIN_{i}.", h).flatten(2) for i in range(3))
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), -1)
        h = nin(held, "NIN_3.", (v @ weight.transpose(1, 2)).reshape(x.shape))
        return (x + h) / math.sqrt(2) if self.spec.plusplus else x + h


def linear(module, x):
    return F.linear(x, module[1]["weight"], module[1]["bias"])


def conv(held, name, x):
    w = held[f"{name}weight"]
    return F.conv2d(x, w, held[f"{name}bias"], padding=w.shape[-1] // 2)


def nin(held, name, x):
    return torch.einsum("bchw,cd->bdhw", x, held[f"{name}W"]) + held[f"{name}b"][:, None, None]


def read(folder, spec, sde):
    """The model of the file that their training would have saved."""

    def tensors(tree):
        if isinstance(tree, dict):
            return {key: tensors(value) for key, value in tree.items()}
        return (
            [tensors(value) for value in tree] if isinstance(tree, list) else torch.tensor(tree) if hasattr(tree, "shape") else tree
        )

    torch.save(tensors(checkpoint(spec)), folder / "checkpoint_3.pth")
    return score_sde.read(folder / "checkpoint_3.pth", sde=sde, image_size=8)


def level_of(schedule, t):
    return Level(*(jnp.asarray(a).reshape(-1, 1, 1, 1) for a in times.grid(schedule, np.asarray(t))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sde"), [("ddpm++", "vp"), ("ddpm++, odd groups", "vp_discrete"), ("ddpm", "subvp"), ("ddpm++", "subvp")]
)
@torch.no_grad()
def test_eps_is_their_output(tmp_path, name, sde):
    spec = SPECS[name]
    got = read(tmp_path, spec, sde)
    built = experiment.build(got.config)
    t = np.array([0.001, 0.03, 0.4, 1.0])
    labels = t * 1000 - 1 if sde == "vp_discrete" else t * 999
    level = level_of(built.schedule(None), t)
    eps = jax.jit(lambda params, x: denoiser(built.net(params, None), built.target)(x, level).eps)
    for size in (8, 16) if sde == "vp" else (8,):
        x = np.random.default_rng(1).standard_normal((4, 3, size, size)).astype(np.float32)
        theirs = Theirs(spec)(torch.from_numpy(x), torch.tensor(labels, dtype=torch.float32)).numpy()
        scale = np.sqrt((theirs**2).mean())
        assert scale > 0.1
        ours = np.moveaxis(np.asarray(eps(got.params, jnp.moveaxis(x, 1, -1))), -1, 1)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("sde", ["vp", "subvp"])
@torch.no_grad()
def test_ten_steps_of_ddim_end_alike(tmp_path, sde):
    spec = SPECS["ddpm++"]
    got, net = read(tmp_path, spec, sde), Theirs(spec)
    workdir.write(tmp_path / "w", got.config, got.params)
    run = jd.load(tmp_path / "w")
    t = np.linspace(1, 1e-3, 10)
    np.testing.assert_allclose(times.linear(10, lo=0.001, hi=1.0), t)
    log = -(0.1 * t + 19.9 * t**2 / 2)
    alphas, sigmas = np.exp(log / 2), (1 - np.exp(log)) if sde == "subvp" else np.sqrt(1 - np.exp(log))
    start = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    x = torch.from_numpy(start)
    for n in range(10):
        eps = net(x, torch.full((2,), 999 * t[n], dtype=torch.float32))
        x0 = ((x - sigmas[n] * eps) / alphas[n]).clamp(-1, 1)
        eps = (x - alphas[n] * x0) / sigmas[n]
        if n < 9:
            x = (alphas[n + 1] * x0 + sigmas[n + 1] * eps).float()
    levels = times.grid(experiment.build(run.config).schedule(None), t)
    draw = jax.jit(lambda solver, x: jd.sample(jax.random.key(0), solver, x, levels))
    ours = draw(solvers.ddim(run.denoiser()), jnp.moveaxis(start, 1, -1))
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), -1, 1), x0.numpy(), atol=5e-4)
