"""Evaluates a trained model:  python evaluate.py --workdir=DIR --metrics=fd_own,pr_own,floor,nearest --classifier=DIR

Metrics, separated by commas:
  psnr, ssim, usage                             of an autoencoder: how near held-out images are given back, and use of its codes
  bpd_elbo, bpd_ode                             bits per dimension of real images: variational bound, and exact (probability flow)
  fid, sfid, is, kid, pr, dc                    by Inception-v3, --inception=FILE: the field's own
  fd_dinov2, kd_dinov2, pr_dinov2, dc_dinov2    by DINOv2, --dinov2=FILE
  fd_own, kd_own, pr_own, dc_own, is_own        by a classifier trained here, --classifier=WORKDIR, where Inception does not suit
  floor                                         the distances asked for, of real held-out images: what a perfect model would have
  nearest                                       a picture of samples with the training images nearest to them, to see copies

An autoencoder's distances are of held-out images given back, from the same images (rFID); bits, floor and nearest it has not.
fd: Frechet distance, kd: kernel distance, pr: precision and recall, dc: density and coverage. Prints each figure with what it is of
and writes it to WORKDIR/evaluation. Samples are drawn as sample.py draws them and kept there; stopped, it goes on where it was, and
another metric of the same samples draws nothing. Every device and process takes its share.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import jaxdiff as jd
from jaxdiff import cli, data, evaluation, experiment, first_stage, shards
from jaxdiff import mesh as meshes
from jaxdiff import run as runs
from jaxdiff.evaluation import features, reconstruction, references, report, samples

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "What train.py wrote to.")
flags.DEFINE_string("metrics", None, "Comma-separated, see above (default: bpd_elbo; of an autoencoder psnr,ssim).")
flags.DEFINE_string("split", None, "Which split (default: bits test, a reference the one trained on, autoencoders --held_out).")
flags.DEFINE_string("data_dir", None, "Where the data is (default: the config's data_dir).")
flags.DEFINE_integer(
    "num", 0, "Bits, autoencoders: only the first so many images, 0 for all. Distances: so many samples; 0 is 50,000, or with a "
    "classifier's features as many as the reference has, if fewer.",
)  # fmt: skip
flags.DEFINE_integer("batch_size", 0, "Images at once; 0 is config.sampling.batch_size, and 100 through a feature network.")
flags.DEFINE_integer("terms", 128, "bpd_elbo: steps or times drawn for each image; 0 is every step (1000 times without a table).")
flags.DEFINE_integer("steps", None, "bpd_ode: steps of the integrator, four evaluations each (50). Sampling steps (the config's).")
flags.DEFINE_string("solver", None, "Samples: as sample.py's, such as unipc or 'ddim(eta=1.0)' (default: the config's).")
flags.DEFINE_string("times", None, "Samples: the grid, such as uniform (default: the config's).")
flags.DEFINE_float("guidance", None, "Samples: classifier-free guidance; 1 is none (default: the config's).")
flags.DEFINE_integer("label", None, "Samples: the class, -1 for none (default: each class in turn).")
flags.DEFINE_integer("seed", 0, "Of the random numbers.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_integer("step", None, "The checkpoint kept at this training step (default: the newest).")
flags.DEFINE_string("ema", None, "One of config.training.ema, or 'power(0.07)', say, from snapshots (default: the config's).")
flags.DEFINE_string("samples", None, "Images at hand instead of the model's: an .npz (images, or ADM's arr_0), or a folder.")
flags.DEFINE_string("reference", None, "An .npz of statistics or images, pytorch-fid's, ADM's or ours, instead of --split.")
flags.DEFINE_string(
    "save_reference", None, "Also write the reference's statistics to this .npz, which pytorch-fid reads; Inception's with images "
    "beside them, which ADM's evaluator reads (it resizes as --resize=tensorflow).",
)  # fmt: skip
flags.DEFINE_string("held_out", "test", "floor, nearest, autoencoders: the split of real images that the model was not trained on.")
flags.DEFINE_string("inception", None, "Inception's weights, as pytorch-fid publishes them.")
flags.DEFINE_enum("resize", "pytorch", ["pytorch", "tensorflow"], "How images are brought to Inception: as pytorch-fid, or as ADM.")
flags.DEFINE_string("dinov2", None, "DINOv2's weights.")
flags.DEFINE_string("classifier", None, "The workdir of a classifier of such images, for its features.")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes are not found automatically.")
flags.DEFINE_integer("processes", None, "How many processes there are.")
flags.DEFINE_integer("process", None, "Which of them this is, from 0.")

ALLOWED = (*evaluation.METRICS, *report.METRICS, *report.BESIDES, *reconstruction.METRICS)
# What says how samples are drawn, or which: an autoencoder draws none.
OF_SAMPLES = ("samples", "steps", "solver", "times", "guidance", "label")
OF_DISTANCES = ("samples", "reference", "save_reference")


def main() -> None:
    if FLAGS.workdir is None:
        raise jd.InputError("which model? Give --workdir=DIR, the folder that train.py wrote to")
    metrics = list(dict.fromkeys(name.strip() for name in (FLAGS.metrics or "").split(",") if name.strip()))
    if (FLAGS.metrics is not None and not metrics) or set(metrics) - set(ALLOWED):
        raise jd.InputError(f"metrics={FLAGS.metrics!r} is unknown; allowed: {', '.join(ALLOWED)}")
    for name in ("num", "batch_size", "terms"):
        if FLAGS[name].value < 0:  # type: ignore[operator]
            raise jd.InputError(f"{name}={FLAGS[name].value} is negative")
    meshes.connect(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
    if "floor" in metrics and not takes(metrics) & set(report.FLOORED):
        raise jd.InputError("floor is of the distances that are asked for beside it, such as fid or fd_own, and there is none")
    networks = networks_of(metrics)
    if not networks and (useless := [name for name in OF_DISTANCES if FLAGS[name].value is not None]):
        asked = "the default metrics" if FLAGS.metrics is None else f"metrics={FLAGS.metrics!r}"
        raise jd.InputError(f"--{useless[0]} is of distances, and {asked} are none")
    autoencoder = reconstruction.load(FLAGS.workdir, FLAGS.ema, FLAGS.step)
    if autoencoder is not None:
        reconstructions(autoencoder, metrics or ["psnr", "ssim"], networks)
        return
    run, metrics = jd.load(FLAGS.workdir, FLAGS.ema, FLAGS.step), metrics or ["bpd_elbo"]
    if wrong := [name for name in metrics if name in reconstruction.METRICS]:
        raise jd.InputError(f"metrics={wrong[0]!r} is of an autoencoder, and {FLAGS.workdir} holds a {run.config.model.name}")
    if bits := [name for name in metrics if name in evaluation.METRICS]:
        bits_per_dim(run, bits)
    if networks:
        distances(run, metrics, networks)


def bits_per_dim(run, metrics: list[str]) -> None:
    """Bits per dimension of real images."""
    config, built, split = run.config, experiment.build(run.config), FLAGS.split or "test"
    settings = evaluation.Settings(FLAGS.terms, 50 if FLAGS.steps is None else FLAGS.steps, FLAGS.seed)
    for metric in metrics:  # what cannot work is told before the data is decoded
        evaluation.estimator(metric, config, built, run.params, settings)
    dataset = load(run, split)
    if FLAGS.num:
        dataset = dataset._replace(images=dataset.images[: FLAGS.num], labels=dataset.labels[: FLAGS.num])
    say(
        f"{len(dataset.labels)} images of {config.data.name} {split}, step {run.step}, {jax.device_count()} "
        f"{jax.devices()[0].device_kind} device(s); the first batch compiles for up to a minute"
    )
    for metric in metrics:
        row = evaluation.evaluate(
            FLAGS.workdir,
            metric,
            config,
            built,
            run.params,
            dataset,
            FLAGS.batch_size or config.sampling.batch_size,
            settings,
            step=run.step,
            ema=str(FLAGS.ema or runs.average(config)),
            data=config.data.name,
            split=split,
        )
        say(_line(row))


def reconstructions(run: reconstruction.Trained, metrics: list[str], networks: dict) -> None:
    """How near an autoencoder gives images back: pixel by pixel, in the use of its codes, and as distances of the two sets."""
    if wrong := [name for name in metrics if name in evaluation.METRICS or name in report.BESIDES]:
        raise jd.InputError(f"metrics={wrong[0]!r} is of a model that draws images, and {FLAGS.workdir} holds an autoencoder")
    if wrong := [name for name in OF_SAMPLES if FLAGS[name].value is not None]:
        raise jd.InputError(f"--{wrong[0]} is of drawing images, and {FLAGS.workdir} holds an autoencoder")
    if not run.config.data.name:
        raise jd.InputError(f"{FLAGS.workdir} was imported, and its config names no data")
    split = FLAGS.split or FLAGS.held_out
    name, codes = f"{run.config.data.name} {split}", getattr(run.model, "codes", 0)
    reconstruction.check(metrics, run.shape, codes)
    images = load(run, split).images
    images = images[: FLAGS.num or len(images)]
    of = {network: [m for m in metrics if m in report.METRICS and report.METRICS[m].network == network] for network in networks}
    if networks:
        real = read_real(run, [], FLAGS.save_reference or any(takes(each) for each in of.values()), split)
        check(run, of, networks, real, len(images))
    through = reconstruction.through(run.model, first_stage.of_config(run.config.data.codec))
    size, mesh = FLAGS.batch_size or run.config.sampling.get("batch_size", 64), meshes.make_mesh((-1, 1))
    seen = reconstruction.measure(through, run.params, images, size, codes, mesh, name)
    facts = {"reconstructed": name, "originals": shards.digest(images), "model": shards.digest(run.params), "step": run.step}
    facts |= {"ema": str(FLAGS.ema or runs.average(run.config))}
    for metric in (m for m in reconstruction.METRICS if m in metrics):
        row = reconstruction.figure(metric, seen) | facts
        say(reconstruction.line(row))
        if meshes.first_process():
            reconstruction.save(FLAGS.workdir, row)
    given_back = samples.Samples(seen.images, facts | {"images": shards.digest(seen.images)})
    for network, features_of_it in networks.items():
        figures(run, given_back, of[network], features_of_it, real)


class Real(NamedTuple):
    """What samples are compared with: the statistics of --reference or None, the reference's name, and images by their names.

    `labels` are those of the held-out images.
    """

    stats: references.Described | None
    name: str
    images: dict[str, np.ndarray]
    labels: np.ndarray


def distances(run, metrics: list[str], networks: dict) -> None:
    """Distances of samples from a reference, and what goes with them: one pass of each network over the samples."""
    of = {network: [m for m in metrics if m in report.METRICS and report.METRICS[m].network == network] for network in networks}
    extra = [m for m in metrics if m in report.BESIDES]
    real = read_real(run, extra, FLAGS.save_reference or any(takes(each) for each in of.values()))
    given = at_hand(run)
    num = len(given.images) if given else FLAGS.num or how_many(networks, real.stats, real.images.get(real.name))
    check(run, of, networks, real, num)
    drawn = given or draw(run, num)
    for network, seen in networks.items():
        figures(run, drawn, [*of[network], *extra], seen, real)


def takes(metrics: list[str]) -> set[str]:
    """What metrics take of the reference."""
    return {of for m in metrics if m in report.METRICS and (of := report.METRICS[m].takes) is not None}


def check(run, of: dict[str, list[str]], networks: dict, real: Real, num: int) -> None:
    """Raises InputError for what cannot work, before anything is drawn."""
    for network, seen in networks.items():
        one = jax.ShapeDtypeStruct((1, *run.shape), jnp.uint8)
        widths = {key: a.shape[1] for key, a in jax.eval_shape(seen.apply, one).items()}
        references.check(real.stats, real.images.get(real.name), seen, widths, takes(of[network]))
    every = [m for each in of.values() for m in each]
    enough(num, f"num={num}" if FLAGS.samples is None else f"{FLAGS.samples}, n={num},", every)
    if (images := real.images.get(real.name)) is not None:
        enough(len(images), f"{real.name}, n={len(images)},", [m for m in every if report.METRICS[m].takes is not None])
    if FLAGS.save_reference:
        references.writable(FLAGS.save_reference)
        if len(networks) > 1:
            raise jd.InputError(f"--save_reference writes one network's statistics, and these metrics are of {', '.join(networks)}")


def enough(n: int, what: str, metrics: list[str]) -> None:
    """Raises InputError where n images of either set are too few for one of the metrics; all else needs two."""
    least, needs = max([(report.METRICS[m].least, m) for m in metrics], default=(2, "a reference, and nearest,"))
    if n < least:
        raise jd.InputError(f"{what} is too few images: {needs} needs {least} at least")


def figures(run, drawn: samples.Samples, metrics: list[str], seen, real: Real) -> None:
    """The metrics of one feature network."""
    train, held_out = names(run)
    size = FLAGS.batch_size or 100
    see = functools.cache(lambda name: references.cached(real.images[name], seen, size, name))
    found = references.describe(drawn.images, seen, size, "samples")

    def against(takes: str) -> references.Described:
        return real.stats if real.stats is not None and takes in real.stats.moments else see(real.name)

    for metric in (m for m in metrics if m in report.METRICS):
        to = report.METRICS[metric].takes
        tell(drawn, report.figure, metric, found, None if to is None else against(to))
        if "floor" in metrics and to in report.FLOORED:
            tell(drawn, report.floor, metric, found, see(held_out), as_samples(drawn, real.labels), against(to))
        elif "floor" in metrics and to is not None:
            note(f"{metric} has no floor: of its features the moments alone are kept, of all held-out images together")
    if FLAGS.save_reference:
        written = against("pool")
        if meshes.first_process():
            # Only ADM's evaluator looks for images there, and it knows Inception's features alone.
            beside = real.images.get(real.name) if "spatial" in written.moments else None
            references.write(FLAGS.save_reference, written, beside)
            say(f"wrote {FLAGS.save_reference}")
    if "nearest" in metrics:
        path = tell(drawn, report.nearest, found, see(held_out), see(train))
        if path is not None:
            picture = report.picture(json.loads(path.read_text()), drawn.images, real.images[train])
            jd.pictures.save(path.with_suffix(".png"), picture)
            say(f"wrote {path.with_suffix('.png')}")


def as_samples(drawn: samples.Samples, labels: np.ndarray) -> np.ndarray:
    """Rows of the kept held-out images in which classes come as they do among the samples."""
    labels = labels[references.kept_rows(len(labels))]
    rows = references.in_turn if drawn.facts.get("labels") == samples.IN_TURN else lambda of, n: references.any_rows(len(of), n)
    return rows(labels, len(labels))


def tell(drawn: samples.Samples, make, *sets):
    """Writes and prints the figure that the first process makes of these sets; its file there, elsewhere None."""
    if not meshes.first_process():
        return None
    row = make(*sets) | {"samples": drawn.facts}
    say(report.line(row))
    return report.save(FLAGS.workdir, row)


def networks_of(metrics: list[str]) -> dict:
    """The feature networks of the distances asked for; where floor and nearest stand alone, those whose weights are given."""
    weights = {"inception": FLAGS.inception, "dinov2": FLAGS.dinov2, "own": FLAGS.classifier}
    named = {report.METRICS[name].network for name in metrics if name in report.METRICS}
    if not named and set(metrics) & set(report.BESIDES):
        named = {name for name, value in weights.items() if value}
        if not named:
            raise jd.InputError(f"metrics={FLAGS.metrics!r} need a feature network: give --inception, --dinov2 or --classifier")
    return {name: features_of(name, weights[name]) for name in report.NETWORKS if name in named}


def features_of(network: str, weights: str | None):
    """One feature network. Raises InputError where its weights are not given or not there."""
    if network == "inception":
        made = features.inception(weights, getattr(features, f"resize_{FLAGS.resize}"))
        note(features.doubt(str(weights), features.INCEPTION))
        return made
    if network == "dinov2":
        made = features.dinov2(weights)
        note(features.doubt(str(weights), features.DINOV2) if made.name == "dinov2_vitl14" else "")
        return made
    if not weights:
        raise jd.InputError("the metrics that end in _own are by a classifier of such images; give its workdir, --classifier=DIR")
    # A folder's name says more than "classifier"; the digest says which it is.
    return features.classifier(weights)._replace(name=Path(str(weights)).absolute().name)


def note(line: str) -> None:
    if line:
        say(f"note: {line}")


def load(run, split: str) -> data.Dataset:
    """A split of the data that the model was trained on. Raises InputError where the images are of another shape."""
    config = run.config
    dataset = data.of_config(config, split, FLAGS.data_dir)
    if dataset.images.shape[1:] != tuple(run.shape):
        raise jd.InputError(f"the images of {config.data.name} are {dataset.images.shape[1:]}, and this model's are {run.shape}")
    return dataset


def names(run) -> tuple[str, str]:
    """What the splits that the model was trained on, and not, are called."""
    return f"{run.config.data.name} {run.config.data.split}", f"{run.config.data.name} {FLAGS.held_out}"


def read_real(run, extra: list[str], needed, split: str | None = None) -> Real:
    """--reference, or a split where a metric needs one; the other two splits where floor or nearest do."""
    split = split or FLAGS.split or run.config.data.split
    name = f"{run.config.data.name} {split}"
    train, held_out = names(run)
    if extra and held_out in (train, "" if FLAGS.reference else name):
        raise jd.InputError(f"held_out={FLAGS.held_out} is what the model was trained on, or the reference; give another split")
    images, labels = {}, np.zeros(0, np.int32)
    if extra:
        unseen = load(run, FLAGS.held_out)
        images, labels = {train: load(run, run.config.data.split).images, held_out: unseen.images}, unseen.labels
    if FLAGS.reference is None:
        more = {name: load(run, split).images} if needed else {}
        return Real(None, name, images | more, labels)
    stats, at_hand = references.read(FLAGS.reference)
    if at_hand is not None:
        samples.check(FLAGS.reference, at_hand, run.shape)
        images[stats.name] = at_hand
    return Real(stats, stats.name, images, labels)


def how_many(networks, stats: references.Described | None, images: np.ndarray | None) -> int:
    """50,000 samples, as the field has it; by a classifier's features alone as many as the reference has, if fewer."""
    n = stats.n if stats is not None and stats.n is not None else None if images is None else len(images)
    return report.FULL if set(networks) != {"own"} or n is None else min(report.FULL, n)


