"""ImageNet 256, class-conditional, SiT-XL/2 (Ma et al. 2024) on Stable Diffusion's latents: DiT's network on the straight path.

    python -m jaxdiff.interop VAE runs/sd_vae                    # once: a folder of diffusers' AutoencoderKL, such as sd-vae-ft-ema
    python train.py --config=configs/sit_xl_2.py --config.data_dir=DIR        # DIR: where TFDS prepared imagenet2012

As in the paper: linear interpolant, velocity, times drawn uniformly, no weight, and all else as configs/dit_xl_2.py, less the
learned variance: 674,816,272 parameters. Logit-normal times (Esser et al. 2024): --config.process.draw="draw_logit_normal()".
The noise level is heard as its logsnr, where theirs hear the time. Samplers are the ODE's by --solver=heun or euler and the SDE's
by --solver="ddim(eta=1.0)"; docs/transformers.md says which is which of the paper's.

Time: 7,000,000 steps of 256 images at 243 TFLOP each, 182 without remat; not measured on an accelerator. Blocks are computed again
for the gradient; where memory allows, --config.model.remat=False saves that quarter. On a CPU it only serves to try the path.
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
        time="Sinusoidal",
        places="SinCosPlaces",
        qk_norm="NoNorm",
        rotate="NoRotation",
        dtype="bfloat16",
        remat=True,
    )
    config.process = dict(
        schedule="straight",
        target="flow",
        draw="draw_uniform(1e-5, 1.0)",
        weight="unit",
        loss="simple",
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
        times="uniform",
        solver="ddim(eta=1.0)",
        steps=250,
        max_steps=1000,
        guidance=1.375,
        num=16,
        batch_size=64,
        clip=False,
    )
    return config
