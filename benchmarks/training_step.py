"""A whole training step beside PyTorch's:  python benchmarks/training_step.py [--batch 8 16] [--channels 128] [--parts] [--publish]

Ours is `jaxdiff.training.make_step` of configs/cifar.py, jitted with its state donated as train.py does it: flips, levels, noise,
dropout of 0.1, the gradient clipped by its norm, Adam, the average of 0.9999, the loss by noise level, and whether all is finite.
The peer is diffusers' UNet2DModel of the same weights (held to 1e-4 first), channels_last, eager: flips, levels, noise, dropout,
`clip_grad_norm_`, torch.optim.Adam(fused=True) and the average by `_foreach_lerp_`, with a thread a core. They take turns in one
process; the ratio is theirs to ours, turn by turn, median and quartiles: above 1 we are faster.

--parts adds what a step is made of: its gradient alone, then with Adam, then with the average; the step without dropout, and
without donation; these too take turns. A last table has the memory of a step: what the compiler plans (arguments, results that are
no arguments' memory, temporaries) and how much the peak of a fresh process' resident memory grows with the state and two steps.
The share is of the machine's ceiling, as in benchmarks/forward.py.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import measure, peers
from jaxdiff import compiling, experiment
from jaxdiff.training import averages, hardware, init_state, make_optimizer, make_step

COLUMNS = ("batch", "jaxdiff, ms", f"{peers.PEER}, ms", "theirs / ours", "images/s", "GFLOP/s", "of matmul", "of convolution")


def batch_of(config, n: int) -> dict[str, jax.Array]:
    return {"image": jnp.asarray(peers.images(n, config.data.shape[0])), "label": jnp.zeros(n, jnp.int32)}


def going(program: Callable[..., Any], key, state, batch) -> Callable[[], Any]:
    """The function that does one more step from where the last one left the state, which it may have donated."""
    held = [state]

    def once():
        held[0], told = program(key, held[0], batch)
        return held[0], told

    return once


def gradient(built) -> Callable[..., Any]:
    """(key, params, batch) -> (loss [], gradient): a step's first half."""

    def of(key, params, batch):
        k_prepare, k_loss = jax.random.split(key)
        example = built.prepare(built.extra, k_prepare, batch)
        return jax.value_and_grad(lambda p: built.loss(p, built.extra, k_loss, example)[0].mean())(params)

    return of


def parts(config, built, params, n: int) -> dict[str, Callable[[], Any]]:
    """A step by its parts, each with all before it, and steps that are done in other ways."""
    grad, key, batch = gradient(built), jax.random.key(0), batch_of(config, n)
    alone, donated = compiling.jit(grad), {"donate_argnums": 1}

    def with_adam(key, state, batch):
        loss, grads = grad(jax.random.fold_in(key, state.step), state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return state._replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state), loss

    def with_average(key, state, batch):
        state, loss = with_adam(key, state, batch)
        ema = {
            name: optax.incremental_update(state.params, average, 1 - averages.named(name)(state.step))
            for name, average in state.ema.items()
        }
        return state._replace(ema=ema), loss

    def state():
        return peers.state_of(config, built, params)[0]

    optimizer, still = make_optimizer(config.optimizer), config.copy_and_resolve_references()
    still.model.dropout = 0.0
    step = make_step(built, optimizer)
    return {
        "the gradient": lambda: alone(key, params, batch),
        "with Adam": going(compiling.jit(with_adam, **donated), key, state(), batch),
        "with Adam and the average": going(compiling.jit(with_average, **donated), key, state(), batch),
        "the step": going(compiling.jit(step, **donated), key, state(), batch),
        "the step, not donated": going(compiling.jit(step), key, state(), batch),
        "the step, without dropout": going(
            compiling.jit(make_step(experiment.build(still), optimizer), **donated), key, state(), batch
        ),
    }


def compared(config, params, n: int, repeats: int, limits: dict[str, measure.Work]) -> list[str]:
    """A row of the first table."""
    built = experiment.build(config)
    state, optimizer = peers.state_of(config, built, params)
    key, batch, step = jax.random.key(0), batch_of(config, n), compiling.jit(make_step(built, optimizer), donate_argnums=1)
    count = hardware.flops(step.jitted().trace(key, state, batch).jaxpr)
    runs = {"ours": going(step, key, state, batch)} | {name: limit.run for name, limit in limits.items()}
    if peers.torch_is_here():
        theirs, images = peers.torch_step(peers.torch_network(config, params), config), peers.torch_images(batch["image"])
        runs["theirs"] = lambda: theirs(images)
    seconds = measure.turns(runs, repeats)
    ours = measure.spread(seconds["ours"]).median
    beside = ("not here", "")
    if "theirs" in seconds:
        beside = measure.ms(measure.spread(seconds["theirs"]).median), str(measure.ratio(seconds["theirs"], seconds["ours"]))
    shares = [f"{share:.1%}" for share in measure.shares(count, seconds["ours"], limits, seconds)]
    return [f"{n}", measure.ms(ours), *beside, f"{n / ours:.2f}", f"{count / ours / 1e9:.1f}", *shares]


