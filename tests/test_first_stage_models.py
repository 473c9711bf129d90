"""AutoencoderVQ and the patch discriminator: sizes by hand, what encode and decode are, which numbers are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdiff import InputError, codebook, models
from jaxdiff.models import AutoencoderKL, AutoencoderVQ, PatchDiscriminator

TINY = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "latent_channels": 4, "out_channels": 1, "codes": 6, "code_channels": 2}


def count(model, channels=3):
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    return sum(a.size for a in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), image)))


def random(model, *shape):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape), a.dtype), shapes)


def image(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def conv(width, before, after):
    return width**2 * before * after + after


def block(before, after):
    around = conv(1, before, after) if before != after else 0
    return 2 * before + conv(3, before, after) + 2 * after + conv(3, after, after) + around


def middle(width):
    return 2 * block(width, width) + 2 * width + 4 * conv(1, width, width)


def ways(widths, blocks, image, latents, encoded):
    """The parameters of an encoder and a decoder, written down from latent diffusion's description."""
    first, last = widths[0], widths[-1]
    down = sum(conv(3, w, w) for w in widths[:-1])
    encoder = conv(3, image, first) + down + middle(last) + 2 * last + conv(3, last, encoded)
    for before, after in zip((first, *widths), widths, strict=False):
        encoder += block(before, after) + (blocks - 1) * block(after, after)
    up = sum(conv(3, w, w) for w in widths[1:])
    decoder = conv(3, latents, last) + up + middle(last) + 2 * first + conv(3, first, image)
    for before, after in zip((last, *widths[::-1]), widths[::-1], strict=False):
        decoder += block(before, after) + blocks * block(after, after)
    return encoder + decoder


def test_parameters_are_those_counted_by_hand():
    quantised = ways((128, 256, 512), 2, 3, 3, 3) + conv(1, 3, 3) + conv(1, 3, 3) + 8192 * 3
    assert count(AutoencoderVQ()) == quantised == 55_322_782  # Rombach et al. 2022, table 8: 55.3 M
    gaussian = ways((128, 256, 512), 2, 3, 3, 6) + conv(1, 6, 6) + conv(1, 3, 3)
    assert count(AutoencoderKL(multipliers=(1, 2, 4), latent_channels=3)) == gaussian == 55_312_063
    stable = ways((128, 256, 512, 512), 2, 3, 4, 8) + conv(1, 8, 8) + conv(1, 4, 4)
    assert count(AutoencoderKL()) == stable == 83_653_863


def test_what_is_encoded_is_not_quantised_and_what_is_decoded_is_as_given():
    model = AutoencoderVQ(**TINY)
    params, x = random(model, 1, 8, 8, 1), image(2, 8, 8, 1)
    book = params["params"]["codebook"]
    assert book.shape == (6, 2) and book.dtype == jnp.float32
    z = model.apply(params, x, method="encode")
    assert z.shape == (2, 4, 4, 2)
    z_q, indices = codebook.quantise(book, z)
    assert len(np.unique(indices)) > 1 and jnp.abs(z - z_q).max() > 0.05
    whole = model.apply(params, x)
    assert whole.shape == x.shape
    np.testing.assert_allclose(whole, model.apply(params, z_q, method="decode"), atol=1e-5)
    assert jnp.abs(whole - model.apply(params, z, method="decode")).max() > 0.01


def test_codes_begin_uniform_around_zero():
    model = AutoencoderVQ(**TINY | {"codes": 500})
    book = jax.jit(lambda key: model.init(key, jnp.zeros((1, 4, 4, 1)))["params"]["codebook"])(jax.random.key(0))
    assert jnp.abs(book).max() <= 1 / 500
    np.testing.assert_allclose(book.std() * 500, 3**-0.5, rtol=0.1)  # a uniform number's between -1 and 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"codes": 1}, "model.codes=1 is out of range; it is a whole number, at least 2"),
        ({"code_channels": 0}, "model.code_channels=0 is out of range; it is a whole number, at least 1"),
        ({"scale": -1.0}, "model.scale=-1.0 is out of range; it is a finite number above 0"),
        ({"groups": 3}, "model.groups=3 does not divide the channels of every level, multiples of 8"),
        ({"heads": 2}, "model.heads is unknown to model.name='AutoencoderVQ'"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(fields, text):
    with pytest.raises(InputError, match=text) as caught:
        models.build(ConfigDict({"name": "AutoencoderVQ", **TINY, **fields}))
    assert "\n" not in str(caught.value)


def test_a_codebook_is_no_field_of_the_gaussian_autoencoder():
    with pytest.raises(InputError, match=r"model\.codes is unknown to model.name='AutoencoderKL'"):
        models.build(ConfigDict({"name": "AutoencoderKL", "codes": 8}))
    assert models.build(ConfigDict({"name": "AutoencoderKL"})).scale is None  # measured


def test_the_discriminators_parameters_are_those_counted_by_hand():
    weights = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 1)
    assert count(PatchDiscriminator()) == weights + 64 + 1 + 2 * (128 + 256 + 512) == 2_765_633


def test_a_logit_a_patch():
    def shape(layers, *of):
        model = PatchDiscriminator(4, layers)
        return jax.eval_shape(
            lambda x: model.init_with_output(jax.random.key(0), x)[0], jax.ShapeDtypeStruct(of, jnp.float32)
        ).shape

    assert shape(3, 2, 256, 256, 3) == (2, 30, 30, 1)  # pix2pix
    assert shape(3, 2, 32, 32, 1) == (2, 2, 2, 1)
    assert shape(2, 2, 12, 20, 1) == (2, 1, 3, 1)
    with pytest.raises(ValueError, match=r"3 layers needs sizes of 24 at least, got .16, 16."):
        shape(3, 2, 16, 16, 1)


def test_the_discriminator_norms_by_the_batch_at_hand():
    """A norm takes away the mean and the scale of all images together: an affine map of what it is given changes nothing."""
    model = models.discriminator.BatchNorm()
    h = image(3, 5, 5, 4)
    params = {"params": {"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}}
    out = model.apply(params, h)
    np.testing.assert_allclose(out.mean((0, 1, 2)), [0, 1, 2, 3], atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1, 2)), [1, 2, 3, 4], rtol=1e-4)
    np.testing.assert_allclose(model.apply(params, 7 * h - 3), out, atol=1e-3)
    alone = model.apply(params, h[:1])
    assert jnp.abs(alone - out[:1]).max() > 0.1
