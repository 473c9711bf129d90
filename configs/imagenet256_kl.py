"""ImageNet at 256x256: latent diffusion's KL-f4 (Rombach et al. 2022, appendix G), 256x256x3 to 64x64x3 and back.

    python train.py --config=configs/imagenet256_kl.py           # imagenet2012, which TFDS prepared; vgg16.pth and vgg.pth at hand

55,312,063 parameters, and the public code's settings: L1 and LPIPS, KL at 1e-6, a patch discriminator at 0.5 that enters after
50,001 steps, an update by two batches of 12, Adam with b1 = 0.5 and b2 = 0.9 at 4.5e-6 times these 24, no average. LPIPS needs the
weights of torchvision's VGG-16 (vgg16-397923af.pth) and the lpips package's linear ones (weights/v0.1/vgg.pth), which are not
shipped; without them, and with another result, --config.process.perceptual="". Its authors trained on OpenImages and evaluated on
ImageNet's validation images; this trains on ImageNet, scaled to 256 and cropped in the middle, where theirs were cropped at random.

Time: 176,991 steps as published; for a GPU, not measured.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 176_991
    config.batch_size = 24
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(name="imagenet2012", split="train", shape=(256, 256, 3), size=256, codec="pixels", flip=True)
    config.model = dict(
        name="AutoencoderKL",
        channels=128,
        multipliers=(1, 2, 4),
        blocks=2,
        attention=(),
        latent_channels=3,
        out_channels=3,
        dropout=0.0,
        dtype="float32",
        remat=False,
    )
    config.process = dict(
        loss="l1",
        regulariser="kl(1e-6)",
        perceptual="lpips('vgg16.pth', 'vgg.pth', weight=1.0)",
        discriminator="patch(weight=0.5, start=50_001)",
    )
    config.optimizer = dict(name="adam(b1=0.5, b2=0.9)", learning_rate=24 * 4.5e-6, schedule="constant_schedule(1.0)", clip=0.0)
    config.training = dict(
        ema=(0.0,),
        log_every=100,
        sample_every=2000,
        save_every=2000,
        keep=3,
        keep_every=0,
        snapshot_every=0,
        mesh=(-1, 1),
        accumulate=2,
        nonfinite="stop",
    )
    config.sampling = dict(ema=0.0, num=8, batch_size=8)
    return config
