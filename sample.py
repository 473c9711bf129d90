"""Draws from a trained model:  python sample.py --workdir=DIR [--num --steps --solver --guidance --label --seed --out]

With --classifier=DIR a classifier that train.py trained pushes towards the label too; --guidance=0 leaves the label to it alone.

A PNG grid, or with --out=FILE.npz the arrays `images` (uint8 [N, H, W, C]) and, for a model with classes, `labels`; a request of
many images that is stopped goes on where it was. --trajectory=FILE.gif shows how the images come about. --image=FILE edits a
picture: with --mask=FILE, black and white alone, the mask's white part is drawn anew; with --strength below 1 the whole picture is,
from that much noise.
"""

import os

import jax
import numpy as np
from absl import flags

import jaxdiff as jd
from jaxdiff import cli, shards
from jaxdiff import run as runs
from jaxdiff.training.checkpoint import place

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "What train.py wrote to.")
flags.DEFINE_integer("num", None, "How many images (default: as many as in the training's grids).", lower_bound=1)
flags.DEFINE_integer("steps", None, "Sampling steps (default: the config's).")
flags.DEFINE_string("solver", None, "Such as ddim, unipc or 'ddim(eta=1.0)', see docs/solvers.md (default: the config's).")
flags.DEFINE_string("times", None, "The grid, such as uniform or 'linear(lo=0.001)' (default: the config's).")
flags.DEFINE_float("guidance", None, "Classifier-free guidance; 1 is none (default: the config's).")
flags.DEFINE_string("classifier", None, "The workdir of a classifier, to guide by it; an unconditional model's label is its.")
flags.DEFINE_float("classifier_scale", 1.0, "With --classifier: how strongly it pushes; 0 is not at all.")
flags.DEFINE_integer("label", None, "The class, -1 for none (default: each class in turn).")
# JAX's keys hold 32 bits of a seed: larger ones would repeat these.
flags.DEFINE_integer("seed", 0, "Of the random numbers.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_integer("step", None, "The checkpoint kept at this training step (default: the newest).")
flags.DEFINE_string("ema", None, "One of config.training.ema, or 'power(0.07)', say, from snapshots (default: the config's).")
flags.DEFINE_string("out", None, "A .png or .npz file (default: samples.png in the workdir).")
flags.DEFINE_string("trajectory", None, "A .gif or .png file to show the denoiser's estimates on the way in, too.")
flags.DEFINE_string("image", None, "A picture to edit, of the model's size.")
flags.DEFINE_string("mask", None, "With --image: a picture of its size, white where it is to be drawn anew, elsewhere black.")
flags.DEFINE_float("strength", 1.0, "With --image: how much of the way down from noise is gone, above 0, at most 1.")
flags.DEFINE_integer("resample", 1, "With --mask: how often each stretch of steps is gone (RePaint); more fits in better.")


def main() -> None:
    if FLAGS.workdir is None:
        raise jd.InputError("which model? Give --workdir=DIR, the folder that train.py wrote to")
    out = target(FLAGS.out or place(FLAGS.workdir) / "samples.png", "out", (".png", ".npz"))
    film = FLAGS.trajectory and target(FLAGS.trajectory, "trajectory", (".gif", ".png"))
    if FLAGS.image is None and (FLAGS.mask is not None or FLAGS.strength != 1 or FLAGS.resample != 1):
        raise jd.InputError("--mask, --strength and --resample edit a picture; give it with --image=FILE")
    if FLAGS.image is not None and FLAGS.mask is None and FLAGS.strength == 1:
        raise jd.InputError("--image needs --mask=FILE, or --strength below 1: else nothing of it would be left")
    if FLAGS.image is not None and film:
        raise jd.InputError("--trajectory shows how new images come about, not how --image is edited; give one of the two")
    if FLAGS.classifier is None and FLAGS["classifier_scale"].present:
        raise jd.InputError("--classifier_scale is of a classifier; give its workdir with --classifier=DIR")
    run = jd.load(FLAGS.workdir, FLAGS.ema, FLAGS.step)
    for path in filter(None, (out, film)):
        if "://" not in str(path) and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise jd.InputError(f"{path}: the folder {path.parent} is not there or cannot be written")
    names = ("steps", "solver", "times", "guidance", "label")
    settings = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    if FLAGS.classifier is not None:
        settings |= {"classifier": jd.load_classifier(FLAGS.classifier), "classifier_scale": FLAGS.classifier_scale}
    num = run.config.sampling.num if FLAGS.num is None else FLAGS.num
    key = jax.random.key(FLAGS.seed)
    labels, columns, settings = runs.chosen(run, num, **settings)
    if film and settings["steps"] < 2:
        raise jd.InputError(f"--trajectory needs at least 2 sampling steps to show, got steps={settings['steps']}")
    parts, large = out.parent / (out.name + ".parts"), FLAGS.image is None and num > run.config.sampling.batch_size
    if out.suffix == ".npz" and not large and shards.begun(parts):
        raise jd.InputError(f"{parts} holds part of a larger request for {out.name}; remove it, or give another --out")
    # What is wrong with a request is told now, before a part of it is kept and stands in the way of the next.
    runs.request(run.config, jd.experiment.build(run.config), run.params, key, num, label=labels, **settings).make(np.arange(1))
    print(f"drawing {num} images at step {run.step} (the first call compiles) ...", flush=True)
    if FLAGS.image is not None:
        images = edited(run, key, num, settings | {"label": labels})
    elif out.suffix == ".npz" and large:
        images = runs.kept(run, parts, FLAGS.seed, num, labels, settings)
    else:
        images = run.generate(key, num, label=labels, **settings)
    if out.suffix == ".png":
        jd.pictures.save(out, jd.pictures.tile(images, columns))
    else:
        arrays = {"images": images} | ({} if labels is None else {"labels": labels})
        shards.whole(out, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        if large:
            parts.rmtree()
    print(f"wrote {out}")
    if film:
        show(run, key, min(num, 64), None if labels is None else labels[:64], settings, film, columns)


def target(path, flag: str, suffixes: tuple[str, ...]):
    """The file to write. Raises InputError for a directory or another suffix."""
    path = place(path)
    if path.suffix not in suffixes:
        kinds = f"neither a {suffixes[0]} nor an {suffixes[1]} file" if flag == "out" else f"no {' or '.join(suffixes)} file"
        raise jd.InputError(f"{flag}={path} is {kinds}")
    if path.is_dir():
        raise jd.InputError(f"{flag}={path} is a directory; give the name of a file")
    return path


def edited(run, key, num: int, settings: dict) -> np.ndarray:
    """`num` versions of the picture."""
    image = np.broadcast_to(jd.pictures.load(FLAGS.image, run.shape), (num, *run.shape))
    mask = None if FLAGS.mask is None else jd.pictures.load_mask(FLAGS.mask, run.shape[:-1])
    return run.edit(key, image, mask, FLAGS.strength, FLAGS.resample, **settings)


def show(run, key, num: int, labels, settings: dict, path, columns: int | None) -> None:
    """The denoiser's estimates on the way: one grid after another in a GIF, or one sample a row in a PNG."""
    steps = settings["steps"]
    told = run.trajectory(key, num, frames=min(30 if path.suffix == ".gif" else 10, steps), label=labels, **settings)
    if path.suffix == ".gif":
        jd.pictures.animate(path, [jd.pictures.tile(images, columns) for images in told.x0])
    else:
        rows = np.stack([told.x[:, :8], told.x0[:, :8]]).swapaxes(1, 2).swapaxes(0, 1)  # noisy and estimate, under each other
        jd.pictures.save(path, jd.pictures.tile(rows.reshape(-1, *run.shape), told.x0.shape[0]))
    print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
