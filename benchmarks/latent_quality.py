"""Whether digits drawn in latent space are what was asked for, and what one costs beside a model of pixels.

    python train.py --config=configs/mnist_vq.py && python train.py --config=configs/mnist_ldm.py
    python train.py --config=configs/digits_classifier.py --workdir=runs/mnist_classifier --config.data.name=mnist ...
    python benchmarks/latent_quality.py --workdir=runs/mnist_ldm --classifier=runs/mnist_classifier --pixels=runs/mnist

The judge is a classifier that this project trained, shown images without noise; first its accuracy on all real held-out images is
told. Samples are cropped in the middle to the size it knows. Then, for each guidance, the share of samples that it labels as asked,
with the standard error. Last the operations that a sample takes, those of matrix products and convolutions: one network call's
times the levels of the grid (twice that where guided), and the decoder's. --out=FILE.png writes the samples of the first guidance,
a class a column.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from judge import percent, table

import jaxdiff as jd
from jaxdiff import cli, data, editing, experiment, pictures
from jaxdiff import run as runs
from jaxdiff.evaluation import features
from jaxdiff.training import hardware

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "The model of latents.")
flags.DEFINE_string("classifier", None, "The workdir of a classifier of such images, perhaps without their border.")
flags.DEFINE_string("pixels", None, "A model of pixels to compare the cost with.")
flags.DEFINE_string("data_dir", None, "Where the classifier's data is (default: its config's data_dir).")
flags.DEFINE_list("guidance", ["1.0", "1.5", "2.0"], "Scales to draw with.")
flags.DEFINE_integer("num", 1000, "How many samples, each class as often.", lower_bound=2)
flags.DEFINE_integer("steps", 50, "Sampling steps.", lower_bound=1)
flags.DEFINE_string("solver", "ddim", "The solver.")
flags.DEFINE_integer("seed", 0, "The samples' seed.")
flags.DEFINE_string("out", None, "A .png file for samples.")


def cropped(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The middle of images [N, H, W, C] that is of `shape` (H, W, C)."""
    top, left = ((have - want) // 2 for have, want in zip(images.shape[1:3], shape))
    return images[:, top : top + shape[0], left : left + shape[1]]


def says(network: features.Features, images: np.ndarray) -> np.ndarray:
    """The labels that the judge gives images, a few hundred at once."""
    batches = np.array_split(images, -(-len(images) // 250))
    return np.concatenate([np.asarray(network.apply(jnp.asarray(batch))["logits"]).argmax(-1) for batch in batches])


def operations(function, *args) -> float:
    """GFLOP of one call."""
    return hardware.flops(jax.make_jaxpr(function)(*args)) / 1e9


def cost(run: jd.Run, steps: int) -> list:
    """[GFLOP of a network call on one image, calls for a sample without guidance, GFLOP of decoding, of a sample in all]."""
    built = experiment.build(run.config)
    cond = {"label": jnp.zeros(1, jnp.int32)} if built.classes else None
    latent = runs.latent_shape(built, 1)
    call = operations(lambda params, x: built.net(params, cond)(x, jnp.zeros(()))[0], run.params, jnp.zeros(latent))
    calls = editing.true_length(runs.grid(run.config, built, run.params, steps))
    decode = operations(run.codec.decode, jnp.zeros(latent))
    return [f"{call:.4g}", calls, f"{decode:.4g}", f"{calls * call + decode:.4g}"]


def main() -> None:
    if lost := [name for name in ("workdir", "classifier") if FLAGS[name].value is None]:
        raise jd.InputError(f"--{lost[0]}=DIR is missing")
    run, network, judge = jd.load(FLAGS.workdir), features.classifier(FLAGS.classifier), jd.load_classifier(FLAGS.classifier)
    real = data.of_config(judge.config, "test", FLAGS.data_dir)
    right = float(np.mean(says(network, real.images) == real.labels))
    print(f"judge: right on {percent(right, len(real.labels))} of the {len(real.labels)} real held-out images\n")
    labels = np.arange(FLAGS.num) % run.config.model.classes
    rows: list[tuple] = [("guidance", "samples", "label as asked")]
    for scale in map(float, FLAGS.guidance):
        images = run.generate(jax.random.key(FLAGS.seed), FLAGS.num, FLAGS.steps, FLAGS.solver, labels, scale)
        if FLAGS.out and len(rows) == 1:
            pictures.save(Path(FLAGS.out), pictures.tile(images[:100], run.config.model.classes))
        asked = float(np.mean(says(network, cropped(images, judge.shape)) == labels))
        rows.append((scale, FLAGS.num, percent(asked, FLAGS.num)))
    table(*rows)
    heads = ("model", "image", "diffused", "GFLOP a network call", "calls", "GFLOP of decoding", "GFLOP a sample, unguided")
    both = [run] + ([jd.load(FLAGS.pixels)] if FLAGS.pixels else [])
    shapes = [runs.latent_shape(experiment.build(each.config), 1)[1:] for each in both]
    names = [FLAGS.workdir, FLAGS.pixels]
    table(heads, *((name, each.shape, shape, *cost(each, FLAGS.steps)) for name, each, shape in zip(names, both, shapes)))


if __name__ == "__main__":
    cli.run(main)
