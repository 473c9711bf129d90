import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import config

from jaxdiff import data, experiment, run, training
from jaxdiff.errors import InputError
from jaxdiff.training import checkpoint, metrics


@pytest.fixture(scope="module")
def trained():
    """A tiny experiment, its jitted init and step, counted traces, and batches by step."""
    c = config()
    built = experiment.build(c)
    optimizer = training.make_optimizer(c.optimizer)
    step = jax.jit(chex.assert_max_traces(training.make_step(built, optimizer), n=1))
    # Restored arrays are committed to a device, which newer JAX traces for once more, as a new process does anyway.
    resumed = jax.jit(training.make_step(built, optimizer))
    init = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))
    digits = data.load("digits")

    def go(state, first, last, restored=False):
        for i in range(first, last):
            state, scalars = (resumed if restored else step)(jax.random.key(1), state, data.batch_at(digits, 0, i, 8))
        return state, scalars

    return c, built, init, go


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_the_step_traces_once_and_learns(trained):
    _, _, init, go = trained
    state, first = go(init(jax.random.key(0)), 0, 1)
    state, last = go(state, 1, 60)  # a second trace would raise
    assert int(state.step) == 60
    assert float(last["loss"]) < 0.7 * float(first["loss"])
    assert float(last["grad_norm"]) > 0


def test_the_averages_follow_their_formula(trained):
    _, _, init, go = trained
    state = init(jax.random.key(0))
    want = {decay: state.params for decay in ("0.9", "0.99")}
    for i in range(4):
        state, _ = go(state, i, i + 1)
        for decay in want:
            d = min(float(decay), (1 + i) / (10 + i))
            want[decay] = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * p, want[decay], state.params)
    chex.assert_trees_all_close(state.ema, want, rtol=1e-5, atol=1e-6)


def test_the_optimizer_is_the_one_named_with_its_schedule_and_clip():
    made = training.make_optimizer(config(**{"optimizer.schedule": "linear_schedule(0, 1, 4)"}).optimizer)
    params, grads = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([30.0, 40.0])}
    want = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda s: 1e-2 * jnp.minimum(s / 4, 1)))
    a, b = made.init(params), want.init(params)
    for _ in range(6):
        u, a = made.update(grads, a, params)
        v, b = want.update(grads, b, params)
        np.testing.assert_allclose(u["w"], v["w"], rtol=1e-6)
    plain = {"optimizer.name": "sgd", "optimizer.clip": 0.0, "optimizer.schedule": "constant_schedule(1)"}
    sgd = training.make_optimizer(config(**plain).optimizer)
    np.testing.assert_allclose(sgd.update(grads, sgd.init(params))[0]["w"], -0.01 * grads["w"])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"optimizer.name": "adamm"}, "did you mean 'adam'"),
        ({"optimizer.name": "adam(c1=2)"}, "optimizer.name='adam(c1=2)'"),
        ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate=0.0"),
        ({"optimizer.schedule": "linear_schedul(0, 1, 2)"}, "did you mean 'linear_schedule'"),
    ],
)
def test_wrong_optimizers_are_refused(changes, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(").replace(")", r"\)")):
        training.make_optimizer(config(**changes).optimizer)


def test_a_saved_and_resumed_run_has_the_same_bits(trained, tmp_path):
    c, _, init, go = trained
    whole, _ = go(init(jax.random.key(0)), 0, 6)
    half, _ = go(init(jax.random.key(0)), 0, 3)
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, half, c)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(init, jax.random.key(0))
    with checkpoint.manager(tmp_path) as checkpoints:
        back = checkpoint.restore(checkpoints, shapes, jax.tree.map(lambda _: here, shapes))
    assert equal(back, half) and int(back.step) == 3
    assert jax.tree.structure(back) == jax.tree.structure(half)
    again, _ = go(back, 3, 6, restored=True)
    assert equal(again, whole)
    assert not equal(again.params, half.params)


def saved(trained, tmp_path, steps=(1, 2)):
    c, _, init, go = trained
    state = init(jax.random.key(0))
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        done = 0
        for n in steps:
            state, _ = go(state, done, n)
            done = n
            checkpoint.save(checkpoints, state, c)
    return state


def test_the_newest_are_kept_and_the_averages_come_back_alone(trained, tmp_path):
    state = saved(trained, tmp_path, (1, 2, 3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]
    assert checkpoint.newest(tmp_path) == 3
    step, c = checkpoint.restore_meta(tmp_path)
    assert step == 3 and c.to_dict() == trained[0].to_dict()
    (tmp_path / "checkpoints" / "3" / "state").rename(tmp_path / "gone")  # the EMA needs nothing of it
    loaded = run.load(tmp_path)
    assert loaded.step == 3 and equal(loaded.params, state.ema["0.9"])


def test_no_checkpoint_and_damaged_ones_are_one_line(trained, tmp_path):
    with pytest.raises(InputError, match="is not there"):
        run.load(tmp_path / "none")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no checkpoint"):
        run.load(tmp_path / "empty")
    saved(trained, tmp_path / "a")
    meta = tmp_path / "a" / "checkpoints" / "2" / "meta" / "metadata"
    meta.write_text(meta.read_text()[:50])
    with pytest.raises(InputError, match="checkpoints/2 is damaged") as error:
        run.load(tmp_path / "a")
    assert "\n" not in str(error.value)
    saved(trained, tmp_path / "b")
    big = max((p for p in (tmp_path / "b" / "checkpoints" / "2" / "ema").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    big.write_bytes(big.read_bytes()[: big.stat().st_size // 2])
    with pytest.raises(InputError, match="checkpoints/2 is damaged") as error:
        run.load(tmp_path / "b")
    assert "\n" not in str(error.value)


def test_metrics_of_steps_that_are_trained_again_are_taken_out(tmp_path):
    first = metrics.writer(tmp_path, 0)
    for step in (2, 4, 6):
        first.scalars(step, {"loss": step / 10})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "lo')  # cut short by a kill
    second = metrics.writer(tmp_path, 4)
    second.scalars(6, {"loss": 7.0})
    second.image(6, "samples", np.zeros((4, 4, 3), np.uint8))
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 2, "loss": 0.2}, {"step": 4, "loss": 0.4}, {"step": 6, "loss": 7.0}]
    assert list((tmp_path / "tensorboard").glob("events.*"))
