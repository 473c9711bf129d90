"""What bits per dimension cost beside bare network calls:  python benchmarks/likelihood.py [--channels 128] [--batch 4] [--publish]

The functions are those that evaluate.py jits (`evaluation.estimator`) for the network of configs/cifar.py: the variational bound
with --terms of its steps drawn for each image, which asks the network terms + 1 times, and the exact likelihood by --steps of
Runge-Kutta steps of order 4, four evaluations each with a Jacobian's product beside it (Hutchinson's trace). Each takes turns with
as many bare jitted calls: of the network, for the exact likelihood also of the network with a Jacobian-vector product, each call on
what the one before said. Above 1 the estimator costs less than the calls.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import measure, peers
from jaxdiff import compiling, evaluation, experiment, sampling

COLUMNS = ("what", "network calls", "s", "ms a call", "bare calls, s", "bare / ours", "bare calls with products, s", "with / ours")


def repeated(call: Callable[..., jax.Array], calls: int, x: jax.Array) -> Callable[[], jax.Array]:
    """The function that does so many calls, each on what the one before said."""

    def once():
        y = x
        for _ in range(calls):
            y = call(y)
        return y

    return once


def compared(config, params, batch: int, metric: str, calls: int, settings, repeats: int) -> list[str]:
    """A row of the table."""
    built, size = experiment.build(config), config.data.shape[0]
    estimate, _ = evaluation.estimator(metric, config, built, params, settings)
    keys, images = sampling.sample_keys(jax.random.key(0), batch), jnp.asarray(peers.images(batch, size))
    labels, net = jnp.zeros(batch, jnp.int32), compiling.jit(peers.forward(built))
    x, _, logsnr = (jnp.asarray(a) for a in peers.noisy(batch, size))
    sign = jnp.sign(x)

    @compiling.jit
    def product(params, x):
        y, moved = jax.jvp(lambda x: built.net(params, None)(x, logsnr)[0], (x,), (sign,))
        return y + 0 * (sign * moved).sum()  # the product is asked for, and changes nothing

    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: estimate(params, keys, images, labels),
        "bare": repeated(lambda x: net(params, x, logsnr), calls, x),
    }
    if metric == "bpd_ode":
        runs["product"] = repeated(lambda x: product(params, x), calls, x)
    seconds = measure.turns(runs, repeats)
    middle = {name: measure.spread(taken).median for name, taken in seconds.items()}
    cells = [metric, f"{calls}", f"{middle['ours']:.2f}", measure.ms(middle["ours"] / calls)]
    for name in ("bare", "product"):
        cells += [f"{middle[name]:.2f}", str(measure.ratio(seconds[name], seconds["ours"]))] if name in seconds else ["", ""]
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128, help="128 is the network of configs/cifar.py")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--terms", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--publish", action="store_true", help="adds the entry to docs/benchmarks.md")
    asked = parser.parse_args(argv)
    config = peers.config_of(asked.channels, asked.size)
    params = peers.drawn(experiment.build(config))
    size = f"batch {asked.batch}, {asked.size}x{asked.size}"
    said = f"{peers.count(params):,} parameters, {size}, float32, median of {asked.repeats} turns."
    print(said, flush=True)
    settings, rows = evaluation.Settings(asked.terms, asked.steps), []
    for metric, calls in (("bpd_elbo", asked.terms + 1), ("bpd_ode", 4 * asked.steps)):
        rows.append(compared(config, params, asked.batch, metric, calls, settings, asked.repeats))
    body = measure.table(COLUMNS, rows)
    print(body)
    if asked.publish:
        measure.publish("Likelihood beside bare network calls", f"{said}\n\n{body}", measure.command(__file__, argv))


if __name__ == "__main__":
    main()
