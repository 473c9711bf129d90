"""Codecs that a config names, among them a trained autoencoder: what makes a diffusion one of latents."""

import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from jaxdiff import checks, codebook, compiling, models, shards
from jaxdiff import mesh as meshes
from jaxdiff.codec import Codec, centred, pixels, standardised
from jaxdiff.errors import InputError
from jaxdiff.names import named, parse
from jaxdiff.tiles import tiled

Array = jax.Array

__all__ = ["autoencoder", "centred", "pixels", "standardised"]

# What train.py adds to data.codec once it has measured it.
MEASURED = ("mean", "std", "digest")


class Stage(NamedTuple):
    """What a codec of latents has besides, its `encode(key, x)` being draw(key, look(x)).

    `look(x)`: uint8 [B, H, W, C] -> what does not change from epoch to epoch, float32 [B, h, w, m]: of a KL autoencoder the
    posterior's mean and log variance (m is twice the channels of z), of a VQ one z before quantisation. `draw(key, seen)` -> z, at
    unit deviation where `scaled`; it carries no parameters. `digest` is of the parameters, `pixels` names the codec of what the
    autoencoder was trained on, and a latent of more than `tile` along an axis is decoded in tiles (0: never).
    """

    look: Callable[[Array], Array]
    draw: Callable[[Array, Array], Array]
    digest: str
    pixels: str
    scaled: bool
    tile: int


class Loaded(NamedTuple):
    """An autoencoder from a workdir."""

    model: Any
    params: Any
    digest: str
    pixels: str


def autoencoder(
    workdir: str,
    scale: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    digest: str | None = None,
    tile: int = 0,
) -> Codec:
    """The codec of the autoencoder in `workdir`, as `load_codec`, kept for the next call while its newest checkpoint is the same.

    Raises InputError where the parameters have another `digest` than the one given.
    """
    from jaxdiff.training import checkpoint  # brings Orbax

    if not checkpoint.place(workdir).is_dir():
        raise InputError(f"data.codec names a first stage {workdir}, which is neither in the run's workdir nor in {Path.cwd()}")
    shift, spread = (None if each is None else tuple(each) for each in (mean, std))
    made = _kept(str(checkpoint.place(workdir)), checkpoint.written(workdir), scale, shift, spread, tile)
    if digest is not None and made.stage.digest != digest:
        raise InputError(
            f"data.codec: the autoencoder in {workdir} has the digest {made.stage.digest[:16]}, and this run was trained with one "
            f"of digest {str(digest)[:16]}; put that one there"
        )
    return made


def load_codec(
    workdir: str | Path,
    scale: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    tile: int = 0,
) -> Codec:
    """The codec of the autoencoder whose newest good checkpoint is in `workdir`, by the average that config.sampling.ema names.

    `encode(key, x)`: uint8 [B, H, W, C] -> z float32 [B, h, w, c], a draw of the posterior (KL) or what is then quantised (VQ);
    `decode(z)` back to uint8. z is the network's less `mean`, over `std` (numbers [c]), or times `scale`; where nothing is given
    times the config's model.scale, and as it is where that is None. Latents of more than `tile` along an axis are decoded in
    tiles that overlap by a quarter (0: whole). Both ways are compiled, and pytrees of the parameters. Source: Rombach et al. 2022,
    section 3.1. Raises InputError where there is no good checkpoint, or one of something else.
    """
    return _codec(_load(workdir), scale, mean, std, tile)


