"""How many images a second reach the device, and what of a training step's time that costs.

    python benchmarks/input_pipeline.py [--data_dir=DIR] [--publish]

Rates, in turns: `batch_at` from the uint8 memory map; with `meshes.put` on the device; with flips inside jit, as in a train step;
and, where torch is installed, a DataLoader of two workers over the same images as one tensor, each flipped with probability 1/2
by its worker. Without --data_dir, where TFDS prepared CIFAR-10, the images are random numbers in a memory map of the same size.

What a step loses: steps with a batch each against steps that all get the same one, in turns. Of a device that takes 12 or 25 ms a
step, as an accelerator may, and is not here: a thread that sleeps as long, given work two steps ahead as train.py does. And of the
digits' own step on this machine. Each as train.py has it, the batch made after the step before is dispatched, and with a thread
that makes batches two steps ahead. Last, train.py's own pace against the bare step in a loop.
"""

import argparse
import collections
import contextlib
import json
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "configs")]

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import command, publish, ratio, spread, table, turns
from jaxdiff import compiling, data, experiment
from jaxdiff import mesh as meshes
from jaxdiff.cli import enable_compile_cache
from jaxdiff.training import init_state, make_optimizer, make_step

AHEAD = 2  # as train.py's BEHIND


class Flipped:
    """What a DataLoader reads: one image a call, mirrored with probability 1/2. A module's own, so that workers can unpickle it."""

    def __init__(self, images: Any) -> None:
        self.images = images  # a torch tensor uint8 [N, C, H, W]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        import torch

        image = self.images[i]
        return image.flip(-1) if torch.rand(()) < 0.5 else image


def images_of(data_dir: str, n: int, folder: str) -> tuple[data.Dataset, str]:
    """CIFAR-10 as it was prepared in data_dir, or n random images of its shape in a memory map."""
    if data_dir:
        return data.load("cifar10", data_dir=data_dir), "CIFAR-10"
    path = Path(folder) / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8))
    return data.Dataset(np.load(path, mmap_mode="r"), np.zeros(n, np.int32), (), "random"), f"{n:,} random images"


def put(dataset: data.Dataset, mesh: Any, i: int, size: int) -> dict[str, jax.Array]:
    """Batch i on its devices, as train.py puts it there."""
    return meshes.put(mesh, size, lambda part, n: data.batch_at(dataset, 0, i, size, part, n))


def rates(dataset: data.Dataset, mesh: Any, size: int, batches: int, stack: contextlib.ExitStack) -> dict[str, Callable[[], Any]]:
    """What makes `batches` batches, by name."""
    key = jax.random.key(0)
    flip = jax.jit(lambda i, images: data.random_flip(jax.random.fold_in(key, i), images))
    at = iter(range(10**9))

    def each(make: Callable[[int], Any]) -> Callable[[], Any]:
        return lambda: [jax.block_until_ready(make(next(at))) for _ in range(batches)]

    functions = {
        "batch_at": each(lambda i: data.batch_at(dataset, 0, i, size)),
        "and on the device": each(lambda i: put(dataset, mesh, i, size)),
        "and flipped": each(lambda i: flip(i, put(dataset, mesh, i, size)["image"])),
    }
    peer = torch_batches(dataset, size, stack)
    return functions if peer is None else functions | {"torch DataLoader": lambda: [next(peer) for _ in range(batches)]}


