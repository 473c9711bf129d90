"""What the speed benchmarks share: turns, medians with their spread, the machine's own ceiling, entries of docs/benchmarks.md.

A benchmark is a module with `main(argv)`; what it prints it may also publish. Peers take turns with us in one process: first one,
then the other, in the opposite order the next time, so that what else the machine does, and its clock, falls on both alike.
"""

import ctypes
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from jaxdiff import compiling

PUBLISHED = ROOT / "docs" / "benchmarks.md"


class Ratio(NamedTuple):
    """Of what is compared: the median of the turns, and the quartiles of the turns."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def turns(functions: Mapping[str, Callable[[], Any]], repeats: int, warm: int = 1) -> dict[str, np.ndarray]:
    """The seconds [repeats] that each function takes, by the clock, each called in every turn; `warm` calls before do not count.

    A function returns only when what it does is done, or JAX arrays, which are waited for.
    """
    for function in functions.values():
        for _ in range(warm):
            jax.block_until_ready(function())
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats):
        for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            taken[name].append(time.perf_counter() - start)
    return {name: np.array(seconds) for name, seconds in taken.items()}


def ratio(peer: np.ndarray, ours: np.ndarray) -> Ratio:
    """How many times as fast as the peer we are, turn by turn: above 1 we are faster."""
    return spread(peer / ours)


def spread(values: np.ndarray) -> Ratio:
    """The median of values with their quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


class Work(NamedTuple):
    """Something to be done: its operations, and the function that does it."""

    flops: float
    run: Callable[[], Any]


def product(n: int = 2048, dtype: Any = jnp.float32) -> Work:
    """A product of two n x n matrices."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, n)), dtype)
    return Work(2.0 * n**3, _quickest(lambda a: a @ a, a))


def convolution(batch: int = 8, size: int = 32, channels: int = 128, dtype: Any = jnp.float32) -> Work:
    """A 3x3 convolution of [batch, size, size, channels] to as many channels."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, size, size, channels)), dtype)
    kernel = jnp.asarray(rng.standard_normal((3, 3, channels, channels)), dtype)

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    taps = 3 * size - 2  # along an axis, padding left out
    return Work(2.0 * batch * taps**2 * channels**2, _quickest(conv, x, kernel))


def ceilings() -> dict[str, Work]:
    """What the machine does best, to take turns with what is held against it: its speed wanders by a fifth within minutes.

    Each does a few tenths of a second, so that one turn is not a single short call right after a long one.
    """
    return {"matmul": _repeated(product(), 5), "convolution": _repeated(convolution(), 25)}


def _repeated(work: Work, times: int) -> Work:
    return Work(times * work.flops, lambda: [work.run() for _ in range(times)])


CEILING = "Shares are of a product of two 2048 x 2048 matrices, and of a 3x3 convolution of 128 channels, in the same turns"


def rates(limits: Mapping[str, Work], seconds: Mapping[str, np.ndarray]) -> list[float]:
    """The FLOP/s of each, the median of its turns."""
    return [limit.flops / float(np.median(seconds[name])) for name, limit in limits.items()]


def shares(flops: float, ours: np.ndarray, limits: Mapping[str, Work], seconds: Mapping[str, np.ndarray]) -> list[float]:
    """Our rate over that of each, the median of the turns."""
    return [float(np.median(flops / ours / (limit.flops / seconds[name]))) for name, limit in limits.items()]


def _quickest(function: Callable, *args: Any, repeats: int = 5) -> Callable[[], Any]:
    """The function compiled by our options or by JAX's own, which is the faster here."""
    ways = [by.lower(*args).compile() for by in (compiling.jit(function).jitted(), jax.jit(function))]
    runs = [lambda way=way: way(*args) for way in ways]
    seconds = turns({str(i): run for i, run in enumerate(runs)}, repeats)
    return runs[int(np.argmin([taken.min() for taken in seconds.values()]))]


def machine() -> str:
    """The device, the cores and the versions, in a line."""
    device = jax.devices()[0]
    what = _processor() if device.platform == "cpu" else device.device_kind
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "torch", "diffusers") if _installed(name)]
    return f"{what}, {len(jax.local_devices())} device(s), {_cores()} cores; Python {platform.python_version()}, " + ", ".join(
        versions
    )


def publish(title: str, body: str, command: str, path: Path = PUBLISHED) -> None:
    """Adds an entry above those of before: the machine, the versions and the commit are said, and the command that repeats it."""
    header, mark, rest = path.read_text().partition("\n## ")
    said = f"{datetime.date.today():%d %B %Y}. {machine()}; commit {_commit()}."
    path.write_text(f"{header}\n## {title}\n\n{said}\n\n{body.strip()}\n\n    {command}\n{mark}{rest}")


def _processor() -> str:
    try:
        names = [
            line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        ]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def ms(seconds: float) -> str:
    """Milliseconds in three digits, whole ones where there are more."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def command(script: str, argv: Sequence[str] | None = None) -> str:
    """The command that repeats what a script was asked, those words that only say where to write it left out."""
    words = ["--data_dir=DIR" if word.startswith("--data_dir=") else word for word in (sys.argv[1:] if argv is None else argv)]
    given = [word for word in words if word != "--publish"]
    return " ".join(["python", f"benchmarks/{Path(script).name}", *given])


def resident() -> int:
    """Bytes of memory that this process holds now, what was freed given back first (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that this process held since `forget_peak`, or since its start (Linux)."""
    return _status("VmHWM")


def forget_peak() -> None:
    """`peak` begins anew, from what is held now (Linux)."""
    resident()  # what was freed is no longer held
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
