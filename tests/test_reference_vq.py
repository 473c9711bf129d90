"""diffusers' VQModel, loaded here from the files that it writes, latent diffusion's names of it, and pix2pix's discriminator.

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
from jaxdiff import codebook, models
from jaxdiff.interop import autoencoder, files, folder, mapping, source, workdir

VQ = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "latent_channels": 6,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.31,
    "num_vq_embeddings": 50,
    "vq_embed_dim": 4,
}


def random(model, seed=0):
    """The module with every tensor drawn at random, matrices to keep the size of what goes through, codes far apart."""
    rng = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, a in state.items():
        scale = 1.0 if "embedding" in name else a[0].numel() ** -0.5 if a.dim() > 1 else 0.3
        state[name] = torch.randn(a.shape, generator=rng) * scale + (1.0 if "norm" in name and a.dim() == 1 else 0.0)
    model.load_state_dict(state)
    return model.eval()


def written(place, **changes):
    """(their model, the folder it wrote)."""
    model = random(diffusers.VQModel(**VQ | changes))
    model.save_pretrained(place)
    return model, place


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return written(tmp_path_factory.mktemp("theirs"))


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


@pytest.mark.slow
def test_vq_model_is_theirs(theirs):
    """What it encodes, which codes are nearest, what it decodes of vectors as given, and all of it in one."""
    other, place = theirs
    config, params = autoencoder.of_diffusers(*folder.read(place))
    model = models.build(config.model)
    assert (model.codes, model.code_channels, model.latent_channels, model.scale) == (50, 4, 6, 0.31)
    assert config.data.shape == (32, 32, 3)
    run = {name: jax.jit(lambda p, a, m=name: model.apply(p, a, method=m)) for name in ("encode", "decode", "__call__")}
    for size in ((16, 16), (8, 24)):
        x = image(2, *size, 3)
        with torch.no_grad():
            z = other.encode(first(x)).latents
            _, _, (_, _, indices) = other.quantize(z)
            loose, whole = other.decode(z, force_not_quantize=True).sample, other(first(x)).sample
        ours = run["encode"](params, x)
        close(ours, last(z))
        which = codebook.nearest(params["params"]["codebook"], ours)
        np.testing.assert_array_equal(np.ravel(which), indices.numpy())
        assert len(np.unique(which)) > 5
        close(run["decode"](params, last(z)), last(loose))
        close(run["__call__"](params, x), last(whole))


@pytest.mark.slow
def test_attention_at_levels_is_theirs(tmp_path):
    """As in VQ-Diffusion's; without attention in the middle, and read from integers or vectors, as in aMUSEd's."""
    attends = {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (32, 96),
        "vq_embed_dim": None,
    }
    other, place = written(tmp_path, **attends, mid_block_add_attention=False, layers_per_block=1, lookup_from_codebook=True)
    config, params = autoencoder.of_diffusers(*folder.read(place))
    model, x = models.build(config.model), image(2, 8, 12, 3)
    assert model.attention == (1,) and model.code_channels == 6
    with torch.no_grad():
        want = other(first(x)).sample
    close(jax.jit(model.apply)(params, x), last(want))
    made, back = autoencoder.to_diffusers(config, params)
    assert all(np.array_equal(back[name], a) for name, a in folder.read(place)[1].items())
    assert (made["down_block_types"], made["up_block_types"]) == tuple(
        list(attends[f"{way}_block_types"]) for way in ("down", "up")
    )


@pytest.mark.slow
def test_vq_models_loss_is_theirs(theirs):
    """Their quantiser's loss, whose weight of the commitment they put, for old files' sake, at the other term."""
    codes, z = image(50, 4), image(3, 5, 6, 4, seed=1)
    other = theirs[0].quantize.__class__(50, 4, beta=0.25, legacy=False)
    other.embedding.weight.data = torch.from_numpy(codes.copy())
    given = first(z).requires_grad_()
    theirs_q, loss, _ = other(given)
    weight = image(3, 5, 6, 4, seed=2)
    (loss + (theirs_q * first(weight)).sum()).backward()

    def ours(codes, z):
        z_q, _ = codebook.quantise(codes, z)
        loss = (codebook.pull(z, z_q) + 0.25 * codebook.commitment(z, z_q)).mean()
        return loss + (codebook.straight_through(z, z_q) * weight).sum(), loss

    (_, got), (to_codes, to_z) = jax.value_and_grad(ours, (0, 1), has_aux=True)(jnp.asarray(codes), jnp.asarray(z))
    np.testing.assert_allclose(got, loss.item(), rtol=1e-5)
    close(50 * to_codes, 50 * other.embedding.weight.grad.numpy(), 1e-5)
    close(to_z, last(given.grad), 1e-6)


@pytest.mark.slow
def test_vq_model_out_and_in_again_is_exact(theirs, tmp_path):
    other, place = theirs
    said, state = folder.read(place)
    config, params = autoencoder.of_diffusers(said, state)
    made, back = autoencoder.to_diffusers(config, params)
    assert back.keys() == state.keys() and all(np.array_equal(back[name], a) for name, a in state.items())
    folder.write(tmp_path / "ours", made, back)
    again = diffusers.VQModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in other.state_dict().items())
    assert {key: said[key] for key in made} == made
    config_again, params_again = autoencoder.of_diffusers(*folder.read(tmp_path / "ours"))
    assert config_again.to_dict() == config.to_dict()
    jax.tree.map(np.testing.assert_array_equal, params, params_again)
    del config.model.scale
    with pytest.raises(jd.InputError, match=r"model.scale=None is measured .*diffusers' VQModel needs its scaling_factor"):
        autoencoder.to_diffusers(config, params)


@pytest.mark.slow
def test_a_folder_becomes_a_workdir(theirs, tmp_path):
    imported = source.read(theirs[1], image_size=64)
    assert imported.family == "diffusers' VQModel" and imported.config.data.shape == (64, 64, 3)
    workdir.write_imported(tmp_path / "out", imported)
    from jaxdiff.training import checkpoint

    _, config, _ = checkpoint.restore_meta(tmp_path / "out")
    assert config.model.name == "AutoencoderVQ" and config.model.codes == 50


@pytest.mark.slow
def test_the_file_of_latent_diffusion(theirs, tmp_path):
    """Its names, as diffusers' own converter reads those of the encoder and the decoder, bare and inside a whole model's file."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    other, place = theirs
    config, params = autoencoder.of_diffusers(*folder.read(place))
    state = mapping.save(params, autoencoder.compvis_rows(params))
    torches = {name: torch.from_numpy(a) for name, a in state.items()}
    converted = convert_ldm_vae_checkpoint(
        {f"first_stage_model.{name}": a for name, a in torches.items()},
        {"down_block_types": [0] * 3, "up_block_types": [0] * 3},
    )
    want = other.state_dict()
    assert torch.equal(torches["quantize.embedding.weight"], want.pop("quantize.embedding.weight"))
    assert all(torch.equal(converted[name].reshape(a.shape), a) for name, a in want.items())
    bare = {"state_dict": torches | {"loss.discriminator.main.0.bias": torch.zeros(3)}}
    whole = {f"first_stage_model.{name}": a for name, a in torches.items()} | {"model.diffusion_model.x": torch.zeros(3)}
    for name, saved in {"bare": bare, "whole": {"state_dict": whole, "global_step": 1}}.items():
        torch.save(saved, tmp_path / f"{name}.ckpt")
        again, params_again = autoencoder.of_compvis(files.read(tmp_path / f"{name}.ckpt"), 32, scale=0.31)
        assert again.to_dict() == config.to_dict()
        jax.tree.map(np.testing.assert_array_equal, params, params_again)
    imported = source.read(tmp_path / "bare.ckpt", image_size=32)
    assert imported.config.model.scale == 1.0 and "with a codebook" in imported.family
    assert imported.notes == (
        "the factor on latents is taken to be as in latent diffusion's own models, 1.0, which the file does not say",
    )


