"""ImageNet 256x256 by class, LDM-4 as Rombach et al. 2022 trained it on latents of 64x64x3: 401,433,091 parameters.

    python train.py --config=configs/imagenet256_kl.py --workdir=runs/imagenet256_kl     # once: the first stage
    python train.py --config=configs/imagenet256_ldm.py

Settings: table 15 and the authors' cin256-v2.yaml. Without the table of labels, 1001 tokens of 512, the network has 400,920,579:
the 400M of their tables 3 and 10, where table 15 says 395M. Their first stage was VQ-f4, 8192 codes of 3 channels; imagenet256_kl
is of the same size and of the other kind, so what they report is no promise for it. Their linear schedule is linear in the root
of beta, scaled_linear_beta here. What table 15 does not tell is as in their public code: AdamW's decay, the average, one label in
ten dropped. Their loader crops at random, ours at the centre.
Guidance: their scale s is ours, 1 being the conditional model; 1.5 is that of their better figure, config.sampling.guidance=1.0
that of the other.
Time: 271 V100-days by its authors' reckoning (table 18); not measured here, and no work for a CPU.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 178_000
    config.batch_size = 1200
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(
        name="imagenet2012",
        split="train",
        shape=(256, 256, 3),
        size=256,
        codec="autoencoder('runs/imagenet256_kl')",
        latents="",
        flip=False,
        augment="",
    )
    config.model = dict(
        name="UNet",
        channels=192,
        multipliers=(1, 2, 3, 5),
        blocks=2,
        attention=(1, 2, 3),
        heads=1,
        classes=1000,
        dropout=0.0,
        time="ScaledLinearBetaSinusoidal(first=0.0015, last=0.0195, shift=0, cos_first=1)",
        context="LabelTokens(width=512)",
        block="ResBlock(epsilon=1e-5)",
        attend="SpatialTransformer(depth=1)",
        down="ADMDown",
        leave="Leave(epsilon=1e-5)",
        dtype="float32",
        remat=False,
    )
    config.process = dict(
        schedule="scaled_linear_beta(1000, first=0.0015, last=0.0195)",
        target="eps",
        draw="draw_table(1000)",
        weight="unit",
        loss="simple",
        data_std=1.0,
        drop_label=0.1,
    )
    config.optimizer = dict(name="adamw(weight_decay=0.01)", learning_rate=1e-4, schedule="constant_schedule(1.0)", clip=0.0)
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
        steps=250,
        max_steps=1000,
        guidance=1.5,
        num=64,
        batch_size=64,
        clip=False,
    )
    return config
