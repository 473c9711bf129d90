"""Trains a tiny network for 20 steps on the mesh and processes given on the command line, and prints what came out as JSON.

python tests/meshes.py '[2, 4]' [PORT PROCESSES PROCESS FOLDER]      # XLA_FLAGS=--xla_force_host_platform_device_count=8
"""

import faulthandler
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tiny import config

from jaxdiff import compiling, data, experiment
from jaxdiff import mesh as meshes
from jaxdiff import run as runs
from jaxdiff.training import init_state, jit_init, make_optimizer, make_step
from jaxdiff.training.dryrun import state_bytes


def meet(folder: Path, processes: int, process: int, name: str) -> None:
    """Waits for every process: collectives of the CPU give up when one comes 30 s after another, as with a slow compile."""
    (folder / f"{name}_{process}").touch()
    while len(list(folder.glob(f"{name}_*"))) < processes:
        time.sleep(0.05)


def main() -> None:
    faulthandler.dump_traceback_later(400, exit=True)  # a deadlock is to say where
    shape = json.loads(sys.argv[1])
    if len(sys.argv) > 2:
        port, processes, process = (int(a) for a in sys.argv[2:5])
        meshes.connect(f"127.0.0.1:{port}", processes, process)
    # Wide enough that kernels are split; without dropout, whose numbers XLA may draw per device.
    c = config(
        **{
            "model.channels": 32,
            "model.multipliers": (1, 2),
            "model.attention": (1,),
            "model.dropout": 0.0,
            "optimizer.learning_rate": 1e-3,
        }
    )
    mesh = meshes.make_mesh(shape)
    built, optimizer = experiment.build(c), make_optimizer(c.optimizer)
    key, digits = jax.random.key(0), data.load("digits")

    def init(key):
        return init_state(built, optimizer, c.training.ema, key)

    shardings = meshes.state_shardings(mesh, jax.eval_shape(init, key))
    step = compiling.jit(make_step(built, optimizer), donate_argnums=1, out_shardings=(shardings, meshes.replicated(mesh))).jitted()
    with jax.set_mesh(mesh):
        state = jit_init(init, shardings)(key)
        batches = [meshes.put(mesh, 16, lambda part, n, i=i: data.batch_at(digits, 0, i, 16, part, n)) for i in range(20)]
        compiled, losses = step.lower(key, state, batches[0]).compile(), []
        if len(sys.argv) > 2:
            meet(Path(sys.argv[5]), processes, process, "compiled")
        for batch in batches:
            state, told = compiled(key, state, batch)
            losses.append(float(jax.block_until_ready(told)["loss"]))  # fake devices deadlock where steps pile up
        images = runs.of(c, built, state.ema["0.9"]).generate(jax.random.key(1), 5, steps=3, label=[0, 1, 2, 3, 4], guidance=1.5)
    params = meshes.fetch(state.params)
    print(json.dumps({
        "losses": losses,
        "bytes": state_bytes(state),
        "params": float(sum(np.abs(a).sum() for a in jax.tree.leaves(params))),
        "images": np.asarray(images).ravel().tolist(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
