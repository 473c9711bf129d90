"""diffusers' AutoencoderKL, DiTTransformer2DModel and a whole DiT pipeline, loaded here from the files that diffusers writes.

All weights are random, also those that start at zero. Skipped where torch or diffusers is not installed; nothing is downloaded.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")
diffusers = pytest.importorskip("diffusers", reason="a reference implementation; not a dependency")

import jaxdiff as jd
from jaxdiff import models, solvers
from jaxdiff.interop import autoencoder, dit, files, folder, mapping, source, workdir

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 32,
    "scaling_factor": 0.31,
}
FOUR_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32,) * 4,
}
DIT = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}


def random(model, seed=0):
    """The module with every tensor drawn at random, matrices to keep the size of what goes through."""
    rng = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, a in state.items():
        scale = a[0].numel() ** -0.5 if a.dim() > 1 else 0.3
        state[name] = torch.randn(a.shape, generator=rng) * scale + (1.0 if "norm" in name and a.dim() == 1 else 0.0)
    model.load_state_dict(state)
    return model.eval()


def one_embedder(model):
    """All blocks with the embedder of the first, as in every DiT that was published; theirs gives each its own."""
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def vae(**changes):
    return random(diffusers.AutoencoderKL(**VAE | changes))


def transformer(**changes):
    return one_embedder(random(diffusers.DiTTransformer2DModel(**DIT | changes), seed=1))


def image(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def last(a):
    return np.moveaxis(np.asarray(a), 1, -1)


def first(a):
    return torch.from_numpy(np.moveaxis(np.asarray(a), -1, 1).copy())


def close(got, want, tolerance=1e-4):
    """To the tolerance relative to the largest of them."""
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def plain(config):
    """A config.json without what their writer adds."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in config.items() if not key.startswith("_")}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"mid_block_add_attention": False, "block_out_channels": (128,), "norm_num_groups": 32}])
def test_autoencoder_is_theirs(tmp_path, changes):
    if "block_out_channels" in changes:
        changes = changes | {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    other = vae(**changes)
    other.save_pretrained(tmp_path)
    config, params = autoencoder.of_diffusers(*folder.read(tmp_path))
    model = models.build(config.model)
    assert model.scale == 0.31 and config.data.shape == (32, 32, 3)
    encode, decode = (jax.jit(lambda p, a, m=m: model.apply(p, a, method=m)) for m in ("encode", "decode"))
    for size in ((16, 16), (8, 24)):
        x = image(2, *size, 3)
        with torch.no_grad():
            posterior = other.encode(first(x)).latent_dist
            z = posterior.mean + posterior.std
            want = other.decode(z).sample
        mean, logvar = encode(params, x)
        close(mean, last(posterior.mean))
        close(logvar, last(posterior.logvar))
        close(decode(params, last(z)), last(want))


@pytest.mark.slow
def test_autoencoder_out_and_in_again_is_exact(tmp_path):
    other = vae()
    other.save_pretrained(tmp_path / "theirs")
    theirs, state = folder.read(tmp_path / "theirs")
    config, params = autoencoder.of_diffusers(theirs, state)
    made, back = autoencoder.to_diffusers(config, params)
    assert back.keys() == state.keys() and all(np.array_equal(back[name], a) for name, a in state.items())
    folder.write(tmp_path / "ours", made, back)
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in other.state_dict().items())
    wanted = plain(other.config)
    assert {key: wanted[key] for key in made if key[0] != "_"} == plain(made)
    config_again, params_again = autoencoder.of_diffusers(*folder.read(tmp_path / "ours"))
    assert config_again.to_dict() == config.to_dict()
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"patch_size": 4, "out_channels": None, "sample_size": 16, "norm_eps": 1e-6}])
def test_transformer_is_theirs(tmp_path, changes):
    other = transformer(**changes)
    other.save_pretrained(tmp_path)
    scheduler = {"beta_start": 1e-4, "beta_end": 0.02}
    config, params = dit.of_diffusers(*folder.read(tmp_path), scheduler)
    size, model = other.config.sample_size, models.build(config.model)
    x, labels = image(4, size, size, 4), np.array([0, 4, -1, 2])  # -1 is no label, their 5
    run = jax.jit(model.apply)
    schedule = jd.schedules.linear_beta()
    for t in (0, 1, 17, 500, 998, 999, [3, 999, 250, 0]):
        t = np.broadcast_to(t, (4,))
        with torch.no_grad():
            label = torch.from_numpy(labels % 6)
            want = other(first(x), timestep=torch.from_numpy(t.copy()), class_labels=label).sample
        level = schedule(jnp.asarray((t + 1) / 1000, jnp.float32).reshape(4, 1, 1, 1))
        close(run(params, x, jd.logsnr(level), {"label": labels}), last(want))


