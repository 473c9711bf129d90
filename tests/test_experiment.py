import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_latents
from tiny import config

from jaxdiff import data, experiment, losses, schedules, targets, times
from jaxdiff.errors import InputError
from jaxdiff.level import Level, logsnr

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_and_says_how_to_run_it(path, tmp_path):
    module = load(path)
    c = module.get_config()
    if str(c.data.codec).startswith("autoencoder("):  # of random weights, in place of one that has been trained
        c.data.codec = sd_latents.write(tmp_path / "first_stage")
    assert f"--config=configs/{path.name}" in module.__doc__
    assert {"seed", "steps", "batch_size", "data_dir", "data", "model", "process", "optimizer", "training", "sampling"} <= set(c)
    built = experiment.build(c)
    params = jax.eval_shape(built.init, jax.random.key(0))
    batch = {"image": jnp.zeros((2, *built.shape), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
    example = jax.eval_shape(built.prepare, built.extra, jax.random.key(0), batch)
    each, extra, _ = jax.eval_shape(built.loss, params, built.extra, jax.random.key(0), example)
    assert each.shape == (2,) and each.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, extra) == jax.tree.map(jnp.shape, built.extra)


def test_the_cifar_config_is_ho_et_als():
    c = load(CONFIGS[0].parent / "cifar.py").get_config()
    params = jax.eval_shape(experiment.build(c).init, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(params)) == 35_746_307
    assert (c.steps, c.batch_size, c.optimizer.learning_rate, c.optimizer.clip) == (800_000, 128, 2e-4, 1.0)
    assert (c.training.ema, c.model.dropout, c.data.flip) == ((0.9999,), 0.1, True)
    built = experiment.build(c)
    ab = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    level = built.schedule(None)(jnp.arange(1, 1001) / 1000)
    np.testing.assert_allclose(level.alpha, np.sqrt(ab), rtol=2e-5)


def test_the_loss_is_the_denoising_loss_of_its_own_draws():
    # A network that says nothing: the loss of each example is then the mean square of the target it drew.
    c = config(**{"process.schedule": "straight", "process.target": "flow", "process.draw": "draw_uniform(0.2, 0.8)"})
    built = experiment.build(c)
    params = built.init(jax.random.key(0))  # the last convolution starts at zero, so the network says zero
    image = jnp.full((4096, 8, 8, 1), 255, jnp.uint8)
    example = built.prepare((), jax.random.key(1), {"image": image, "label": jnp.zeros(4096, jnp.int32)})
    each, _, _ = jax.jit(built.loss)(params, (), jax.random.key(1), example)
    # flow = eps - x0 with x0 = 1: E(eps - 1)^2 = 2.
    assert abs(float(each.mean()) - 2) < 5 * float(each.std()) / 64


def test_labels_are_dropped_as_often_as_asked_and_seen_otherwise():
    built = experiment.build(config(**{"process.drop_label": 0.25, "model.dropout": 0.0}))
    params = built.init(jax.random.key(0))
    # The label's row reaches the loss only where it was not dropped: count the examples whose gradient moves it.
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(3), a.shape), params)
    label = jnp.arange(400) % 10
    batch = {"image": jnp.zeros((400, 8, 8, 1), jnp.uint8), "label": label}

    def changed(key):
        def loss(table):
            p = {"params": {**params["params"], "label": {"embedding": table}}}
            return built.loss(p, (), key, built.prepare((), key, batch))[0]

        table = params["params"]["label"]["embedding"]
        return jnp.mean(loss(table) == loss(table.at[0].add(1.0)))  # row 0 is the null label

    kept = np.mean([float(jax.jit(changed)(jax.random.key(k))) for k in range(5)])
    assert abs(kept - 0.75) < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_the_network_is_shown_only_the_logsnr_it_was_trained_on():
    c = config(**{"process.schedule": "linear_beta(steps=1000)", "process.draw": "draw_table(1000)"})
    built = experiment.build(c)
    params = jax.tree.map(lambda a: a + 0.1, built.init(jax.random.key(0)))
    net = built.net(params, {"label": jnp.zeros(2, jnp.int32)})
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    ends = [float(logsnr(schedules.linear_beta(1000)(jnp.float32(t)))) for t in (1.0, 1 / 1000)]
    for inside, outside in zip(ends, (-25.0, 25.0)):
        a, b = net(x, jnp.float32(inside))[0], net(x, jnp.float32(outside))[0]
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.allclose(net(x, jnp.float32(0.0))[0], net(x, jnp.float32(2.0))[0])


