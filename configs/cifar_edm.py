"""CIFAR-10, unconditional, as Karras et al. 2022 (EDM) trained DDPM++: 55,733,891 parameters, non-leaky augmentation, Heun.

    python -m jaxdiff.data.prepare cifar10                       # once: 170 MB, into ~/tensorflow_datasets
    python train.py --config=configs/cifar_edm.py
    python train.py --config=configs/cifar_edm.py --config.model.classes=10 --workdir=runs/cifar_edm_cond

Time: 390,625 steps of 512 images, 200 million in all, at 62 TFLOP each (XLA's count): 34 hours at the 196 TFLOP/s that
configs/cifar.py reached on one H200 in bfloat16; its authors' 8 V100s took about two days. On a CPU it only serves to try the path:
add --config.steps=20 --config.batch_size=8.
The second command is the class-conditional network, 55,735,299 parameters.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 390_625
    config.batch_size = 512
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(name="cifar10", split="train", shape=(32, 32, 3), size=0, codec="pixels", flip=False, augment="edm(0.12)")
    config.model = dict(
        name="UNet",
        channels=128,
        multipliers=(2, 2, 2),
        blocks=4,
        attention=(1,),
        attend_each=False,
        heads=1,
        classes=0,
        augment=9,
        dropout=0.13,
        time="Sinusoidal(rate=0.125)",
        embed="OneHotEmbed",
        block="DDPMppBlock",
        attend="DDPMppAttention",
        down="DDPMppDown",
        up="DDPMppUp",
        dtype="float32",
        remat=False,
    )
    config.process = dict(
        schedule="edm",
        target="edm(0.5)",
        draw="draw_log_normal(-1.2, 1.2)",
        weight="edm(0.5)",
        loss="simple",
        data_std=0.5,
        drop_label=0.0,
    )
    config.optimizer = dict(name="adam", learning_rate=1e-3, schedule="linear_schedule(0, 1, 19531)", clip=0.0)
    config.training = dict(
        ema=(0.99929,),  # half of it is 0.5 million images old: 0.5 ** (512 / 500_000)
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
        ema=0.99929,
        times="karras",
        solver="heun",
        steps=18,
        max_steps=256,
        guidance=1.0,
        num=64,
        batch_size=256,
        clip=False,
    )
    return config