def sampling() -> dict:
    """How samples are to be drawn, as far as the flags say."""
    names = ("steps", "solver", "times", "guidance", "label")
    return {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}


def at_hand(run) -> samples.Samples | None:
    """The images that --samples names; None without."""
    if FLAGS.samples is None:
        return None
    if settings := sampling():
        raise jd.InputError(f"--{next(iter(settings))} is of drawing, and --samples are images at hand; give one of the two")
    return samples.at_hand(FLAGS.samples, run.shape, FLAGS.num)


def draw(run, num: int) -> samples.Samples:
    """The model's samples."""
    say(f"{num} samples at step {run.step}, drawn once and kept in {FLAGS.workdir}/evaluation")
    drawn = samples.drawn(FLAGS.workdir, run, num, FLAGS.seed, sampling())
    return drawn._replace(facts=drawn.facts | {"step": run.step, "ema": str(FLAGS.ema or runs.average(run.config))})


def say(text: str) -> None:
    if meshes.first_process():
        print(text, flush=True)


def _line(row: dict) -> str:
    error = "" if row["stderr"] is None else f" +- {row['stderr']:.4f} (standard error)"
    terms = [f"{name} {row[name]:.4f}" for name in ("prior", "diffusion", "decoder") if name in row]
    split = f" = {' + '.join(terms)}" if terms else ""
    return f"{row['metric']}: {row['bits_per_dim']:.4f}{error} bits/dim on {row['n']} images{split}; {row['how']}"


if __name__ == "__main__":
    cli.run(main)
