"""CIFAR-10: a classifier of noisy images, for classifier guidance, after Dhariwal and Nichol 2021 (ADM): 12,993,546 parameters.

    python -m jaxdiff.data.prepare cifar10                       # once: 170 MB, into ~/tensorflow_datasets
    python train.py --config=configs/cifar_classifier.py

ADM has none for CIFAR-10. Of its classifiers of ImageNet (table 12) are the width of 128, the depth of 2, attention at 16x16 and
8x8 in heads of 64 channels, the blocks, attention pooling at 8x8 (section 4), AdamW with a weight decay of 0.05, batches of 256 and
the learning rate of 3e-4, which falls to 0 on a line (public code). Levels, 40,000 steps (205 epochs; theirs are 60) and the crops
of He et al. 2016 are this config's own. The noise is that of configs/cifar.py.
Time: 1.1e17 operations in all (10.5 GFLOP an image, by --dry_run); not measured on an accelerator. On a CPU it only serves to try
the path: add --config.steps=20 --config.batch_size=8.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 40_000
    config.batch_size = 256
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(name="cifar10", split="train", shape=(32, 32, 3), size=0, codec="pixels", flip=True, augment="crop(4)")
    config.model = dict(
        name="Classifier",
        channels=128,
        multipliers=(1, 2, 2),
        blocks=2,
        attention=(1, 2),
        heads=4,
        classes=10,
        dropout=0.0,
        time="Sinusoidal",
        block="ADMBlock",
        attend="Attention(epsilon=1e-5)",
        down="ADMBlockDown",
        pool="AttentionPool(epsilon=1e-5)",
        dtype="float32",
        remat=False,
    )
    config.process = dict(schedule="linear_beta(steps=1000)", draw="draw_table(1000)", loss="cross_entropy", data_std=1.0)
    config.optimizer = dict(name="adamw(weight_decay=0.05)", learning_rate=3e-4, schedule="linear_schedule(1, 0, 40000)", clip=0.0)
    config.training = dict(
        ema=(0.9999,),
        log_every=100,
        sample_every=2000,
        save_every=2000,
        keep=3,
        keep_every=0,
        snapshot_every=0,
        mesh=(-1, 1),
        accumulate=1,
        nonfinite="stop",
    )
    config.sampling = dict(ema=0.9999, batch_size=500)
    return config
