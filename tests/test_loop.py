"""The loop of train.py: what it tells of waiting for data."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
from tiny import config

import train
from jaxdiff.errors import RunError


def written(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def quick(monkeypatch):
    """Nothing drawn at the end."""
    monkeypatch.setattr(train, "_sample", lambda *args: "nothing")


@pytest.mark.slow
def test_rows_of_metrics_say_the_share_of_waiting(quick, tmp_path):
    c = config(steps=8, **{"training.log_every": 4, "training.save_every": 3, "training.ema": (0.9,)})
    train.train(c, tmp_path)
    rows = written(tmp_path)
    assert [row["step"] for row in rows] == [4, 8]
    assert 0 <= rows[1]["data_wait"] < 1


class Loss:
    """A loss that is there, or not yet."""

    def __init__(self, ready):
        self.is_ready = lambda: ready


def test_a_batch_is_waited_for_only_where_the_device_has_nothing_else_to_do():
    def slow(i):
        time.sleep(0.02)
        return {"image": i}

    for before, least, most in ((None, 0, 0), ({"loss": Loss(False)}, 0, 0), ({"loss": Loss(True)}, 0.02, 1)):
        batch, waited = train._timed(slow, 3, before)
        assert batch == {"image": 3} and least <= waited <= most


def test_the_loss_of_a_step_that_is_done_says_so():
    """What `_timed` asks of an array: True once it is there."""
    loss = jax.jit(lambda x: x + 1)(jnp.zeros(()))
    loss.block_until_ready()
    assert loss.is_ready() is True


def test_parameters_that_an_update_broke_are_told_and_never_saved(quick, tmp_path):
    c = config(steps=4, **{"training.log_every": 4, "training.save_every": 1, "training.ema": (0.9,)})
    c.optimizer.name, c.optimizer.schedule = "sgd", "constant_schedule(1e39)"
    with pytest.raises(RunError, match=r"the parameters are not finite at step 1, .*; nothing is saved after step 0"):
        train.train(c, tmp_path)
    assert not [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
