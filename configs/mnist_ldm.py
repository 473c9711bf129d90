"""MNIST in the latents of a trained autoencoder, class-conditional: a small U-Net on 8x8x4, cosine schedule, v target, guided.

    python -m jaxdiff.data.prepare mnist                         # once: 12 MB, into ~/tensorflow_datasets
    python train.py --config=configs/mnist_vq.py                 # the autoencoder, into runs/mnist_vq
    python train.py --config=configs/mnist_ldm.py

The images are encoded once, before the first step; their latents are kept (docs/latents.md).
Time: 20 minutes of the processor, counted over all threads, on two CPU cores with other jobs beside; 15 by the clock.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 4000
    config.batch_size = 64
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(
        name="mnist",
        split="train",
        shape=(32, 32, 1),
        size=0,
        pad=2,
        codec="autoencoder('runs/mnist_vq')",
        latents="",
        flip=False,
        augment="",
    )
    config.model = dict(
        name="UNet",
        channels=48,
        multipliers=(1, 2),
        blocks=1,
        attention=(1,),
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
    config.optimizer = dict(name="adam", learning_rate=2e-3, schedule="cosine_onecycle_schedule(4000, 1.0, 0.1)", clip=1.0)
    config.training = dict(
        ema=(0.998,),
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
        ema=0.998,
        times="uniform",
        solver="ddim",
        steps=50,
        max_steps=1000,
        guidance=1.5,
        num=100,
        batch_size=256,
        clip=False,  # latents have no ends to clip to
    )
    return config
