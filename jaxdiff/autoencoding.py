"""Training an autoencoder: how far its reconstruction is off, what keeps its latents in bounds, and a discriminator against it.

Every term is a mean over the entries of an image where published code sums over them: Adam does not see a common factor. Sources:
van den Oord et al. 2017 (VQ-VAE); Esser et al. 2021 (VQGAN), section 3; Rombach et al. 2022, section 3.1 and appendix G.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdiff import codebook as codebooks
from jaxdiff import first_stage, models
from jaxdiff.codec import Codec
from jaxdiff.data import random_flip
from jaxdiff.errors import InputError
from jaxdiff.names import named, parse, whole

# What a config may name, by the key of `process` that names it.
LOSSES = ("l1", "l2")
REGULARISERS = ("kl", "codebook", "codebook_ema")
PERCEPTUAL = ("lpips",)
DISCRIMINATORS = ("patch",)
__all__ = [*LOSSES, *REGULARISERS, *PERCEPTUAL, *DISCRIMINATORS]

Array = jax.Array
Params = Any
Each = Callable[[Array, Array], Array]  # images and their reconstructions [B, H, W, C] at [-1, 1] -> how far each is off, [B]

# The weight of the discriminator's say is at most this. Source: VQGAN's public code.
MOST = 1e4
# Steps are counted in int32.
LAST = 2**31 - 1


class Autoencoding(NamedTuple):
    """An autoencoder's training: the first five fields as an `Experiment`'s, which are all that training knows.

    `params` are {"params": the autoencoder's} and, with a discriminator, "discriminator" beside. `extra` holds how many steps were
    taken, the use of a codebook's codes, and the perceptual network's weights, of those there are. `codec(params) -> Codec`, of
    latents at their own scale where model.scale says none. `model` is the network, `pixel` the codec that makes of uint8 what it is
    trained on, `shape` one image's (H, W, C).
    """

    init: Callable[[Array], Params]
    prepare: Callable[[Any, Array, dict[str, Array]], dict[str, Any]]
    loss: Callable[[Params, Any, Array, dict[str, Any]], tuple[Array, Any, dict[str, Array]]]
    extra: dict[str, Any]
    settle: Callable[[Array, Params, dict[str, Any]], tuple[Params, dict[str, Any]]]
    codec: Callable[[Params], Codec]
    model: Any
    pixel: Codec
    shape: tuple[int, ...]


class Encoded(NamedTuple):
    """What the decoder is given, z; what the regulariser adds to each image's loss [B]; its metrics; the codes' use, or None."""

    z: Array
    penalty: Array
    told: dict[str, Array]
    usage: codebooks.Usage | None = None


class Regulariser(NamedTuple):
    """What keeps latents in bounds, for the `network` of that name.

    `encode(params, found, example, usage, key) -> Encoded`, where `found` is what the network's encoder says of example["x"].
    `settle(key, codes, usage) -> (codes, usage)`, None where nothing is to be settled.
    """

    network: str
    encode: Callable[[Params, Any, dict[str, Array], Any, Array], Encoded]
    settle: Callable[[Array, Array, codebooks.Usage], tuple[Array, codebooks.Usage]] | None = None


class Perceptual(NamedTuple):
    """A distance `each(weights, x, y) -> [B]` by a network's features, and its weight in the loss."""

    each: Callable[[Any, Array, Array], Array]
    weights: Any
    weight: float


class Discriminator(NamedTuple):
    """The second player: its network, when it enters, and its say in the autoencoder's loss."""

    network: models.PatchDiscriminator
    weight: float
    start: int


def l1(x: Array, y: Array) -> Array:
    """The mean absolute difference of each image [B, ...], [B]."""
    return jnp.abs(x - y).mean(_entries(x))


def l2(x: Array, y: Array) -> Array:
    """The mean squared difference of each image [B, ...], [B]."""
    return jnp.square(x - y).mean(_entries(x))


def normal_kl(mean: Array, logvar: Array) -> Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over the entries of each latent [B, ...], [B].

    Source: Kingma and Welling 2014, appendix B.
    """
    return 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).sum(_entries(mean))


def hinge(real: Array, fake: Array) -> Array:
    """The discriminator's loss of each image, [B], from its logits [B, ...] of real images and of reconstructions.

    Source: Lim and Ye 2017 (geometric GAN); half of it, as in VQGAN's public code.
    """
    return 0.5 * (jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)).mean(_entries(real))


def generator(fake: Array) -> Array:
    """The autoencoder's adversarial loss of each image, [B], from the logits [B, ...] of reconstructions. Source: as `hinge`."""
    return -fake.mean(_entries(fake))


def adaptive(reconstruction: Array, adversarial: Array) -> Array:
    """How much the generator's loss weighs, from both losses' gradients by the decoder's last layer. Source: VQGAN eq. 7."""
    return jnp.clip(jnp.linalg.norm(reconstruction) / (jnp.linalg.norm(adversarial) + 1e-6), 0, MOST)


def kl(weight: float = 1e-6) -> Regulariser:
    """A Gaussian posterior, drawn from, with `weight` on its KL divergence from the standard normal.

    In the loss both the KL, summed over a latent, and the reconstruction are divided by the image's entries. Raises InputError for
    a weight below 0. Source: Rombach et al. 2022, appendix G.
    """
    _at_least("weight", weight, 0)

    def encode(params, found, example, usage, key):
        mean, logvar = found
        each = normal_kl(mean, logvar)
        z = mean + jnp.exp(logvar / 2) * example["eps"]
        return Encoded(z, weight * each / math.prod(example["x"].shape[1:]), {"kl": each})

    return Regulariser("AutoencoderKL", encode)


def codebook(commitment: float = 0.25, revive: float = 0.01) -> Regulariser:
    """A codebook that follows the gradient of its own loss; `commitment` is the weight of the encoder's (VQ-VAE eq. 3).

    Codes whose share of use over some hundred steps is below `revive` of 1/K move to an encoder's output; 0: none do. Raises
    InputError for numbers out of range.
    """

    def settle(key, codes, usage):
        usage, _ = codebooks.average(usage, codes, 0.99)
        return _revived(key, codes, usage, revive)

    return Regulariser("AutoencoderVQ", _vq(commitment, revive, by_gradient=True), settle)


def codebook_ema(decay: float = 0.99, commitment: float = 0.25, revive: float = 0.01) -> Regulariser:
    """A codebook of moving averages of what falls to each code (VQ-VAE eq. 6 to 8); all else as `codebook`."""
    if not (_number(decay) and 0 <= decay < 1):
        raise InputError(f"decay={decay!r} is out of range; it is at least 0 and below 1")

    def settle(key, codes, usage):
        usage, codes = codebooks.average(usage, codes, decay)
        return _revived(key, codes, usage, revive)

    return Regulariser("AutoencoderVQ", _vq(commitment, revive, by_gradient=False), settle)


def _vq(commitment: float, revive: float, by_gradient: bool) -> Callable[..., Encoded]:
    _at_least("commitment", commitment, 0)
    if not (_number(revive) and 0 <= revive < 1):
        raise InputError(f"revive={revive!r} is out of range; it is at least 0 and below 1")

    def encode(params, z, example, usage, key):
        quantised, indices = codebooks.quantise(params["params"]["codebook"], z)
        after = codebooks.tally(usage, z, indices, key)
        counts = after.batch_counts - usage.batch_counts
        told = {"commitment": codebooks.commitment(z, quantised)}
        told |= {"perplexity": codebooks.perplexity(counts), "codes_used": codebooks.used(counts)}
        penalty = commitment * told["commitment"]
        if by_gradient:
            penalty = penalty + codebooks.pull(z, quantised)
        return Encoded(codebooks.straight_through(z, quantised), penalty, told, after)

    return encode


def _revived(key: Array, codes: Array, usage: codebooks.Usage, least: float) -> tuple[Array, codebooks.Usage]:
    if least:
        usage, codes = codebooks.revive(key, usage, codes, least)
    return codes, usage


def lpips(vgg: str, linear: str, weight: float = 1.0) -> Perceptual:
    """LPIPS by the files of VGG's weights and of its linear layers (`jaxdiff.interop.lpips.read`).

    Raises InputError where they cannot be read. Source: Zhang et al. 2018.
    """
    from jaxdiff.interop import lpips as files
    from jaxdiff.models.lpips import lpips as distance

    _at_least("weight", weight, 0)
    return Perceptual(distance, files.read(vgg, linear), weight)


def patch(weight: float = 0.5, start: int = 50_000, channels: int = 64, layers: int = 3) -> Discriminator:
    """A patch discriminator that enters after `start` steps, `weight` on its adaptive say in the autoencoder's loss.

    Raises InputError for numbers out of range. Source: VQGAN eq. 5 to 7; Isola et al. 2017 for the network.
    """
    _at_least("weight", weight, 0)
    for name, value, least in (("start", start, 0), ("channels", channels, 1), ("layers", layers, 1)):
        if not whole(value, least):
            raise InputError(f"{name}={value!r} is out of range; it is a whole number, at least {least}")
    if start > LAST:
        raise InputError(f"start={start} is out of range; steps are counted up to {LAST}; leave the discriminator out, if never")
    return Discriminator(models.PatchDiscriminator(channels, layers), weight, start)


def build(config, shape: tuple[int, ...]) -> Autoencoding:
    """The training of a config's autoencoder for images of `shape` (H, W, C); `experiment.build` calls it.

    Raises InputError for a name, number or combination that cannot work, before anything is compiled.
    """
    process, model = config.process, models.build(config.model)
    _check_sizes(config, model, shape)
    distance: Each = _named(process.get("loss", "l1"), "process.loss", LOSSES)
    regulariser = _regulariser(config)
    perceptual = _optional(process, "perceptual", PERCEPTUAL)
    player = _optional(process, "discriminator", DISCRIMINATORS)
    image, key = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.random.key(0)
    if perceptual is not None:
        _fits(config, "perceptual", perceptual.each, perceptual.weights, image, image)
    if player is not None:
        _fits(config, "discriminator", player.network.init, key, image)
    pixel = first_stage.of_config(config.data.codec)
    latent = jax.eval_shape(lambda: encoded(model, model.init(jax.random.key(0), jnp.zeros((1, *shape))), jnp.zeros((1, *shape))))

    def init(key: Array) -> Params:
        params = model.init(key, jnp.zeros((1, *shape)))
        second = {} if player is None else {"discriminator": _player(player, jax.random.fold_in(key, 1), shape)}
        return {"params": params["params"], **second}

    def prepare(extra, key, batch):
        k_flip, k_eps = jax.random.split(key)
        image = random_flip(k_flip, batch["image"]) if config.data.flip else batch["image"]
        example = {"x": pixel.encode(key, image)}
        if regulariser.network == "AutoencoderKL":
            example["eps"] = jax.random.normal(k_eps, (len(image), *latent[0].shape[1:]))
        return example

    def off(extra, x: Array, y: Array) -> tuple[Array, dict[str, Array]]:
        """How far reconstructions are off, as the decoder is to see it: [B], and its parts."""
        each = distance(x, y)
        if perceptual is None:
            return each, {"reconstruction": each}
        seen = perceptual.each(extra["perceptual"], x, y)
        return each + perceptual.weight * seen, {"reconstruction": each, "perceptual": seen}

    def loss(params, extra, key, example):
        k_encode, k_decode, k_tally = jax.random.split(key, 3)
        x = example["x"]
        found = encoded(model, params, x, k_encode)
        coded = regulariser.encode(params, found, example, extra.get("usage"), k_tally)
        decode = functools.partial(_decode_by, model, params, coded.z, k_decode)
        # The discriminator's say is weighed by gradients of the last layer alone: pulling back to it costs one convolution.
        y, to_last = (decode(), None) if player is None else jax.vjp(decode, last_layer(params))
        each, to_image, told = jax.vjp(functools.partial(off, extra, x), y, has_aux=True)
        each, told = each + coded.penalty, told | coded.told
        if coded.usage is not None:
            extra = extra | {"usage": coded.usage}
        if player is not None:
            pulls = jax.tree.map(lax.stop_gradient, (to_last, to_image))
            play = functools.partial(_play, player, params["discriminator"], pulls, x)
            # Before it enters, the second player costs nothing.
            adversarial, of_players = lax.cond(extra["step"] >= player.start, play, _sit_out, y)
            each, told = each + adversarial, told | of_players
        return each, extra, told

    def settle(key, params, extra):
        extra = extra | {"step": extra["step"] + 1}
        if regulariser.settle is None:
            return params, extra
        codes, usage = regulariser.settle(key, params["params"]["codebook"], extra["usage"])
        return params | {"params": params["params"] | {"codebook": codes}}, extra | {"usage": usage}

    def codec(params: Params) -> Codec:
        return first_stage.codec_of(model, {"params": params["params"]}, pixel, model.scale)

    extra: dict[str, Any] = {"step": jnp.zeros((), jnp.int32)}
    extra |= {} if perceptual is None else {"perceptual": perceptual.weights}
    extra |= {} if regulariser.settle is None else {"usage": _unused(model)}
    return Autoencoding(init, prepare, loss, extra, settle, codec, model, pixel, shape)


def encoded(model: Any, params: Params, x: Array, key: Array | None = None) -> Any:
    """What the encoder says of images x; a key turns dropout on."""
    return model.apply({"params": params["params"]}, x, key is not None, method="encode", rngs=_dropout(key))


def decoded(model: Any, params: Params, z: Array, key: Array | None = None) -> Array:
    """The images that the decoder makes of latents z; a key turns dropout on."""
    return model.apply({"params": params["params"]}, z, key is not None, method="decode", rngs=_dropout(key))


def reconstructed(model: Any, params: Params, x: Array) -> tuple[Array, Array | None]:
    """(images through the autoencoder, which codes they became, None without a codebook); of a posterior its mean."""
    found = encoded(model, params, x)
    if not isinstance(model, models.AutoencoderVQ):
        return decoded(model, params, found[0]), None
    z, indices = codebooks.quantise(params["params"]["codebook"], found)
    return decoded(model, params, z), indices


def last_layer(params: Params) -> Array:
    """The kernel of the decoder's last convolution."""
    return params["params"]["decoder"]["conv_out"]["kernel"]


def _decode_by(model: Any, params: Params, z: Array, key: Array, last: Array | None = None) -> Array:
    """The decoder with another kernel in its last layer, where one is given."""
    network = params["params"]
    if last is not None:
        decoder = network["decoder"]
        network = network | {"decoder": decoder | {"conv_out": decoder["conv_out"] | {"kernel": last}}}
    return decoded(model, {"params": network}, z, key)


def _play(player: Discriminator, params: Params, pulls: tuple[Callable, Callable], x: Array, y: Array):
    """What the discriminator adds to each image's loss, and metrics; `pulls` go from y to the last layer, and from the losses to y.

    Two players in one loss: each one's parameters meet the gradient of its own loss alone, the other's are held.
    """
    to_last, to_image = pulls

    def says(params, images):
        return player.network.apply({"params": params}, images)

    def fooled(y):
        return generator(says(lax.stop_gradient(params), y))

    held, share = lax.stop_gradient(y), jnp.full(len(y), 1 / len(y))  # of each image in the mean loss
    _, to_fooled = jax.vjp(fooled, held)
    by_last = (to_last(*pull(share))[0] for pull in (to_image, to_fooled))
    weight = player.weight * lax.stop_gradient(adaptive(*by_last))
    each = fooled(y)
    against = hinge(says(params, x), says(params, held))
    told = {"generator": each, "discriminator": against, "adversarial_weight": jnp.full_like(each, weight)}
    return weight * each + against, told


def _sit_out(y: Array):
    zeros = jnp.zeros(len(y), jnp.float32)
    return zeros, {"generator": zeros, "discriminator": zeros, "adversarial_weight": zeros}


def _unused(model: Any) -> codebooks.Usage:
    # Arrays of their own: the step donates each, and a buffer may be donated only once.
    return jax.tree.map(jnp.array, codebooks.start(model.codes, model.code_channels))


def _player(player: Discriminator, key: Array, shape: Sequence[int]) -> Params:
    return player.network.init(key, jnp.zeros((1, *shape)))["params"]


def _entries(x: Array) -> tuple[int, ...]:
    """All axes but the batch's."""
    return tuple(range(1, x.ndim))


def _dropout(key: Array | None) -> dict[str, Array] | None:
    return None if key is None else {"dropout": key}


def _named(text: Any, key: str, allowed: Sequence[str]) -> Any:
    """What a config's `key` names, of the names that are `allowed` there."""
    here = sys.modules[__name__]
    parse(here, text, key, allowed)
    return named(here, text if "(" in str(text) or key == "process.loss" else f"{text}()", key)


def _optional(process, name: str, allowed: Sequence[str]) -> Any:
    return _named(process[name], f"process.{name}", allowed) if process.get(name, "") else None


def _regulariser(config) -> Regulariser:
    text, name = config.process.regulariser, config.model.name
    regulariser = _named(text, "process.regulariser", REGULARISERS)
    if regulariser.network != name:
        fits = "kl" if name == "AutoencoderKL" else "codebook, codebook_ema"
        raise InputError(f"process.regulariser={text!r} is of {regulariser.network}; allowed with model.name={name!r}: {fits}")
    return regulariser


def _check_sizes(config, model: Any, shape: tuple[int, ...]) -> None:
    """Raises InputError where images of `shape` do not fit the network, or the codec makes no pixels at [-1, 1] of them."""
    least, reason = models.checks.divisor(model)
    if any(n % least for n in shape[:-1]):
        raise InputError(f"data.shape={shape} does not fit {reason}: each size of an image must be divisible by {least}")
    if model.out_channels != shape[-1]:
        raise InputError(f"model.out_channels={model.out_channels} but images of data.shape={shape} have {shape[-1]} channel(s)")
    if str(config.data.codec) not in ("pixels", "pixels()"):
        raise InputError(f"data.codec={config.data.codec!r} is not what an autoencoder is trained on; allowed: pixels")


def _fits(config, name: str, function: Callable, *args: Any) -> None:
    """Raises InputError where what config.process names does not take such images."""
    try:
        jax.eval_shape(function, *args)
    except ValueError as error:
        text, shape = config.process[name], tuple(config.data.shape)
        raise InputError(f"process.{name}={text!r} does not fit data.shape={shape}: {' '.join(str(error).split())}") from error


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at_least(name: str, value: Any, least: float) -> None:
    if not (_number(value) and value >= least):
        raise InputError(f"{name}={value!r} is out of range; it is a finite number, at least {least:g}")