def test_flips_happen_only_where_asked(monkeypatch):
    # In place of the mirror, one that shows in the loss: white images (x0 = 1) become grey (x0 = 0).
    monkeypatch.setattr(experiment, "random_flip", lambda key, image: jnp.full_like(image, 127.5))
    batch = {"image": jnp.full((4, 8, 8, 1), 255, jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    for flip, want in ((False, 1.0), (True, 0.0)):
        built = experiment.build(config(**{"data.flip": flip, "process.target": "x0"}))
        key = jax.random.key(0)
        each, _, _ = built.loss(built.init(key), (), key, built.prepare((), key, batch))  # the network says zero
        np.testing.assert_allclose(each, want, atol=1e-4)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"process.schedule": "cosin"}, "did you mean 'cosine'"),
        ({"process.schedule": "linear_beta"}, "process.schedule='linear_beta' needs brackets"),
        ({"process.target": "edm"}, "process.target='edm' needs brackets"),
        ({"process.target": "epsilon"}, "allowed: edm, eps, flow, v, x0"),
        ({"process.draw": "uniform(3)"}, "process.draw='uniform(3)' needs brackets, such as draw_table(1000)"),
        ({"process.drop_label": 1.5}, "process.drop_label=1.5"),
        ({"process.data_std": 0.0}, "process.data_std=0.0"),
        ({"data.codec": "pixel"}, "did you mean 'pixels'"),
        ({"data.shape": (7, 8, 1), "model.multipliers": (1, 2)}, "data.shape=(7, 8, 1)"),
        ({"model.name": "UNett"}, "did you mean 'UNet'"),
        ({"model.dtype": "float33"}, "model.dtype='float33'"),
        ({"model.time": "Sinusoid"}, "did you mean 'Sinusoidal'"),
        ({"model.heads": 3}, "model.heads=3 does not divide the channels where attention is; allowed: 1, 2, 4, 8"),
        ({"model.heads": 16, "model.multipliers": (1, 2), "model.attention": (0,)}, "model.heads=16 does not divide"),
        ({"model.heads": 0}, "model.heads=0"),
        ({"model.channels": 0}, "model.channels=0 is out of range; it is a whole number, at least 1"),
        ({"model.channels": -8}, "model.channels=-8"),
        ({"model.multipliers": ()}, "model.multipliers=()"),
        ({"model.multipliers": (1, 0)}, "model.multipliers=(1, 0)"),
        ({"model.multipliers": (1.5,)}, "model.multipliers=(1.5,)"),
        ({"model.blocks": 0}, "model.blocks=0"),
        ({"model.attention": (16,)}, "model.attention=(16,) names a level that is not there; allowed: 0 (levels"),
        ({"model.attention": (2,), "model.multipliers": (1, 2)}, "allowed: 0, 1 (levels"),
        ({"model.attention": (-1,)}, "model.attention=(-1,)"),
        ({"model.attention": (0.0,)}, "model.attention=(0.0,)"),
        ({"model.dropout": 1.0}, "model.dropout=1.0 is out of range; it is at least 0 and below 1"),
        ({"model.dropout": -0.1}, "model.dropout=-0.1"),
        ({"model.dropout": float("nan")}, "model.dropout=nan"),
        ({"model.classes": -1}, "model.classes=-1 is out of range; it is a whole number, at least 0"),
        ({"process.draw": "draw_table(0)"}, "process.draw='draw_table(0)': draw_table needs a whole number of steps, at least 1"),
        ({"process.draw": "draw_table(-5)"}, "draw_table needs a whole number of steps, at least 1, got steps=-5"),
        ({"process.draw": "draw_table(2.5)"}, "draw_table needs a whole number of steps, at least 1, got steps=2.5"),
        ({"process.draw": "draw_table(9999999999)"}, "process.draw='draw_table(9999999999)' cannot be drawn from"),
        ({"process.draw": "draw_uniform(0.001, 2.0)"}, "leaves the schedule"),
        ({"process.draw": "draw_uniform(0.001, 2.0)", "process.schedule": "linear_beta(1000)"}, "must fall all the way"),
        ({"process.draw": "draw_uniform(-0.5, 1.0)"}, "leaves the schedule"),
        ({"process.draw": "draw_uniform(-0.5, 1.0)", "process.schedule": "linear_beta(1000)"}, "draws a logsnr up to inf"),
        ({"process.draw": "draw_uniform(0.9, 0.1)"}, "must fall all the way"),
        ({"process.draw": "draw_uniform(0.0, 1.0)"}, "draws a logsnr up to inf; the highest must be finite"),
        ({"process.draw": "draw_uniform(1.0, 1.0)"}, "draws a logsnr up to -inf"),
        (
            {"process.draw": "draw_uniform(1e30, 1e39)", "process.schedule": "edm"},
            "leaves the schedule: the schedule is not finite",
        ),
        ({"process.draw": "draw_uniform(0.1, 1e999)"}, "does not draw between two finite numbers"),
        ({"process.draw": "draw_uniform('a', 'b')"}, "does not draw between two finite numbers"),
        ({"process.data_std": float("inf")}, "process.data_std=inf"),
        ({"process.drop_label": float("nan")}, "process.drop_label=nan"),
        ({"data.shape": (8, 8, 2)}, "data.shape=(8, 8, 2) has 2 channels; allowed: 1 (grey) or 3 (colour)"),
        ({"data.shape": (8, 8)}, "data.shape=(8, 8) is not the (height, width, channels) of an image"),
        ({"data.shape": (8.0, 8, 1)}, "data.shape=(8.0, 8, 1)"),
        ({"data.shape": (8, 0, 1)}, "data.shape=(8, 0, 1)"),
        ({"seed": -1}, "config.seed=-1 is out of range; it is a whole number from 0 to 2**63 - 1"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(changes, said):
    with pytest.raises(InputError) as error:
        experiment.build(config(**changes))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_model_field_is_refused():
    c = config()
    with c.unlocked():
        c.model.chanels = 3
    with pytest.raises(InputError, match=r"model\.chanels is unknown; did you mean 'channels'"):
        experiment.build(c)


def changed(group, **changes):
    """The tiny config with keys of a group set, or taken out where None."""
    c = config()
    values = c[group] if group else c
    with c.unlocked():
        for key, value in changes.items():
            if key in values:
                del values[key]  # a ConfigDict keeps the type of what it holds
            if value is not None:
                values[key] = value
    return c


@pytest.mark.parametrize(
    "c, said",
    [
        (changed("training", keep_every=None), "config key training.keep_every is missing"),
        (
            changed("training", save_every=None, sav_every=3),
            "training.sav_every is unknown; did you mean 'save_every'?; allowed: ema, ",
        ),
        (changed("", sampling=None), "config key sampling is missing"),
        (changed("", data_dir=None), "config key data_dir is missing"),
        (changed("data", size=None, sizes=0), "data.sizes is unknown; did you mean 'size'"),
        (changed("model", classes=None), "config key model.classes is missing"),
        (changed("model", name=None), "config key model.name is missing"),
        (changed("", optimiser={}), "config key optimiser is unknown; did you mean 'optimizer'?; allowed: seed, "),
        (changed("", process=3), "config key process=3 is a value, not an ml_collections.ConfigDict; it holds schedule, "),
        (config().to_dict(), "the config is of type dict"),
    ],
)
def test_a_config_without_its_keys_is_refused_in_one_line(c, said):
    with pytest.raises(InputError) as error:
        experiment.check_keys(c)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_keys_of_every_config_are_the_keys_known():
    for c in [config(), *(load(path).get_config() for path in CONFIGS)]:
        experiment.check_keys(c)


@pytest.mark.parametrize("group, key", [("data", "shape"), ("data", "flip"), ("model", "classes"), ("process", "drop_label")])
def test_building_needs_what_it_reads_and_nothing_else(group, key):
    c = config()
    with c.unlocked():
        for name in ("seed", "steps", "batch_size", "data_dir", "optimizer", "training", "sampling"):
            del c[name]
        del c.data["split"], c.data["size"], c.data["name"]
        assert experiment.build(c).shape == (8, 8, 1)
        del c[group][key]
    with pytest.raises(InputError, match=f"config key {group}.{key} is missing"):
        experiment.build(c)


def test_building_refuses_keys_that_nothing_reads():
    with pytest.raises(InputError, match=r"training\.kep is unknown; did you mean 'keep'"):
        experiment.build(changed("training", kep=3))


def test_an_output_that_is_not_the_images_is_refused():
    # Its channels would be spread over the image's one, and the loss be a number all the same.
    with pytest.raises(InputError, match=r"model\.out_channels=3 .* allowed: None, 1"):
        experiment.build(changed("model", out_channels=3))
    assert experiment.build(changed("model", out_channels=1)).shape == (8, 8, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"process.draw": "draw_table(1000)"},  # cosine, whose alpha is 0 at t = 1: a logsnr of -inf
        {"process.draw": "draw_uniform(0.5, 0.5)"},
        {"process.draw": "draw_uniform(0.002, 80.0)", "process.schedule": "edm", "process.target": "edm(0.5)"},
        {"process.draw": "draw_table(1)", "process.schedule": "linear_beta(1)"},
        {"process.draw": "draw_table(1000)", "process.schedule": "linear_beta(1000, 0.01, 0.9)"},  # alpha underflows to 0
        {"model.heads": 8, "model.multipliers": (1, 2), "model.attention": (0, 1)},
        {"model.channels": 1},
        {"data.shape": (8, 8, 3)},
        {"seed": 2**63 - 1},
    ],
)
def test_what_can_work_is_built(changes):
    built = experiment.build(config(**changes))
    params = jax.eval_shape(built.init, jax.random.key(0))
    batch = {"image": jnp.zeros((2, *built.shape), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
    example = jax.eval_shape(built.prepare, built.extra, jax.random.key(0), batch)
    assert jax.eval_shape(built.loss, params, built.extra, jax.random.key(0), example)[0].shape == (2,)


def test_the_training_loss_equals_the_formula_at_a_known_level():
    built = experiment.build(config(**{"model.classes": 0, "model.dropout": 0.0, "process.draw": "draw_uniform(0.5, 0.5)"}))
    params = jax.tree.map(lambda a: a + 0.05, built.init(jax.random.key(0)))
    image = jnp.asarray(data.load("digits").images[:3])
    key = jax.random.key(9)
    example = built.prepare((), key, {"image": image, "label": jnp.full(3, -1)})
    each, _, metrics = built.loss(params, (), key, example)
    k_eps = jax.random.split(key, 5)[4]
    level = Level(*(a.reshape(1, 1, 1, 1) for a in schedules.cosine(jnp.float32(0.5))))
    x0 = image / 127.5 - 1.0
    want = losses.denoising_loss(k_eps, built.net(params, None), targets.v, x0.astype(jnp.float32), level)
    np.testing.assert_allclose(each, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["logsnr"], jnp.full(3, logsnr(level).item()), rtol=1e-5)
    assert times.draw_uniform(0.5, 0.5).first == 0.5