@pytest.mark.slow
def test_what_is_not_read_is_refused_in_one_line(theirs, tmp_path):
    _, place = theirs
    said, state = folder.read(place)

    def refused(text, tensors=state, **changes):
        with pytest.raises(jd.InputError, match=text) as caught:
            autoencoder.of_diffusers(json.loads(json.dumps(said | changes)), tensors)
        assert "\n" not in str(caught.value)

    refused("norm_type='spatial' is not read; allowed: group", norm_type="spatial")
    refused("num_vq_embeddings='many' is out of range; it is a whole number", num_vq_embeddings="many")
    refused("VQModel with down_block_types=", down_block_types=["AttnDownEncoderBlock2D"] * 3)
    refused(r"quantize.embedding.weight has shape .50, 4., this architecture's has .60, 4.", num_vq_embeddings=60)
    refused(r"quantize.embedding.weight has shape .50, 4., this architecture's has .50, 6.", vq_embed_dim=None)
    refused("no AutoencoderKL or VQModel", _class_name="AutoencoderTiny")
    refused("tensor quantize.embedding.weight belongs to nothing", _class_name="AutoencoderKL",
            tensors=state | {"encoder.conv_out.weight": np.zeros((12, 64, 3, 3), np.float32)})  # fmt: skip
    refused("tensor quantize.embedding.weight is missing", {k: a for k, a in state.items() if "quantize" not in k})


def pix2pix(channels, layers):
    """Its 70x70 discriminator in PyTorch: convolutions by 4x4, batch norms in training, LeakyReLU of 0.2."""
    made, before = [torch.nn.Conv2d(3, channels, 4, 2, 1), torch.nn.LeakyReLU(0.2)], channels
    for n in range(1, layers + 1):
        after = channels * min(2**n, 8)
        conv = torch.nn.Conv2d(before, after, 4, 2 if n < layers else 1, 1, bias=False)
        made += [conv, torch.nn.BatchNorm2d(after), torch.nn.LeakyReLU(0.2)]
        before = after
    return random(torch.nn.Sequential(*made, torch.nn.Conv2d(before, 1, 4, 1, 1))).train()


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "size"), [(3, (32, 40)), (2, (24, 25))])
def test_the_patch_discriminator_is_pix2pixs(layers, size):
    other = pix2pix(8, layers)
    state = {name: a.numpy() for name, a in other.state_dict().items() if "running" not in name and "num_batches" not in name}
    names = ["conv_in", *(f"{kind}{n}" for n in range(1, layers + 1) for kind in ("conv", "norm")), "conv_out"]
    tensors: dict = {}
    for name, theirs in zip(names, sorted({int(key.split(".")[0]) for key in state}), strict=True):
        weight, bias = state[f"{theirs}.weight"], state.get(f"{theirs}.bias")
        kernel = {"scale": weight} if "norm" in name else {"kernel": mapping.conv.load(weight)}
        tensors[name] = kernel | ({} if bias is None else {"bias": bias})
    model, x = models.PatchDiscriminator(8, layers), image(4, *size, 3)
    assert jax.tree.map(np.shape, {"params": tensors}) == jax.tree.map(
        lambda a: a.shape, jax.eval_shape(model.init, jax.random.key(0), x)
    )
    with torch.no_grad():
        want = other(first(x)).numpy()
    close(jax.jit(model.apply)({"params": tensors}, x), last(want))
