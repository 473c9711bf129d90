"""What a whole sampler costs beside the bare network:  python benchmarks/sampling_cost.py [--batch=4] [--steps=5] [--dtype=float32]

The network is that of configs/cifar.py, 35,746,307 parameters, untrained: no figure here depends on its values. The sampler is
what `run.generate` calls, its grid padded to 1000 levels. Three tables, of which --tables=0 leaves out the first two: they compile
seven programs more.

- What the compiler counts in the optimised program (`cost_analysis`). XLA counts a loop's body once, however often it runs, and of
  a condition the dearer branch; samplers of 10 and of 1000 levels check that. A whole sampler then holds two evaluations, the
  loop's and the last, and is compared with two bare calls. A step of a solver is also compiled alone, and compared with one.
- What memory the compiler plans (`memory_analysis`): temporaries and results at 10 and at 1000 levels, of the sampler and of one
  that returns the x0 predicted at every level.
- Time, of the clock or on a CPU of the processor: --steps levels, one evaluation each, against as many bare jitted calls, taking
  turns --repeats times. The ratio is that of the medians, the range that of the turns: of the bare calls' own times to their
  median, which is the noise, and of the others to the bare calls of the same turn. The grid cut to its true length tells what
  padding costs.
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import peers
from configs import cifar
from jaxdiff import compiling, experiment, run, sampling
from jaxdiff.level import Level


class Sampler:
    """A network and what `run.generate` gives the jitted sampler for `batch` images in `steps` steps.

    The network is that of configs/cifar.py, with so many channels, or that of a config with parameters at hand.
    """

    def __init__(self, dtype: str, batch: int, steps: int, channels: int = 128, config=None, params=None):
        self.config, self.steps = cifar.get_config() if config is None else config, steps
        if config is None:
            self.config.model.channels = channels
        self.config.model.dtype = dtype
        self.built = experiment.build(self.config)
        # Away from their start, where a network's output is zero and calls in a row would see nothing.
        self.params = peers.drawn(self.built) if params is None else params
        self.shape = (batch, *self.built.shape)
        self.x, self.logsnr = jax.random.normal(jax.random.key(1), self.shape), jnp.zeros(())
        self.wanted = run.request(self.config, self.built, self.params, jax.random.key(0), batch, steps)

    def net(self, params, x, logsnr):
        return self.built.net(params, None)(x, logsnr)[0]

    def solver(self, name: str = "ddim"):
        denoise = run.denoiser_of(self.config, self.built, self.params, None, 1.0)
        return run.solver_of(name, "solver", denoise)

    def arguments(self, levels: Level):
        return self.wanted.keys, self.solver(), levels, self.built.data_std, None

    def padded(self, n: int) -> Level:
        return jax.tree.map(lambda a: a[:n], self.wanted.levels)

    def draw(self, levels: Level):
        return run._draw(*self.arguments(levels), shape=self.shape, mesh=None)

    def with_predictions(self, keys, solver, levels, data_std, x0):
        """The sampler that also returns every x0 it predicted, [N - 1, B, ...]."""
        x, k_solve = run._begin(keys, levels, data_std, x0, self.shape)
        state, told = sampling.solve(k_solve, solver, x, levels)
        return solver.final(state, jax.tree.map(lambda a: jnp.asarray(a[-1], x.dtype), levels)), told.x0


def one_step(keys, solver, x, t, s):
    return solver.step(keys, solver.init(x), t, s)[0]


def compiled(function, *arguments):
    return jax.jit(function, compiler_options=compiling.options() or None).lower(*arguments).compile()


def counts(program) -> np.ndarray:
    """[FLOP, bytes accessed]."""
    found = program.cost_analysis()
    found = found[0] if isinstance(found, list) else found
    return np.array([found["flops"], found["bytes accessed"]])


def memory(program) -> np.ndarray:
    """[temporaries, results], in bytes."""
    found = program.memory_analysis()
    return np.array([found.temp_size_in_bytes, found.output_size_in_bytes])


def print_counts(made: Sampler, net, whole) -> None:
    net = counts(net)
    short, long = (counts(whole[n]) for n in (10, 1000))
    # Where a backend multiplies by the loop's length, a sampler of 10 levels holds ten evaluations.
    held = 2 if abs(long[0] / short[0] - 1) < 0.01 else 10
    rows = {f"the sampler, {held} evaluations as counted": (short, held)}
    level = Level(jnp.float32(0.6), jnp.float32(0.8))
    for name in ("ddim", "ddpm_large"):
        step = compiled(one_step, made.wanted.keys, made.solver(name), made.x, level, Level(jnp.float32(0.8), jnp.float32(0.6)))
        rows[f"a step of {name}"] = counts(step), 1
    print("\n| compiler's counts | GFLOP | GB accessed | FLOP, of as many bare calls | bytes, of as many |\n|---|---|---|---|---|")
    print(f"| one bare call | {net[0] / 1e9:.3f} | {net[1] / 1e9:.4f} | | |")
    for name, (found, calls) in rows.items():
        flop, moved = found / (calls * net)
        print(f"| {name} | {found[0] / 1e9:.3f} | {found[1] / 1e9:.4f} | {flop:.5f} | {moved:.5f} |", flush=True)


def print_memory(made: Sampler, net, whole) -> None:
    net = memory(net)
    told = {n: compiled(made.with_predictions, *made.arguments(made.padded(n))) for n in (10, 1000)}
    print("\n| compiler's memory, MB | temporaries, 10 levels | 1000 levels | results, 10 levels | 1000 levels |")
    print("|---|---|---|---|---|")
    print(f"| one bare call | {net[0] / 1e6:.2f} | | {net[1] / 1e6:.2f} | |")
    for name, programs in {"the sampler": whole, "one that returns its predictions": told}.items():
        short, long = (memory(programs[n]) / 1e6 for n in (10, 1000))
        print(f"| {name} | {short[0]:.2f} | {long[0]:.2f} | {short[1]:.2f} | {long[1]:.2f} |", flush=True)


def seconds(function) -> float:
    # A CPU is shared with whatever else runs; what this process has of it is not.
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    start = clock()
    jax.block_until_ready(function())
    return clock() - start


def print_times(made: Sampler, repeats: int) -> None:
    # n levels are n - 1 steps of ddim and the last x0: n evaluations.
    calls, net = made.steps, compiling.jit(made.net)

    def bare():
        x = made.x
        for _ in range(calls):  # each waits for the one before, as a sampler's steps do
            x = net(made.params, x, made.logsnr)
        return x

    runs = {
        f"{calls} bare calls": bare,
        "the sampler, padded to 1000": functools.partial(made.draw, made.wanted.levels),
        "the sampler, not padded": functools.partial(made.draw, made.padded(made.steps)),
    }
    for name, function in runs.items():
        start = time.perf_counter()
        seconds(function)
        print(f"{name}: compiled and run once in {time.perf_counter() - start:.1f} s", flush=True)
    # Taking turns, so that what else the machine does falls on all of them.
    taken = np.array([[seconds(function) for function in runs.values()] for _ in range(repeats)])
    ratios = taken / np.where(np.arange(len(runs)) == 0, np.median(taken[:, 0]), taken[:, :1])
    print(f"\n| time, {repeats} turns | median s | of the bare calls | range of the turns |\n|---|---|---|---|")
    for i, name in enumerate(runs):
        ratio, (low, high) = np.median(taken[:, i]) / np.median(taken[:, 0]), (ratios[:, i].min(), ratios[:, i].max())
        print(f"| {name} | {np.median(taken[:, i]):.3f} | {ratio:.4f} | {low:.4f} to {high:.4f} |")


def print_tables(made: Sampler) -> None:
    draw = functools.partial(run.draw_samples, shape=made.shape, mesh=None)
    whole = {n: compiled(draw, *made.arguments(made.padded(n))) for n in (10, 1000)}
    net = compiled(made.net, made.params, made.x, made.logsnr)
    print_counts(made, net, whole)
    print_memory(made, net, whole)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="turns of the timing; 0 leaves it out")
    parser.add_argument("--tables", type=int, default=1, help="0 leaves out what the compiler counts and plans")
    parser.add_argument("--channels", type=int, default=128)
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    made = Sampler(args.dtype, args.batch, args.steps, args.channels)
    size = sum(a.size for a in jax.tree.leaves(made.params))
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}: {size:,} parameters, {args.dtype}, batch {args.batch}")
    if args.tables:
        print_tables(made)
    if args.repeats:
        print_times(made, args.repeats)


if __name__ == "__main__":
    main()
