"""What a feature network says of a set of images: computed over all devices, kept in a cache, and read from statistics of others.

A file of statistics is an .npz with the keys of pytorch-fid (mu, sigma) or of ADM's evaluator (mu_s, sigma_s too, and images in
arr_0, without which the evaluator reads no reference). Ours have the same keys, so that both read them, and say n, name, network,
digest and images_digest besides.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from jaxdiff import mesh as meshes
from jaxdiff import shards
from jaxdiff.errors import InputError
from jaxdiff.evaluation import distances
from jaxdiff.evaluation.distances import Moments
from jaxdiff.training.checkpoint import place

# Rows of features that are kept, spread over a larger set; moments are of all.
KEPT = 50_000
# Images in a file of statistics, as in ADM's of ImageNet.
IMAGES = 10_000
# The keys of a file of statistics, by what the moments are of.
KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}

NONE = np.zeros((0, 0), np.float32)


class Described(NamedTuple):
    """A set of images as a feature network sees it.

    `moments` by the features' names (pool, spatial) are of all n images, n None where a file does not say; `pool` float32 [m, d]
    and `logits` [m, classes] are of `kept_rows(n)`, empty where only the moments are known. `images` is their digest, `network`
    and `digest` are the feature network's; each is "" where a file does not say.
    """

    name: str
    n: int | None
    images: str
    network: str
    digest: str
    moments: dict[str, Moments]
    pool: np.ndarray = NONE
    logits: np.ndarray = NONE


def kept_rows(n: int) -> np.ndarray:
    """Which of n images' features are kept."""
    return np.arange(n) if n <= KEPT else np.linspace(0, n - 1, KEPT).round().astype(int)


def any_rows(n: int, m: int) -> np.ndarray:
    """m of n rows in an order of chance, always the same."""
    return np.random.RandomState(2020).permutation(n)[:m]


def in_turn(labels: np.ndarray, m: int) -> np.ndarray:
    """Rows of images with these labels [n], each class in turn as samples are drawn: m, or as many until a class ends.

    By chance within a class, and always the same. At a few hundred images the chance in how often each class comes would be most of
    a distance.
    """
    order = any_rows(len(labels), len(labels))
    by_class = [order[labels[order] == label] for label in np.unique(labels)]
    turns = min(map(len, by_class))
    return np.stack([rows[:turns] for rows in by_class], axis=1).reshape(-1)[:m]


