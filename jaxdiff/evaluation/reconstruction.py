"""How well an autoencoder gives images back: PSNR, SSIM, which codes it uses, and the images themselves for distances."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxdiff import autoencoding, codebook, compiling, models, pictures
from jaxdiff import mesh as meshes
from jaxdiff import run as runs
from jaxdiff.cli import enable_compile_cache
from jaxdiff.codec import Codec
from jaxdiff.errors import InputError
from jaxdiff.training import checkpoint

Array = jax.Array
Through = Callable[[Any, Array], dict[str, Array]]

# SSIM's window, 11 x 11 of a Gaussian of deviation 1.5, and its two constants.
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# What evaluate.py tells of an autoencoder, besides the distances.
METRICS = ("psnr", "ssim", "usage")


class Trained(NamedTuple):
    """An autoencoder of a workdir; the fields are as a `Run`'s, and `model` its network."""

    config: ConfigDict
    params: Any
    shape: tuple[int, ...]
    step: int
    model: Any


class Reconstructed(NamedTuple):
    """Images uint8 [n, H, W, C] given back, and each one's PSNR and SSIM [n]; how often each code was used [K].

    `ssim` is empty for images smaller than its window, `counts` without a codebook.
    """

    images: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray
    counts: np.ndarray


def psnr(x: Array, y: Array) -> Array:
    """The peak signal-to-noise ratio of each pair of images [B, H, W, C], 0 to 255, in dB, [B]; infinite where they are equal."""
    error = jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)).mean((1, 2, 3))
    return 10 * jnp.log10(255**2 / error)


