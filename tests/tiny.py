"""A config small enough for tests: the digits with a network of a few thousand parameters; and parameters that say something."""

import jax
from ml_collections import ConfigDict

from jaxdiff import experiment


def config(**changes) -> ConfigDict:
    """The tiny config, with dotted keys changed: config(**{"model.channels": 16})."""
    c = ConfigDict(
        dict(
            seed=0,
            steps=6,
            batch_size=8,
            data_dir="",
            data=dict(name="digits", split="train", shape=(8, 8, 1), size=0, codec="pixels", flip=False, augment=""),
            model=dict(
                name="UNet",
                channels=8,
                multipliers=(1,),
                blocks=1,
                attention=(),
                heads=1,
                classes=10,
                dropout=0.1,
                time="Sinusoidal",
                dtype="float32",
                remat=False,
            ),
            process=dict(
                schedule="cosine",
                target="v",
                draw="draw_uniform(0.001, 0.999)",
                weight="unit",
                loss="simple",
                data_std=1.0,
                drop_label=0.1,
            ),
            optimizer=dict(name="adam", learning_rate=1e-2, schedule="linear_schedule(0, 1, 2)", clip=1.0),
            training=dict(
                ema=(0.9, 0.99),
                log_every=2,
                sample_every=100,
                save_every=3,
                keep=3,
                keep_every=0,
                snapshot_every=0,
                mesh=(-1, 1),
                accumulate=1,
                nonfinite="stop",
            ),
            sampling=dict(
                ema=0.9,
                times="uniform",
                solver="ddim",
                steps=3,
                max_steps=20,
                guidance=1.5,
                num=4,
                batch_size=4,
                clip=True,
            ),
        )
    )
    for key, value in changes.items():
        c.update_from_flattened_dict({key: value})
    return c


def classifier(**changes) -> ConfigDict:
    """The tiny config of a classifier of digits."""
    c = config(**{"model.name": "Classifier", "process.loss": "cross_entropy"})
    for group, keys in experiment.PREDICTS.items():
        for key in keys:
            del c[group][key]
    for key, value in changes.items():
        c.update_from_flattened_dict({key: value})
    return c


def noisy(key, params):
    """Parameters away from their start, where the last layer is zero and a network says nothing."""
    keys = iter(jax.random.split(key, len(jax.tree.leaves(params))))
    return jax.tree.map(lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape), params)
