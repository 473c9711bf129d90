"""Evaluates a trained model:  python evaluate.py --workdir=DIR [--metrics=bpd_elbo,bpd_ode --num --split --terms --steps --seed]

Prints each figure with its standard error and writes it to WORKDIR/evaluation. Stopped, it goes on where it was; every device
and process takes its share.
"""

import jax
from absl import flags

import jaxdiff as jd
from jaxdiff import cli, data, evaluation, experiment
from jaxdiff import mesh as meshes
from jaxdiff import run as runs

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "What train.py wrote to.")
flags.DEFINE_string(
    "metrics",
    "bpd_elbo",
    "Comma-separated: bpd_elbo (variational bound; in continuous time down to logsnr 10, unless the schedule was learned), "
    "bpd_ode (exact, probability flow).",
)
flags.DEFINE_string("split", "test", "Which split of the data.")
flags.DEFINE_string("data_dir", None, "Where the data is (default: the config's data_dir).")
flags.DEFINE_integer("num", 0, "Only the first so many images; 0 is all.")
flags.DEFINE_integer("batch_size", 0, "Images at once; 0 is config.sampling.batch_size.")
flags.DEFINE_integer("terms", 128, "bpd_elbo: steps or times drawn for each image; 0 is every step (1000 times without a table).")
flags.DEFINE_integer("steps", 50, "bpd_ode: steps of the integrator, four evaluations each.")
flags.DEFINE_integer("seed", 0, "Of the random numbers.")
flags.DEFINE_integer("step", None, "The checkpoint kept at this training step (default: the newest).")
flags.DEFINE_string("ema", None, "One of config.training.ema, or 'power(0.07)', say, from snapshots (default: the config's).")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes are not found automatically.")
flags.DEFINE_integer("processes", None, "How many processes there are.")
flags.DEFINE_integer("process", None, "Which of them this is, from 0.")


def main() -> None:
    if FLAGS.workdir is None:
        raise jd.InputError("which model? Give --workdir=DIR, the folder that train.py wrote to")
    metrics = [name.strip() for name in FLAGS.metrics.split(",") if name.strip()]
    unknown = [name for name in metrics if name not in evaluation.METRICS]
    if unknown or not metrics:
        raise jd.InputError(f"metrics={FLAGS.metrics!r} is unknown; allowed: {', '.join(evaluation.METRICS)}")
    for name in ("num", "batch_size", "terms", "seed"):
        if FLAGS[name].value < 0:  # type: ignore[operator]
            raise jd.InputError(f"{name}={FLAGS[name].value} is negative")
    meshes.connect(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
    run = jd.load(FLAGS.workdir, FLAGS.ema, FLAGS.step)
    config = run.config
    settings = evaluation.Settings(FLAGS.terms, FLAGS.steps, FLAGS.seed)
    built = experiment.build(config)
    for metric in metrics:  # what cannot work is told before the data is decoded
        evaluation.estimator(metric, config, built, run.params, settings)
    dataset = data.load(config.data.name, FLAGS.split, FLAGS.data_dir or config.data_dir or None, size=config.data.size or None)
    if dataset.images.shape[1:] != tuple(run.shape):
        raise jd.InputError(f"the images of {config.data.name} are {dataset.images.shape[1:]}, and this model's are {run.shape}")
    if FLAGS.num:
        dataset = dataset._replace(images=dataset.images[: FLAGS.num], labels=dataset.labels[: FLAGS.num])
    if meshes.first_process():
        print(
            f"{len(dataset.labels)} images of {config.data.name} {FLAGS.split}, step {run.step}, {jax.device_count()} "
            f"{jax.devices()[0].device_kind} device(s); the first batch compiles for up to a minute",
            flush=True,
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
            split=FLAGS.split,
        )
        if meshes.first_process():
            print(_line(row), flush=True)


def _line(row: dict) -> str:
    error = "" if row["stderr"] is None else f" +- {row['stderr']:.4f} (standard error)"
    terms = [f"{name} {row[name]:.4f}" for name in ("prior", "diffusion", "decoder") if name in row]
    split = f" = {' + '.join(terms)}" if terms else ""
    return f"{row['metric']}: {row['bits_per_dim']:.4f}{error} bits/dim on {row['n']} images{split}; {row['how']}"


if __name__ == "__main__":
    cli.run(main)
