"""DDIM beside diffusers' loop and bare network calls:  python benchmarks/sampling.py [--channels 128 32] [--steps 50] [--publish]

Ours is the jitted sampler that `run.generate` calls, on the grid it makes (padded to 1000 levels); the peer is diffusers'
UNet2DModel of the same weights in channels_last under inference_mode, walked by its DDIMScheduler in Python. Both ask the network
at the same rows of the table, as often as there are steps, which is checked; from the same noise both draw the same images, which
is checked too, to the bound that --same gives. A third takes turns with them: as many bare jitted calls of our network, each on
what the one before said.

A ratio is theirs to ours, turn by turn, median and quartiles: above 1 the sampler is faster. Widths are of the network of
configs/cifar.py: at 128 it has 35,746,307 parameters, at 32 there are 2,245,763.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import measure, peers
from benchmarks.sampling_cost import Sampler
from jaxdiff import compiling, editing, experiment, run
from jaxdiff.times import grid

COLUMNS = (
    "channels", "parameters", "network calls", "jaxdiff, s", "diffusers, s", "diffusers / ours", "bare calls, s", "bare / ours",
    "images/s",
)  # fmt: skip


def sampler(channels: int, size: int, batch: int, steps: int) -> Sampler:
    config = peers.config_of(channels, size)
    return Sampler("float32", batch, steps, config=config, params=peers.drawn(experiment.build(config)))


def bare(made: Sampler):
    """As many calls of the jitted network as the sampler makes, each waiting for the one before."""
    net, calls = compiling.jit(made.net), editing.true_length(made.wanted.levels)

    def once():
        x = made.x
        for _ in range(calls):
            x = net(made.params, x, made.logsnr)
        return x

    return once


def start(made: Sampler) -> np.ndarray:
    """The noise that our sampler begins from, [B, H, W, 3]."""
    return np.asarray(run._begin(made.wanted.keys, made.wanted.levels, made.built.data_std, None, made.shape)[0])


def rows_asked(made: Sampler) -> list[int]:
    """The rows of the table at which our sampler asks the network."""
    table = grid(made.built.schedule(None), np.arange(1, 1001) / 1000)
    levels = made.padded(editing.true_length(made.wanted.levels))
    return [int(np.abs(np.asarray(table.alpha) - alpha).argmin()) for alpha in np.asarray(levels.alpha)]


def theirs(made: Sampler, same: float):
    """The peer, ready to run; it and ours were seen to draw the same, at the same rows. Raises AssertionError where they do not."""
    model = peers.torch_network(made.config, made.params)
    peers.check_same(made.config, made.params, model)
    loop, rows = peers.torch_sampler(model, made.config, made.steps)
    if rows != rows_asked(made):
        raise AssertionError(f"the network is asked at rows {rows_asked(made)} here, at {rows} there")
    noise = peers.torch_images(start(made))
    apart = np.abs(np.asarray(made.draw(made.wanted.levels)) - loop(noise).permute(0, 2, 3, 1).numpy())
    if np.median(apart) > same:
        raise AssertionError(f"images of the two differ by {np.median(apart):.2e}, the median pixel of a range of 2")
    return functools.partial(loop, noise)


def compared(made: Sampler, repeats: int, same: float) -> list[str]:
    """A row of the table."""
    runs = {"ours": lambda: made.draw(made.wanted.levels), "bare": bare(made)}
    if peers.torch_is_here():
        runs["theirs"] = theirs(made, same)
    seconds = measure.turns(runs, repeats)
    ours, calls = measure.spread(seconds["ours"]).median, measure.spread(seconds["bare"]).median
    beside = ["not here", ""]
    if "theirs" in seconds:
        beside = [f"{measure.spread(seconds['theirs']).median:.2f}", str(measure.ratio(seconds["theirs"], seconds["ours"]))]
    who = [f"{made.config.model.channels}", f"{peers.count(made.params):,}", f"{editing.true_length(made.wanted.levels)}"]
    ratio = str(measure.ratio(seconds["bare"], seconds["ours"]))
    return [*who, f"{ours:.2f}", *beside, f"{calls:.2f}", ratio, f"{made.shape[0] / ours:.3f}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--same", type=float, default=1e-3, help="by how much the median pixel of the two may differ")
    parser.add_argument("--publish", action="store_true", help="adds the entry to docs/benchmarks.md")
    asked = parser.parse_args(argv)
    said = f"{asked.steps} steps of DDIM, batch {asked.batch}, {asked.size}x{asked.size}, float32, median of {asked.repeats} turns."
    print(said, flush=True)
    rows = [compared(sampler(n, asked.size, asked.batch, asked.steps), asked.repeats, asked.same) for n in asked.channels]
    body = measure.table(COLUMNS, rows)
    print(body)
    if asked.publish:
        title = "DDIM beside diffusers' loop and bare network calls"
        measure.publish(title, f"{said}\n\n{body}", measure.command(__file__, argv))


if __name__ == "__main__":
    main()
