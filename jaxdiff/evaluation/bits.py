"""Bits per dimension of a trained model over a whole split: in batches, over all devices, kept from batch to batch."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdiff import codec as codecs
from jaxdiff import compiling, first_stage, guidance, likelihood, schedules, shards, times
from jaxdiff import mesh as meshes
from jaxdiff.data import Dataset
from jaxdiff.denoiser import denoiser
from jaxdiff.errors import InputError
from jaxdiff.experiment import Experiment, target_of
from jaxdiff.level import Level, logsnr
from jaxdiff.likelihood import Bits
from jaxdiff.names import named
from jaxdiff.targets import determinant
from jaxdiff.training.checkpoint import place

Array = jax.Array

# Where a schedule begins without any data, the flow begins here: logsnr -14, a thousandth of the data's deviation.
NOISIEST = -14.0
# The continuous bound ends here at the latest, sigma / alpha = 0.0067, a little less than the 0.0078 between two 8-bit values:
# below, a network that was not told that pixels are integers pays for digits there are none of. Any end is a bound.
FINEST = 10.0


class Settings(NamedTuple):
    """How to evaluate: `terms` of the bound drawn for each image (0: every step of the table), `steps` of the flow's integrator."""

    terms: int = 128
    steps: int = 50
    seed: int = 0


Estimator = Callable[[Any, Array, Array, Array], Bits]


def estimator(metric: str, config, experiment: Experiment, params: Any, settings: Settings) -> tuple[Estimator, str]:
    """(the jitted function (params, keys [B], images uint8 [B, H, W, C], labels [B]) -> Bits, a line on what it computes).

    Raises InputError for an unknown metric, or one that this model cannot have.
    """
    if metric not in METRICS:
        raise InputError(f"metrics={metric!r} is unknown; allowed: {', '.join(METRICS)}")
    if settings.terms < 0 or settings.steps < 1:
        raise InputError(f"terms={settings.terms} and steps={settings.steps} are out of range; at least 0 and 1")
    if first_stage.is_latent(experiment.codec):
        raise InputError(
            f"metrics={metric!r} is of pixels, and data.codec={config.data.codec!r} gives latents, which have no bound"
        )
    target = target_of(experiment)
    bits, line = METRICS[metric](config, experiment, params, settings)

    def run(params, keys, images, labels):
        cond = {"label": labels} if experiment.classes else None
        denoise = denoiser(experiment.net(params, cond), target, experiment.data_std)
        return bits(params, denoise, keys, images)

    return compiling.jit(run), line


def _bpd_elbo(config, experiment, params, settings):
    draw, outputs = experiment.draw, experiment.objective.outputs
    clip = config.sampling.clip
    bounds = codecs.ends(experiment.codec, experiment.shape)

    def clipped(denoise):
        return guidance.clip(denoise, *bounds) if clip else denoise

    if draw.steps:
        levels = times.grid(experiment.schedule(params), times.strided(draw.steps, draw.steps))
        _determined(config, experiment, levels)
        variance = likelihood.learned if outputs > 1 else likelihood.small
        terms = settings.terms if settings.terms < draw.steps - 1 else 0

        def discrete(params, denoise, keys, images):
            return likelihood.image_elbo(
                keys, clipped(denoise), experiment.codec, images, levels, variance, terms, experiment.data_std
            )

        of = f"{terms} of {draw.steps - 1}" if terms else f"all {draw.steps - 1}"
        kind = "learned" if outputs > 1 else "small fixed"
        return discrete, f"variational bound of {draw.steps} steps, {kind} variance, {of} terms an image, discretised decoder"

    # A learned schedule ends where its bound was trained to; a network that was not need not know that pixels are integers.
    learns = isinstance(named(schedules, config.process.schedule, "process.schedule"), schedules.Learned)
    levels = path(experiment, params, 1, np.inf if learns else FINEST)
    _determined(config, experiment, levels)
    terms = settings.terms or 1000

    def continuous(params, denoise, keys, images):
        return likelihood.image_continuous_elbo(
            keys, clipped(denoise), experiment.codec, images, levels, terms, experiment.data_std
        )

    last = float(logsnr(Level(*(jnp.asarray(a[-1]) for a in levels))))
    return (
        continuous,
        f"continuous-time variational bound, {terms} times an image, stratified and even in logsnr up to {last:.4g}, "
        "decoder by Bayes' rule",
    )


def _bpd_ode(config, experiment, params, settings):
    levels = path(experiment, params, settings.steps)
    _determined(config, experiment, levels)

    def exact(params, denoise, keys, images):
        return likelihood.image_log_likelihood(keys, denoise, experiment.codec, images, levels, data_std=experiment.data_std)

    return exact, f"probability flow, {settings.steps} Runge-Kutta steps of order 4, Hutchinson's trace, uniform dequantization"