def describe(images: np.ndarray, features: Any, size: int, name: str) -> Described:
    """The features of images uint8 [n, H, W, C], `size` at once, split over all devices; every process must call it.

    Raises InputError for fewer than two images.
    """
    n, mesh = len(images), meshes.make_mesh((-1, 1))
    if n < 2:
        raise InputError(f"{name} is {n} image(s), which have no covariance; give at least 2")
    size = -(-min(size, n) // mesh.size) * mesh.size
    sums: dict[str, distances.Sums] = {}
    parts: dict[str, list[np.ndarray]] = {"pool": [], "logits": []}
    kept = np.isin(np.arange(n), kept_rows(n))
    with tqdm(total=n, desc=f"{features.name}: {name}", unit="image", disable=not meshes.first_process()) as bar:
        for start in range(0, n, size):
            here = np.arange(start, min(start + size, n))
            for key, found in _features_at(images, features, size, here, mesh).items():
                if key in KEYS:
                    sums[key] = distances.moments_add(sums.get(key, distances.moments_begin(found.shape[1])), found)
                if key in parts:
                    parts[key].append(found[kept[here]])
            bar.update(len(here))
    moments = {key: distances.moments_end(each) for key, each in sums.items()}
    pool, logits = (np.concatenate(each) for each in parts.values())
    return Described(name, n, shards.digest(images), features.name, features.digest, moments, pool, logits)


def _features_at(images, features, size: int, here: np.ndarray, mesh) -> dict[str, np.ndarray]:
    # The last batch is filled up, so that one compiled program does for all.
    index = np.concatenate([here, np.full(size - len(here), here[-1])])
    batch = meshes.put(mesh, size, lambda i, of: {"image": np.asarray(images[np.split(index, of)[i]])})
    found = {key: value[: len(here)] for key, value in meshes.fetch(features.apply(batch["image"])).items()}
    # The score of 2016 is of logits without their bias, as its graph says them; a classifier of ours has the one kind alone.
    found["logits"] = found.pop("logits_unbiased", found.pop("logits", np.zeros((len(here), 0))))
    for key, value in found.items():
        if not np.isfinite(value).all():
            raise InputError(f"{features.name} says what is not finite ({key}) of image {here[~np.isfinite(value).all(1)][0]}")
    return found


def cached(images: np.ndarray, features: Any, size: int, name: str, cache_dir: str | os.PathLike[str] | None = None) -> Described:
    """`describe`, computed once for these images and this network.

    Kept in cache_dir (default: $XDG_CACHE_HOME/jaxdiff, else ~/.cache/jaxdiff), below features/: the moments of all images and
    their pooled features, KEPT at most.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxdiff"
    whose = hashlib.sha256(f"{features.digest} {shards.digest(images)}".encode()).hexdigest()[:24]
    file = place(default if cache_dir is None else cache_dir) / "features" / f"{whose}.npz"
    found = _from_cache(file, features) if meshes.first_process() else None
    if meshes.agree(np.int32(found is not None)):
        if found is None:  # of another process, whose cache may be on another disk
            found = Described(name, len(images), "", features.name, features.digest, {})
        return found._replace(name=name)
    found = describe(images, features, size, name)
    if meshes.first_process():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            shards.whole(file, lambda opened: np.savez(opened, **_arrays(found), pool=found.pool))
        except OSError as error:
            raise InputError(f"cannot write the cache in {file.parent}: {error.strerror or error}; make room there") from error
    return found


def _from_cache(file, features: Any) -> Described | None:
    try:
        found = read(file)[0] if file.exists() else None
    except InputError:  # cut short
        return None
    return found if found is None or found.digest == features.digest else None


def write(path: str | os.PathLike[str], described: Described, images: np.ndarray | None = None) -> None:
    """Writes the moments as .npz, for pytorch-fid and `read`, and with `images`, of which IMAGES are kept, for ADM's evaluator.

    Raises InputError where it cannot be written.
    """
    target = writable(path)
    arrays = _arrays(described)
    if images is not None:
        arrays["arr_0"] = np.asarray(images[np.sort(any_rows(len(images), IMAGES))])
    try:
        shards.whole(target, lambda file: np.savez(file, **arrays))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def writable(path: str | os.PathLike[str]) -> epath.Path:
    """Where statistics are to be written. Raises InputError unless it is an .npz file in a folder that is there."""
    target = place(path)
    if target.suffix != ".npz" or target.is_dir():
        raise InputError(f"statistics are written to an .npz file, got {path}")
    if "://" not in str(path) and not target.parent.is_dir():
        raise InputError(f"{path} cannot be written: the folder {target.parent} is not there")
    return target


def _arrays(described: Described) -> dict[str, Any]:
    statistics: dict[str, Any] = {}
    for key, moments in described.moments.items():
        statistics |= dict(zip(KEYS[key], (moments.mean, moments.cov)))
    facts = {"name": described.name, "network": described.network, "digest": described.digest, "images_digest": described.images}
    return statistics | facts | ({} if described.n is None else {"n": described.n})


def read(path: str | os.PathLike[str]) -> tuple[Described, np.ndarray | None]:
    """(the statistics in an .npz, the images that it holds as arr_0 or images, None without).

    Raises InputError where it cannot be read, holds a pickle, or has neither.
    """
    arrays = load_npz(path)
    n = _number(path, arrays.get("n"))
    moments = {key: _moments(path, arrays, n, *names) for key, names in KEYS.items() if names[0] in arrays}
    images = arrays.get("arr_0", arrays.get("images"))
    if not moments and images is None:
        raise InputError(
            f"{path} has neither statistics (mu and sigma) nor images (arr_0); its keys are {', '.join(arrays) or 'none'}"
        )
    images_digest, network, digest = (str(arrays.get(key, "")) for key in ("images_digest", "network", "digest"))
    name = place(path).name + (f" ({arrays['name']})" if "name" in arrays else "")
    return Described(name, n, images_digest, network, digest, moments, arrays.get("pool", NONE)), images


def _number(path, n: np.ndarray | None) -> int | None:
    if n is None:
        return None
    if n.shape or not np.issubdtype(n.dtype, np.integer) or n < 1:
        raise InputError(f"{path}: n={n} is no number of images")
    return int(n)


def _moments(path, arrays: dict[str, np.ndarray], n: int | None, mu: str, sigma: str) -> Moments:
    if sigma not in arrays:
        raise InputError(f"{path} has {mu} without {sigma}")
    mean, cov = arrays[mu], arrays[sigma]
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise InputError(f"{path}: {mu} and {sigma} are of shapes [d] and [d, d], got {mean.shape} and {cov.shape}")
    if not all(np.issubdtype(a.dtype, np.floating) and np.isfinite(a).all() for a in (mean, cov)):
        raise InputError(f"{path}: {mu} or {sigma} holds what is not a finite number")
    if np.diag(cov).min() < 0 or np.abs(cov - cov.T).max() > 1e-4 * np.abs(cov).max():
        raise InputError(f"{path}: {sigma} is no covariance: it is not symmetric, or has a negative variance")
    return Moments(n, mean.astype(np.float64), cov.astype(np.float64))


def load_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an .npz. Raises InputError where it is missing, truncated, no .npz, or holds a pickle."""
    source = place(path)
    if not source.is_file():
        raise InputError(f"{path} is not there, or is no file")
    try:
        with source.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except Exception as error:  # ValueError, BadZipFile, zlib.error, EOFError; a lone .npy has no files
        # NumPy takes whatever is no array for a pickle; only an array of objects within a whole archive really is one.
        pickled = str(error).startswith("Object arrays")
        what = "it holds a pickle, which could run code" if pickled else "it is damaged, or no .npz"
        raise InputError(f"{path} cannot be read: {what}") from error


def check(stats: Described | None, images: np.ndarray | None, features: Any, widths: dict[str, int], takes: set[str]) -> None:
    """Raises InputError where a file cannot be the reference of metrics that take `takes` (`report.Metric`) by this network.

    That is where its statistics say that they are of another network, or are not of as many features as this one's `widths` (by
    name), or where single images are needed and it has statistics alone.
    """
    if stats is None:
        return
    if stats.moments and stats.digest and stats.digest != features.digest:
        theirs, ours = f"{stats.network} ({stats.digest[:12]})", f"{features.name} ({features.digest[:12]})"
        differ = "its weights, or how it is shown images, differ"
        raise InputError(f"{stats.name} is of the feature network {theirs}, and these samples are seen by {ours}: {differ}")
    for key, moments in stats.moments.items():
        if key in takes and len(moments.mean) != widths.get(key):
            of = f"{features.name} has {widths.get(key)}: it is of another network"
            raise InputError(f"{stats.name} has {len(moments.mean)} features ({KEYS[key][0]}), and {of}")
    if images is None and takes - set(stats.moments):
        there = ", ".join(key for name in stats.moments for key in KEYS[name])
        wanted = " or ".join("images" if not name else ", ".join(KEYS[name]) for name in sorted(takes - set(stats.moments)))
        raise InputError(
            f"{stats.name} has {there} alone, and these metrics need {wanted}: give a file with images (arr_0), or leave "
            "--reference out for the images of --split"
        )
