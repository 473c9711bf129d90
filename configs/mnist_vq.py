"""MNIST's autoencoder with a codebook: 32x32, two pixels of border included, to 8x8 codes of 64, for diffusion in its latents.

    python -m jaxdiff.data.prepare mnist                         # once: 12 MB, into ~/tensorflow_datasets
    python train.py --config=configs/mnist_vq.py

645,693 parameters. Codes are moving averages of what the encoder says, and those that are not used are revived.
Time: 24 minutes of the processor, counted over all threads, on two CPU cores with other jobs beside.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 3000
    config.batch_size = 32
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(name="mnist", split="train", shape=(32, 32, 1), size=0, pad=2, codec="pixels", flip=False)
    config.model = dict(
        name="AutoencoderVQ",
        channels=16,
        multipliers=(1, 2, 4),
        blocks=1,
        attention=(),
        middle_attend="NoAttention",
        latent_channels=4,
        out_channels=1,
        codes=64,
        code_channels=4,
        dropout=0.0,
        dtype="float32",
        remat=False,
    )
    config.process = dict(loss="l2", regulariser="codebook_ema(0.99, commitment=0.25)", perceptual="", discriminator="")
    config.optimizer = dict(
        name="adam", learning_rate=2e-3, schedule="warmup_cosine_decay_schedule(0, 1, 50, 3000, 0.02)", clip=1.0
    )
    config.training = dict(
        ema=(0.995,),
        log_every=50,
        sample_every=1000,
        save_every=1000,
        keep=3,
        keep_every=0,
        snapshot_every=0,
        mesh=(-1, 1),
        accumulate=1,
        nonfinite="stop",
    )
    config.sampling = dict(ema=0.995, num=32, batch_size=256)
    return config