def torch_batches(dataset: data.Dataset, size: int, stack: contextlib.ExitStack) -> Iterator[Any] | None:
    """Batches of torch without end, None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    images = torch.from_numpy(np.array(dataset.images)).permute(0, 3, 1, 2).contiguous().share_memory_()
    # spawn: a fork of a process with JAX's threads may hang.
    loader = torch.utils.data.DataLoader(
        Flipped(images), size, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True, multiprocessing_context="spawn"
    )

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    made = forever()
    stack.callback(made.close)
    return made


@contextlib.contextmanager
def in_a_thread(get: Callable[[int], Any], steps: int) -> Iterator[Callable[[int], Any]]:
    """The batches 0 ... steps - 1 of `get` in turn, made by a thread that keeps AHEAD of them ready: what train.py could do."""
    ready: queue.Queue = queue.Queue(AHEAD)
    thread = threading.Thread(target=lambda: [ready.put(get(i)) for i in range(steps)])
    thread.start()
    yield lambda i: ready.get()
    thread.join()


def sleeping(seconds: float) -> Callable[[Any, Any], Any]:
    """A device of one queue whose step takes `seconds`: step(state, batch) -> (state, what to wait for)."""
    device = ThreadPoolExecutor(1)

    def step(state: Any, batch: Any) -> Any:
        return state, device.submit(lambda: (jax.block_until_ready(batch), time.sleep(seconds)))

    return step


def loop(step: Callable[[Any, Any], Any], wait: Callable[[Any], Any], state: Any, get: Callable[[int], Any], steps: int) -> None:
    """`steps` steps from `state` on, never more than AHEAD of them unfinished when the next batch is made."""
    pending: collections.deque = collections.deque()
    state = jax.tree.map(jnp.copy, state)  # steps are given theirs to overwrite
    for i in range(steps):
        state, told = step(state, get(i))
        pending.append(told)
        if len(pending) > AHEAD:
            wait(pending.popleft())
    wait(told)


def losses(step: Any, wait: Any, state: Any, get: Callable[[int], Any], steps: int, repeats: int) -> list[str]:
    """The share of their time that steps with batches take longer than steps with one: as train.py, and with a thread."""
    same = get(0)

    def threaded() -> None:
        with in_a_thread(get, steps) as ready:
            loop(step, wait, state, ready, steps)

    functions = {
        "same": lambda: loop(step, wait, state, lambda i: same, steps),
        "plain": lambda: loop(step, wait, state, get, steps),
        "thread": threaded,
    }
    seconds = turns(functions, repeats)
    return [percent(seconds[name] / seconds["same"] - 1) for name in ("plain", "thread")]


def percent(values: np.ndarray) -> str:
    median, low, high = (100 * v for v in spread(values))
    return f"{median:.2f}% ({low:.2f} to {high:.2f})"


def digits_step(config: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    """The digits' own step, step(state, batch) -> (state, metrics), and the first state."""
    built, optimizer, key = experiment.build(config), make_optimizer(config.optimizer), jax.random.key(0)
    step = compiling.jit(make_step(built, optimizer), donate_argnums=1)
    state = jax.jit(lambda key: init_state(built, optimizer, config.training.ema, key))(key)
    return lambda state, batch: step(key, state, batch), state


def whole_loop(config: Any, step: Any, state: Any, steps: int, repeats: int) -> tuple[str, str]:
    """train.py's seconds a step against those of the bare step, and the waiting for data that train.py itself tells."""
    import train

    enable_compile_cache()  # each run builds its programs anew
    config.update(steps=steps)
    config.training.update(log_every=max(steps // 4, 1), sample_every=10**9, save_every=10**9)
    config.sampling.update(num=1, steps=1)
    digits, mesh = data.load("digits"), meshes.make_mesh((-1, 1))
    batch = put(digits, mesh, 0, config.batch_size)
    pace, waited = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            train.train(config, folder)
            rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "steps_per_s" in row]
        bare = turns({"": lambda: loop(step, jax.block_until_ready, state, lambda i: batch, steps)}, 1)[""][0] / steps
        pace.append(np.median([1 / row["steps_per_s"] for row in rows]) / bare)
        waited += [row["data_wait"] for row in rows]
    return percent(np.array(pace) - 1), percent(np.array(waited))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="", help="where TFDS prepared CIFAR-10; random images without it")
    parser.add_argument("--images", type=int, default=50_000, help="how many random images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=200, help="batches in a turn")
    parser.add_argument("--steps", type=int, default=100, help="training steps in a turn")
    parser.add_argument("--step_ms", type=float, nargs="*", default=[12.0, 25.0], help="steps of the device that sleeps")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--publish", action="store_true", help="add the tables to docs/benchmarks.md")
    args = parser.parse_args(argv)
    mesh = meshes.make_mesh((-1, 1))
    said = []

    def say(text: str) -> None:
        said.append(text)
        print(text + "\n", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        dataset, what = images_of(args.data_dir, args.images, folder)
        with contextlib.ExitStack() as stack:
            seconds = turns(rates(dataset, mesh, args.batch, args.batches, stack), args.repeats)
        n, full = args.batch * args.batches, seconds["and flipped"]
        rows = [[name, f"{n / np.median(taken):,.0f}", ratio(taken, full)] for name, taken in seconds.items()]
        if "torch DataLoader" not in seconds:
            rows.append(["torch DataLoader", "torch is not installed", ""])
        say(table([f"{what}, batches of {args.batch}", "images/s", "its time over that of all of ours"], rows))

        lost = []
        for ms in args.step_ms:
            own = losses(
                sleeping(ms / 1000),
                lambda f: f.result(),
                None,
                lambda i: put(dataset, mesh, i, args.batch),
                args.steps,
                args.repeats,
            )
            lost.append([f"a device that sleeps {ms:g} ms", *own])
    import digits

    config, images = digits.get_config(), data.load("digits")
    step, state = digits_step(config)
    own = losses(step, jax.block_until_ready, state, lambda i: put(images, mesh, i, config.batch_size), args.steps, args.repeats)
    lost.append(["the digits' step here", *own])
    say(table(["time lost to data", "as train.py has it", "with a thread"], lost))
    more, waited = whole_loop(config, step, state, args.steps, min(args.repeats, 5))
    say(f"train.py with configs/digits.py takes {more} longer a step than the bare step in a loop; its data_wait is {waited}.")
    if args.publish:
        publish("Input pipeline", "\n\n".join(said), command(__file__, argv))


if __name__ == "__main__":
    main()
