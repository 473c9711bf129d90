"""The images that distances are of: drawn from a trained model and kept, or at hand in a file or folder."""

import hashlib
import json
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdiff import data, shards
from jaxdiff import run as runs
from jaxdiff.errors import InputError
from jaxdiff.evaluation.references import any_rows, load_npz
from jaxdiff.experiment import build
from jaxdiff.training.checkpoint import place

# What is told of labels where nobody asked for one.
IN_TURN = "each class in turn"


class Samples(NamedTuple):
    """Images uint8 [n, H, W, C], and what to tell of them with every figure: how they were made, or where they were read."""

    images: np.ndarray
    facts: dict[str, Any]


def drawn(workdir: str | os.PathLike[str], run: runs.Run, num: int, seed: int, settings: dict[str, Any]) -> Samples:
    """`num` samples with the settings of `run.generate` (label, steps, solver, guidance, times), the config's where none is given.

    They are kept in parts in WORKDIR/evaluation/samples-DIGEST: stopped, the same call goes on where it was, and later it draws
    nothing. Without a label, a model with classes draws each in turn, so all equally often. Raises InputError for what this model
    cannot do, before anything is drawn.
    """
    labels, _, settings = runs.chosen(run, num, **settings)
    experiment = build(run.config)
    key = jax.random.key(seed)
    runs.request(run.config, experiment, run.params, key, num, label=labels, **settings).make(np.arange(1))
    asked = runs.asked(run, seed, labels, settings)
    digest = hashlib.sha256(json.dumps([asked, num, run.config.sampling.batch_size], sort_keys=True).encode()).hexdigest()[:12]
    folder = place(workdir) / "evaluation" / f"samples-{digest}"
    images = runs.kept(run, folder, seed, num, labels, settings)
    told = {name: asked[name] for name in ("solver", "steps", "times", "guidance", "seed", "model")}
    return Samples(images, {"folder": folder.name, "images": shards.digest(images), **told, "labels": _told(labels)})


def _told(labels: np.ndarray | None) -> str | int | None:
    if labels is None:
        return None
    return int(labels[0]) if (labels == labels[0]).all() and len(labels) > 1 else IN_TURN


def at_hand(path: str | os.PathLike[str], shape: tuple[int, ...], num: int = 0) -> Samples:
    """`num` images, 0 for all, of an .npz (key images, or arr_0 as ADM writes) or of a folder of pictures.

    Which, and their order, is by chance, and always the same: a file may hold one class after the other. Raises
    InputError where they cannot be read, or are not uint8 of `shape` (H, W, C).
    """
    if place(path).is_dir():
        images = data.load("folder", "train", path).images
        if shape[-1] == 1 and images.shape[-1] == 3 and (images == images[..., :1]).all():
            images = images[..., :1]  # grey pictures are read as colour
    else:
        arrays = load_npz(path)
        found = [key for key in ("images", "arr_0") if key in arrays]
        if not found:
            raise InputError(f"{path} has no images: neither the key images nor arr_0; its keys are {', '.join(arrays) or 'none'}")
        images = arrays[found[0]]
    check(path, images, shape)
    if num > len(images):
        raise InputError(f"{path} has {len(images)} images, fewer than num={num}")
    images = np.asarray(images[any_rows(len(images), num or len(images))])
    return Samples(images, {"file": str(path), "images": shards.digest(images)})


def check(path: str | os.PathLike[str], images: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises InputError where images of a file are not uint8 [n, *shape]."""
    if images.dtype != np.uint8:
        of = f", {images.min():g} to {images.max():g}" if images.size and np.issubdtype(images.dtype, np.number) else ""
        raise InputError(f"{path} holds {images.dtype}{of}; images are uint8, 0 to 255")
    if images.ndim != 4 or images.shape[1:] != tuple(shape):
        raise InputError(f"{path} holds images of shape {images.shape[1:]}, and this model's are {tuple(shape)}")
