"""All speed benchmarks, one after another, each in a process of its own:  python benchmarks/all.py [--publish] [--quick]

--quick runs them at small sizes, to see that they run; --only names some of them. A line says what begins; what failed is told at
the end, and then the exit code is 1. About 40 minutes on two cores; the peer's rows need PyTorch and diffusers
(`pip install torch diffusers`), which are imported by the benchmarks alone.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Name -> the words of a rehearsal.
QUICK = {
    "forward": "--batch 2 --channels 16 --size 16 --repeats 5",
    "training_step": "--batch 2 --channels 16 --size 16 --repeats 5 --parts",
    "sampling": "--channels 16 --size 16 --batch 2 --steps 5",
    "input_pipeline": "--images 2000 --batches 10 --steps 5 --repeats 3",
    "dispatch": "--channels 8 --batch 4 --together 2 --guided 2 --repeats 5",
    "startup": "--configs=digits --repeats=1 --change=model.channels=8",
    "compile_time": "--depth 4 --repeats 1",
    "likelihood": "--channels 16 --size 16 --batch 2 --terms 3 --steps 1",
    "scaling": "--batch 1 2 --train_batch 1 2 --channels 16 32 --size 8 16 --middle 16 16 2",
}
# Those that have more to say than by default.
FULL = {"training_step": "--parts", "gpu_training": "--peer"}
# Those that print only.
PRINTS = ("compile_time",)
OF_GPU = {"gpu_training": "--batch 8 --channels 16 --size 16 --steps 2 --repeats 3"}


def has_gpu() -> bool:
    """Whether JAX sees a GPU, asked of another process: one that held it would leave the benchmarks little of its memory."""
    code = "import jax; raise SystemExit(jax.default_backend() != 'gpu')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def commands(names: Sequence[str], quick: bool, publish: bool, data_dir: str = "") -> dict[str, list[str]]:
    """Name -> the words that run that benchmark."""
    told = {}
    for name in names:
        words = (QUICK | OF_GPU if quick else FULL).get(name, "").split()
        words += [f"--data_dir={data_dir}"] if name == "input_pipeline" and data_dir else []
        told[name] = [sys.executable, str(HERE / f"{name}.py"), *words, *(["--publish"] if publish and name not in PRINTS else [])]
    return told


def run(told: dict[str, list[str]]) -> list[str]:
    """Runs them in turn, what they say let through; the names of those that failed."""
    failed = []
    for name, words in told.items():
        print(f"\n== {name}: {' '.join(words[1:])}", flush=True)
        start = time.perf_counter()
        # The peers of all but one are on the CPU, so we are too.
        env = os.environ | ({} if name in OF_GPU else {"JAX_PLATFORMS": "cpu"})
        code = subprocess.run(words, cwd=HERE.parent, env=env).returncode
        print(
            f"== {name}: {'done' if not code else f'failed with exit code {code}'}, {time.perf_counter() - start:.0f} s", flush=True
        )
        failed += [name] if code else []
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--publish", action="store_true", help="each adds its entry to docs/benchmarks.md")
    parser.add_argument("--only", nargs="+", choices=[*QUICK, *OF_GPU], metavar="NAME", help=", ".join([*QUICK, *OF_GPU]))
    parser.add_argument("--data_dir", default="", help="where CIFAR-10 is prepared; random images stand for it otherwise")
    asked = parser.parse_args(argv)
    if asked.quick and asked.publish:
        parser.error("--publish with --quick would publish figures of a rehearsal")
    names = asked.only or [*QUICK, *(OF_GPU if has_gpu() else ())]
    if failed := run(commands(names, asked.quick, asked.publish, asked.data_dir)):
        print(f"\nfailed: {', '.join(failed)}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
