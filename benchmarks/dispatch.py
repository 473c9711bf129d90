"""What fewer, larger calls save: several training steps by one `lax.scan`, and guidance by one network call on twice the batch.

    python benchmarks/dispatch.py [--config=digits] [--batch=32] [--together=10] [--guided 4 32 128] [--publish]

Steps: `--together` of them one by one, and by a scan, the state donated, on batches on the device. Guidance: one evaluation of the
guided denoiser, at scale 3, by `guidance.classifier_free`, which asks the network twice, and by `guidance.at_once`, which asks it
once, for each of the batches given. Both take turns with their peer. The network is the config's, with ten classes, as wide as
`--channels` says.
"""

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "configs")]

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import command, publish, ratio, table, turns
from jaxdiff import compiling, denoiser, experiment, guidance, schedules
from jaxdiff.training import init_state, make_optimizer, make_step


def config_of(name: str, channels: int, batch: int) -> Any:
    """The config of that name, class-conditional."""
    config = importlib.import_module(name).get_config()
    config.model.update(classes=10, **({"channels": channels} if channels else {}))
    config.process.drop_label, config.batch_size = 0.1, batch
    return config


def batch_of(config: Any, seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (config.batch_size, *config.data.shape), np.uint8)
    return jax.device_put({"image": images, "label": np.arange(config.batch_size, dtype=np.int32) % 10})


def in_turn(step: Any) -> Callable[..., Any]:
    """Several steps as one: (key, state, their batches) -> (state, metrics), each metric with one of every step, [n, ...]."""

    def run(key: jax.Array, state: Any, batches: Sequence[Any]) -> tuple[Any, Any]:
        stacked = jax.tree.map(lambda *each: jnp.stack(each), *batches)
        return jax.lax.scan(lambda state, batch: step(key, state, batch), state, stacked)

    return run


def steps(config: Any, together: int) -> dict[str, Callable[[], Any]]:
    """`together` training steps, one by one and in one call."""
    built, optimizer, key = experiment.build(config), make_optimizer(config.optimizer), jax.random.key(0)
    step = make_step(built, optimizer)
    one, several = (compiling.jit(f, donate_argnums=1) for f in (step, in_turn(step)))
    init = jax.jit(lambda key: init_state(built, optimizer, config.training.ema, key))
    batches = [batch_of(config, i) for i in range(together)]
    states = {"one": init(key), "several": init(key)}

    def single() -> jax.Array:
        for batch in batches:
            states["one"], told = one(key, states["one"], batch)
        return told["loss"]

    def scanned() -> jax.Array:
        states["several"], told = several(key, states["several"], batches)
        return told["loss"]

    return {"one": single, "several": scanned}


def guided(config: Any, batch: int) -> dict[str, Callable[[], Any]]:
    """One evaluation of the guided denoiser, by two network calls and by one."""
    built = experiment.build(config)
    params = jax.jit(built.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (batch, *config.data.shape))
    labels, level = jnp.arange(batch, dtype=jnp.int32) % 10, schedules.cosine(jnp.float32(0.5))

    def of(params: Any, labels: jax.Array) -> Any:
        return denoiser(built.net(params, {"label": labels}), built.target, built.data_std)

    def two(params: Any, scale: jax.Array) -> jax.Array:
        none = jnp.full_like(labels, -1)
        return guidance.classifier_free(of(params, labels), of(params, none), scale)(x, level).x0

    def one(params: Any, scale: jax.Array) -> jax.Array:
        pairs = jnp.stack([labels, jnp.full_like(labels, -1)], axis=1).reshape(-1)
        return guidance.at_once(of(params, labels), of(params, pairs), scale)(x, level).x0

    return {name: functools.partial(compiling.jit(f), params, jnp.float32(3)) for name, f in (("two", two), ("one", one))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits", help="the name of a config of images, such as digits or cifar")
    parser.add_argument("--channels", type=int, default=0, help="the network's width, the config's where 0")
    parser.add_argument("--batch", type=int, default=32, help="of a training step")
    parser.add_argument("--together", type=int, nargs="*", default=[10], help="steps a call")
    parser.add_argument("--guided", type=int, nargs="*", default=[1, 4, 32, 128], help="batches of guidance")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--publish", action="store_true", help="add the tables to docs/benchmarks.md")
    args = parser.parse_args(argv)
    config, rows = config_of(args.config, args.channels, args.batch), []
    for n in args.together:
        seconds = turns(steps(config, n), args.repeats)
        each = [f"{1000 * np.median(seconds[name]) / n:.2f} ms" for name in ("one", "several")]
        rows.append([f"{n} steps of batch {args.batch}", *each, ratio(seconds["one"], seconds["several"])])
    body = (
        [table([args.config, "a step, one by one", "a step, in one call", "ratio, above 1 where one call is faster"], rows)]
        if rows
        else []
    )
    rows = []
    for batch in args.guided:
        seconds = turns(guided(config, batch), args.repeats)
        each = [f"{1000 * np.median(seconds[name]):.2f} ms" for name in ("two", "one")]
        rows.append([f"guided, batch {batch}", *each, ratio(seconds["two"], seconds["one"])])
    columns = [args.config, "two network calls", "one of twice the batch", "ratio, above 1 where one is faster"]
    body += [table(columns, rows)] if rows else []
    print("\n\n".join(body))
    if args.publish:
        publish(f"Fewer, larger calls ({args.config})", "\n\n".join(body), command(__file__, argv))


if __name__ == "__main__":
    main()
