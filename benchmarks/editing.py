"""Editing that can be checked:  python benchmarks/editing.py --workdir=runs/digits [--only=inpainting,inversion,super_resolution]

For MNIST: --set=mnist --workdir=runs/mnist [--data_dir=DIR]. All of it with held-out images, none of it told a label:

  inpainting        the lower half is drawn anew, by replacement and by RePaint; the known pixels must come back bit for bit, and an
                    independent judge (judge.py) says how often the whole is the original's class;
  inversion         image to noise and back by one solver, PSNR by the number of steps;
  super_resolution  from the means of blocks, 2x2 for the 8x8 digits (of which 4x4 would leave four numbers) and 4x4 for MNIST,
                    beside bicubic interpolation of the same means.

Prints tables and writes a picture for each. Needs scikit-learn and matplotlib.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import judge as judges
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import jaxdiff as jd
from jaxdiff import cli, editing, experiment
from jaxdiff import run as runs

# Enough images for decibels; for shares there are more (--num).
PSNR_IMAGES = 100
# Of those less where a derivative goes through the network, which costs several evaluations on a CPU.
SUPER_IMAGES, SUPER_STEPS = 60, 20
STEPS = (5, 10, 20, 50, 100)
SOLVERS = ("ddim", "dpmpp_2m", "heun")


def first_of_each(digits: judges.Digits) -> np.ndarray:
    """Where the first held-out image of each class is: nobody picked them."""
    return np.asarray([np.flatnonzero(digits.test.labels == label)[0] for label in range(10)])


def psnr(made: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Of each image the peak signal-to-noise ratio in decibels, [N]; 99 at most, for images that are equal."""
    error = np.square(made.astype(float) - original).reshape(len(original), -1).mean(1)
    return np.minimum(99, 10 * np.log10(255**2 / np.maximum(error, 1e-9)))


