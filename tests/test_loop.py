"""The loop of train.py: which steps go together, and what it tells of waiting for data."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from injected import with_nan_at
from ml_collections import ConfigDict
from tiny import config

import train
from jaxdiff import data, experiment, training
from jaxdiff.errors import InputError, RunError


def written(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def quick(monkeypatch):
    """Nothing drawn at the end."""
    monkeypatch.setattr(train, "_sample", lambda *args: "nothing")


@pytest.mark.parametrize("first, most", [(0, 1), (0, 4), (7, 4), (0, 3), (13, 5)])
def test_calls_take_every_step_once_and_stop_where_something_is_written(first, most):
    c = ConfigDict({"steps": 43, "training": {"log_every": 10, "sample_every": 15, "save_every": 40, "snapshot_every": 0}})
    calls = list(train._calls(c, first, most))
    assert [j for i, n in calls for j in range(i, i + n)] == list(range(first, 43))
    assert calls[0] == (first, 1) and {n for _, n in calls} == {1, most}
    for stop in [*range(10, 43, 10), *range(15, 43, 15), 43]:
        assert stop <= first or stop in [i + n for i, n in calls]


@pytest.mark.slow
def test_steps_in_turn_are_the_same_steps():
    c = config(**{"training.ema": (0.9,)})
    built, optimizer, key = experiment.build(c), training.make_optimizer(c.optimizer), jax.random.key(1)
    step = training.make_step(built, optimizer)
    digits = data.load("digits")
    batches = [data.batch_at(digits, 0, i, 8) for i in range(3)]
    state = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))(jax.random.key(0))
    together, told = jax.jit(training.in_turn(step))(key, state, batches)
    single = jax.jit(step)
    for i, batch in enumerate(batches):
        state, one = single(key, state, batch)
        for name, value in one.items():
            np.testing.assert_allclose(told[name][i], value, rtol=1e-3, atol=1e-4, err_msg=name)
    assert int(together.step) == 3
    # Adam's first steps are signs of the gradient: what differs is its rounding where it is all but zero.
    for a, b in zip(jax.tree.leaves(together.ema), jax.tree.leaves(state.ema)):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.slow
def test_several_steps_a_call_write_what_single_ones_do(quick, tmp_path):
    rows = {}
    for n in (1, 2):
        c = config(steps=8, **{"training.log_every": 4, "training.save_every": 6, "training.ema": (0.9,)})
        c.training.steps_per_call = n
        train.train(c, tmp_path / str(n))
        rows[n] = written(tmp_path / str(n))
        saved = {path.name for path in (tmp_path / str(n) / "checkpoints").iterdir()}
        assert {"6", "8"} <= saved
    assert [row["step"] for row in rows[2]] == [row["step"] for row in rows[1]] == [4, 8]
    for one, two in zip(rows[1], rows[2]):
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-3)
        np.testing.assert_allclose(two["ema_distance"], one["ema_distance"], rtol=1e-2)
    for row in rows[1][1:] + rows[2][1:]:
        assert 0 <= row["data_wait"] < 1


@pytest.mark.slow
def test_a_step_among_several_that_is_not_finite_is_told_by_its_number(quick, tmp_path, monkeypatch):
    build = train.experiments.build
    monkeypatch.setattr(train.experiments, "build", lambda c: with_nan_at(build(c), 6, c.seed))
    c = config(steps=12, **{"training.log_every": 12, "training.save_every": 12, "training.ema": (0.9,)})
    c.training.steps_per_call = 4
    with pytest.raises(RunError, match=r"step 7 is not finite: .*step=6, "):
        train.train(c, tmp_path)


def test_steps_a_call_out_of_range_are_one_line(tmp_path):
    c = config()
    c.training.steps_per_call = 0
    with pytest.raises(InputError, match=r"config\.training\.steps_per_call=0 is out of range"):
        train.train(c, tmp_path)


class Loss:
    """A loss that is there, or not yet."""

    def __init__(self, ready):
        self.is_ready = lambda: ready


def test_a_batch_is_waited_for_only_where_the_device_has_nothing_else_to_do():
    def slow(i):
        time.sleep(0.02)
        return {"image": i}

    for before, least, most in ((None, 0, 0), ({"loss": Loss(False)}, 0, 0), ({"loss": Loss(True)}, 0.04, 1)):
        batches, waited = train._timed(slow, range(3, 5), before)
        assert batches == [{"image": 3}, {"image": 4}] and least <= waited <= most


def test_the_loss_of_a_step_in_flight_says_so():
    """What `_timed` asks of an array: True once it is there."""
    loss = jax.jit(lambda x: x + 1)(jnp.zeros(()))
    loss.block_until_ready()
    assert loss.is_ready() is True