def ssim(x: Array, y: Array) -> Array:
    """The structural similarity of each image pair [B, H, W, C] of values 0 to 255, [B]: 1 where they are equal.

    It is the mean over all places of the window within the image, and over channels. Raises ValueError for images smaller than the
    window. Source: Wang et al. 2004, eq. 13 to 15.
    """
    if min(x.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs sizes of {WINDOW} at least, got {x.shape[1:3]}")
    # About the middle of the range: squares of large numbers would lose digits of the variances.
    x, y = (a.astype(jnp.float32) - 127.5 for a in (x, y))
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    cov = _blurred(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 127.5, mean_y + 127.5
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * cov + C2) / (var_x + var_y + C2)
    return (luminance * structure).mean((1, 2, 3))


def _blurred(x: Array) -> Array:
    """Images [B, H, W, C] under the window, where it lies within: [B, H - 10, W - 10, C]."""
    at = np.arange(WINDOW) - WINDOW // 2
    taps = np.exp(-(at**2) / (2 * SIGMA**2))
    taps = taps / taps.sum()
    for axis in (1, 2):
        size = x.shape[axis] - WINDOW + 1
        x = sum(float(tap) * lax.slice_in_dim(x, i, i + size, axis=axis) for i, tap in enumerate(taps))  # type: ignore[assignment]
    return x


def load(workdir: str | Path, ema: float | str | None = None, step: int | None = None) -> Trained | None:
    """The autoencoder whose newest good checkpoint is in `workdir`, all as `jaxdiff.load`; None where it is of another model."""
    number, config, bad = checkpoint.restore_meta(workdir, step)
    if config.model.name not in models.AUTOENCODERS:
        return None
    enable_compile_cache()
    for damaged, problem in bad.items():
        warnings.warn(f"checkpoint of step {damaged} is damaged ({problem}); using step {number}", stacklevel=2)
    model, shape = models.build(config.model), tuple(config.data.shape)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    return Trained(config, runs.restored(workdir, config, shapes, ema, number), shape, number, model)


def through(model: Any, pixel: Codec) -> Through:
    """The jitted function (params, images uint8 [B, H, W, C]) -> {"images": what is given back, "psnr": [B], ...}.

    There are "ssim" [B] and "codes" [B, places] besides, where `Reconstructed` has them.
    """

    @compiling.jit
    def run(params, images):
        y, codes = autoencoding.reconstructed(model, params, pixel.encode(jax.random.key(0), images))
        back = pixel.decode(y)
        seen = {"images": back, "psnr": psnr(images, back)}
        seen |= {"ssim": ssim(images, back)} if has_ssim(images.shape) else {}
        return seen | ({} if codes is None else {"codes": codes.reshape(len(images), -1)})

    return run


def has_ssim(shape: Sequence[int]) -> bool:
    """Whether images of shape (..., H, W, C) are large enough for the window of SSIM."""
    return min(shape[-3:-1]) >= WINDOW


def measure(
    run: Through, params: Any, images: np.ndarray, size: int, codes: int, mesh: Mesh, name: str | None = None
) -> Reconstructed:
    """What `run` gives back of images uint8 [n, H, W, C], `size` at once, split over the mesh; every process must call it.

    `codes` is how many a codebook has, 0 without one; with a `name` a bar tells how far it is.
    """
    n, counts = len(images), np.zeros(codes, np.int64)
    size = -(-min(size, n) // mesh.size) * mesh.size
    parts: dict[str, list[np.ndarray]] = {"images": [], "psnr": [], "ssim": []}
    quiet = name is None or not meshes.first_process()
    with tqdm(total=n, desc=name, unit="image", disable=quiet, dynamic_ncols=True) as bar, jax.set_mesh(mesh):
        for start in range(0, n, size):
            # The last batch is filled up, so that one compiled program does for all.
            rows = np.minimum(np.arange(start, start + size), n - 1)

            def part(i, of, rows=rows):
                return {"image": np.asarray(images[np.split(rows, of)[i]])}

            batch = meshes.put(mesh, size, part)
            found = meshes.fetch(run(params, batch["image"]))
            here = min(size, n - start)
            counts += np.bincount(found.pop("codes", np.zeros((0, 0), int))[:here].reshape(-1), minlength=codes)
            for key, value in found.items():
                parts[key].append(value[:here])
            bar.update(here)
    joined = {key: np.concatenate(each) if each else np.zeros(0) for key, each in parts.items()}
    return Reconstructed(**joined, counts=counts)


def usage(counts: np.ndarray) -> dict[str, Any]:
    """Perplexity of the codes' use, and the number and share of codes that are used at all, from how often each was [K]."""
    each = jnp.asarray(counts, jnp.float32)
    used = int((counts > 0).sum())
    return {"perplexity": float(codebook.perplexity(each)), "codes_used": used, "codes": len(counts), "share": used / len(counts)}


def summary(seen: Reconstructed) -> dict[str, float]:
    """The means, and of a codebook the perplexity and the share of codes used."""
    row = {"psnr": float(seen.psnr.mean(dtype=np.float64))}
    row |= {"ssim": float(seen.ssim.mean(dtype=np.float64))} if len(seen.ssim) else {}
    told = usage(seen.counts) if len(seen.counts) else {}
    return row | ({"perplexity": told["perplexity"], "codes_used": told["share"]} if told else {})


def told(row: dict[str, float], codes: int) -> str:
    """`summary` in words."""
    line = f"PSNR {row['psnr']:.2f} dB" + (f", SSIM {row['ssim']:.4f}" if "ssim" in row else "")
    if codes:
        line += f", {round(row['codes_used'] * codes)} of {codes} codes used, perplexity {row['perplexity']:.1f}"
    return line


def grid(images: np.ndarray, back: np.ndarray) -> np.ndarray:
    """A picture, uint8 [H, W, 3], of images [n, H, W, C]: rows of them, each with a row of what was given back below."""
    columns = int(np.ceil(np.sqrt(2 * len(images))))
    rows = [each for i in range(0, len(images), columns) for each in _pair(images, back, i, columns)]
    return pictures.tile(np.concatenate(rows), columns)


def _pair(images: np.ndarray, back: np.ndarray, start: int, columns: int) -> list[np.ndarray]:
    both = [each[start : start + columns] for each in (images, back)]
    missing = columns - len(both[0])
    return [np.concatenate([each, np.full((missing, *each.shape[1:]), 255, np.uint8)]) for each in both]


def check(metrics: Sequence[str], shape: Sequence[int], codes: int) -> None:
    """Raises InputError for a metric that an autoencoder of images of `shape` with so many codes, 0 for none, does not have."""
    if "usage" in metrics and not codes:
        raise InputError(f"metrics='usage' is of a codebook, and this autoencoder has none; allowed: {', '.join(METRICS[:2])}")
    if "ssim" in metrics and not has_ssim(shape):
        raise InputError(f"metrics='ssim' needs images of {WINDOW} pixels at least, and these are {tuple(shape[:2])}")


def figure(metric: str, seen: Reconstructed) -> dict[str, Any]:
    """A metric that this autoencoder has, as a dict for JSON."""
    if metric == "usage":
        return {"metric": metric, **usage(seen.counts), "n": len(seen.psnr)}
    each = getattr(seen, metric).astype(np.float64)
    std = float(each.std()) if np.isfinite(each).all() else None
    return {"metric": metric, "value": float(each.mean()), "std": std, "n": len(each)}


def line(row: dict[str, Any]) -> str:
    """A figure, with what it is of, as a line of text."""
    of = f"{row['n']} images of {row['reconstructed']} given back at step {row['step']}"
    if row["metric"] == "usage":
        share = f"{row['codes_used']} of {row['codes']} codes used ({row['share']:.1%})"
        return f"usage (n={row['n']}): {share}, perplexity {row['perplexity']:.2f}, of {of}"
    value = f"{row['value']:.3f} dB" if row["metric"] == "psnr" else f"{row['value']:.5f}"
    return (
        f"{row['metric']} (n={row['n']}): {value}" + (f" (std {row['std']:.3g})" if row["std"] is not None else "") + f", of {of}"
    )


def save(workdir: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Writes a figure to WORKDIR/evaluation/METRIC-DIGEST.json, whose digest is of all that the figure is of."""
    what = {key: row[key] for key in ("metric", "n", "originals", "model", "step", "ema")}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    path = checkpoint.place(workdir) / "evaluation" / f"{row['metric']}-{digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=1) + "\n")
