"""MNIST, class-conditional, 28x28: a small U-Net on the cosine schedule with the v target, guided without a classifier.

    python -m jaxdiff.data.prepare mnist                         # once: 12 MB, into ~/tensorflow_datasets
    python train.py --config=configs/mnist.py

Time: 287 s on one H200, another training beside it; not measured on a CPU.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 20_000
    config.batch_size = 128
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(name="mnist", split="train", shape=(28, 28, 1), size=0, codec="pixels", flip=False, augment="")
    config.model = dict(
        name="UNet",
        channels=32,
        multipliers=(1, 2, 2),
        blocks=1,
        attention=(2,),
        heads=1,
        classes=10,
        dropout=0.0,
        time="Sinusoidal",
        dtype="float32",
        remat=False,
    )
    config.process = dict(
        schedule="cosine", target="v", draw="draw_uniform(0.001, 0.999)", weight="unit", loss="simple", data_std=1.0, drop_label=0.1
    )
    config.optimizer = dict(name="adam", learning_rate=5e-4, schedule="linear_schedule(0, 1, 200)", clip=1.0)
    config.training = dict(
        ema=(0.999,),
        log_every=50,
        sample_every=1000,
        save_every=1000,
        keep=3,
        keep_every=0,
        snapshot_every=0,
        mesh=(-1, 1),
        accumulate=1,
        nonfinite="stop",
    )
    config.sampling = dict(
        ema=0.999,
        times="uniform",
        solver="ddim",
        steps=50,
        max_steps=1000,
        guidance=1.5,
        num=100,
        batch_size=256,
        clip=True,
    )
    return config
