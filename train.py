"""Trains a diffusion model:  python train.py --config=configs/digits.py [--config.key=value ...] [--workdir=DIR]

Writes to the workdir: samples/*.png and metrics.jsonl while it runs, TensorBoard events, checkpoints. Run again with the same
workdir, it goes on from the newest checkpoint. With Ctrl-C or SIGTERM it saves first.
"""

import contextlib
import signal
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from jaxdiff import cli, data, pictures
from jaxdiff import experiment as experiments
from jaxdiff import run as runs
from jaxdiff.errors import InputError
from jaxdiff.training import checkpoint, init_state, make_optimizer, make_step, metrics

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/digits.py.", lock_config=True)
flags.DEFINE_string("workdir", None, "Where everything is written; runs/NAME of the config unless given.")

# A first grid is begun this many seconds after the start, so that a mistake shows at once and not after sample_every steps, ...
FIRST_GRID = 30.0
# ... and takes what is left to this, compiling the sampler (about 5 s) included.
FIRST_GRID_DONE = 50.0
# Where a grid as the config has it would take longer than this (a large network on a CPU), a smaller one is drawn.
GRID_SECONDS = 60.0


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains `config` in `workdir` to config.steps, from the newest checkpoint there. Raises InputError for wrong input."""
    start = time.time()

    # What can be wrong is found out before anything is decoded or compiled.
    mesh = jax.make_mesh((jax.device_count(), 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    _check(config, mesh)
    optimizer = make_optimizer(config.optimizer)
    _writable(workdir)
    went_on = checkpoint.newest(workdir) is not None
    if went_on:
        _same_experiment(workdir, config)
    dataset = data.load(config.data.name, config.data.split, config.data_dir or None, size=config.data.size or None)
    if config.data.codec == "standardised":
        mean, std = data.statistics(dataset)
        config.data.codec = f"standardised({mean.tolist()}, {std.tolist()})"
    experiment = experiments.build(config)
    _fits(config, dataset)
    runs.check(config, experiment)
    print(f"{config.data.name}: {len(dataset.images)} images {dataset.images.shape[1:]}, {jax.device_count()} "
          f"{jax.devices()[0].device_kind} device(s), writing to {workdir}")  # fmt: skip

    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    key = jax.random.key(config.seed)

    def init(key):
        return init_state(experiment, optimizer, config.training.ema, key)

    shardings = jax.tree.map(lambda _: replicated, jax.eval_shape(init, key))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(checkpoint.manager(workdir, config.training.keep))
        if went_on:
            state = checkpoint.restore(checkpoints, jax.eval_shape(init, key), shardings)
            print(f"going on from step {int(state.step)}, the newest checkpoint in {workdir}")
        else:
            print("compiling the start ...", flush=True)
            state = jax.jit(init, out_shardings=shardings)(key)
        first = int(state.step)
        if first >= config.steps:
            print(f"nothing to do: {workdir} is at step {first} of config.steps={config.steps}; a larger config.steps goes on")
            return

        count = sum(a.size for a in jax.tree.leaves(state.params))
        print(f"{count:,} parameters; compiling the train step (about a minute for a large network, cached for next time) ...")
        step = jax.jit(make_step(experiment, optimizer), donate_argnums=1, out_shardings=(shardings, replicated))
        writer = metrics.writer(workdir, first)
        stack.callback(writer.close)
        stop = _on_signal(stack)
        bar = stack.enter_context(tqdm(initial=first, total=config.steps, unit="step", dynamic_ncols=True, smoothing=0.05))
        shown, since, since_step, grids, pace = [], time.time(), first, 0, 0.0

        for i in range(first, config.steps):
            batch = data.batch_at(dataset, config.seed, i, config.batch_size)
            state, scalars = step(key, state, jax.device_put(batch, split))
            done = i + 1
            shown.append(scalars)
            if len(shown) > 2:
                # The host stays two steps ahead: enough to keep the device busy, and the bar tells the truth.
                jax.block_until_ready(shown[-3])
            if i == first:
                jax.block_until_ready(state)
                bar.write(f"first step done, {time.time() - start:.0f} s after the start")
                since, since_step = time.time(), done
            bar.update()
            last = done == config.steps or bool(stop)
            early = not grids and i > first and time.time() - start > FIRST_GRID
            logs = done % config.training.log_every == 0 or last
            if (logs or early) and done > since_step:
                jax.block_until_ready(state)  # steps are dispatched ahead of the device; only finished ones tell its pace
                pace = (time.time() - since) / (done - since_step)
            if logs:
                values = {name: float(np.mean([float(s[name]) for s in shown])) for name in scalars}
                shown = []
                if pace:
                    values["steps_per_s"] = 1 / pace
                writer.scalars(done, values)
                bar.set_postfix(loss=f"{values['loss']:.4f}")
                since, since_step = time.time(), done
            if done % config.training.sample_every == 0 or last or early:
                paused = time.time()
                forward = pace / config.batch_size / 3  # a training step costs about three forward passes
                num, steps = _affordable(config, forward, FIRST_GRID_DONE - (paused - start) if early else GRID_SECONDS)
                path = _sample(config, experiment, state, workdir, writer, num, steps)
                grids += 1
                bar.write(f"step {done}: {num} samples of {steps} steps in {path}, {time.time() - start:.0f} s after the start")
                since += time.time() - paused
            if done % config.training.save_every == 0 or last:
                checkpoint.save(checkpoints, state, config)
            if last:
                break
        checkpoints.wait_until_finished()
    if stop:
        print(f"stopped by {stop[0]} at step {done}, saved; the same command goes on from there")
    else:
        print(f"done: step {done}, {time.time() - start:.0f} s; draw more with: python sample.py --workdir={workdir}")


def _affordable(config, forward: float, budget: float) -> tuple[int, int]:
    """How many images and steps a grid may have in `budget` seconds, one image through the network taking `forward` seconds."""
    num, steps = config.sampling.num, config.sampling.steps
    if num * steps * forward <= budget:
        return num, steps
    num = min(num, int(np.clip(budget / (10 * forward), 4, 16)))
    return num, int(np.clip(budget / (num * forward), min(5, steps), steps))


def _sample(config, experiment, state, workdir: Path, writer, num: int, steps: int) -> Path:
    """Draws the grid of config.sampling with the averaged parameters and writes it; the same noise every time."""
    run = runs.of(config, experiment, state.ema[runs.average(config)], int(state.step))
    images, columns, _ = runs.showcase(run, jax.random.key(config.seed), num, steps=steps)
    picture = pictures.tile(images, columns)
    path = workdir / "samples" / f"step_{int(state.step):07d}.png"
    pictures.save(path, picture)
    writer.image(int(state.step), "samples", picture)
    return path


def _check(config: ConfigDict, mesh) -> None:
    for name in ("steps", "batch_size"):
        if config[name] < 1:
            raise InputError(f"config.{name}={config[name]} is out of range; it is at least 1")
    for name in ("log_every", "sample_every", "save_every", "keep"):
        if config.training[name] < 1:
            raise InputError(f"config.training.{name}={config.training[name]} is out of range; it is at least 1")
    if config.batch_size % mesh.size:
        raise InputError(f"config.batch_size={config.batch_size} does not divide over the {mesh.size} devices")
    if not config.training.ema or not all(0 <= decay < 1 for decay in config.training.ema):
        raise InputError(f"config.training.ema={config.training.ema} needs one decay or more, each at least 0 and below 1")


def _writable(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error.strerror}") from error


def _same_experiment(workdir: Path, config: ConfigDict) -> None:
    """Raises InputError where the workdir's checkpoint is of another model, data or process."""
    _, old = checkpoint.restore_meta(workdir)
    for group in ("data", "model", "process"):
        before, now = checkpoint.plain(old[group]), checkpoint.plain(config[group])
        for name in sorted(before.keys() | now.keys()):
            a, b = before.get(name), now.get(name)
            # The statistics of a standardised codec are measured, and stand in the checkpoint only.
            if a != b and not (name == "codec" and b == "standardised" and str(a).startswith("standardised")):
                raise InputError(
                    f"workdir {workdir} holds another experiment: its {group}.{name} is {a!r}, now {b!r}; "
                    f"give another --workdir, or the value it was trained with"
                )


def _fits(config: ConfigDict, dataset: data.Dataset) -> None:
    shape, classes = tuple(dataset.images.shape[1:]), int(dataset.labels.max()) + 1
    if shape != tuple(config.data.shape):
        raise InputError(f"config.data.shape={tuple(config.data.shape)} but the images of {config.data.name} are {shape}")
    if config.model.classes and not classes:
        raise InputError(f"config.model.classes={config.model.classes} but {config.data.name} has no labels; use 0")
    if config.model.classes and classes > config.model.classes:
        raise InputError(f"config.model.classes={config.model.classes} but {config.data.name} has {classes} classes")


def _on_signal(stack: contextlib.ExitStack) -> list[str]:
    """A list that gets the name of SIGINT or SIGTERM when it comes; a second one ends the process as it would have."""
    seen: list[str] = []

    def note(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, note))
    return seen


def main() -> None:
    if CONFIG.value is None:
        raise InputError("which experiment? Give --config=configs/digits.py, for instance")
    name = Path(config_flags.get_config_filename(FLAGS["config"])).stem
    train(CONFIG.value, Path(FLAGS.workdir or Path("runs") / name))


if __name__ == "__main__":
    cli.run(main)
