"""ImageNet 256, class-conditional, DiT-XL/2 (Peebles and Xie 2023) on Stable Diffusion's latents: 674,834,720 parameters.

    python -m jaxdiff.interop VAE runs/sd_vae                    # once: a folder of diffusers' AutoencoderKL, such as sd-vae-ft-ema
    python train.py --config=configs/dit_xl_2.py --config.data_dir=DIR        # DIR: where TFDS prepared imagenet2012

As in the authors' code: the linear table of 1000 steps, eps and a learned variance in the hybrid objective, AdamW without decay at
a constant rate, batches of 256, 7 million steps. Their guidance scale of 1.5 was on three of the four latent channels; 1.375 on
all four, as guidance is here, is what they say does the same (appendix A).
Smaller ones: --config.model.width=384 --config.model.depth=12 --config.model.heads=6 is S; docs/transformers.md has all sizes.

Time: 7,000,000 steps of 256 images at 243 TFLOP each, 182 without remat; 0.535 s a step on one H200 (docs/benchmarks.md). Blocks
are computed again for the gradient; where memory allows, --config.model.remat=False saves that quarter. The state is split over all
devices: --dry_run says what a device holds, without the data. On a CPU it only serves to try the path.
Expected and measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 7_000_000
    config.batch_size = 256
    config.data_dir = ""  # where TFDS prepared the set; its own default, ~/tensorflow_datasets, where empty
    config.data = dict(
        name="imagenet2012",
        split="train",
        shape=(256, 256, 3),
        size=256,
        pad=0,
        codec="autoencoder('runs/sd_vae')",
        latents="",
        flip=True,
        augment="",
    )
    config.model = dict(
        name="DiT",
        patch=2,
        width=1152,
        depth=28,
        heads=16,
        classes=1000,
        time="LinearBetaSinusoidal(cos_first=1, shift=0)",
        places="SinCosPlaces",
        qk_norm="NoNorm",
        rotate="NoRotation",
        out_channels=8,
        dtype="bfloat16",
        remat=True,
    )
    config.process = dict(
        schedule="linear_beta(1000)",
        target="eps",
        draw="draw_table(1000)",
        weight="unit",
        loss="hybrid(0.001)",
        data_std=1.0,
        drop_label=0.1,
    )
    config.optimizer = dict(name="adamw(weight_decay=0.0)", learning_rate=1e-4, schedule="constant_schedule(1.0)", clip=0.0)
    config.training = dict(
        ema=(0.9999,),
        log_every=100,
        sample_every=50_000,
        save_every=10_000,
        keep=3,
        keep_every=500_000,
        snapshot_every=0,
        mesh=(1, -1),
        accumulate=1,
        nonfinite="stop",
    )
    config.sampling = dict(
        ema=0.9999,
        times="strided(1000, spacing='linspace')",
        solver="ddpm_learned",
        steps=250,
        max_steps=1000,
        guidance=1.375,
        num=16,
        batch_size=64,
        clip=False,
    )
    return config
