"""The transformers of the papers as configs: their settings, where their state lies, and a dry run without data."""

import jax
import numpy as np
import pytest
import sd_latents
from jax.sharding import AbstractMesh, AxisType
from test_configs import load

from jaxdiff import InputError, data, experiment, run, training
from jaxdiff import mesh as meshes
from jaxdiff.training import dryrun, hardware

XL = {"dit_xl_2": 674_834_720, "sit_xl_2": 674_816_272}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """What data.codec names a first stage by whose latents have the shape of Stable Diffusion's."""
    return sd_latents.write(tmp_path_factory.mktemp("runs") / "sd_vae")


def config(name, codec, **model):
    c = load(name).get_config()
    c.data.codec = codec
    c.model.update(model)
    return c


def state_of(c):
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    return jax.eval_shape(lambda key: training.init_state(built, optimizer, c.training.ema, key), jax.random.key(0))


def placed(state, mesh):
    """The shapes of a state with the shardings that training gives them."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, meshes.state_shardings(mesh, state))


@pytest.mark.parametrize("name", XL)
def test_configs_hold_the_papers_network_and_settings(name, codec):
    module, c = load(name), config(name, codec)
    assert f"--config=configs/{name}.py" in module.__doc__ and f"{XL[name]:,}" in module.__doc__
    state = state_of(c)
    assert sum(a.size for a in jax.tree.leaves(state.params)) == XL[name]
    assert (c.batch_size, c.steps, c.optimizer.learning_rate, c.process.drop_label) == (256, 7_000_000, 1e-4, 0.1)
    assert c.optimizer.name == "adamw(weight_decay=0.0)" and c.optimizer.clip == 0 and list(state.ema) == ["0.9999"]
    run.check(c, experiment.build(c))


def test_without_its_first_stage_a_config_says_so_in_one_line():
    with pytest.raises(InputError, match=r"data.codec names a first stage runs/sd_vae, which is neither in") as caught:
        experiment.build(load("dit_xl_2").get_config())
    assert "\n" not in str(caught.value)


def test_a_latent_that_the_patches_do_not_divide_is_refused(codec):
    with pytest.raises(InputError, match=r"as data.codec encodes it\) does not fit model.patch=3"):
        experiment.build(config("dit_xl_2", codec, patch=3))


@pytest.mark.parametrize("name", XL)
def test_fully_sharded_over_eight_devices_each_holds_an_eighth_of_the_state(name, codec):
    """Parameters, average and Adam's two moments of XL/2, without allocating them; what stays whole is small."""
    mesh = AbstractMesh((1, 8), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    state = placed(state_of(config(name, codec)), mesh)
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    assert whole > 4 * 4 * XL[name]
    assert dryrun.state_bytes(state) == pytest.approx(whole / 8, rel=1e-4)
    kept = dryrun.unsplit(state)
    # Biases outside the blocks, and counters.
    assert all(key.endswith(("['bias']", ".count", ".step")) for key in kept) and max(kept.values()) < 4 * 4096
    assert sum(kept.values()) < 1e-5 * whole
    assert f"12.50%; {len(kept)} small arrays" in dryrun.shares(state)
    alone = placed(state, AbstractMesh((8, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2))
    assert dryrun.state_bytes(alone) == whole == sum(dryrun.unsplit(alone).values())


def test_a_batch_of_the_dry_run_is_as_one_of_data():
    """Shapes, types and places of `meshes.put`, for images and labels alike."""
    c = load("digits").get_config()
    mesh = meshes.make_mesh((-1, 1))
    digits = data.load("digits")
    real = meshes.put(mesh, c.batch_size, lambda part, n: data.batch_at(digits, 0, 0, c.batch_size, part, n))
    shapes = dryrun.batch_shapes(c, experiment.build(c).codec, mesh)
    for name, each in shapes.items():
        assert (each.shape, each.dtype, each.sharding) == (real[name].shape, real[name].dtype, real[name].sharding)
    assert shapes.keys() == real.keys()


@pytest.mark.parametrize("limit", [0, 2**40])
def test_a_state_is_made_where_it_fits_and_nowhere_else(limit, monkeypatch):
    c, mesh, said, made = load("digits").get_config(), meshes.make_mesh((-1, 1)), [], []
    c.model.update(channels=8, multipliers=(1,), attention=())
    state = state_of(c)
    step = jax.jit(lambda key, state, batch: (state, {"key": key, "light": batch["image"].mean()}))  # quick to compile
    monkeypatch.setattr(hardware, "memory", lambda device: limit)
    monkeypatch.setattr(dryrun, "pace", lambda *args: made.append(args) or 1.0)
    shardings = meshes.state_shardings(mesh, state)
    dryrun.report(
        c, mesh, step, jax.random.key(0), state, shardings, dryrun.batch_shapes(c, experiment.build(c).codec, mesh), said.append
    )
    assert bool(made) == bool(limit) == any("it fits" in line for line in said)
    assert any("DOES NOT FIT" in line for line in said) == (not limit)


def test_what_a_pace_is_measured_on_are_zeros_of_the_shapes():
    mesh = meshes.make_mesh((-1, 1))
    shapes = {"a": jax.ShapeDtypeStruct((4, 2), "uint8", sharding=meshes.split(mesh))}
    made = dryrun.zeros(shapes)["a"]
    assert (made.shape, made.dtype, made.sharding, int(made.sum())) == ((4, 2), "uint8", meshes.split(mesh), 0)


def trained(c, steps):
    """The loss of each step of training on the digits."""
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    digits, key = data.load("digits"), jax.random.key(0)
    state = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))(key)
    step, losses = jax.jit(training.make_step(built, optimizer), donate_argnums=1), []
    for i in range(steps):
        state, told = step(key, state, data.batch_at(digits, 0, i, c.batch_size))
        losses.append(float(told["loss"]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dit_xl_2", {}),
        ("sit_xl_2", {}),
        ("sit_xl_2", {"process.draw": "draw_logit_normal()", "model.qk_norm": "RMSNorm", "model.rotate": "Rotary"}),
    ],
)
def test_a_small_one_learns_digits_under_the_settings_of_both(name, changes):
    """The configs themselves, with the digits' pixels in place of latents and a network of 2 blocks; losses of 10 steps each."""
    c = config(name, "pixels", width=48, depth=2, heads=4, classes=10, dtype="float32", remat=False)
    c.model.out_channels = 2 if name == "dit_xl_2" else None
    c.data.update(name="digits", shape=(8, 8, 1), size=0, flip=False)
    c.update_from_flattened_dict({"batch_size": 32, "optimizer.learning_rate": 2e-3} | changes)
    losses = np.asarray(trained(c, 120))
    first, last = losses[:10].mean(), losses[-10:].mean()
    assert np.isfinite(losses).all() and last < 0.6 * first, (first, last)
