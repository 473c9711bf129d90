"""Handwritten digits, 8x8: a classifier of noisy digits, for classifier guidance, 177,994 parameters.

    python train.py --config=configs/digits_classifier.py

Time: 120 s on 2 CPU cores, compiling included.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 2000
    config.batch_size = 64
    config.data_dir = ""  # not needed: the digits are in the package
    config.data = dict(name="digits", split="train", shape=(8, 8, 1), size=0, pad=0, codec="pixels", flip=False, augment="")
    config.model = dict(
        name="Classifier",
        channels=24,
        multipliers=(1, 2),
        blocks=1,
        attention=(),
        heads=2,
        classes=10,
        dropout=0.3,
        time="Sinusoidal",
        dtype="float32",
        remat=False,
    )
    config.process = dict(schedule="cosine", draw="draw_uniform(0.001, 0.999)", loss="cross_entropy", data_std=1.0)
    config.optimizer = dict(
        name="adamw(weight_decay=0.05)", learning_rate=3e-3, schedule="cosine_onecycle_schedule(2000, 1.0, 0.1)", clip=1.0
    )
    config.training = dict(
        ema=(0.995,),
        log_every=50,
        sample_every=500,
        save_every=1000,
        keep=3,
        keep_every=0,
        snapshot_every=0,
        mesh=(-1, 1),
        accumulate=1,
        nonfinite="stop",
    )
    config.sampling = dict(ema=0.995, batch_size=300)
    return config
