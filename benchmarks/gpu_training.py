"""Training on one GPU, in low precision, beside PyTorch:  python benchmarks/gpu_training.py --peer [--batch 128 256] [--publish]

The network is that of configs/cifar.py, 35,746,307 parameters, its convolutions and attention in bfloat16, its parameters, Adam and
the average in float32. A turn is --steps whole training steps, one after another without waiting for the device: flips, levels and
noise drawn anew, dropout, the gradient clipped by its norm, Adam, the average; the state is donated, batches of random bytes lie on
the device. The peer is diffusers' UNet2DModel with the same weights and the same step under torch.compile, in channels_last, under
autocast, with fused Adam; it takes turns with us in one process. A share is of the rate measured in a product of two bfloat16
matrices, and of the data sheet's; operations are those of the traced program's products and convolutions.

--variants "rbg; cudnn; model.dropout=0.0; xla_gpu_enable_triton_gemm=False" times ours in other ways too, each a list of settings
joined by "+": a key of the config, an option of XLA's, `rbg` or `unsafe_rbg` for the random bits, `cudnn` for attention by cuDNN's
kernel, `scan` for a turn in one dispatch. One that fails is reported and left out. --profile=FOLDER also records a few steps and
says by kind of kernel and by part of the network where their time went (benchmarks/device_time.py).
"""

import argparse
import ast
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the device's memory

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import device_time, measure, peers
from jaxdiff import experiment
from jaxdiff.training import hardware, make_optimizer, make_step

OURS = "jaxdiff"
BATCHES = 4  # different ones, over and over
# Kernels inside a CUDA graph are told without the instruction that they belong to.
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
KEYS = ("rbg", "unsafe_rbg")
STARTED = time.perf_counter()


class Variant(NamedTuple):
    """How our step is built otherwise: keys of the config, options of XLA's, and those of the words KEYS, cudnn and scan it has."""

    config: dict[str, Any]
    options: dict[str, Any]
    words: frozenset[str]


class Trainer(NamedTuple):
    """`turn()` runs steps and returns the last one's metrics; `flops` of a step, `bytes` of device memory, the compiled program."""

    turn: Callable[[], dict[str, jax.Array]]
    flops: float
    bytes: int
    program: Any


def variant(text: str) -> Variant:
    """The settings of one of --variants. Raises ValueError for a word that is none."""
    made = Variant({}, {}, frozenset())
    for setting in filter(None, (part.strip() for part in text.split("+"))):
        key, given, value = setting.partition("=")
        if given:
            (made.options if key.startswith("xla_") else made.config)[key] = _value(value)
        elif setting in (*KEYS, "cudnn", "scan"):
            made = made._replace(words=made.words | {setting})
        else:
            raise ValueError(f"--variants: {setting!r} is no setting; allowed: {', '.join(KEYS)}, cudnn, scan, KEY=VALUE")
    return made


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
    """A line on what was done and how long it took, at once: a run may be cut off."""
    start = time.perf_counter()
    yield
    print(f"[{time.perf_counter() - start:.1f} s] {what}", flush=True)


def trainer(config: Any, params: Any, batch: int, steps: int, made: Variant) -> Trainer:
    """Our step at that batch size, compiled, its state on the device."""
    _change(config, made.config)
    built = experiment.build(config)
    optimizer = make_optimizer(config.optimizer)
    state = peers.state_of(config, built, params)[0]
    key = jax.random.key(0, impl=next((name for name in KEYS if name in made.words), None))
    step, shape, scan = make_step(built, optimizer), (batch, *built.shape), "scan" in made.words
    batches = [{"image": image, "label": jnp.zeros(batch, jnp.int32)} for image in _images(shape)]
    if scan:
        batches = [jax.tree.map(lambda *a: jnp.stack(a), *(batches[i % BATCHES] for i in range(steps)))]
    with _attention(made):
        jitted = jax.jit(_several(step) if scan else step, donate_argnums=1)
        traced = jitted.trace(key, state, batches[0])
        program = traced.lower().compile(compiler_options=made.options or None)
    held, flops = [state], hardware.flops(traced.jaxpr) / (steps if scan else 1)

    def turn():
        for i in range(1 if scan else steps):
            held[0], told = program(key, held[0], batches[i % len(batches)])
        return told

    return Trainer(turn, flops, _memory(program), program)


