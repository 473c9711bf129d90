"""CIFAR-10 in the latents of a trained autoencoder, class-conditional: a U-Net on 16x16x4, cosine schedule, v target, guided.

    python -m jaxdiff.data.prepare cifar10                       # once: 170 MB, into ~/tensorflow_datasets
    python train.py --config=configs/cifar_kl.py                 # the autoencoder, into runs/cifar_kl
    python train.py --config=configs/cifar_ldm.py --config.model.dtype=bfloat16

The images and their mirror images are encoded once, before the first step; their latents are kept (docs/latents.md).
Time: 43 steps a second on one H200 in bfloat16, an hour and a half in all (extrapolated). No work for a CPU.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 200_000
    config.batch_size = 128
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(
        name="cifar10",
        split="train",
        shape=(32, 32, 3),
        size=0,
        codec="autoencoder('runs/cifar_kl')",
        latents="",
        flip=True,
        augment="",
    )
    config.model = dict(
        name="UNet",
        channels=128,
        multipliers=(1, 2, 2),
        blocks=2,
        attention=(1, 2),
        heads=4,
        classes=10,
        dropout=0.1,
        time="Sinusoidal",
        dtype="float32",
        remat=False,
    )
    config.process = dict(
        schedule="cosine", target="v", draw="draw_uniform(0.001, 0.999)", weight="unit", loss="simple", data_std=1.0, drop_label=0.1
    )
    config.optimizer = dict(name="adam", learning_rate=2e-4, schedule="linear_schedule(0, 1, 5000)", clip=1.0)
    config.training = dict(
        ema=(0.9999,),
        log_every=100,
        sample_every=5000,
        save_every=5000,
        keep=3,
        keep_every=0,
        snapshot_every=0,
        mesh=(-1, 1),
        accumulate=1,
        nonfinite="stop",
    )
    config.sampling = dict(
        ema=0.9999,
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
