"""Handwritten digits, 8x8, class-conditional: a U-Net of 368,185 parameters, cosine schedule, v target, classifier-free guidance.

    python train.py --config=configs/digits.py

Time: 104 s on 2 CPU cores, compiling included, the first grid after 41 s.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 2200
    config.batch_size = 32
    config.data_dir = ""  # not needed: the digits are in the package
    config.data = dict(name="digits", split="train", shape=(8, 8, 1), size=0, codec="pixels", flip=False, augment="")
    config.model = dict(
        name="UNet",
        channels=24,
        multipliers=(1, 2),
        blocks=1,
        attention=(),
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
    config.optimizer = dict(name="adam", learning_rate=3e-3, schedule="cosine_onecycle_schedule(2200, 1.0, 0.1)", clip=1.0)
    config.training = dict(
        ema=(0.995,),
        log_every=50,
        sample_every=1100,
        save_every=1100,
        keep=3,
        keep_every=0,
        snapshot_every=0,
        mesh=(-1, 1),
        accumulate=1,
        nonfinite="stop",
    )
    config.sampling = dict(
        ema=0.995,
        times="uniform",
        solver="ddim",
        steps=50,
        max_steps=1000,
        guidance=1.05,
        num=100,
        batch_size=250,
        clip=True,
    )
    return config
