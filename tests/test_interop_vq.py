"""AutoencoderVQ in the two foreign layouts, written and read again without torch."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdiff import models
from jaxdiff.errors import InputError
from jaxdiff.interop import autoencoder, files, folder, mapping, source, workdir
from jaxdiff.training import checkpoint

VQ = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "latent_channels": 3, "codes": 7, "code_channels": 2, "groups": 32}


@pytest.fixture(scope="module")
def small():
    """(config, params), no two numbers of which are the same."""
    config = ConfigDict(
        {"data": {"shape": (16, 16, 3)}, "model": {"name": "AutoencoderVQ", **VQ, "scale": 0.5, "dtype": "float32"}}
    )
    model = models.build(config.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    rng = np.random.default_rng(1)
    return config, jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)


def same_model(config, want, **changes):
    """All that is said of the network is the same, but for the changes."""
    built, wanted = (models.build(c.model) for c in (config, want))
    assert built == wanted.clone(**changes)


def test_a_folder_of_vq_model_there_and_back(small, tmp_path):
    config, params = small
    folder.write(tmp_path / "vqvae", *autoencoder.to_diffusers(config, params))
    written = folder.read_json(tmp_path / "vqvae" / "config.json")
    assert written["_class_name"] == "VQModel" and (written["num_vq_embeddings"], written["vq_embed_dim"]) == (7, 2)
    state = files.read(folder.weights(tmp_path / "vqvae"))
    np.testing.assert_array_equal(state["quantize.embedding.weight"], params["params"]["codebook"])
    assert state["encoder.conv_out.weight"].shape[0] == 3 and state["quant_conv.weight"].shape == (2, 3, 1, 1)
    read = source.read(tmp_path / "vqvae")
    assert read.family == "diffusers' VQModel" and read.config.data.shape == (16, 16, 3) and read.notes == ()
    same_model(read.config, config)
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    workdir.write_imported(tmp_path / "w", read)
    assert checkpoint.restore_meta(tmp_path / "w")[1].model.name == "AutoencoderVQ"


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_file_of_latent_diffusion_with_a_codebook(small, tmp_path, prefix):
    """Which of the two autoencoders a file holds, its codebook tells; its latents are not scaled unless it is said."""
    config, params = small
    state = {f"{prefix}{name}": a for name, a in mapping.save(params, autoencoder.compvis_rows(params)).items()}
    assert f"{prefix}quantize.embedding.weight" in state and f"{prefix}encoder.down.1.block.0.nin_shortcut.weight" in state
    files.write(tmp_path / "model.safetensors", state)
    read = source.read(tmp_path / "model.safetensors", image_size=16)
    assert read.config.data.shape == (16, 16, 3) and len(read.notes) == 1 and "1.0, which the file does not say" in read.notes[0]
    same_model(read.config, config, scale=1.0)
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    same_model(autoencoder.of_compvis(state, 16, scale=0.5)[0], config)


def test_what_does_not_fit_is_refused_in_one_line(small):
    config, params = small
    theirs, state = autoencoder.to_diffusers(config, params)

    def refused(text, call):
        with pytest.raises(InputError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)

    refused("norm_type='spatial' is not read; allowed: group",
            lambda: autoencoder.of_diffusers(theirs | {"norm_type": "spatial"}, state))  # fmt: skip
    refused(r"quantize.embedding.weight has shape \(7, 2\), this architecture's has \(9, 2\)",
            lambda: autoencoder.of_diffusers(theirs | {"num_vq_embeddings": 9}, state))  # fmt: skip
    refused(r"is of a VAE, no AutoencoderKL or VQModel", lambda: autoencoder.of_diffusers(theirs | {"_class_name": "VAE"}, state))
    config = config.copy_and_resolve_references()
    for middle in ("BareAttention", "DDPMppAttention", "SpatialTransformer", "Attention(scale=0.5)"):
        config.model.middle_attend = middle
        refused(r"model.middle_attend='.*' has no place in diffusers' VQModel; allowed: Attention, NoAttention",
                lambda: autoencoder.to_diffusers(config, params))  # fmt: skip
    config.model.middle_attend = "Attention"
    assert autoencoder.to_diffusers(config, params)[0] == theirs
    config.model.scale = None
    refused("model.scale=None is measured with latents, and diffusers' VQModel", lambda: autoencoder.to_diffusers(config, params))
    only_down = {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}
    refused("down_block_types=.*up_block_types=.* is not read; allowed: .* at the same levels",
            lambda: autoencoder.of_diffusers(theirs | only_down, state))  # fmt: skip
