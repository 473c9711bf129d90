"""CIFAR-10, unconditional, as Nichol and Dhariwal 2021 (Improved DDPM) trained L_vlb: the network of cifar_iddpm, for likelihood.

    python -m jaxdiff.data.prepare cifar10                       # once: 170 MB, into ~/tensorflow_datasets
    python train.py --config=configs/cifar_iddpm_vlb.py

Time: 500,000 steps of 128 images at 6.0 TFLOP each (XLA's count): 4.3 hours at the 196 TFLOP/s that configs/cifar.py
reached on one H200 in bfloat16; not measured itself. On a CPU it only serves to try the path: add --config.steps=20
--config.batch_size=8.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 500_000
    config.batch_size = 128
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(name="cifar10", split="train", shape=(32, 32, 3), size=0, codec="pixels", flip=False, augment="")
    config.model = dict(
        name="UNet",
        channels=128,
        multipliers=(1, 2, 2, 2),
        blocks=3,
        attention=(1, 2),
        heads=4,
        classes=0,
        dropout=0.3,
        out_channels=6,
        time="Sinusoidal",
        block="ADMBlock",
        attend="Attention(epsilon=1e-5)",
        down="ADMDown",
        leave="Leave(epsilon=1e-5)",
        dtype="float32",
        remat=False,
    )
    config.process = dict(
        schedule="cosine_beta(4000)",
        target="eps",
        draw="draw_importance(4000)",
        weight="unit",
        loss="vlb",
        data_std=1.0,
        drop_label=0.0,
    )
    config.optimizer = dict(name="adam", learning_rate=1e-4, schedule="constant_schedule(1.0)", clip=0.0)
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
        times="strided(4000)",
        solver="ddpm_learned",
        steps=250,
        max_steps=4000,
        guidance=1.0,
        num=64,
        batch_size=256,
        clip=True,
    )
    return config
