"""Bits per dimension of a run's kept checkpoints against the images it had seen:  python benchmarks/bits_by_step.py --workdir=DIR

Keep checkpoints with --config.training.keep_every while training. Prints a Markdown table, each figure with its standard error over
images, and writes the plot to WORKDIR/bits_by_step.png. The flow's figure is of the last checkpoint alone: it costs the most.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jaxdiff as jd
from jaxdiff import cli, data, evaluation, experiment
from jaxdiff import run as runs
from jaxdiff.training import checkpoint

# bits per dimension on CIFAR-10's test images: DDPM table 1, Improved DDPM table 4, score SDEs table 2, VDM table 1
PUBLISHED = {"DDPM": 3.75, "Improved DDPM": 2.94, "sub-VP": 2.99, "VDM": 2.65}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--num", type=int, default=512)
    parser.add_argument("--terms", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--flow", type=int, default=0, help="how many images for the flow's figure; 0: none")
    args = parser.parse_args()
    cli.enable_compile_cache()
    steps = sorted(checkpoint.steps(checkpoint.place(args.workdir) / checkpoint.FOLDER))
    config = jd.load(args.workdir).config
    built = experiment.build(config)
    test = data.of_config(config, "test", args.data_dir)

    def bits(metric: str, step: int, num: int) -> dict:
        run = jd.load(args.workdir, step=step)
        some = test._replace(images=test.images[:num], labels=test.labels[:num])
        settings, facts = evaluation.Settings(args.terms), {"step": step, "ema": runs.average(config), "split": "test"}
        return evaluation.evaluate(args.workdir, metric, config, built, run.params, some, args.batch, settings, **facts)

    print("| step | images seen | bits/dim | standard error | prior | steps between | decoder |\n|---|---|---|---|---|---|---|")
    seen, found = [], []
    for step in steps:
        row = bits("bpd_elbo", step, args.num)
        seen.append(step * config.batch_size)
        found.append(row["bits_per_dim"])
        print(
            f"| {step} | {seen[-1]:,} | {row['bits_per_dim']:.3f} | {row['stderr']:.3f} | {row['prior']:.4f} | "
            f"{row['diffusion']:.3f} | {row['decoder']:.3f} |",
            flush=True,
        )
    print(f"\n{args.num} test images; {row['how']}")
    if args.flow:
        row = bits("bpd_ode", steps[-1], args.flow)
        print(f"flow at step {steps[-1]}: {row['bits_per_dim']:.3f} +- {row['stderr']:.3f} on {args.flow} images; {row['how']}")
    _plot(seen, found, checkpoint.place(args.workdir) / "bits_by_step.png")


def _plot(seen: list[int], found: list[float], path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(seen, found, "o-")
    for name, value in PUBLISHED.items():
        axes.axhline(value, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(f"{name} {value}", (seen[0], value), fontsize=7, va="bottom")
    axes.set(xlabel="images seen", ylabel="bits/dim, test images", xscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
