"""Time against operations, over batch, width and image size:  python benchmarks/scaling.py [--repeats 5] [--publish]

The network of configs/cifar.py in float32 with one of batch, width and image size changed at a time, its forward pass and its whole
training step (with dropout, Adam and the average, the state donated). Operations are those of products and convolutions in the
traced program (`jaxdiff.training.hardware.flops`); what time they leave unexplained is not theirs. The ceiling is what the machine
does in a product of two 2048 x 2048 matrices that takes turns with it; so does a 3x3 convolution of 128 channels.

Each time is the median of --repeats calls after one that does not count; what takes more than 3 s has 3 calls, as its row says.
Writes docs/images/scaling_cost.png with --publish, or --out. `log-log slope` is of time against operations along a series: 1 where
time follows them.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import measure, peers
from benchmarks.training_step import batch_of, going
from jaxdiff import compiling, experiment
from jaxdiff.training import hardware, make_step

PICTURE = measure.ROOT / "docs" / "images" / "scaling_cost.png"
COLUMNS = ("what", "series", "channels", "size", "batch", "GFLOP", "ms", "calls", "GFLOP/s", "of matmul", "of convolution")
LONG = 3.0  # seconds: what takes more has fewer calls


class Size(NamedTuple):
    channels: int
    size: int
    batch: int


class Point(NamedTuple):
    """Of one size: operations, the seconds of a call, the median of so many, the ceilings' rates and our shares of them."""

    flops: float
    seconds: float
    calls: int
    rates: tuple[float, ...]
    shares: tuple[float, ...]


def forward(at: Size) -> tuple[Callable[[], Any], float]:
    """(a forward pass, its operations)."""
    built = experiment.build(peers.config_of(at.channels, at.size))
    net, params = compiling.jit(peers.forward(built)), peers.drawn(built)
    x, _, logsnr = (jnp.asarray(a) for a in peers.noisy(at.batch, at.size))
    return lambda: net(params, x, logsnr), hardware.flops(net.jitted().trace(params, x, logsnr).jaxpr)


def training(at: Size) -> tuple[Callable[[], Any], float]:
    """(a training step, its operations)."""
    config = peers.config_of(at.channels, at.size)
    built = experiment.build(config)
    state, optimizer = peers.state_of(config, built, peers.drawn(built))
    step, batch, key = compiling.jit(make_step(built, optimizer), donate_argnums=1), batch_of(config, at.batch), jax.random.key(0)
    return going(step, key, state, batch), hardware.flops(step.jitted().trace(key, state, batch).jaxpr)


WHAT = {"forward": forward, "training step": training}


def measured(made: tuple[Callable[[], Any], float], repeats: int, limits: dict[str, measure.Work]) -> Point:
    function, flops = made
    runs = {"": function} | {name: limit.run for name, limit in limits.items()}
    first = measure.turns(runs, 1)
    calls = min(repeats, 3) if first[""][0] > LONG else repeats
    others = measure.turns(runs, calls - 1, warm=0)
    seconds = {name: np.concatenate([first[name], others[name]]) for name in runs}
    shares = measure.shares(flops, seconds[""], limits, seconds)
    return Point(flops, float(np.median(seconds[""])), calls, tuple(measure.rates(limits, seconds)), tuple(shares))


def series(middle: Size, asked: argparse.Namespace, what: str) -> dict[str, list[Size]]:
    """What is changed, and the sizes then."""
    batches = asked.batch if what == "forward" else asked.train_batch
    return {
        "batch": [middle._replace(batch=n) for n in batches],
        "width": [middle._replace(channels=n) for n in asked.channels],
        "image size": [middle._replace(size=n) for n in asked.size],
    }


def slope(points: Iterable[Point]) -> float:
    """Of log seconds against log operations, by least squares."""
    flops, seconds = (np.log([p[i] for p in points]) for i in (0, 1))
    return float(np.polyfit(flops, seconds, 1)[0]) if len(flops) > 1 else float("nan")


def plot(found: dict[tuple[str, str], list[Point]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matmul, convolution = np.median([p.rates for points in found.values() for p in points], axis=0)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for ax, what in zip(axes, WHAT):
        mine = {name: points for (of, name), points in found.items() if of == what}
        every = np.array([p.flops for points in mine.values() for p in points])
        ends = np.array([every.min() / 1.5, every.max() * 1.5])
        for share, style in ((1.0, "-"), (0.8, "--"), (0.7, ":")):
            ax.plot(ends / 1e9, ends / (share * matmul), style, color="grey", lw=1, label=f"{share:.0%} of a matrix product's rate")
        ax.plot(ends / 1e9, ends / convolution, "-", color="tan", lw=1, label="a convolution's rate")
        for (name, points), marker in zip(mine.items(), "os^"):
            points = sorted(points)
            ax.plot([p.flops / 1e9 for p in points], [p.seconds for p in points], marker, ms=5, label=f"{name} changed")
        ax.set(xscale="log", yscale="log", xlabel="GFLOP", ylabel="seconds", title=what)
        ax.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def row(what: str, name: str, at: Size, point: Point) -> list[str]:
    rate = point.flops / point.seconds
    time = [f"{point.flops / 1e9:.4g}", measure.ms(point.seconds), f"{point.calls}", f"{rate / 1e9:.1f}"]
    return [what, name, *map(str, at), *time, *(f"{share:.1%}" for share in point.shares)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--train_batch", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 160])
    parser.add_argument("--size", type=int, nargs="+", default=[16, 32, 64], help="each divisible by 8")
    parser.add_argument(
        "--middle", type=int, nargs=3, default=[128, 32, 4], help="channels, size and batch where they are not changed"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--publish", action="store_true", help="adds the entry to docs/benchmarks.md, and writes the picture there")
    parser.add_argument("--out", type=Path, help="where to write the picture")
    asked = parser.parse_args(argv)
    limits = measure.ceilings()
    said = f"float32, median of {asked.repeats} calls (3 above {LONG:.0f} s). {measure.CEILING}."
    print(said, flush=True)
    known: dict[tuple[str, Size], Point] = {}  # a size that is in several series is measured once
    found: dict[tuple[str, str], list[Point]] = {}
    rows = []
    for what, make in WHAT.items():
        for name, sizes in series(Size(*asked.middle), asked, what).items():
            for at in sizes:
                if (what, at) not in known:
                    known[what, at] = measured(make(at), asked.repeats, limits)
                    jax.clear_caches()  # its program is of no more use, and holds memory
                rows.append(row(what, name, at, known[what, at]))
                print(" ".join(rows[-1]), flush=True)
            found[what, name] = [known[what, at] for at in sizes]
    slopes = [[what, name, f"{slope(points):.3f}"] for (what, name), points in found.items()]
    body = f"{measure.table(COLUMNS, rows)}\n\n{measure.table(('what', 'series', 'log-log slope'), slopes)}"
    print(f"\n{body}")
    path = asked.out or (PICTURE if asked.publish else None)
    if path:
        plot(found, path)
    if asked.publish:
        picture = "![time against operations](images/scaling_cost.png)"
        measure.publish("Time against operations", f"{said}\n\n{picture}\n\n{body}", measure.command(__file__, argv))


if __name__ == "__main__":
    main()
