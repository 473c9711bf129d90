"""Draws from a trained model:  python sample.py --workdir=DIR [--num --steps --solver --guidance --label --seed --out]

A PNG grid, or with --out=FILE.npz the arrays `images` (uint8 [N, H, W, C]) and, for a model with classes, `labels`.
"""

import os

import jax
import numpy as np
from absl import flags

import jaxdiff as jd
from jaxdiff import cli
from jaxdiff import run as runs
from jaxdiff.training.checkpoint import place

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "What train.py wrote to.")
flags.DEFINE_integer("num", None, "How many images (default: as many as in the training's grids).")
flags.DEFINE_integer("steps", None, "Sampling steps (default: the config's).")
flags.DEFINE_string("solver", None, "Such as ddim, ddpm, dpmpp_2m, heun or 'ddim(eta=1.0)' (default: the config's).")
flags.DEFINE_float("guidance", None, "Classifier-free guidance; 1 is none (default: the config's).")
flags.DEFINE_integer("label", None, "The class, -1 for none (default: each class in turn).")
flags.DEFINE_integer("seed", 0, "Of the random numbers.")
flags.DEFINE_string("ema", None, "One of config.training.ema, or 'power(0.07)', say, from snapshots (default: the config's).")
flags.DEFINE_string("out", None, "A .png or .npz file (default: samples.png in the workdir).")


def main() -> None:
    if FLAGS.workdir is None:
        raise jd.InputError("which model? Give --workdir=DIR, the folder that train.py wrote to")
    out = place(FLAGS.out or place(FLAGS.workdir) / "samples.png")
    if out.suffix not in (".png", ".npz"):
        raise jd.InputError(f"out={out} is neither a .png nor an .npz file")
    if out.is_dir():
        raise jd.InputError(f"out={out} is a directory; give the name of a file")
    run = jd.load(FLAGS.workdir, FLAGS.ema)
    if "://" not in str(out) and not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise jd.InputError(f"out={out}: the folder {out.parent} is not there or cannot be written")
    settings = {name: FLAGS[name].value for name in ("steps", "solver", "guidance", "label") if FLAGS[name].value is not None}
    num = run.config.sampling.num if FLAGS.num is None else FLAGS.num
    print(f"drawing {num} images at step {run.step} (the first call compiles) ...", flush=True)
    images, columns, labels = runs.showcase(run, jax.random.key(FLAGS.seed), num, **settings)
    if out.suffix == ".png":
        jd.pictures.save(out, jd.pictures.tile(images, columns))
    else:
        with out.open("wb") as file:
            np.savez(file, images=images, **({} if labels is None else {"labels": labels}))  # type: ignore[arg-type]
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