def table_of_parts(config, params, n: int, repeats: int) -> str:
    seconds = measure.turns(parts(config, experiment.build(config), params, n), repeats)
    whole = seconds["the step"]
    rows = [[name, measure.ms(measure.spread(taken).median), measure.spread(taken / whole)] for name, taken in seconds.items()]
    return measure.table((f"what, batch {n}", "ms", "of the step"), rows)


def memory_here(config, n: int) -> dict[str, int]:
    """Bytes: what the compiler says a step needs in all, and how much this process' peak grew by the state and two steps.

    For a process of its own, on Linux: what it held before would be used again. Everything is compiled before, of shapes alone.
    """
    built, optimizer, key = experiment.build(config), make_optimizer(config.optimizer), jax.random.key(0)
    shapes = jax.eval_shape(lambda: init_state(built, optimizer, config.training.ema, key))
    batch = batch_of(config, n)
    step = (
        jax.jit(make_step(built, optimizer), donate_argnums=1, compiler_options=compiling.options() or None)
        .lower(key, shapes, batch)
        .compile()
    )
    fill = jax.jit(lambda: jax.tree.map(lambda a: jnp.full(a.shape, 0.01, a.dtype), shapes)).lower().compile()
    planned = step.memory_analysis()
    before = measure.resident()
    measure.forget_peak()
    state = fill()
    for _ in range(2):
        state, told = step(key, state, batch)
    jax.block_until_ready((state, told))
    arguments, results = planned.argument_size_in_bytes, planned.output_size_in_bytes - planned.alias_size_in_bytes
    return {
        "state": sum(a.nbytes for a in jax.tree.leaves(state)),
        "temporaries": planned.temp_size_in_bytes,
        "planned": arguments + results + planned.temp_size_in_bytes,
        "grew": measure.peak() - before,
    }


def memory(asked: argparse.Namespace, n: int) -> dict[str, int]:
    """`memory_here` of a fresh process."""
    words = [sys.executable, __file__, "--memory_of", str(n), "--channels", str(asked.channels), "--size", str(asked.size)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table_of_memory(asked: argparse.Namespace) -> str:
    rows = []
    for n in asked.batch:
        told = memory(asked, n)
        mib = [f"{told[name] / 2**20:,.0f}" for name in ("state", "temporaries", "planned", "grew")]
        rows.append([n, *mib, f"{told['grew'] / told['planned']:.3f}"])
    return measure.table(
        ("batch", "state, MiB", "temporaries", "in all, by the compiler", "measured", "measured / compiler's"), rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--channels", type=int, default=128, help="128 is the network of configs/cifar.py")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", action="store_true", help="adds what a step is made of")
    parser.add_argument("--publish", action="store_true", help="adds the entry to docs/benchmarks.md")
    parser.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    config = peers.config_of(asked.channels, asked.size)
    if asked.memory_of:
        print(json.dumps(memory_here(config, asked.memory_of)))
        return
    params = peers.drawn(experiment.build(config))
    same = ""
    if peers.torch_is_here():
        same = f"; the two networks agree to {peers.check_same(config, params, peers.torch_network(config, params)):.1e}"
    said = (
        f"{peers.count(params):,} parameters, {asked.size}x{asked.size}, float32, median of {asked.repeats} turns{same}. "
        f"{measure.CEILING}."
    )
    limits = measure.ceilings()
    print(said, flush=True)
    told = [measure.table(COLUMNS, [compared(config, params, n, asked.repeats, limits) for n in asked.batch])]
    print(f"\n{told[-1]}", flush=True)
    if asked.parts:
        told += [table_of_parts(config, params, asked.batch[0], asked.repeats)]
        print(f"\n{told[-1]}", flush=True)
    if sys.platform == "linux" and jax.default_backend() == "cpu":
        told += [table_of_memory(asked)]
        print(f"\n{told[-1]}", flush=True)
    if asked.publish:
        body = "\n\n".join([said, *told])
        measure.publish("A training step beside PyTorch's, and its memory", body, measure.command(__file__, argv))


if __name__ == "__main__":
    main()
