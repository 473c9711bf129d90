"""CIFAR-10's KL autoencoder: 32x32x3 to 16x16x4 and back in 3,346,471 parameters, for diffusion in its latents.

    python -m jaxdiff.data.prepare cifar10                       # once: 170 MB, into ~/tensorflow_datasets
    python train.py --config=configs/cifar_kl.py

Half the size and no less: at 32x32 a pixel already stands for eight by eight of a photograph at 256x256, of which published
autoencoders keep a quarter of the size or less, and 8x8x4 would leave one number of twelve. What is saved is positions, four times
fewer for the diffusion's network. A discriminator is off; one enters late with
--config.process.discriminator="patch(0.5, start=20_000, layers=2)".

Time: 5,000 steps in 122 s, compiling included, on one H200 in bfloat16 (docs/results.md). On a CPU it only serves to try the path:
add --config.steps=20 --config.batch_size=8.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 40_000
    config.batch_size = 128
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(name="cifar10", split="train", shape=(32, 32, 3), size=0, codec="pixels", flip=True)
    config.model = dict(
        name="AutoencoderKL",
        channels=64,
        multipliers=(1, 2),
        blocks=2,
        attention=(),
        latent_channels=4,
        out_channels=3,
        dropout=0.0,
        dtype="float32",
        remat=False,
    )
    config.process = dict(loss="l1", regulariser="kl(1e-6)", perceptual="", discriminator="")
    config.optimizer = dict(
        name="adam", learning_rate=3e-4, schedule="warmup_cosine_decay_schedule(0, 1, 500, 40_000, 0.01)", clip=1.0
    )
    config.training = dict(
        ema=(0.999,),
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
    config.sampling = dict(ema=0.999, num=64, batch_size=256)
    return config
