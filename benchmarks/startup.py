"""How long things take before the first step: the import, a run of train.py, the start of the state, the train step's compile.

    python benchmarks/startup.py [--configs=digits,cifar] [--run=digits] [--repeats=5] [--publish]

Each time is of a process of its own: seconds by the clock, and of the processor (all threads together, so that other jobs count
less), medians with quartiles. `import jaxdiff` takes turns with `import jax, flax.linen`. To the first step: what train.py says of
`--run`, from the start of its process, cold with an empty compile cache, warm with the one that leaves. Then, of each config, the
start of the state by `training.jit_init` and by `jax.jit`, and the train step, traced and lowered, and compiled: cold without any
cache, warm from a filled one.
"""

import argparse
import ast
import json
import os
import re
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure

SETTINGS = ("JAX_COMPILATION", "JAX_PERSISTENT", "JAX_ENABLE_COMPILATION")
IMPORTS = {"import jax, flax.linen": "import jax, flax.linen", "import jaxdiff": "import jaxdiff"}


def environment(cache: str) -> dict[str, str]:
    """This process's, but with compiled programs kept in `cache` and by jaxdiff's own settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return own | {"XDG_CACHE_HOME": cache, "PYTHONPATH": path}


def child(arguments: Sequence[str], cache: str) -> tuple[float, float, str]:
    """The seconds by the clock and of the processor that a Python process took, and what it printed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment(cache), cwd=ROOT, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def taking_turns(processes: Mapping[str, Callable[[], tuple[float, float, str]]], repeats: int) -> dict[str, np.ndarray]:
    """The seconds [repeats, 2] by the clock and of the processor of each, in turns."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
    for i in range(repeats):
        for name in list(processes)[:: 1 if i % 2 == 0 else -1]:
            taken[name].append(processes[name]()[:2])
    return {name: np.array(seconds) for name, seconds in taken.items()}


def first_step(options: Sequence[str], cache: str) -> tuple[float, float]:
    """The seconds that train.py itself says its first step was done after, and of the processor until then; it is stopped there."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-u", "train.py", f"--workdir={workdir}/run", *options]
        with subprocess.Popen(
            command, env=environment(cache), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as run:
            said = []
            for line in run.stdout or ():
                said.append(line)
                if found := re.search(r"first step done, ([\d.]+) s", line):
                    ticks = Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
                    run.kill()
                    return float(found[1]), sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    raise RuntimeError(f"train.py told of no first step: {''.join(said)[-2000:]}")


def runs(options: Sequence[str], repeats: int) -> dict[str, np.ndarray]:
    """The seconds [repeats, 2] to the first step, with an empty cache and with the one it leaves."""
    taken: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for name in taken:
                taken[name].append(first_step(options, cache))
    return {name: np.array(seconds) for name, seconds in taken.items()}


def programs(config, cached: bool) -> dict[str, tuple[float, float]]:
    """The seconds by the clock and of the processor to compile and run the state's start, and to trace and compile the step."""
    from jaxdiff import cli, compiling, experiment, training
    from jaxdiff import mesh as meshes
    from jaxdiff.training.dryrun import batch_shapes

    cli.enable_compile_cache() if cached else jax.config.update("jax_enable_compilation_cache", False)
    built, optimizer, key = experiment.build(config), training.make_optimizer(config.optimizer), jax.random.key(config.seed)
    taken: dict[str, tuple[float, float]] = {}

    def timed(name: str, function: Callable):
        start, processor = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(function())
        taken[name] = time.perf_counter() - start, time.process_time() - processor
        return result

    def init(key):
        return training.init_state(built, optimizer, config.training.ema, key)

    timed("jit_init", lambda: training.jit_init(init)(key))
    if not cached:
        timed("jax.jit(init)", lambda: jax.jit(lambda key: init(key))(key))
    batch = batch_shapes(config, built.codec, meshes.make_mesh((-1, 1)))
    step = jax.jit(training.make_step(built, optimizer), donate_argnums=1, compiler_options=compiling.options() or None)
    lowered = timed("step: trace and lower", lambda: step.lower(key, jax.eval_shape(init, key), batch))
    timed("step: compile", lambda: lowered.compile())
    return taken


def compiled(name: str, changes: Sequence[str], repeats: int) -> dict[str, np.ndarray]:
    """`programs` of a config in processes of their own, without a cache ("cold") and with a filled one ("warm"), [repeats, 2]."""
    taken: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as cache:
        for i in range(repeats + 1):
            for kind in ("cold", "warm"):
                told = child([__file__, f"--child={name}:{kind}", *(f"--change={change}" for change in changes)], cache)[2]
                for what, seconds in json.loads(told[told.index("{") :]).items():
                    # The first warm one fills the cache.
                    taken.setdefault(f"{name}, {what}, {kind}", []).extend([seconds] if i or kind == "cold" else [])
    return {what: np.array(seconds)[-repeats:] for what, seconds in taken.items()}


def configured(name: str, changes: Sequence[str]):
    """The config of that name with "group.key=value" changes, values as Python literals."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    for change in changes:
        key, _, value = change.partition("=")
        group, _, last = key.rpartition(".")
        (config[group] if group else config)[last] = ast.literal_eval(value)
    return config


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--configs", default="digits,cifar", help="whose programs are compiled")
    parser.add_argument("--run", default="digits", help="whose first step is waited for; empty: none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--change", action="append", default=[], help="group.key=value of the configs, to try small ones")
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.child:
        name, kind = asked.child.split(":")
        print(json.dumps(programs(configured(name, asked.change), kind == "warm")))
        return
    taken = taking_turns({n: lambda code=code: child(["-c", code], "") for n, code in IMPORTS.items()}, asked.repeats)
    if asked.run:
        options = [f"--config=configs/{asked.run}.py", *(f"--config.{change}" for change in asked.change)]
        told = runs(options, asked.repeats)
        taken |= {f"train.py, {asked.run}, to the first step, {kind}": seconds for kind, seconds in told.items()}
    for name in filter(None, asked.configs.split(",")):
        taken |= compiled(name, asked.change, asked.repeats)
    rows = [[what, *(measure.spread(seconds[:, i]) for i in (0, 1))] for what, seconds in taken.items()]
    plain, ours = (taken[name][:, 1] for name in IMPORTS)
    body = measure.table(["what", "seconds by the clock", "seconds of the processor"], rows)
    body += f"\n\n`import jaxdiff` takes {np.median(ours - plain):.2f} s of the processor more than `import jax, flax.linen`."
    print(body)
    if asked.publish:
        measure.publish("Start-up", body, measure.command(__file__, argv))


if __name__ == "__main__":
    main()
