"""How a model's distance from real images falls along training, and rises as its samples are drawn in fewer steps.

    python train.py --config=configs/digits.py --config.training.save_every=100 --config.training.keep=100
    python train.py --config=configs/digits_classifier.py
    python benchmarks/distance_by_step.py --workdir=runs/digits --classifier=runs/digits_classifier --num=1000

The own-feature distance (Frechet distance of a classifier's last features; no FID) of `num` samples from the training images, from
every kept checkpoint, or those of --at; then from the newest in fewer and fewer sampling steps. The floor is that of real held-out
images, as many where there are, each class as often as among samples. Prints both tables, writes them as JSON and, with
--out=FILE.png, as a picture.
"""

import json
from pathlib import Path

import jax
import numpy as np
from absl import flags

import jaxdiff as jd
from jaxdiff import cli, data
from jaxdiff.evaluation import distances, features, references
from jaxdiff.training import checkpoint

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "What train.py wrote to, with several checkpoints kept.")
flags.DEFINE_string("final", None, "The workdir of the model to draw in fewer steps (default: the same).")
flags.DEFINE_string("classifier", None, "The workdir of a classifier of such images.")
flags.DEFINE_string("data_dir", None, "Where the data is (default: the config's data_dir).")
flags.DEFINE_list("at", [], "Training steps to look at (default: all that are kept).")
flags.DEFINE_list("few", ["50", "20", "10", "5"], "Sampling steps to compare.")
flags.DEFINE_integer("num", 1000, "How many samples.", lower_bound=2)
flags.DEFINE_integer("steps", None, "Sampling steps along training (default: the config's).")
flags.DEFINE_integer("batch_size", None, "Images drawn at once (default: the config's); small ones are faster on a CPU.")
flags.DEFINE_float("guidance", 1.0, "Classifier-free guidance; more than 1 trades variety, which the distance sees, for clarity.")
flags.DEFINE_string("out", None, "A .png file for the two curves; their numbers go beside it as .json.")


def main() -> None:
    if lost := [name for name in ("workdir", "classifier") if FLAGS[name].value is None]:
        raise jd.InputError(f"--{lost[0]}=DIR is missing")
    network = features.classifier(FLAGS.classifier)
    run = jd.load(FLAGS.workdir)
    train, test = (of_split(run, split) for split in ("train", "test"))
    reference = references.cached(train.images, network, 100, "train").moments["pool"]

    def seen(images: np.ndarray, name: str) -> distances.Moments:
        return references.describe(images, network, 100, name).moments["pool"]

    def distance(images: np.ndarray, name: str) -> float:
        return distances.frechet(seen(images, name), reference)

    held_out = test.images[references.in_turn(test.labels, FLAGS.num)]
    unseen = seen(held_out, "held out")
    floor = distances.frechet(unseen, reference)
    print(
        f"own-feature distance ({network.digest[:12]}) of {len(reference.mean)} features, from {len(train.labels)} training images"
    )
    print(f"floor: {floor:.4f} of {len(held_out)} held-out images; a model's are of {FLAGS.num} samples, guidance {FLAGS.guidance}")
    there = sorted(checkpoint.steps(checkpoint.place(FLAGS.workdir) / checkpoint.FOLDER))
    rows = {}
    for step in [int(step) for step in FLAGS.at] or there:
        at = jd.load(FLAGS.workdir, step=step)
        rows[step] = distance(drawn(at, FLAGS.steps or at.config.sampling.steps), f"step {step}")
        print(f"training step {step:7d}: {rows[step]:.4f}", flush=True)
    last = jd.load(FLAGS.final or FLAGS.workdir)
    few, fresh = {}, {}
    # The classifier has learnt training images by heart, the model too; neither has seen the held-out ones. From these, samples and
    # as many training images are judged alike.
    some = train.images[references.in_turn(train.labels, FLAGS.num)]
    alike = distances.frechet(seen(some, "train"), unseen)
    print(f"from the held-out images: {alike:.4f} of {len(some)} training images")
    for steps in map(int, FLAGS.few):
        found = seen(drawn(last, steps), f"{steps} sampling steps")
        few[steps], fresh[steps] = distances.frechet(found, reference), distances.frechet(found, unseen)
        print(f"{steps:4d} sampling steps: {few[steps]:.4f}, from the held-out images {fresh[steps]:.4f}", flush=True)
    if FLAGS.out:
        told = {
            "floor": floor,
            "by_step": rows,
            "by_sampling_steps": few,
            "from_held_out": fresh,
            "training_from_held_out": alike,
            "n": FLAGS.num,
            "guidance": FLAGS.guidance,
        }
        told |= {"held_out": len(held_out), "network": network.digest, "final_step": last.step, "seed": 0}
        Path(FLAGS.out).with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        picture(Path(FLAGS.out), rows, few, floor)


def of_split(run, split: str) -> data.Dataset:
    config = run.config
    return data.of_config(config, split, FLAGS.data_dir)


def drawn(run, steps: int) -> np.ndarray:
    """`num` samples, each class in turn, the same noise whatever the model and the steps."""
    run.config.sampling.batch_size = FLAGS.batch_size or run.config.sampling.batch_size
    labels = np.arange(FLAGS.num) % run.config.model.classes if run.config.model.classes else None
    return run.generate(jax.random.key(0), FLAGS.num, steps=steps, label=labels, guidance=FLAGS.guidance)


def picture(path: Path, rows: dict[int, float], few: dict[int, float], floor: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for place, curve, label in zip(figure.subplots(1, 2, sharey=True), (rows, few), ("training step", "sampling steps")):
        place.plot(list(curve), list(curve.values()), "o-", markersize=4)
        place.axhline(floor, color="grey", linestyle="--", label="real held-out images")
        place.set(xlabel=label, yscale="log")
        place.grid(alpha=0.3)
    place.set_xscale("log")
    place.set_xticks(list(few), map(str, few))
    place.minorticks_off()
    place.legend()
    figure.axes[0].set_ylabel("own-feature distance")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    cli.run(main)
