"""diffusers' UNet2DModel and its pipelines give the same numbers here, and ours there, every weight random.

Skipped where torch or diffusers is not installed; nothing is downloaded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import experiment, targets
from jaxdiff.interop import files, scheduler, source, unet2d, workdir
from jaxdiff.interop import folder as folders
from jaxdiff.names import named

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")
diffusers = pytest.importorskip("diffusers", reason="a reference implementation; not a dependency")

DDPM = {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "attention_head_dim": None, "norm_eps": 1e-6}
# Beside each network the scheduler that it comes with.
MODELS = {
    "cifar10": (
        DDPM
        | {
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [32, 64],
            "layers_per_block": 1,
        },
        {"variance_type": "fixed_large"},
    ),
    "celebahq": (
        DDPM
        | {
            "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
            "block_out_channels": [32, 32, 64, 64],
            "layers_per_block": 1,
        },
        {},
    ),
    "users": (
        {
            "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
            "block_out_channels": [64, 64],
            "layers_per_block": 1,
        },
        {"beta_schedule": "squaredcos_cap_v2"},
    ),
    "classes": (
        {
            "in_channels": 1,
            "out_channels": 1,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [32, 64],
            "layers_per_block": 1,
            "num_class_embeds": 3,
        },
        {"prediction_type": "sample"},
    ),
    "scale_shift": (
        {
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "block_out_channels": [32, 64],
            "layers_per_block": 1,
            "resnet_time_scale_shift": "scale_shift",
        },
        {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "resnet": (
        {
            "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
            "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "block_out_channels": [32, 32],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "add_attention": False,
            "attention_head_dim": 16,
        },
        {"prediction_type": "v_prediction", "num_train_timesteps": 100, "timestep_spacing": "trailing"},
    ),
    "learned": (
        {
            "out_channels": 6,
            "down_block_types": ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"],
            "block_out_channels": [32],
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 16,
        },
        {"variance_type": "learned_range"},
    ),
}
pytestmark = pytest.mark.slow


def written(folder, name, **more):
    """Their pipeline of that name with random weights, saved by them: (its network, its folder)."""
    unet, table = MODELS[name]
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(sample_size=8, **unet).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():  # they begin some weights at zero or one, which would say nothing
        for parameter in model.parameters():
            shape = tuple(parameter.shape)
            scale = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.3
            parameter.copy_(torch.from_numpy((rng.standard_normal(shape) * scale + (len(shape) == 1) * 0.5).astype(np.float32)))
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(**table | more)).save_pretrained(folder)
    return model, folder


def imported(folder, place, **more):
    read = source.read(folder, **more)
    workdir.write(place, read.config, read.params)
    return jd.load(place)


def image(n, size, channels, seed=1):
    return np.random.default_rng(seed).standard_normal((n, size, size, channels)).astype(np.float32)


def theirs(model, x, t, labels=None):
    with torch.no_grad():
        return seen(model(swapped(x), torch.as_tensor(t), class_labels=None if labels is None else torch.as_tensor(labels)).sample)


def swapped(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def seen(x):
    return np.moveaxis(x.numpy(), 1, -1)


@jax.jit
def predicted(denoise, x, level):
    return denoise(x, level)


def ours(run, x, t, labels=None):
    """What the network of a run says of x at row t of its table, counted from 0, got back from the prediction."""
    built = experiment.build(run.config)
    grid = jd.grid(built.schedule(None), np.array([(t + 1) / built.draw.steps]))
    level = jd.Level(*(jnp.asarray(a[0]) for a in grid))
    said = predicted(run.denoiser(labels), jnp.asarray(x), level)
    y = np.asarray(targets.regress(built.target, level, said.x0, said.eps))
    return y if said.aux is None else np.concatenate([y, said.aux], axis=-1)


def near(got, want, bound=1e-4):
    """To `bound` of the largest number; which has to be one."""
    assert got.shape == want.shape and 0.1 < np.abs(want).max() < 1e4
    np.testing.assert_array_less(np.abs(got - want).max() / np.abs(want).max(), bound)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_output_there_and_back(name, tmp_path):
    model, folder = written(tmp_path / "theirs", name, clip_sample=False)
    run = imported(folder, tmp_path / "w")
    channels, steps = run.shape[-1], run.config.sampling.max_steps
    labels = np.array([2, 0]) if run.config.model.classes else None
    unet2d.export(run, tmp_path / "ours")
    back = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    sizes = (8, 16, 8) if name == "cifar10" else (8, 8, 8)
    for t, size in zip((0, steps // 3, steps - 1), sizes, strict=True):
        x = image(2, size, channels, t)
        want = theirs(model, x, t, labels)
        near(ours(run, x, t, labels), want)
        np.testing.assert_array_equal(theirs(back.unet.eval(), x, t, labels), want)
    again = imported(tmp_path / "ours", tmp_path / "w2")
    assert again.config == run.config
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)
    assert {k: v for k, v in back.scheduler.config.items() if k in scheduler.DEFAULTS} == {
        k: "fixed_small" if v == "fixed_large" else v for k, v in diffusers.DDPMScheduler(**MODELS[name][1]).config.items()
        if k in scheduler.DEFAULTS
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "clip"), [("cifar10", False), ("cifar10", True), ("users", False), ("classes", True), ("scale_shift", False)]
)
def test_ten_steps_of_ddim(name, clip, tmp_path):
    """Where they clip, they are told to make the noise agree with the clipped image, as the pipeline can be and as here it does."""
    _, folder = written(tmp_path / "theirs", name, clip_sample=clip)
    run = imported(folder, tmp_path / "w")
    assert run.config.sampling.clip == clip
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
    pipeline.scheduler.set_timesteps(10)
    labels = np.array([1, 2]) if run.config.model.classes else None
    start = image(2, 8, run.shape[-1])
    x = swapped(start)
    for t in pipeline.scheduler.timesteps:
        y = swapped(theirs(pipeline.unet.eval(), seen(x), t, labels))
        x = pipeline.scheduler.step(y, t, x, use_clipped_model_output=clip).prev_sample
    built = experiment.build(run.config)
    levels = jd.grid(built.schedule(None), named(jd.times, run.config.sampling.times.replace(")", ", n=10)"), "times"))
    got = jax.jit(jd.sample)(jax.random.key(0), jd.solvers.ddim(run.denoiser(labels)), jnp.asarray(start), levels)
    near(np.asarray(got), seen(x))


def test_the_sampler_of_a_workdir_begins_at_their_first_step(tmp_path):
    """`generate`, the whole path: the images are those of their pipeline begun from the same noise."""
    _, folder = written(tmp_path / "theirs", "cifar10")
    run = imported(folder, tmp_path / "w")
    images = run.generate(jax.random.key(3), 2, steps=10)
    keys = jd.sample_keys(jax.random.key(3), 2)
    noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), run.shape))(keys)
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
    pipeline.scheduler.set_timesteps(10)
    x = swapped(noise)
    for t in pipeline.scheduler.timesteps:
        y = swapped(theirs(pipeline.unet.eval(), seen(x), t))
        x = pipeline.scheduler.step(y, t, x, use_clipped_model_output=True).prev_sample
    want = np.round((seen(x) + 1) * 127.5)
    assert np.abs(images - want).max() <= 1 and (images != want).mean() < 0.02 and images.std() > 20


def test_weights_as_they_were_uploaded_first(tmp_path):
    """Everything in one folder, pickled by torch, attention's maps by their old names, or as convolutions by 1x1."""
    model, folder = written(tmp_path / "theirs", "cifar10", clip_sample=False)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, a in model.state_dict().items():
        for now, old in new.items():
            name = name.replace(f".{now}.", f".{old}.")
        state[name] = a[:, :, None, None] if name.endswith("query.weight") else a
    old = tmp_path / "old"
    old.mkdir()
    torch.save(state, old / "diffusion_pytorch_model.bin")
    (old / "config.json").write_text((folder / "unet" / "config.json").read_text())
    (old / "model_index.json").write_text((folder / "model_index.json").read_text())
    (old / "scheduler_config.json").write_text((folder / "scheduler" / "scheduler_config.json").read_text())
    one, other = source.read(folder), source.read(old)
    assert one.config == other.config and "proj_attn" in " ".join(state)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_weights_in_parts(tmp_path):
    model, folder = written(tmp_path / "theirs", "cifar10")
    model.save_pretrained(tmp_path / "parts", max_shard_size="500KB")
    assert (tmp_path / "parts" / "diffusion_pytorch_model.safetensors.index.json").exists()
    jax.tree.map(np.testing.assert_array_equal, source.read(tmp_path / "parts").params, source.read(folder).params)


