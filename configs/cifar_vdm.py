"""CIFAR-10, unconditional, as Kingma et al. 2021 (VDM) trained for likelihood: 30,577,667 parameters, a learned schedule.

    python -m jaxdiff.data.prepare cifar10                       # once: 170 MB, into ~/tensorflow_datasets
    python train.py --config=configs/cifar_vdm.py

Time: 10,000,000 steps of 128 images, at full size all through, at 20 TFLOP each (XLA's count): 12 days at the 196 TFLOP/s that
configs/cifar.py reached on one H200 in bfloat16; not measured itself. On a CPU it only serves to try the path: add
--config.steps=20 --config.batch_size=8.
Expected and measured: docs/results.md.
Their public config for CIFAR-10 learns a straight line between the two ends of the schedule; here it is the paper's monotone
network. Pixels are encoded as there, with a step of 1/128.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 10_000_000
    config.batch_size = 128
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(name="cifar10", split="train", shape=(32, 32, 3), size=0, codec="centred", flip=False, augment="")
    config.model = dict(
        name="UNet",
        channels=128,
        multipliers=(1,),
        blocks=32,
        attention=(),
        heads=1,
        classes=0,
        dropout=0.1,
        time="Sinusoidal(rate=54.6)",
        enter="FourierEnter",
        block="VDMBlock",
        leave="ResidualLeave",
        dtype="float32",
        remat=False,
    )
    config.process = dict(
        schedule="learned(lo=-5.0, hi=13.3)",
        target="eps",
        draw="draw_uniform(0.0, 1.0)",
        weight="unit",
        loss="bound",
        data_std=1.0,
        drop_label=0.0,
    )
    config.optimizer = dict(
        name="adamw(b2=0.99, weight_decay=0.01)", learning_rate=2e-4, schedule="linear_schedule(0, 1, 100)", clip=0.0
    )
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
        solver="ddpm",
        steps=250,
        max_steps=1000,
        guidance=1.0,
        num=64,
        batch_size=256,
        clip=True,
    )
    return config