def path(experiment: Experiment, params: Any, steps: int, finest: float = np.inf) -> Level:
    """steps + 1 levels even in logsnr over what training draws, noisiest first, from NOISIEST at least to `finest` at most.

    Neither the flow's density nor the continuous bound depends on the way between its ends, and this one is the smoothest.
    """
    ends = times.grid(experiment.schedule(params), np.array([experiment.draw.last, experiment.draw.first]))
    lo, hi = np.asarray(logsnr(Level(*(jnp.asarray(a) for a in ends))), np.float64)
    return times.grid(schedules.of_logsnr, np.linspace(max(lo, NOISIEST), min(hi, finest), steps + 1))


METRICS = {"bpd_elbo": _bpd_elbo, "bpd_ode": _bpd_ode}


def evaluate(
    workdir, metric: str, config, experiment: Experiment, params: Any, dataset: Dataset, size: int, settings: Settings, **of: Any
) -> dict[str, Any]:
    """The metric over a data set in batches of `size`, as a dict for JSON, written to WORKDIR/evaluation too.

    Every batch is kept, so the same call goes on where an earlier one was stopped; image i has the same key in every batch size.
    What was kept is used for the same parameters, process and images only; `of` are facts to tell with the figure (step, average,
    split). Raises InputError as `estimator` does.
    """
    run, line = estimator(metric, config, experiment, params, settings)
    used = settings._replace(terms=0) if metric == "bpd_ode" else settings._replace(steps=0)
    built = [config.model.to_dict(), config.process.to_dict(), config.data.codec, config.sampling.clip]
    same = {"model": shards.digest(params), "images": shards.digest((dataset.images, dataset.labels))}
    what = {"metric": metric, "how": line, "n": len(dataset.labels), **of, **used._asdict(), **same}
    name = f"{metric}-{hashlib.sha256(json.dumps([what, built], sort_keys=True).encode()).hexdigest()[:12]}"
    folder = place(workdir) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    rows = _kept(folder / f"{name}.npy") if meshes.first_process() else None
    n = int(meshes.agree(np.int32(0 if rows is None else len(rows))))
    parts = [] if rows is None else [rows]
    mesh = meshes.make_mesh((-1, 1))
    size = -(-min(size, what["n"]) // mesh.size) * mesh.size
    keys = jax.random.key(settings.seed)
    bar = tqdm(initial=n, total=what["n"], desc=metric, unit="image", disable=not meshes.first_process(), dynamic_ncols=True)
    with bar, jax.set_mesh(mesh):
        while n < what["n"]:
            here = np.arange(n, min(n + size, what["n"]))
            # The last batch is filled up, so that one compiled program does for all.
            index = np.concatenate([here, np.full(size - len(here), here[-1])])

            def part(i, of, index=index):
                mine = np.split(index, of)[i]
                return {"index": mine, "image": np.asarray(dataset.images)[mine], "label": dataset.labels[mine]}

            batch = meshes.put(mesh, size, part)
            sample_keys = jax.vmap(lambda i: jax.random.fold_in(keys, i))(batch["index"])
            bits = run(params, sample_keys, batch["image"], batch["label"])
            columns = [bits.each] if bits.terms is None else [bits.each, *bits.terms]
            new = np.stack([meshes.fetch(c) for c in columns], axis=1)[: len(here)]
            if not np.isfinite(new).all():
                bad = here[~np.isfinite(new).all(axis=1)][0]
                raise InputError(f"{metric} of image {bad} is not finite: this model is singular at a level of its grid")
            parts.append(new)
            n += len(here)
            bar.update(len(here))
            bar.set_postfix(bits=f"{np.concatenate(parts)[:, 0].mean():.4f}")
            if meshes.first_process():
                shards.write(folder / f"{name}.npy", np.concatenate(parts))
    each = np.concatenate(parts).astype(np.float64) if parts else np.zeros((0, 1))
    row = what | _summary(each)
    if meshes.first_process():
        (folder / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
    return row


def _summary(each: np.ndarray) -> dict[str, float | None]:
    n = len(each)
    row: dict[str, float | None] = {"bits_per_dim": float(each[:, 0].mean())}
    row["stderr"] = float(each[:, 0].std(ddof=1) / np.sqrt(n)) if n > 1 else None
    for i, term in enumerate(("prior", "diffusion", "decoder") if each.shape[1] > 1 else ()):
        row[term] = float(each[:, i + 1].mean())
    return row


def _determined(config, experiment: Experiment, levels: Level) -> None:
    if (np.asarray(determinant(target_of(experiment), Level(*(jnp.asarray(a) for a in levels)))) == 0).any():
        raise InputError(f"process.target={config.process.target!r} says nothing at a level of the grid, where alpha or sigma is 0")


def _kept(file) -> np.ndarray | None:
    if not file.exists():
        return None
    with file.open("rb") as opened:
        try:
            return np.load(opened)
        except (ValueError, EOFError):  # cut short
            return None
