"""Trains a tiny network whose loss is not a number at one step:  python tests/injected.py STEP stop|skip WORKDIR"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import jax
import jax.numpy as jnp
from tiny import config

import train
from jaxdiff import cli


def with_nan_at(built, step: int, seed: int):
    """The experiment whose loss of example 2 is NaN in the step after `step` steps."""
    at = jax.random.key_data(jax.random.split(jax.random.fold_in(jax.random.key(seed), step))[1])

    def loss(params, extra, key, example):
        each, extra, told = built.loss(params, extra, key, example)
        return each.at[2].add(jnp.where((jax.random.key_data(key) == at).all(), jnp.nan, 0.0)), extra, told

    return built._replace(loss=loss)


def main() -> None:
    step, mode, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    build = train.experiments.build
    train.experiments.build = lambda c: with_nan_at(build(c), step - 1, c.seed)
    c = config(steps=2 * step, **{"training.nonfinite": mode, "training.save_every": 5, "training.log_every": 5})
    train.train(c, workdir)


if __name__ == "__main__":
    name, *sys.argv[1:] = sys.argv
    cli._parse = lambda argv, arguments: []
    cli.run(main)