@pytest.mark.slow
def test_transformer_out_and_in_again_is_exact(tmp_path):
    other = transformer()
    other.save_pretrained(tmp_path / "theirs")
    theirs, state = folder.read(tmp_path / "theirs")
    config, params = dit.of_diffusers(theirs, state, {})
    made, back = dit.to_diffusers(config, params)
    assert back.keys() == state.keys() and all(np.array_equal(back[name], a) for name, a in state.items())
    folder.write(tmp_path / "ours", made, back)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in other.state_dict().items())
    wanted = plain(other.config)
    assert {key: wanted[key] for key in made if key[0] != "_"} == plain(made)
    config_again, params_again = dit.of_diffusers(*folder.read(tmp_path / "ours"), {})
    assert config_again.to_dict() == config.to_dict()
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


def authors_names(state):
    """The tensors as the authors of DiT name them: q, k and v in one, one embedder, and the places."""
    made = {}
    for name, a in state.items():
        at = name.split(".")
        if at[0] == "transformer_blocks":
            made[f"blocks.{at[1]}.{'.'.join(at[2:])}"] = a
        else:
            made[name] = a
    for i in range(2):
        for leaf in ("weight", "bias"):
            made[f"blocks.{i}.attn.qkv.{leaf}"] = np.concatenate([made.pop(f"blocks.{i}.attn1.to_{n}.{leaf}") for n in "qkv"])
    pairs = [("pos_embed.proj", "x_embedder.proj"), ("proj_out_1", "final_layer.adaLN_modulation.1")]
    pairs += [("proj_out_2", "final_layer.linear"), ("blocks.0.norm1.emb.timestep_embedder.linear_1", "t_embedder.mlp.0")]
    pairs += [("blocks.0.norm1.emb.timestep_embedder.linear_2", "t_embedder.mlp.2")]
    pairs += [("blocks.0.norm1.emb.class_embedder", "y_embedder")]
    for i in range(2):
        of_block = [("norm1.linear", "adaLN_modulation.1"), ("attn1.to_out.0", "attn.proj")]
        of_block += [("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2")]
        pairs += [(f"blocks.{i}.{a}", f"blocks.{i}.{b}") for a, b in of_block]
    out = {}
    for name, a in made.items():
        if name.startswith("blocks.1.norm1.emb"):
            continue
        for theirs, own in pairs:
            name = name.replace(theirs + ".", own + ".", 1) if name.startswith(theirs + ".") else name
        out[name] = a
    return out


@pytest.mark.slow
def test_the_authors_file_of_dit(tmp_path):
    """Their network is diffusers' but for the frequencies of time and the epsilon of the norm before an MLP; torch.save's file."""
    other = transformer(num_attention_heads=6, attention_head_dim=64, num_layers=2, norm_eps=1e-6)
    for block in other.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    state = authors_names({name: a.numpy() for name, a in other.state_dict().items()})
    assert {name.split(".")[0] for name in state} == {"x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer"}
    state["pos_embed"] = other.pos_embed.pos_embed.numpy()
    saved = {name: torch.from_numpy(a) for name, a in state.items()}
    torch.save({"ema": saved, "opt": {}, "model": {}}, tmp_path / "DiT-S-2-64x64.pt")
    workdir.write_imported(tmp_path / "out", source.read(tmp_path / "DiT-S-2-64x64.pt"))
    with pytest.raises(jd.InputError, match="first_stage"):  # such a file has none
        jd.load(tmp_path / "out")
    vae(**FOUR_LEVELS).save_pretrained(tmp_path / "vae")
    workdir.write_imported(tmp_path / "out" / "first_stage", source.read(tmp_path / "vae"))
    assert jd.load(tmp_path / "out").shape == (64, 64, 3)
    with pytest.raises(jd.InputError, match="pos_embed is not the sines"):
        dit.of_original(state | {"pos_embed": 1 - state["pos_embed"]})
    config, params = dit.of_original(state)
    assert config.data.shape == (64, 64, 3) and config.model.heads == 6 and config.model.classes == 5
    run = jax.jit(models.build(config.model).apply)
    x, labels = image(3, 8, 8, 4), np.array([0, -1, 3])
    for t in (0, 400, 999):
        with torch.no_grad():
            want = other(first(x), torch.full((3,), t), torch.from_numpy(labels % 6)).sample
        level = jd.schedules.linear_beta()(jnp.full((3, 1, 1, 1), (t + 1) / 1000, jnp.float32))
        close(run(params, x, jd.logsnr(level), {"label": labels}), last(want))


