"""A config for train.py, small enough for tests: digits scaled to 16x16, a codebook of averages and a late discriminator."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 6
    config.batch_size = 8
    config.data_dir = ""
    config.data = dict(name="digits", split="train", shape=(16, 16, 1), size=16, codec="pixels", flip=True)
    config.model = dict(
        name="AutoencoderVQ",
        channels=8,
        multipliers=(1, 2),
        blocks=1,
        attention=(),
        middle_attend="NoAttention",
        latent_channels=2,
        out_channels=1,
        codes=16,
        code_channels=2,
        dropout=0.1,
        dtype="float32",
        remat=False,
    )
    config.process = dict(
        loss="l2", regulariser="codebook_ema(0.9)", perceptual="", discriminator="patch(0.5, start=3, channels=4, layers=2)"
    )
    config.optimizer = dict(name="adam", learning_rate=1e-2, schedule="constant_schedule(1.0)", clip=1.0)
    config.training = dict(
        ema=(0.9,),
        log_every=2,
        sample_every=100,
        save_every=3,
        keep=3,
        keep_every=0,
        snapshot_every=0,
        mesh=(-1, 1),
        accumulate=1,
        nonfinite="stop",
    )
    config.sampling = dict(ema=0.9, num=8, batch_size=64)
    return config