def matmul_rate(n: int, dtype: Any, products: int = 10, repeats: int = 7) -> float:
    """FLOP/s of products of two n x n matrices, launched one after another as a step's kernels are; the best of the turns."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, n), np.float32), dtype)
    product = jax.jit(lambda a: a @ a)
    taken = measure.turns({"": lambda: [product(a) for _ in range(products)]}, repeats)[""]
    return 2.0 * n**3 * products / float(taken.min())


def _several(step):
    def run(key, state, batches):
        state, told = jax.lax.scan(lambda state, batch: step(key, state, batch), state, batches)
        return state, jax.tree.map(lambda a: a[-1], told)

    return run


def _images(shape: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(BATCHES)]


def _attention(made: Variant) -> contextlib.AbstractContextManager:
    if "cudnn" not in made.words:
        return contextlib.nullcontext()
    return mock.patch.object(
        jax.nn, "dot_product_attention", functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    )


def _memory(program: Any) -> int:
    found = program.memory_analysis()
    return found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def peer(config: Any, params: Any, batch: int, steps: int, device: str) -> Callable[[], float]:
    """The same step of the same network in PyTorch; a turn returns the last loss, so nothing is left to wait for."""
    import torch

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    model = torch.compile(peers.torch_network(config, params, device), dynamic=False)
    step = peers.torch_step(model, config, device)
    dtype = getattr(torch, config.model.dtype)
    images = [peers.torch_images(np.asarray(a), device) for a in _images((batch, *config.data.shape))]

    def turn():
        for i in range(steps):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = step(images[i % BATCHES])
        return float(loss)

    return turn


def _without(what: str, error: Exception) -> None:
    print(f"{what} is left out: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)


def contestants(args: argparse.Namespace, batch: int) -> tuple[dict[str, Trainer], dict[str, Callable[[], Any]]]:
    """(ours by name, PyTorch's turn by its name), all that can be built; ours as it is first."""
    ours: dict[str, Trainer] = {}
    params = peers.drawn(experiment.build(_config(args)))
    for text in ["", *filter(None, (part.strip() for part in args.variants.split(";")))]:
        name = f"{OURS}, {text}" if text else OURS
        if ours and time.perf_counter() - STARTED > args.budget:
            print(f"{name} is left out: {args.budget:.0f} s are over", flush=True)
            continue
        try:
            with said(f"batch {batch}: {name} compiled"):
                ours[name] = trainer(_config(args), params, batch, args.steps, variant(text))
            jax.block_until_ready(ours[name].turn())
            with said(f"batch {batch}: {name}, a turn of {args.steps} steps alone"):
                jax.block_until_ready(ours[name].turn())
        except Exception as error:  # whatever XLA says of an option or a size
            if not text:
                raise
            ours.pop(name, None)
            _without(name, error)
    theirs: dict[str, Callable[[], Any]] = {}
    if args.peer and peers.torch_is_here():
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        try:
            with said(f"batch {batch}: {peers.PEER} built, compiled, first turn"):
                theirs[peers.PEER] = peer(_config(args), params, batch, args.steps, device)
                theirs[peers.PEER]()
        except Exception as error:  # whatever torch.compile may say
            theirs.clear()
            _without(peers.PEER, error)
    return ours, theirs


def _config(args: argparse.Namespace) -> Any:
    config = peers.config_of(args.channels, args.size)
    config.model.dtype = args.dtype
    _change(config, variant(args.set).config)
    return config


def _change(config: Any, changes: dict[str, Any]) -> None:
    with config.unlocked():
        for key, value in changes.items():
            group, _, name = key.rpartition(".")
            (config[group] if group else config)[name] = value


def rows(args: argparse.Namespace, batch: int, ours: dict[str, Trainer], theirs: dict, ceiling: float) -> list[tuple]:
    """Times all of a batch size in turns, and says it in rows of the table."""
    with said(f"batch {batch}: {args.repeats} turns of {args.steps} steps each"):
        taken = measure.turns({name: each.turn for name, each in ours.items()} | theirs, args.repeats, warm=1)
    for name, each in ours.items():
        if not bool(each.turn()["finite"]):
            raise AssertionError(f"{name} is no longer finite")
    sheet, flops, made = hardware.peak_flops(jax.devices()[0]), ours[OURS].flops, []
    for name, seconds in taken.items():
        pace = measure.spread(batch * args.steps / seconds)
        rate = flops * pace.median / batch
        beside = str(measure.ratio(taken[peers.PEER], seconds)) if theirs and name in ours else ""
        memory = f"{ours[name].bytes / 2**30:.2f}" if name in ours else ""
        made.append(
            (batch, name, f"{pace.median:,.0f} ({pace.low:,.0f} to {pace.high:,.0f})", f"{batch / pace.median * 1e3:.2f}",
             f"{rate / ceiling:.1%}", f"{rate / sheet:.1%}" if sheet else "", beside, memory)
        )  # fmt: skip
    return made


COLUMNS = ("batch", "what", "images/s", "ms a step", "of the measured rate", "of the data sheet", "PyTorch's time / this", "GiB")


def profile(args: argparse.Namespace, batch: int, steps: int = 5) -> str:
    """Where the time of a step goes: the tables of device_time, of our step compiled so that its kernels can be told."""
    folder, text = args.profile, args.profiled
    made = variant(text)
    made = made._replace(options=made.options | NO_GRAPHS, words=made.words - {"scan"})
    with said("the step compiled for the profile"):
        ours = trainer(_config(args), peers.drawn(experiment.build(_config(args))), batch, steps, made)
    jax.block_until_ready(ours.turn())
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(ours.turn())
    hlo = ours.program.as_text()
    (folder / "step.hlo.txt").write_text(hlo)
    return f"A step at batch {batch}, {text or 'as it is'}.\n\n" + device_time.report(folder, hlo, steps)


def profile_peer(args: argparse.Namespace, turn: Callable[[], Any]) -> str:
    """The same of PyTorch's step, kinds told by the kernels' names."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        turn()
    file = args.profile / "peer.json"
    found.export_chrome_trace(str(file))
    return f"{peers.PEER}'s step.\n\n" + device_time.report(file, "", args.steps)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[128], help="images a step")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=20, help="steps a turn")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--set", default="", help="keys of the config that both have otherwise, KEY=VALUE joined by +")
    parser.add_argument("--matrix", type=int, default=8192, help="size of the matrices whose product is the measured rate")
    parser.add_argument("--peer", action="store_true", help="PyTorch too, where torch and diffusers are installed")
    parser.add_argument("--variants", default="", help="other ways of ours, separated by ;")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further variant is built")
    parser.add_argument("--profile", type=Path, help="a folder for a profile of a few steps at the first batch size")
    parser.add_argument("--profiled", default="", help="the variant that is profiled")
    parser.add_argument("--publish", action="store_true", help="add the tables to docs/benchmarks.md")
    args = parser.parse_args(argv)
    print(measure.machine(), flush=True)
    with said(f"the rate of a product of two {args.matrix} x {args.matrix} matrices measured"):
        ceiling = matmul_rate(args.matrix, getattr(jnp, args.dtype))
    told, body = [], ""
    for batch in args.batch:
        ours, theirs = contestants(args, batch)
        told += rows(args, batch, ours, theirs, ceiling)
        count, flops = peers.count(peers.drawn(experiment.build(_config(args)))), ours[OURS].flops / batch
        body = (
            f"{count:,} parameters, {args.dtype}, {flops / 1e9:.2f} GFLOP an image; turns of {args.steps} steps, {args.repeats} of "
            f"them, medians with quartiles. Measured: {ceiling / 1e12:.1f} TFLOP/s.\n\n" + measure.table(COLUMNS, told)
        )
        print(f"\n{body}\n", flush=True)
        if args.profile and batch == args.batch[0]:
            ours.clear()  # their memory
            profiles = [profile(args, batch)]
            print(f"\n{profiles[0]}\n", flush=True)
            if theirs:
                try:
                    profiles.append(profile_peer(args, next(iter(theirs.values()))))
                    print(f"\n{profiles[1]}\n", flush=True)
                except Exception as error:  # two profilers in one process may not agree
                    _without(f"{peers.PEER}'s profile", error)
        del ours, theirs
    if args.publish:
        command = "python benchmarks/gpu_training.py " + " ".join(argv if argv is not None else sys.argv[1:])
        measure.publish(f"Training on {jax.devices()[0].device_kind} in {args.dtype}", body, command)


if __name__ == "__main__":
    main()
