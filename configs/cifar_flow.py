"""CIFAR-10, unconditional, flow matching on the straight path (Lipman et al. 2023) with Ho et al.'s network, 35,746,307 parameters.

    python -m jaxdiff.data.prepare cifar10                       # once: 170 MB, into ~/tensorflow_datasets
    python train.py --config=configs/cifar_flow.py

Time: 400,000 steps of 128 images at 4.5 TFLOP each (XLA's count): 2.6 hours at the 196 TFLOP/s that configs/cifar.py
reached on one H200 in bfloat16; not measured itself. On a CPU it only serves to try the path: add --config.steps=20
--config.batch_size=8.
Lipman et al. train 256 channels for 391K steps of 256 images without dropout; this network is smaller.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 400_000
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
        schedule="straight",
        target="flow",
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
        solver="heun",
        steps=50,
        max_steps=1000,
        guidance=1.0,
        num=64,
        batch_size=256,
        clip=True,
    )
    return config
