"""CIFAR-10, unconditional, as Ho et al. 2020 (DDPM) trained it: the 35,746,307-parameter U-Net, eps target, 1000 linear betas.

    python -m jaxdiff.data.prepare cifar10                       # once: 170 MB, into ~/tensorflow_datasets
    python train.py --config=configs/cifar.py

Time: 800,000 steps of 128 images at 4.5 TFLOP each (XLA's count); 10.6 hours on its authors' TPU v3-8 (DDPM appendix B), five at
the pace of one H200 in bfloat16 (docs/benchmarks.md). On a CPU it only serves to try the path: add --config.steps=20
--config.batch_size=8.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 800_000
    config.batch_size = 128
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(name="cifar10", split="train", shape=(32, 32, 3), size=0, codec="pixels", flip=True, augment="")
    config.model = dict(
        name="UNet",
        channels=128,
        multipliers=(1, 2, 2, 2),
        blocks=2,
        attention=(1,),
        heads=1,
        classes=0,
        dropout=0.1,
        time="Sinusoidal",
        dtype="float32",
        remat=False,
    )
    config.process = dict(
        schedule="linear_beta(steps=1000)",
        target="eps",
        draw="draw_table(1000)",
        weight="unit",
        loss="simple",
        data_std=1.0,
        drop_label=0.0,
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
        times="strided(1000)",
        solver="ddim",
        steps=50,
        max_steps=1000,
        guidance=1.0,
        num=64,
        batch_size=256,
        clip=True,
    )
    return config
