"""CIFAR-10, unconditional, as Song et al. 2021 trained DDPM++ cont. on the sub-VP SDE: cifar_score_sde on another curve.

    python -m jaxdiff.data.prepare cifar10                       # once: 170 MB, into ~/tensorflow_datasets
    python train.py --config=configs/cifar_subvp.py

Time: 1,300,000 steps of 128 images at 7.8 TFLOP each (XLA's count): 14 hours at the 196 TFLOP/s that configs/cifar.py
reached on one H200 in bfloat16; not measured itself. On a CPU it only serves to try the path: add --config.steps=20
--config.batch_size=8.
With --config.model.blocks=8 --config.steps=950000 it is the deep network, 106,632,579 parameters.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 1_300_000
    config.batch_size = 128
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(name="cifar10", split="train", shape=(32, 32, 3), size=0, codec="pixels", flip=True, augment="")
    config.model = dict(
        name="UNet",
        channels=128,
        multipliers=(1, 2, 2, 2),
        blocks=4,
        attention=(1,),
        attend_each=False,
        heads=1,
        classes=0,
        dropout=0.1,
        time="Sinusoidal",
        block="DDPMppBlock",
        attend="DDPMppAttention",
        down="DDPMppDown",
        up="DDPMppUp",
        dtype="float32",
        remat=False,
    )
    config.process = dict(
        schedule="subvp(0.1, 20.0)",
        target="eps",
        draw="draw_uniform(1e-5, 1.0)",
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
        times="uniform",
        solver="ddim",
        steps=50,
        max_steps=1000,
        guidance=1.0,
        num=64,
        batch_size=256,
        clip=True,
    )
    return config