def codec_of(
    model: Any,
    params: Any,
    pixel: Codec,
    scale: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    tile: int = 0,
    digest: str = "",
    pixels: str = "",
) -> Codec:
    """The codec of an autoencoder's parameters at hand, as `load_codec`; `pixel` makes of uint8 what it was trained on.

    Raises ValueError for a scale or deviations that are not positive, means and deviations of another number than the latent's
    channels, one of the two alone or with a scale, and a tile below 0.
    """
    quantises = isinstance(model, models.AutoencoderVQ)
    shift, spread, scaled = _units(model.code_channels if quantises else model.latent_channels, scale, mean, std)
    tile, params = checks.whole("tile", tile, 0), {"params": params["params"]}

    def look(params: Any, x: Array) -> Array:
        if x.shape[-1] != model.out_channels:
            raise ValueError(f"the autoencoder is of images of {model.out_channels} channels, got {x.shape[-1]}")
        seen = model.apply(params, pixel.encode(jax.random.key(0), x), method="encode")
        return seen if quantises else jnp.concatenate(seen, -1)

    def draw(shift: Array, spread: Array, key: Array, seen: Array) -> Array:
        z = seen.astype(jnp.float32)
        if not quantises:
            middle, logvar = jnp.split(z, 2, axis=-1)
            z = middle + jnp.exp(logvar / 2) * jax.random.normal(key, middle.shape, middle.dtype)
        return (z - _along(shift, z)) / _along(spread, z)

    def encode(params: Any, shift: Array, spread: Array, key: Array, x: Array) -> Array:
        return draw(shift, spread, key, look(params, x))

    def decode(params: Any, shift: Array, spread: Array, z: Array) -> Array:
        def image(z: Array) -> Array:
            codes = codebook.quantise(params["params"]["codebook"], z)[0] if quantises else z
            return model.apply(params, codes, method="decode")

        whole = tiled(image, tile, tile // 4) if tile else image
        return pixel.decode(whole(z * _along(spread, z) + _along(shift, z)))

    there, back = (Partial(compiling.jit(way), params, shift, spread) for way in (encode, decode))
    stage = Stage(Partial(compiling.jit(look), params), Partial(compiling.jit(draw), shift, spread), digest, pixels, scaled, tile)
    return Codec(there, back, stage)


def _units(channels: int, scale: Any, mean: Any, std: Any) -> tuple[Array, Array, bool]:
    """What is taken away from a latent and what it is then divided by, float32 [channels] each, and whether anybody said so."""
    if (mean is None) != (std is None) or (scale is not None and mean is not None):
        raise ValueError("mean and std go together, and without a scale")
    if mean is None:
        spread = jnp.ones(()) if scale is None else 1 / checks.positive("scale", scale)
        return jnp.zeros(channels), jnp.broadcast_to(spread, (channels,)).astype(jnp.float32), scale is not None
    shift, spread = checks.number("mean", mean), checks.positive("std", std)
    if shift.shape != (channels,) or spread.shape != (channels,):
        raise ValueError(
            f"mean and std are {channels} numbers each, one a channel of the latent, got {shift.size} and {spread.size}"
        )
    return shift.astype(jnp.float32), spread.astype(jnp.float32), True


def _along(row: Array, z: Array) -> Array:
    return row.reshape(*(1,) * (z.ndim - 1), -1)


def of_config(text: str) -> Codec:
    """What data.codec names: a codec of `jaxdiff.codec`, or "autoencoder('WORKDIR')". Raises InputError for anything else."""
    return named(sys.modules[__name__], str(text) if "(" in str(text) else f"{text}()", "data.codec")


def is_latent(codec: Codec) -> bool:
    """Whether a codec gives latents and not pixels."""
    return getattr(codec, "stage", None) is not None


def on(codec: Codec, mesh: Mesh) -> Codec:
    """The codec of latents for arrays on `mesh`, whose shape may put the devices in another order than that it was loaded onto."""
    held = getattr(jax.tree.leaves(codec.decode)[0].sharding, "mesh", mesh)
    if [*held.devices.flat] == [*mesh.devices.flat]:
        return codec
    encode, decode = (jax.device_put(way, meshes.replicated(mesh)) for way in (codec.encode, codec.decode))
    return codec._replace(encode=encode, decode=decode)


def facts(codec: Codec) -> list[Any]:
    """What a picture decoded by an autoencoder depends on, as JSON: what it has learnt, and its tiles."""
    return [shards.digest(codec.decode), codec.stage.tile]


def found(text: str, workdir: str | Path) -> str:
    """data.codec with the place of its first stage, where that lies inside `workdir`; else as it is."""
    function, args, kwargs = parse(sys.modules[__name__], text, "data.codec")
    if function is not autoencoder:
        return text
    from jaxdiff.training import checkpoint  # brings Orbax

    given = args[0] if args else kwargs.get("workdir", "")
    inside = checkpoint.place(workdir) / str(given)
    if "://" in str(given) or not given or not inside.is_dir():
        return text
    return _text((str(inside), *args[1:]), {name: value for name, value in kwargs.items() if name != "workdir"})


def _text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    given = [repr(arg) for arg in args] + [f"{name}={value!r}" for name, value in kwargs.items()]
    return f"autoencoder({', '.join(given)})"


# What training measures of a codec, and writes into data.codec: one life in four functions.


def provisional(text: str) -> str:
    """The codec to build before anything is measured."""
    return "standardised((0.0,), (1.0,))" if text == "standardised" else text


def measures(text: str, codec: Codec) -> bool:
    """Whether the data's statistics are still to be measured for this codec, built of its provisional text."""
    return text == "standardised" or (is_latent(codec) and not codec.stage.scaled)


def measured(text: str, codec: Codec, statistics: tuple[np.ndarray, np.ndarray] | None) -> str:
    """The text with the data's `statistics`, mean and deviation of each channel, where measured, and the parameters' digest."""
    told = {} if statistics is None else dict(zip(("mean", "std"), (tuple(each.tolist()) for each in statistics)))
    if not is_latent(codec):
        return f"standardised({list(told['mean'])}, {list(told['std'])})" if told else text
    _, args, kwargs = parse(sys.modules[__name__], text, "data.codec")
    return _text(args, kwargs | told | {"digest": codec.stage.digest})


def kept(text: str, before: str) -> str:
    """`before`, what an earlier start wrote, where it says all that `text` says and besides only what is measured; else `text`."""
    (codec, args, says), (was, before_args, said) = (parse(sys.modules[__name__], each, "data.codec") for each in (text, before))
    if codec is not was or codec not in (autoencoder, standardised):
        return text
    if codec is standardised:
        return text if args or says else before
    more = {name for name in said if name not in says}
    alike = args == before_args and all(name in said and said[name] == value for name, value in says.items())
    return before if alike and more <= set(MEASURED) else text


@functools.lru_cache(maxsize=1)
def _read(workdir: str, written: str) -> Loaded:
    return _load(workdir)


# Two: a run's before and after it is measured.
@functools.lru_cache(maxsize=2)
def _kept(workdir: str, written: str, scale: float | None, mean: tuple | None, std: tuple | None, tile: int) -> Codec:
    return _codec(_read(workdir, written), scale, mean, std, tile)


def _codec(loaded: Loaded, scale: Any, mean: Any, std: Any, tile: int) -> Codec:
    model, params, digest, text = loaded
    scale = model.scale if scale is None and mean is None and std is None else scale
    return codec_of(model, params, of_config(text), scale, mean, std, tile, digest, text)


def _load(workdir: str | Path) -> Loaded:
    from jaxdiff.training import checkpoint  # brings Orbax

    step, config, bad = checkpoint.restore_meta(workdir)
    for number, problem in bad.items():
        warnings.warn(f"checkpoint of step {number} is damaged ({problem}); using step {step}", stacklevel=2)
    if config.model.name not in models.AUTOENCODERS:
        loads = "load_classifier" if config.model.name == "Classifier" else "load"
        raise InputError(f"{workdir} holds a {config.model.name}, no autoencoder; jaxdiff.{loads} loads it")
    model = models.build(config.model)
    everywhere = meshes.replicated(meshes.make_mesh((-1, 1)))
    image = jax.ShapeDtypeStruct((1, *config.data.shape), jnp.float32)
    params = {"params": jax.eval_shape(model.init, jax.random.key(0), image)["params"]}
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), params)
    name = str(config.sampling.ema)
    # A discriminator, which only training has a use for, may lie beside the parameters.
    params = checkpoint.restore_some(workdir, step, {name: abstract})[name]
    return Loaded(model, params, shards.digest(params), config.data.codec)
