"""Distances as they are told: which features each is of, under which name, and how the picture of nearest images is made."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxdiff import pictures, shards
from jaxdiff.errors import InputError
from jaxdiff.evaluation import distances, references
from jaxdiff.evaluation.references import Described
from jaxdiff.training.checkpoint import place

# FID is of this many samples unless it says otherwise.
FULL = 50_000
# Samples in the picture of nearest images, and the training images beside each.
SHOWN, BESIDE = 12, 7


class Metric(NamedTuple):
    """A figure of two described sets.

    `network` is whose features it takes, `title` its name, `takes` what of the reference: "pool" or "spatial" for moments, "" for
    single images, None for nothing; `least` how few images of either set will do; `figures(samples, reference) -> dict` for JSON.
    """

    network: str
    title: str
    takes: str | None
    least: int
    figures: Callable[[Described, Any], dict[str, Any]]


def _frechet(samples: Described, reference: Described, key: str = "pool") -> dict[str, Any]:
    a, b = samples.moments[key], reference.moments[key]
    notes = [
        f"{whose}: {line}"
        for whose, each in (("samples", a), ("reference", b))
        if (line := distances.shortage(each.n, len(a.mean)))
    ]
    if not reference.digest:
        notes.append(f"{reference.name} does not say of which feature network it is")
    return {"value": distances.frechet(a, b), "notes": notes}


def _score(samples: Described, _: Any) -> dict[str, Any]:
    mean, std = distances.inception_score(samples.logits)
    return {"value": mean, "std": std, "splits": 10}


def _kernel(samples: Described, reference: Described) -> dict[str, Any]:
    found = distances.kernel_distance(samples.pool, reference.pool)
    return {"value": found.mean, "std": found.std, "subsets": found.subsets, "subset_size": found.size}


def _precision_recall(samples: Described, reference: Described) -> dict[str, Any]:
    precision, recall = distances.precision_recall(reference.pool, samples.pool)
    return {"precision": precision, "recall": recall, "k": 3, "rows": [len(samples.pool), len(reference.pool)]}


def _density_coverage(samples: Described, reference: Described) -> dict[str, Any]:
    density, coverage = distances.density_coverage(reference.pool, samples.pool)
    return {"density": density, "coverage": coverage, "k": 5, "rows": [len(samples.pool), len(reference.pool)]}


# What is asked for, in the order in which it is told. Only figures by Inception have the field's names.
METRICS = {
    "fid": Metric("inception", "fid", "pool", 2, _frechet),
    "sfid": Metric("inception", "sfid", "spatial", 2, functools.partial(_frechet, key="spatial")),
    "is": Metric("inception", "inception score", None, 10, _score),
    "kid": Metric("inception", "kid", "", 2, _kernel),
    "pr": Metric("inception", "precision and recall", "", 4, _precision_recall),
    "dc": Metric("inception", "density and coverage", "", 6, _density_coverage),
    "fd_dinov2": Metric("dinov2", "fd of {network}", "pool", 2, _frechet),
    "kd_dinov2": Metric("dinov2", "kernel distance of {network}", "", 2, _kernel),
    "pr_dinov2": Metric("dinov2", "precision and recall of {network}", "", 4, _precision_recall),
    "dc_dinov2": Metric("dinov2", "density and coverage of {network}", "", 6, _density_coverage),
    "fd_own": Metric("own", "own-feature distance (of {network})", "pool", 2, _frechet),
    "kd_own": Metric("own", "own-feature kernel distance (of {network})", "", 2, _kernel),
    "pr_own": Metric("own", "own-feature precision and recall (of {network})", "", 4, _precision_recall),
    "dc_own": Metric("own", "own-feature density and coverage (of {network})", "", 6, _density_coverage),
    "is_own": Metric("own", "own-classifier score (of {network})", None, 10, _score),
}
# Of each network asked for: real held-out images in the samples' place, and the training images nearest to samples.
BESIDES = ("floor", "nearest")
# What metrics with a floor take: features that are kept of every image.
FLOORED = ("pool", "")
NETWORKS = ("inception", "dinov2", "own")
FIGURES = ("value", "std", "precision", "recall", "density", "coverage")


def figure(metric: str, samples: Described, reference: Described | None) -> dict[str, Any]:
    """The metric as a dict for JSON: its label, its figures, n, the feature network, and the reference, None where it has none."""
    of = METRICS[metric]
    found = of.figures(samples, reference)
    return {
        "metric": metric,
        "label": label(of.title.format(network=samples.network), samples.n),
        **found,
        "n": samples.n,
        "features": {"network": samples.network, "digest": samples.digest},
        "reference": None if reference is None else told(reference),
    }


def label(title: str, n: int | None) -> str:
    """The name under which a figure is shown: of fewer than 50,000 samples, with their number."""
    if n is not None and n >= FULL:
        return title
    return f"{title[:-1]}, n={n})" if title.endswith(")") else f"{title} (n={n})"


def told(described: Described) -> dict[str, Any]:
    """What is told of a reference; None where a file does not say. It has the digest of its images, or else of its statistics."""
    statistics = {key: (each.mean, each.cov) for key, each in described.moments.items()}
    return {
        "name": described.name,
        "n": described.n,
        "images": described.images or None,
        "statistics": None if described.images else shards.digest(statistics),
        "network": described.network or "unknown network",
        "digest": described.digest or None,
    }


def floor(metric: str, samples: Described, held_out: Described, rows: np.ndarray, reference: Described) -> dict[str, Any]:
    """The metric of real held-out images, and of as many samples: what a perfect model would have at this n, and what this has.

    The samples are the first, those that a request of so many would have drawn; the held-out images are the first of `rows`.
    Distances of few images are biased upward: the two are to be compared with each other alone.
    """
    m = min(len(samples.pool), len(rows))
    real = part(held_out, rows[:m])
    row, same = figure(metric, real, reference), METRICS[metric].figures(part(samples, np.arange(m)), reference)
    title = f"floor ({held_out.name}) of {METRICS[metric].title.format(network=samples.network)}"
    told_of = {"label": label(title, m), "held_out": told(held_out)}
    return row | {"metric": f"floor_{metric}"} | told_of | {"samples_at_n": {key: same[key] for key in FIGURES if key in same}}


def part(described: Described, rows: np.ndarray) -> Described:
    """Some images of a set; of their features only `pool` is known."""
    pool = described.pool[rows]
    return described._replace(n=len(rows), images="", moments={"pool": distances.moments(pool)}, pool=pool, logits=references.NONE)


def nearest(samples: Described, held_out: Described, train: Described) -> dict[str, Any]:
    """How near samples are to training images, as a dict for JSON; `shown` are the nearest to the first samples, for `picture`.

    The figure is the median distance of samples to the nearest training image over that of held-out images: well below 1, samples
    are nearer to what was learned than new images are. Raises InputError where most of the held-out images are training images.
    """
    to_samples, to_held_out = (float(np.median(distances.nearest(each.pool, train.pool)[1])) for each in (samples, held_out))
    if not to_held_out > 0:
        raise InputError(f"most images of {held_out.name} are images of {train.name} as well; held-out ones are others")
    rows, far = distances.nearest(samples.pool[:SHOWN], train.pool, min(BESIDE, len(train.pool)))
    rows = references.kept_rows(train.n or 0)[rows]
    title = f"nearest training images by {samples.network}, distance of samples over that of {held_out.name}"
    return {
        "metric": "nearest",
        "label": label(title, samples.n),
        "value": to_samples / to_held_out,
        "samples_to_train": to_samples,
        "held_out_to_train": to_held_out,
        "n": samples.n,
        "features": {"network": samples.network, "digest": samples.digest},
        "reference": told(train),
        "held_out": told(held_out),
        "shown": [{"train": found.tolist(), "distance": each.tolist()} for found, each in zip(rows, far)],
    }


def picture(row: dict[str, Any], images: np.ndarray, train: np.ndarray) -> np.ndarray:
    """What `nearest` found, uint8 [H, W, 3]: a sample a row, then the training images nearest to it, nearest first."""
    rows = [np.concatenate([images[i : i + 1], train[each["train"]]]) for i, each in enumerate(row["shown"])]
    return pictures.tile(np.concatenate(rows), len(rows[0]))


def line(row: dict[str, Any]) -> str:
    """A figure as a line of text, and a further one for each note."""
    value = _value(row)
    if "samples_at_n" in row:
        value += f" (as many samples: {_value(row['samples_at_n'])})"
    if reference := row["reference"]:
        n = "unknown n" if reference["n"] is None else f"n={reference['n']}"
        value += f" against {reference['name']} ({n}, {(reference['images'] or reference['statistics'])[:12]})"
    network, digest = row["features"].values()
    return "\n  ".join([f"{row['label']}: {value}, features of {network} ({digest[:12]})", *row.get("notes", [])])


def _value(row: dict[str, Any]) -> str:
    if "value" in row:
        return f"{row['value']:.5g}" + (f" (std {row['std']:.2g})" if "std" in row else "")
    return ", ".join(f"{name} {row[name]:.4f}" for name in FIGURES if name in row)


def save(workdir: str | os.PathLike[str], row: dict[str, Any]) -> epath.Path:
    """Writes a figure to WORKDIR/evaluation/METRIC-DIGEST.json, whose digest is of all that the figure is of; the file."""
    what = [row[key] for key in ("metric", "n", "features", "reference", "held_out", "samples") if key in row]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    path = place(workdir) / "evaluation" / f"{row['metric']}-{digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=1) + "\n")
    return path