def mean(values: np.ndarray, digits: int = 2) -> str:
    """The mean with its standard error."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}"


def show(path: str, rows: list[tuple[str, np.ndarray]], size: int = 56) -> None:
    """Writes rows of images, ten a row, each with its name at the left."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(7.3, 0.72 * len(rows)), layout="constrained")
    for axis, (name, images) in zip(axes, rows):
        axis.imshow(jd.pictures.tile(images, len(images), smallest=size), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


# --- inpainting -----------------------------------------------------------------------------------------------------------


def inpainting(run: jd.Run, digits: judges.Digits, args) -> None:
    """The lower half drawn anew: a table and a picture."""
    images, labels = digits.test.images[: args.num], digits.test.labels[: args.num]
    shown, hidden = first_of_each(digits), np.zeros(run.shape[:2], bool)
    hidden[run.shape[0] // 2 :] = True
    # Of the images in the picture two more versions are drawn.
    many = np.concatenate([images, *2 * [digits.test.images[shown]], digits.test.images[shown]])
    blank = np.where(hidden[..., None], 128, digits.test.images[shown]).astype(np.uint8)
    rows = [("original", digits.test.images[shown]), ("given", blank)]
    average = np.where(hidden[..., None], digits.train.images.mean(0).round(), images).astype(np.uint8)
    said = [
        ("the original", "", judges.percent(np.mean(digits.says(images) == labels), len(labels))),
        ("the mean training image in the gap", "", judges.percent(np.mean(digits.says(average) == labels), len(labels))),
    ]
    for name, resample in (("replacement", 1), ("RePaint", 10)):
        made = run.edit(jax.random.key(args.seed), many, hidden, resample=resample, steps=args.steps, solver="ddpm")
        assert (made[:, ~hidden] == many[:, ~hidden]).all(), f"{name} changed a known pixel"
        right = np.mean(digits.says(made[: len(labels)]) == labels)
        kept = f"all of {(~hidden).sum()} in {len(many)} images"
        said.append((f"{name}, {args.steps} steps of `ddpm`", kept, judges.percent(right, len(labels))))
        rows += [(f"{name} {i + 1}", part) for i, part in enumerate(np.split(made[len(labels) :], 3))]
    judges.table(("lower half", "known pixels equal in uint8", f"judged as the original's class ({len(labels)} images)"), *said)
    show(f"{args.out}/inpainting_{args.set}.png", rows)


# --- inversion ------------------------------------------------------------------------------------------------------------


def unclipped(run: jd.Run) -> jd.Run:
    """The model without clipping, whose flow can be gone both ways: what clipping cuts off is lost."""
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.sampling.clip = False
    return runs.of(config, experiment.build(config), run.params, run.step)


@jax.jit
def there_and_back(solver: jd.Solver, x0: jax.Array, levels: jd.Level) -> jax.Array:
    return jd.sample(jax.random.key(0), solver, editing.invert(solver, x0, levels), levels)


def inversion(run: jd.Run, digits: judges.Digits, args) -> None:
    """To noise and back: a table and a picture."""
    free, images = unclipped(run), digits.test.images[: min(PSNR_IMAGES, args.num)]
    x0, built, told = run.codec.encode(jax.random.key(0), jnp.asarray(images)), experiment.build(run.config), {}
    for name in SOLVERS:
        solver = getattr(jd.solvers, name)(free.denoiser())
        for steps in STEPS:
            levels = runs.grid(free.config, built, free.params, steps, args.times)
            told[name, steps] = psnr(np.asarray(run.codec.decode(there_and_back(solver, x0, levels))), images)
    rows = [(f"`{name}`", *(mean(told[name, steps], 1) for steps in STEPS)) for name in SOLVERS]
    print(f"PSNR in dB, {len(images)} images, times {args.times}")
    judges.table(("solver", *(f"{steps} steps" for steps in STEPS)), *rows)
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for name in SOLVERS:
        axis.plot(STEPS, [told[name, steps].mean() for steps in STEPS], marker="o", label=name)
    axis.set(
        xscale="log",
        xticks=STEPS,
        xticklabels=STEPS,
        xlabel="steps each way",
        ylabel="PSNR, dB",
        title=f"{args.set}: to noise and back",
    )
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(f"{args.out}/inversion_{args.set}.png", dpi=110)


# --- super-resolution -----------------------------------------------------------------------------------------------------


def bicubic(y: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """y [N, h, w, 1] at the size of `shape`, by Pillow, of float pixels and not of rounded ones."""
    size = shape[1], shape[0]
    return np.stack([np.asarray(Image.fromarray(each[..., 0]).resize(size, Image.Resampling.BICUBIC)) for each in y])[..., None]


def measured(factor: int) -> dict[str, Callable]:
    """How a measurement is put into a denoiser. Means of blocks shrink a gradient by factor^2, which the second scale makes up."""
    square = factor**2
    return {
        "null space": editing.null_space,
        "reconstruction, scale 1": editing.reconstruction,
        f"reconstruction, scale {square}": lambda d, operator, y: editing.reconstruction(d, operator, y, float(square)),
        "pseudo-inverse": editing.pseudo_inverse,
    }


def super_resolution(run: jd.Run, digits: judges.Digits, args) -> None:
    """Block means made large again: a table and a picture."""
    factor = 2 if args.set == "digits" else 4
    # A solver of a measurement belongs to its rows, so all of them are one batch.
    n, shown = min(SUPER_IMAGES, args.num, run.config.sampling.batch_size - 10), first_of_each(digits)
    images = np.concatenate([digits.test.images[:n], digits.test.images[shown]])
    labels, operator = digits.test.labels[:n], editing.average(factor)
    y = operator.forward(run.codec.encode(jax.random.key(0), jnp.asarray(images)))
    repeated = np.asarray(run.codec.decode(operator.pseudo(y)))
    said, rows = [], [("original", images[n:]), ("given", repeated[n:])]

    def tell(name: str, made: np.ndarray, average: np.ndarray | None = None) -> None:
        off = np.asarray(operator.forward(jnp.asarray(made[:n], jnp.float32) - jnp.asarray(images[:n], jnp.float32)))
        right = judges.percent(np.mean(digits.says(made[:n]) == labels), n)
        of_mean = "" if average is None else mean(psnr(average[:n], images[:n]))
        said.append((name, mean(psnr(made[:n], images[:n])), of_mean, right, f"{np.sqrt(np.square(off).mean()):.2f}"))
        rows.append((name, made[n:]))

    tell("pixels repeated", repeated)
    del rows[-1]  # it is what was given
    tell("bicubic (Pillow)", np.asarray(run.codec.decode(jnp.asarray(bicubic(np.asarray(y), run.shape)))))
    for name, hold in measured(factor).items():
        made = [
            run.generate(jax.random.key(seed), len(images), SUPER_STEPS, lambda d, hold=hold: jd.solvers.ddim(hold(d, operator, y)))
            for seed in range(args.versions)
        ]
        tell(name, made[0], np.mean(made, 0))
    heads = ("from the block means", "PSNR, dB", f"of the mean of {args.versions}", "judged right", "block means off by, of 255")
    print(f"{factor}x, {n} images, {SUPER_STEPS} steps of `ddim`")
    judges.table(heads, *said)
    show(f"{args.out}/super_resolution_{args.set}.png", rows)


def main() -> None:
    parts = {part.__name__: part for part in (inpainting, inversion, super_resolution)}
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--workdir", default="runs/digits")
    parser.add_argument("--data_dir", default=None)
    parser.add_argument("--num", type=int, default=250, help="held-out images, of the other two at most 100 and 60")
    parser.add_argument("--steps", type=int, default=50, help="of inpainting")
    parser.add_argument("--times", default="linear(lo=0.01)", help="the grid of inversion")
    parser.add_argument("--versions", type=int, default=4, help="samples an image of super-resolution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(parts))
    parser.add_argument("--out", default="docs/images")
    args = parser.parse_args()
    cli.enable_compile_cache()
    run, digits = jd.load(args.workdir), judges.load(args.set, args.data_dir)
    for name in args.only.split(","):
        start = time.time()
        print(f"## {name}: {args.set}, model of step {run.step}\n")
        parts[name](run, digits, args)
        print(f"{time.time() - start:.0f} s on {jax.devices()[0].platform}\n", flush=True)


if __name__ == "__main__":
    main()
