"""Codecs that a config names, among them a trained autoencoder: what makes a diffusion one of latents."""

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxdiff import checks, models
from jaxdiff import mesh as meshes
from jaxdiff.codec import Codec, centred, pixels, standardised
from jaxdiff.errors import InputError
from jaxdiff.names import named, parse

Array = jax.Array

__all__ = ["autoencoder", "centred", "pixels", "standardised"]


def autoencoder(workdir: str, scale: float | None = None) -> Codec:
    """The codec of the autoencoder in `workdir`, as `load_codec`, kept for the next call while no newer checkpoint is there."""
    from jaxdiff.training import checkpoint  # brings Orbax

    if not checkpoint.place(workdir).is_dir():
        raise InputError(f"data.codec names a first stage {workdir}, which is neither in the run's workdir nor in {Path.cwd()}")
    return _kept(str(checkpoint.place(workdir)), scale, checkpoint.newest(workdir))


def load_codec(workdir: str | Path, scale: float | None = None) -> Codec:
    """The codec of the autoencoder whose newest good checkpoint is in `workdir`.

    `encode(key, x)`: uint8 [B, H, W, C] -> a draw of the posterior times `scale`, the config's model.scale where None, float32
    [B, h, w, latent_channels]; `decode(z)` back to uint8. Both are compiled, and pytrees of the parameters. Source: Rombach et al.
    2022, section 3.1. Raises InputError where there is no good checkpoint, or one of something else.
    """
    from jaxdiff.training import checkpoint  # brings Orbax

    step, config, bad = checkpoint.restore_meta(workdir)
    for number, problem in bad.items():
        warnings.warn(f"checkpoint of step {number} is damaged ({problem}); using step {step}", stacklevel=2)
    if config.model.name != "AutoencoderKL":
        loads = "load_classifier" if config.model.name == "Classifier" else "load"
        raise InputError(f"{workdir} holds a {config.model.name}, no autoencoder; jaxdiff.{loads} loads it")
    model = models.build(config.model)
    everywhere = meshes.replicated(meshes.make_mesh((-1, 1)))
    image = jax.ShapeDtypeStruct((1, *config.data.shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), params)
    kept = checkpoint.restore_ema(workdir, step, {str(name): abstract for name in config.training.ema})
    pixel = of_config(config.data.codec)
    return codec_of(model, kept[str(config.sampling.ema)], pixel, model.scale if scale is None else scale)  # type: ignore[union-attr]


def codec_of(model: Any, params: Any, pixel: Codec, scale: float) -> Codec:
    """The codec of an autoencoder's parameters at hand; `pixel` makes of uint8 what it was trained on.

    Raises ValueError for a scale that is not positive.
    """

    def encode(params: Any, scale: Array, key: Array, x: Array) -> Array:
        if x.shape[-1] != model.out_channels:
            raise ValueError(f"the autoencoder is of images of {model.out_channels} channels, got {x.shape[-1]}")
        mean, logvar = model.apply(params, pixel.encode(key, x), method="encode")
        return scale * (mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape, mean.dtype))

    def decode(params: Any, scale: Array, z: Array) -> Array:
        return pixel.decode(model.apply(params, z / scale, method="decode"))

    carried = params, checks.positive("scale", scale).astype(jnp.float32)
    return Codec(Partial(jax.jit(encode), *carried), Partial(jax.jit(decode), *carried))


def of_config(text: str) -> Codec:
    """What data.codec names: a codec of `jaxdiff.codec`, or "autoencoder('WORKDIR')". Raises InputError for anything else."""
    return named(sys.modules[__name__], str(text) if "(" in str(text) else f"{text}()", "data.codec")


def is_latent(codec: Codec) -> bool:
    """Whether a codec gives latents and not pixels: of all codecs an autoencoder's alone carries parameters."""
    return isinstance(codec.encode, Partial)


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
    rest = [repr(arg) for arg in args[1:]] + [f"{name}={value!r}" for name, value in kwargs.items() if name != "workdir"]
    return f"autoencoder({', '.join([repr(str(inside)), *rest])})"


@functools.lru_cache(maxsize=1)
def _kept(workdir: str, scale: float | None, step: int | None) -> Codec:
    return load_codec(workdir, scale)
