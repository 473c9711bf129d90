import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
def test_every_config_builds_and_says_how_to_run_it(path):
    module = load(path)
    c = module.get_config()
    assert f"--config=configs/{path.name}" in module.__doc__
    assert {"seed", "steps", "batch_size", "data_dir", "data", "model", "process", "optimizer", "training", "sampling"} <= set(c)
    built = experiment.build(c)
    params = jax.eval_shape(built.init, jax.random.key(0))
    batch = {"image": jnp.zeros((2, *built.shape), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
    each, extra, _ = jax.eval_shape(built.loss, params, built.extra, jax.random.key(0), batch)
    assert each.shape == (2,) and each.dtype == jnp.float32 and extra == ()


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
    each, _, _ = jax.jit(built.loss)(params, (), jax.random.key(1), {"image": image, "label": jnp.zeros(4096, jnp.int32)})
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
            return built.loss(p, (), key, batch)[0]

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
        each, _, _ = built.loss(built.init(jax.random.key(0)), (), jax.random.key(0), batch)  # the network says zero
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


def test_the_training_loss_equals_the_formula_at_a_known_level():
    built = experiment.build(config(**{"model.classes": 0, "model.dropout": 0.0, "process.draw": "draw_uniform(0.5, 0.5)"}))
    params = jax.tree.map(lambda a: a + 0.05, built.init(jax.random.key(0)))
    image = jnp.asarray(data.load("digits").images[:3])
    key = jax.random.key(9)
    each, _, _ = built.loss(params, (), key, {"image": image, "label": jnp.full(3, -1)})
    k_eps = jax.random.split(key, 6)[4]
    level = Level(*(a.reshape(1, 1, 1, 1) for a in schedules.cosine(jnp.float32(0.5))))
    x0 = image / 127.5 - 1.0
    want = losses.denoising_loss(k_eps, built.net(params, None), targets.v, x0.astype(jnp.float32), level)
    np.testing.assert_allclose(each, want, rtol=1e-5)
    assert times.draw_uniform(0.5, 0.5).first == 0.5