@pytest.mark.slow
def test_the_compvis_file_of_an_autoencoder(tmp_path):
    """Its names and 1x1 convolutions, as diffusers' own converter reads them; the architecture is read off the shapes."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    other = vae(block_out_channels=(32, 32, 64), norm_num_groups=32)
    other.save_pretrained(tmp_path)
    config, params = autoencoder.of_diffusers(*folder.read(tmp_path))
    state = mapping.save(params, autoencoder.compvis_rows(params))
    assert state["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1) and "decoder.up.1.upsample.conv.weight" in state
    torches = {f"first_stage_model.{name}": torch.from_numpy(a) for name, a in state.items()}
    converted = convert_ldm_vae_checkpoint(dict(torches), {"down_block_types": [0] * 3, "up_block_types": [0] * 3})
    assert all(torch.equal(converted[name].reshape(a.shape), a) for name, a in other.state_dict().items())
    whole = torches | {"model.diffusion_model.x": torch.zeros(3)}
    torch.save({"state_dict": whole, "global_step": 1}, tmp_path / "v1.ckpt")
    again, params_again = autoencoder.of_compvis(files.read(tmp_path / "v1.ckpt"), 32, scale=0.31)
    assert again.to_dict() == config.to_dict()
    jax.tree.map(np.testing.assert_array_equal, params, params_again)
    with pytest.raises(jd.InputError, match=r"encoder\.down\.0\.block\.0\.conv1\.weight is missing: the file holds no autoencoder"):
        autoencoder.of_compvis({"conv_in.weight": np.zeros(3)})


@pytest.mark.slow
def test_old_names_of_attention_are_read(tmp_path):
    """As in the files of the published ones, which are of 2022."""
    other = vae()
    other.save_pretrained(tmp_path)
    theirs, state = folder.read(tmp_path)
    params = autoencoder.of_diffusers(theirs, state)[1]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, a in state.items():
        for new, was in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        renamed[name] = a
    assert renamed.keys() != state.keys()
    jax.tree.map(np.testing.assert_array_equal, params, autoencoder.of_diffusers(theirs, renamed)[1])


@pytest.mark.slow
def test_embedders_of_their_own_are_refused(tmp_path):
    other = random(diffusers.DiTTransformer2DModel(**DIT))
    other.save_pretrained(tmp_path)
    with pytest.raises(jd.InputError, match=r"transformer_blocks\.[12]\.norm1\.emb\S+ differs from transformer_blocks\.0\."):
        dit.of_diffusers(*folder.read(tmp_path), {})


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """(their pipeline, its folder, our workdir made of it)."""
    place = tmp_path_factory.mktemp("pipeline")
    scheduler = diffusers.DDIMScheduler(beta_start=2e-4, beta_end=0.02, clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer=transformer(), vae=vae(), scheduler=scheduler)
    pipe.save_pretrained(place / "theirs")
    workdir.write_imported(place / "ours", source.read(place / "theirs"))
    return pipe, place / "theirs", place / "ours"


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 4])
def test_a_whole_ddim_run_of_the_pipeline(pipeline, steps):
    """Their pipeline and ours from the same noise, class-conditional without guidance: latents to 1e-4, pixels to one value.

    Their guidance leaves the learned variance's channels alone, as ours does, and so is the same at 2.5 too.
    """
    pipe, _, workdir = pipeline
    run = jd.load(workdir)
    assert run.shape == (32, 32, 3) and run.config.model.classes == 5
    noise, labels = image(3, 8, 8, 4, seed=2), [1, 4, 0]
    levels = jd.grid(jd.schedules.linear_beta(1000, 2e-4, 0.02), jd.times.strided(1000, steps))
    pipe.scheduler.set_timesteps(steps)
    draw = jax.jit(jd.sample)
    for guidance in (1.0, 2.5):
        x = first(noise)
        null = torch.tensor([5] * 3)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                cond, none = (pipe.transformer(x, t.expand(3), k).sample[:, :4] for k in (torch.tensor(labels), null))
                x = pipe.scheduler.step(none + guidance * (cond - none), t, x).prev_sample
            pixels = (pipe.vae.decode(x / 0.31).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        z = draw(jax.random.key(0), solvers.ddim(run.denoiser(np.array(labels), guidance)), jnp.asarray(noise), levels)
        close(z, last(x))
        ours = np.asarray(run.codec.decode(z)).astype(int)
        assert ours.shape == (3, 32, 32, 3) and ours.std() > 20
        assert np.abs(ours - np.round(255 * pixels)).max() <= 1


@pytest.mark.slow
def test_what_the_workdir_draws_and_encodes(pipeline):
    pipe, _, workdir = pipeline
    run = jd.load(workdir)
    images = run.generate(jax.random.key(0), 3, steps=4, label=[0, 1, 2], guidance=2.0)
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 10
    again = run.generate(jax.random.key(0), 3, steps=4, label=[0, 1, 2], guidance=2.0)
    np.testing.assert_array_equal(images, again)
    # The posterior of theirs, drawn from: 512 draws of one image have its mean and deviation, times the scale.
    codec = jd.load_codec(workdir / "first_stage")
    x = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3)).astype(np.uint8)
    with torch.no_grad():
        posterior = pipe.vae.encode(first(x / np.float32(127.5) - 1)).latent_dist
    z = np.asarray(codec.encode(jax.random.key(1), jnp.asarray(np.repeat(x, 512, 0))))
    mean, std = (0.31 * last(a)[0] for a in (posterior.mean, posterior.std))
    assert z.shape == (512, 2, 2, 4)
    np.testing.assert_array_less(np.abs(z.mean(0) - mean), 5 * std / 512**0.5)
    np.testing.assert_allclose(z.std(0), std, rtol=5 / 1024**0.5)


@pytest.mark.slow
def test_a_pipeline_that_is_not_ours_is_refused_in_one_line(pipeline, tmp_path):
    _, theirs, _ = pipeline
    (tmp_path / "model_index.json").write_bytes((theirs / "model_index.json").read_bytes())

    def refused(text, name, **changes):
        config = json.loads((theirs / name).read_text()) | changes
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        for part in ("vae", "transformer", "scheduler"):
            (tmp_path / part).mkdir(exist_ok=True)
            for file in (theirs / part).iterdir():
                (tmp_path / part / file.name).write_bytes(file.read_bytes())
        (tmp_path / name).write_text(json.dumps(config))
        with pytest.raises(jd.InputError, match=text) as caught:
            dit.read(tmp_path)
        assert "\n" not in str(caught.value)

    refused("beta_schedule='sigmoid'", "scheduler/scheduler_config.json", beta_schedule="sigmoid")
    refused("prediction_type='flow_prediction'", "scheduler/scheduler_config.json", prediction_type="flow_prediction")
    refused("activation_fn='geglu'", "transformer/config.json", activation_fn="geglu")
    refused("of a UNet2DModel", "transformer/config.json", _class_name="UNet2DModel")
    refused("16 out is not read; allowed: 4, 8", "transformer/config.json", out_channels=16)
    refused(r"proj_out_2\.\w+ has shape", "transformer/config.json", patch_size=4)
    refused(r"transformer_blocks\.3\.\S+ is missing", "transformer/config.json", num_layers=4)
    refused(r"transformer_blocks\.2\.\S+ belongs to nothing", "transformer/config.json", num_layers=2)
    refused("use_quant_conv=False", "vae/config.json", use_quant_conv=False)
    refused("shift_factor=0.1", "vae/config.json", shift_factor=0.1)
    refused("down_block_types", "vae/config.json", down_block_types=["AttnDownEncoderBlock2D"] * 3)
