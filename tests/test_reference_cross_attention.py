"""diffusers' UNet2DConditionModel, of the Stable Diffusion kind, gives the same numbers here, every weight random.

Skipped where torch or diffusers is not installed; nothing is downloaded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")
diffusers = pytest.importorskip("diffusers", reason="a reference implementation; not a dependency")

import jaxdiff as jd
from jaxdiff import models, targets
from jaxdiff.interop import source, unet2d_condition

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SMALL = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
MODELS = {
    "first": (SMALL, {}),
    "second": (SMALL | {"use_linear_projection": True, "attention_head_dim": (2, 4)}, {"prediction_type": "v_prediction"}),
    "deep": (
        SMALL
        | {"transformer_layers_per_block": 2, "norm_num_groups": 8, "norm_eps": 1e-6}
        | {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2},
        {},
    ),
}
pytestmark = pytest.mark.slow


def written(place, name):
    """Their U-Net of that name with random weights and its scheduler, saved by them."""
    unet, table = MODELS[name]
    model = diffusers.UNet2DConditionModel(**unet).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():  # some begin at zero or one, which would say nothing
        for parameter in model.parameters():
            shape = tuple(parameter.shape)
            scale = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.3
            parameter.copy_(torch.from_numpy((rng.standard_normal(shape) * scale + (len(shape) == 1) * 0.5).astype(np.float32)))
    model.save_pretrained(place / "unet")
    scheduler = diffusers.DDIMScheduler(**TABLE | table, clip_sample=False)
    scheduler.save_pretrained(place / "scheduler")
    return model, scheduler


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def theirs(model, x, t, tokens, mask=None):
    with torch.no_grad():
        given = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
        there = None if mask is None else torch.from_numpy(mask)
        said = model(given, torch.as_tensor(t), torch.from_numpy(tokens), encoder_attention_mask=there).sample
    return np.moveaxis(said.numpy(), 1, -1)


def net_of(read):
    """The network of an imported model, and the schedule of its table."""
    run = jax.jit(models.build(read.config.model).apply)
    schedule = jd.schedules.scaled_linear_beta()
    assert read.config.process.schedule.startswith("scaled_linear_beta(steps=1000, first=0.00085, last=0.012)")
    return (lambda x, level, cond: run(read.params, x, jd.logsnr(level), cond)), schedule


def near(got, want, bound=1e-4):
    """To `bound` of the largest number; which has to be one."""
    assert got.shape == want.shape and 0.1 < np.abs(want).max() < 1e4
    np.testing.assert_array_less(np.abs(got - want).max() / np.abs(want).max(), bound)


@pytest.mark.parametrize("name", MODELS)
def test_the_network_is_theirs(name, tmp_path):
    model, _ = written(tmp_path, name)
    read = source.read(tmp_path / "unet")
    net, schedule = net_of(read)
    assert sum(a.size for a in jax.tree.leaves(read.params)) == sum(p.numel() for p in model.parameters())
    tokens = draw(3, 5, 24, seed=1)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 1]], bool)
    all_there = np.ones_like(mask)
    for t, size in ((0, 8), (999, 8)) + (((333, 16),) if name == "first" else ()):
        x, level = draw(3, size, size, 4, seed=t), schedule(jnp.float32((t + 1) / 1000))
        near(net(x, level, {"tokens": tokens, "mask": all_there}), theirs(model, x, t, tokens))
        near(net(x, level, {"tokens": tokens, "mask": mask}), theirs(model, x, t, tokens, mask))
    assert np.abs(theirs(model, x, t, tokens) - theirs(model, x, t, tokens, mask)).max() > 1e-2


@pytest.mark.parametrize("name", ["first", "second"])
def test_ten_guided_steps_of_ddim(name, tmp_path):
    """Guidance as their pipeline has it: both conditions in one batch, 1 being the conditional model."""
    model, scheduler = written(tmp_path, name)
    read = source.read(tmp_path / "unet")
    _, schedule = net_of(read)
    start, tokens, empty, scale = draw(2, 8, 8, 4), draw(2, 5, 24, seed=1), draw(2, 5, 24, seed=2), 3.0
    scheduler.set_timesteps(10)
    x = torch.from_numpy(np.moveaxis(start, -1, 1).copy())
    for t in scheduler.timesteps:
        now = np.moveaxis(x.numpy(), 1, -1)
        none, some = np.split(theirs(model, np.concatenate([now, now]), t, np.concatenate([empty, tokens])), 2)
        y = torch.from_numpy(np.moveaxis(none + scale * (some - none), -1, 1).copy())
        x = scheduler.step(y, t, x).prev_sample
    target = getattr(targets, read.config.process.target)

    def conditioned(tokens):
        return jd.denoiser(
            lambda x, snr: (models.build(read.config.model).apply(read.params, x, snr, {"tokens": tokens}), None), target
        )

    guided = jd.guidance.classifier_free(conditioned(tokens), conditioned(empty), scale)
    levels = jd.grid(schedule, jd.times.strided(1000, 10))
    got = jax.jit(lambda x: jd.sample(jax.random.key(0), jd.solvers.ddim(guided), x, levels))(jnp.asarray(start))
    near(np.asarray(got), np.moveaxis(x.numpy(), 1, -1))


def test_stable_diffusions_size_is_theirs():
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    config = unet2d_condition.config_of({"cross_attention_dim": 768, "sample_size": 64}, TABLE)
    shapes = jax.eval_shape(models.build(config.model).init, jax.random.key(0), jnp.zeros((1, 64, 64, 4)), jnp.zeros(()))
    rows = {row.theirs: row for row in unet2d_condition.rows(config, shapes)}
    assert rows.keys() == model.state_dict().keys()
    assert sum(a.size for a in jax.tree.leaves(shapes)) == sum(p.numel() for p in model.parameters()) == 859_520_964


def test_what_is_taken_where_a_file_says_nothing_is_what_they_take():
    with torch.device("meta"):
        said = dict(diffusers.UNet2DConditionModel().config)
    for key, value in unet2d_condition.DEFAULTS.items():
        assert said[key] == value, key
    for key, value in said.items():
        known = key in unet2d_condition.DEFAULTS or value in unet2d_condition.READ.get(key, ())
        assert key[0] == "_" or known or value is None, key