def test_a_trained_null_label_goes_out_as_the_last_class_and_comes_back(tmp_path):
    model, folder = written(tmp_path / "theirs", "classes", clip_sample=False)
    run = imported(folder, tmp_path / "w", null_class=True)
    assert run.config.model.classes == 2
    x = image(2, 8, 1)
    near(ours(run, x, 500, np.array([-1, 1])), theirs(model, x, 500, [2, 1]))
    unet2d.export(run, tmp_path / "ours")
    want = files.read(folder / "unet" / folders.WEIGHTS[0])
    for name, a in files.read(tmp_path / "ours" / "unet" / folders.WEIGHTS[0]).items():
        np.testing.assert_array_equal(a, want[name])


def test_what_is_taken_where_a_file_says_nothing_is_what_they_take():
    unet = dict(diffusers.UNet2DModel(block_out_channels=(32, 32, 32, 32)).config)
    said = {k: tuple(v) if isinstance(v, list) else v for k, v in unet.items() if not k.startswith("_")}
    assert said == unet2d.DEFAULTS | {"block_out_channels": (32, 32, 32, 32)}
    for name, clips in scheduler.CLIPS.items():
        config = getattr(diffusers, name)().config
        for key, value in scheduler.DEFAULTS.items():
            assert config.get(key, value) == value, (name, key)
        assert config.get("clip_sample", False) == clips


@pytest.mark.parametrize("table", scheduler.TABLES)
def test_the_tables_are_theirs(table):
    said = scheduler.read({"beta_schedule": table, "num_train_timesteps": 1000})
    built = named(jd.schedules, scheduler.process(said)["schedule"], "process.schedule")
    want = diffusers.DDPMScheduler(beta_schedule=table).alphas_cumprod.double().numpy()
    levels = jd.grid(built, np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(np.square(levels.alpha), want, rtol=3e-5)  # theirs is a product of 1000 numbers in float32
    np.testing.assert_allclose(np.square(levels.sigma), 1 - want, rtol=3e-5, atol=1e-7)
