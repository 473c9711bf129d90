"""Trains a diffusion model, a classifier or an autoencoder:  python train.py --config=configs/digits.py [--workdir=DIR]

Writes to the workdir: samples/*.png and metrics.jsonl while it runs, TensorBoard events, checkpoints; --config.key=value changes a
key of the config. Instead of samples a classifier has its accuracy on held-out images told, by noise level, and an autoencoder
shows held-out images above what it gives back. Run again with the same workdir, it goes on from the newest good checkpoint. With
Ctrl-C or SIGTERM it saves first; a second Ctrl-C leaves at once.
--dry_run says what the run needs and takes, and trains nothing; --profile records a few steps for Perfetto. Several processes: the
same command on each host of a TPU pod, Slurm job or GKE job; elsewhere with --coordinator=HOST:PORT --processes=N --process=I.
"""

import collections
import contextlib
import functools
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from jaxdiff import cli, compiling, data, evaluation, first_stage, pictures
from jaxdiff import experiment as experiments
from jaxdiff import mesh as meshes
from jaxdiff import run as runs
from jaxdiff.autoencoding import Autoencoding
from jaxdiff.data import latents
from jaxdiff.errors import InputError, RunError
from jaxdiff.evaluation import reconstruction
from jaxdiff.training import (
    averages,
    checkpoint,
    dryrun,
    ema_distance,
    hardware,
    init_state,
    jit_init,
    make_optimizer,
    make_step,
    metrics,
)

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/digits.py.", lock_config=True)
flags.DEFINE_string("workdir", None, "Where everything is written, gs:// too; runs/NAME of the config unless given.")
flags.DEFINE_boolean("dry_run", False, "Print parameters, memory and time of this run, and train nothing.")
flags.DEFINE_boolean("profile", False, "Record a few steps in WORKDIR/profile, a trace that Perfetto opens.")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes are not found automatically.")
flags.DEFINE_integer("processes", None, "How many processes there are.")
flags.DEFINE_integer("process", None, "Which of them this is, from 0.")

# A first grid is begun this many seconds after the start, so that a mistake shows at once and not after sample_every steps, ...
FIRST_GRID = 30.0
# ... and takes what is left to this, compiling the sampler (about 5 s) included.
FIRST_GRID_DONE = 50.0
# Where a grid as the config has it would take longer than this (a large network on a CPU), a smaller one is drawn.
GRID_SECONDS = 60.0
# How many held-out images an autoencoder is measured on along the way, spread over the split; evaluate.py takes them all.
HELD_OUT = 1024
# What a step says is fetched this many steps later: the device never waits for the host, and the bar tells the truth.
BEHIND = 2
# Which steps of a process --profile records.
PROFILED = range(5, 10)


def train(
    config: ConfigDict, workdir: Path | str, dry_run: bool = False, profile: bool = False, start: float | None = None
) -> None:
    """Trains `config` in `workdir` to config.steps, from the newest good checkpoint there; `start` is when the process began.

    Raises InputError for wrong input, RunError where the run cannot go on.
    """
    start = time.time() if start is None else start
    first_process = meshes.first_process()

    def say(line: str) -> None:
        if first_process:
            print(line, flush=True)

    # What can be wrong is found out before anything is decoded or compiled.
    mesh = meshes.make_mesh(config.training.mesh)
    _check(config, mesh)
    if profile and "://" in str(workdir):
        raise InputError(f"--profile writes to a local disk, and the workdir is {workdir}; give a local one")
    optimizer = make_optimizer(config.optimizer)
    went_on = None
    if not dry_run:
        _writable(workdir)
        found = checkpoint.recover(workdir, say) if first_process else None
        newest = int(meshes.agree(np.int32(-1 if found is None else found)))
        went_on = None if newest < 0 else newest
    if went_on is not None:
        _same_experiment(workdir, went_on, config)
    asked = config.data.codec
    config.data.codec = first_stage.provisional(asked)
    experiment = _built(config, workdir)
    runs.check(config, experiment)
    key = jax.random.key(config.seed)
    if dry_run:  # of shapes alone: the data need not be there
        with jax.set_mesh(mesh):
            _, step, shapes, shardings = _programs(config, experiment, optimizer, mesh, key)
            batch = dryrun.batch_shapes(config, experiment.codec, mesh)
            dryrun.report(config, mesh, step, key, shapes, shardings, batch, say)
        return
    dataset = data.of_config(config)
    _fits(config, dataset)
    stored = _latents(config, experiment, dataset) if first_stage.is_latent(experiment.codec) else None
    config.data.codec = _measured(asked, experiment.codec, dataset, stored)
    if config.data.codec != asked:
        experiment = _built(config, workdir)
    if stored is not None:
        experiment = experiment._replace(codec=first_stage.on(experiment.codec, mesh))

    at = functools.partial(data.batch_at, dataset) if stored is None else functools.partial(latents.batch_at, stored)

    def batch_of(i: int) -> dict[str, jax.Array]:
        return meshes.put(mesh, config.batch_size, lambda part, n: at(config.seed, i, config.batch_size, part, n))

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        init, step, shapes, shardings = _programs(config, experiment, optimizer, mesh, key)
        show, then = _task(config, experiment, mesh, workdir, dataset, say)
        say(f"{config.data.name}: {len(dataset.images)} images {dataset.images.shape[1:]}, {jax.device_count()} "
            f"{jax.devices()[0].device_kind} device(s), {jax.process_count()} process(es), writing to {workdir}")  # fmt: skip
        if stored is not None:
            say(f"latents {stored.parts[0].shape[1:]} of each in {stored.folder}, encoded by data.codec={config.data.codec}")
        if went_on is None:
            say("compiling the start ...")
            state = init(key)
        else:
            state = checkpoint.restore(workdir, went_on, shapes, shardings)
            say(f"going on from step {went_on}, the newest good checkpoint in {workdir}")
        first = int(state.step)
        if first >= config.steps:
            say(f"nothing to do: {workdir} is at step {first} of config.steps={config.steps}; a larger config.steps goes on")
            return

        checkpoints = stack.enter_context(checkpoint.manager(workdir, config.training.keep, config.training.keep_every))
        powers = [str(name) for name in config.training.ema if averages.width(name) is not None]
        snapshots = None
        if config.training.snapshot_every and powers:
            checkpoint.forget_later(workdir, first)
            meshes.agree(np.int32(first))  # the others wait until that is done
            snapshots = stack.enter_context(checkpoint.snapshots(workdir))
        writer = metrics.writer(workdir, first) if first_process else metrics.silent()
        stack.callback(writer.close)
        distance = compiling.jit(ema_distance, static_argnums=1, out_shardings=meshes.replicated(mesh))

        count = sum(a.size for a in jax.tree.leaves(shapes.params))
        say(f"{count:,} parameters; compiling the train step (about a minute for a large network, cached for next time) ...")
        peak, flops = hardware.peak_flops(jax.devices()[0]), 0.0
        if peak:
            flops = hardware.flops(step.trace(key, state, batch_of(first)).jaxpr)
        stop = _on_signal(stack)
        bar = stack.enter_context(
            tqdm(initial=first, total=config.steps, unit="step", dynamic_ncols=True, smoothing=0.05, disable=not first_process)
        )
        tell = bar.write if first_process else lambda line: None
        pending: collections.deque = collections.deque()
        told: list[dict] = []
        row: dict = {}
        clock = _Clock()
        grids, saved, values = 0, first, None

        def take() -> None:
            """Fetches what the oldest pending step said, and writes a row of metrics where one is due."""
            nonlocal told, row
            done, values, apart, waited, due = pending.popleft()
            values = jax.device_get(values) | {"data_wait": waited}
            clock.tick(done)
            if not values["finite"] and config.training.nonfinite == "stop":
                raise RunError(_not_finite(config, done, values, saved))
            told.append(values)
            if apart is not None and not np.isfinite(apart):
                raise RunError(_broken(config, done, saved))
            if not due:
                return
            row = metrics.summary(told) | {"ema_distance": float(apart)}
            waits = row.pop("data_wait")
            if clock.pace:
                row |= {"steps_per_s": 1 / clock.pace, "images_per_s": config.batch_size / clock.pace}
                row["data_wait"] = waits / clock.pace
                if peak:
                    row["mfu"] = flops / clock.pace / (peak * jax.device_count())
            clock.restart(done)
            writer.scalars(done, row)
            more = {name: f"{row[name]:.4g}" for name in ("accuracy", "skipped") if name in row}
            bar.set_postfix(loss=f"{row['loss']:.4f}", **more)
            told = []

        for i in range(first, config.steps):
            if profile and i - first in (PROFILED.start, PROFILED.stop):
                _profile(i - first == PROFILED.start, workdir, state, tell)
            images, waited = _timed(batch_of, i, values)
            state, values = step(key, state, images)
            done = i + 1
            if i == first:
                jax.block_until_ready(state)
                tell(f"first step done, {time.time() - start:.1f} s after the start")
            stopping = _stopping(stop, done)
            last = done == config.steps or stopping
            logs = done % config.training.log_every == 0 or last
            saves = done % config.training.save_every == 0 or last
            early = not grids and i > first and time.time() - start > FIRST_GRID and jax.process_count() == 1
            # Who asks to stop may not wait for a grid.
            draws = (done % config.training.sample_every == 0 or last or early) and not stopping
            snaps = snapshots is not None and (done % config.training.snapshot_every == 0 or done == config.steps)
            shown_or_kept = saves or draws or snaps
            pending.append((done, values, distance(state, runs.average(config)) if logs or shown_or_kept else None, waited, logs))
            # Before anything is saved or drawn, it has proved finite, and all that led to it.
            while len(pending) > (0 if shown_or_kept else BEHIND):
                take()
            bar.update()
            if snaps and snapshots is not None:
                checkpoint.save_snapshot(snapshots, done, {name: state.ema[name] for name in powers}, config)
            if saves:
                checkpoint.save(checkpoints, state, config)
                saved = done
            if draws:
                with clock.paused():
                    forward = clock.last / config.batch_size * mesh.size / 3  # a training step costs about three forward passes
                    budget = max(FIRST_GRID_DONE - (time.time() - start), 5.0) if early else GRID_SECONDS
                    shown = show(state, writer, forward, budget)
                    if row.get("loss_by_logsnr"):
                        _levels(workdir, writer, done, row["loss_by_logsnr"])
                    grids += 1
                    tell(f"step {done}: {shown}, {time.time() - start:.0f} s after the start")
            if last:
                break
        checkpoint.finish(checkpoints)
    if stop:
        say(f"stopped by {stop[0]} at step {done}, saved; the same command goes on from there")
    elif done < config.steps:
        say(f"stopped by a preemption notice at step {done}, saved; the same command goes on from there")
    else:
        say(f"done: step {done}, {time.time() - start:.0f} s; {then}")


def _built(config, workdir):
    """The experiment, with the first stage that lies inside the workdir where one does, as `jaxdiff.load` finds it."""
    here = config.copy_and_resolve_references()
    here.data.codec = first_stage.found(config.data.codec, workdir)
    return experiments.build(here)


def _programs(config, experiment, optimizer, mesh, key):
    """The start and the step of training, to be compiled when first called, and the shapes and shardings of the state."""

    def init(key):
        return init_state(experiment, optimizer, config.training.ema, key)

    shapes = jax.eval_shape(init, key)  # the key that the start is called with, so that JAX traces it once
    shardings = meshes.state_shardings(mesh, shapes)
    step = make_step(experiment, optimizer, config.training.accumulate)
    jitted = jax.jit(
        step, donate_argnums=1, out_shardings=(shardings, meshes.replicated(mesh)), compiler_options=compiling.options() or None
    )
    return jit_init(init, shardings), jitted, shapes, shardings


def _timed(batch_of, i: int, before) -> tuple[dict[str, jax.Array], float]:
    """Batch i, and how many seconds at most the device waited for it to be made.

    While the device is at steps it was given before, it waits for nothing. Where it is done with those when the batch is there
    (`before` is what the last one says), all the time that the batch took counts.
    """
    start = time.perf_counter()
    batch = batch_of(i)
    busy = before is None or not before["loss"].is_ready()  # the first step of a process has to compile
    return batch, 0.0 if busy else time.perf_counter() - start


class _Clock:
    """The pace of steps, told by when they are finished; pauses for drawing are left out."""

    def __init__(self) -> None:
        self.since, self.pace, self.last = time.time(), 0.0, 0.0
        self.since_step: int | None = None

    def tick(self, done: int) -> None:
        """Step `done` is finished."""
        if self.since_step is None:  # the first step of a process compiles
            self.restart(done)
        elif done > self.since_step:
            self.pace = self.last = (time.time() - self.since) / (done - self.since_step)

    def restart(self, done: int) -> None:
        """The pace is measured from step `done`."""
        self.since, self.since_step, self.pace = time.time(), done, 0.0

    @contextlib.contextmanager
    def paused(self):
        """Time spent in here is not training."""
        began = time.time()
        yield
        self.since += time.time() - began


def _not_finite(config, done: int, values, saved: int) -> str:
    worst = f", worst at logsnr {values['worst_logsnr']:.3f}" if "worst_logsnr" in values else ""
    return (
        f"step {done} is not finite: loss {values['loss']}, gradient norm {values['grad_norm']}{worst}; its batch is "
        f"batch_at(dataset, seed={config.seed}, step={done - 1}, batch_size={config.batch_size}) and its key "
        f"fold_in(key({config.seed}), {done - 1}); nothing is saved after step {saved}; "
        f"--config.training.nonfinite=skip passes over such steps"
    )


def _broken(config, done: int, saved: int) -> str:
    return (
        f"the parameters are not finite at step {done}, though loss and gradient were: the update of optimizer.name="
        f"{config.optimizer.name!r} at learning_rate={config.optimizer.learning_rate} times optimizer.schedule="
        f"{config.optimizer.schedule!r} is not; nothing is saved after step {saved}"
    )


def _stopping(stop: list[str], done: int) -> bool:
    if jax.process_count() == 1:
        return bool(stop)
    # All processes stop after the same step: the runtime spreads a SIGTERM or the platform's notice among them.
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(done)


def _profile(begin: bool, workdir, state, write) -> None:
    if begin:
        jax.profiler.start_trace(str(checkpoint.place(workdir) / "profile"), create_perfetto_trace=True)
        return
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    write(f"profile of {len(PROFILED)} steps under {workdir}/profile; open its perfetto_trace.json.gz at https://ui.perfetto.dev")


def _levels(workdir, writer, step: int, by_logsnr) -> None:
    """The loss by noise level since the last row of metrics, as a table and a plot."""
    picture = metrics.level_plot(by_logsnr)
    writer.image(step, "loss_by_logsnr", picture)
    if meshes.first_process():
        (checkpoint.place(workdir) / "loss_by_logsnr.csv").write_text(metrics.level_table(by_logsnr))
        pictures.save(checkpoint.place(workdir) / "loss_by_logsnr.png", picture)


def _task(config, experiment, mesh, workdir, dataset, say):
    """What is shown of the model along the way, `show(state, writer, forward, budget) -> line`, and what is done with it then."""
    if isinstance(experiment, Autoencoding):
        held_out = _held_out(config, say, labelled=False) or dataset
        through = reconstruction.through(experiment.model, experiment.pixel)
        show = functools.partial(
            _reconstruct, config, through, getattr(experiment.model, "codes", 0), mesh, workdir, held_out.images
        )
        return show, f"diffuse its latents with: --config.data.codec=\"autoencoder('{workdir}')\""
    if experiment.target is None:
        show = functools.partial(_accuracy, config, experiment, mesh, _held_out(config, say, labelled=True))
        return show, f"guide with: jaxdiff.load_classifier({str(workdir)!r})"
    return functools.partial(_sample, config, experiment, workdir), f"draw more with: python sample.py --workdir={workdir}"


def _affordable(config, forward: float, budget: float) -> tuple[int, int]:
    """How many images and steps a grid may have in `budget` seconds, one image through the network taking `forward` seconds."""
    num, steps = config.sampling.num, config.sampling.steps
    if num * steps * forward > budget:
        num = min(num, int(np.clip(budget / (10 * forward), 4, 16)))
        steps = int(np.clip(budget / (num * forward), min(5, steps), steps))
    # The clocks of several processes differ, and they must draw the same.
    num, steps = meshes.agree(np.array([num, steps]))
    return int(num), int(steps)


def _sample(config, experiment, workdir, state, writer, forward: float, budget: float) -> str:
    """Draws the grid of config.sampling with the averaged parameters and writes it; the same noise every time."""
    num, steps = _affordable(config, forward, budget)
    run = runs.of(config, experiment, state.ema[runs.average(config)], int(state.step))
    images, columns, _ = runs.showcase(run, jax.random.key(config.seed), num, steps=steps)
    picture = pictures.tile(images, columns)
    path = checkpoint.place(workdir) / "samples" / f"step_{int(state.step):07d}.png"
    if meshes.first_process():
        pictures.save(path, picture)
    writer.image(int(state.step), "samples", picture)
    return f"{num} samples of {steps} steps in {path}"


def _latents(config, experiment, dataset: data.Dataset) -> latents.Latents:
    """What the first stage says of the images, encoded once."""
    folder = experiments.optional(config, "data", "latents")
    return latents.cached(dataset, experiment.codec, config.data.flip, config.sampling.batch_size, folder)


def _measured(asked: str, codec, dataset: data.Dataset, stored: latents.Latents | None) -> str:
    """data.codec with what it asks to measure of the images, or of their latents."""
    if not first_stage.measures(asked, codec):
        return first_stage.measured(asked, codec, None)
    return first_stage.measured(asked, codec, data.statistics(dataset) if stored is None else latents.statistics(stored))


def _held_out(config, say, labelled: bool) -> data.Dataset | None:
    """Images that are not trained on: the split test or validation, None where there is neither."""
    for split in ("test", "validation"):
        with contextlib.suppress(InputError):
            dataset = data.of_config(config, split)
            if split != config.data.split and len(dataset.labels) and (not labelled or dataset.labels.min() >= 0):
                say(f"held out: {len(dataset.labels)} images, {config.data.name} {split}")
                return dataset
    if labelled:
        say(f"{config.data.name} has no labelled split test or validation: the accuracy is not measured on held-out images")
    else:
        say(f"{config.data.name} has no split test or validation: reconstructions are of images that are trained on")
    return None


def _reconstruct(config, through, codes: int, mesh, workdir, images, state, writer, forward: float, budget: float) -> str:
    """Shows images above what the averaged parameters make of them, and tells how near that is; always the same images."""
    shown = min(config.sampling.num, len(images))
    # As many as the budget allows, of which the grid is the first.
    most = min(len(images), max(HELD_OUT, shown))
    num = int(meshes.agree(np.int32(np.clip(budget / max(forward, 1e-9), min(256, most), most))))
    rows = np.linspace(0, len(images) - 1, most).round().astype(int)
    rows = np.random.RandomState(config.seed % 2**32).permutation(rows)[: max(num, shown)]
    params = state.ema[runs.average(config)]
    seen = reconstruction.measure(through, params, images[rows], config.sampling.batch_size, codes, mesh)
    row = reconstruction.summary(seen)
    writer.scalars(int(state.step), {f"held_out_{name}": value for name, value in row.items()})
    picture = reconstruction.grid(np.asarray(images[rows[:shown]]), seen.images[:shown])
    path = checkpoint.place(workdir) / "samples" / f"step_{int(state.step):07d}.png"
    if meshes.first_process():
        pictures.save(path, picture)
    writer.image(int(state.step), "reconstructions", picture)
    return f"{reconstruction.told(row, codes)} of {len(rows)} images; {shown} of them in {path}"


def _accuracy(config, experiment, mesh, held_out, state, writer, forward: float, budget: float) -> str:
    """Tells how often the averaged parameters are right on held-out images, by noise level; the same noise every time."""
    if held_out is None:
        return "no held-out images"
    levels = metrics.LOGSNR_EDGES
    # At least 100 images, and as many more as the budget allows.
    num = np.clip(budget / (len(levels) * max(forward, 1e-9)), 100, len(held_out.labels))
    num, size = int(meshes.agree(np.int32(num))), config.sampling.batch_size
    params, key = state.ema[runs.average(config)], jax.random.key(config.seed)
    right = evaluation.accuracy_by_level(experiment, params, held_out, num, size, key, mesh)
    by_level = [[float(at), float(share)] for at, share in zip(levels, right)]
    writer.scalars(int(state.step), {"held_out_accuracy": float(right.mean()), "held_out_by_logsnr": by_level})
    row = "".join(f"{100 * share:6.1f}" for share in right)
    return f"% of {num} held-out images right at logsnr {levels[0]:g}, {levels[1]:g} ... {levels[-1]:g}:{row}"


def _check(config: ConfigDict, mesh) -> None:
    for name in ("steps", "batch_size"):
        if config[name] < 1:
            raise InputError(f"config.{name}={config[name]} is out of range; it is at least 1")
    least = {"log_every": 1, "sample_every": 1, "save_every": 1, "keep": 1, "accumulate": 1, "keep_every": 0, "snapshot_every": 0}
    for name, smallest in least.items():
        if config.training[name] < smallest:
            raise InputError(f"config.training.{name}={config.training[name]} is out of range; it is at least {smallest}")
    if config.batch_size % (mesh.size * config.training.accumulate):
        raise InputError(
            f"config.batch_size={config.batch_size} does not divide over the {mesh.size} device(s) times "
            f"config.training.accumulate={config.training.accumulate}"
        )
    if config.training.nonfinite not in ("stop", "skip"):
        raise InputError(f"config.training.nonfinite={config.training.nonfinite!r} is unknown; allowed: 'stop', 'skip'")
    if not config.training.ema:
        raise InputError(f"config.training.ema={config.training.ema} is empty; it needs one average or more, such as 0.9999")
    for name in config.training.ema:
        averages.named(name)


def _writable(workdir) -> None:
    place = checkpoint.place(workdir)
    try:
        place.mkdir(parents=True, exist_ok=True)
        probe = place / f".writable{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error.strerror or error}") from error


def _same_experiment(workdir, step: int, config: ConfigDict) -> None:
    """Raises InputError where the workdir's checkpoint is of another model, data, process, optimizer or averages.

    A codec whose statistics were measured keeps them: the data may have grown since.
    """
    _, old, _ = checkpoint.restore_meta(workdir, step)
    config.data.codec = first_stage.kept(config.data.codec, old.data.codec)
    for name, of in {
        "training.ema": lambda c: ", ".join(str(average) for average in c.training.ema),
        "optimizer.name": lambda c: str(c.optimizer.name).split("(")[0],
    }.items():
        was, wanted = of(old), of(config)
        if was != wanted:
            raise InputError(
                f"workdir {workdir} was trained with {name}={was!r}, now {wanted!r}; give another --workdir, or that value"
            )
    for group in ("data", "model", "process"):
        before, now = checkpoint.plain(old[group]), checkpoint.plain(config[group])
        for name in sorted(before.keys() | now.keys()):
            a, b = (keys.get(name, experiments.left_out(config, group, name)) for keys in (before, now))
            if a != b and name not in ("remat", "latents"):
                raise InputError(
                    f"workdir {workdir} holds another experiment: its {group}.{name} is {a!r}, now {b!r}; "
                    f"give another --workdir, or the value it was trained with"
                )


def _fits(config: ConfigDict, dataset: data.Dataset) -> None:
    shape, classes = tuple(dataset.images.shape[1:]), int(dataset.labels.max()) + 1
    if shape != tuple(config.data.shape):
        border = f" with data.pad={config.data.pad}" if config.data.get("pad") else ""
        raise InputError(f"config.data.shape={tuple(config.data.shape)} but the images of {config.data.name} are {shape}{border}")
    wanted = config.model.get("classes", 0)
    if wanted and not classes:
        raise InputError(f"config.model.classes={wanted} but {config.data.name} has no labels; use 0")
    if wanted and classes > wanted:
        raise InputError(f"config.model.classes={wanted} but {config.data.name} has {classes} classes")


def _on_signal(stack: contextlib.ExitStack) -> list[str]:
    """A list that gets the name of SIGINT or SIGTERM when it comes; a second one ends the process as it would have."""
    seen: list[str] = []

    def note(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(signal.Signals(number).name)

    def pass_on(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(signal.Signals(number).name)
        os.kill(os.getpid(), signal.SIGTERM)

    if jax.process_count() == 1:
        handlers = {signal.SIGINT: note, signal.SIGTERM: note}
    else:
        # JAX's runtime listens for SIGTERM itself, and tells the other processes.
        handlers = {signal.SIGINT: pass_on}
    for number, handler in handlers.items():
        stack.callback(signal.signal, number, signal.signal(number, handler))
    return seen


def main() -> None:
    if CONFIG.value is None:
        raise InputError("which experiment? Give --config=configs/digits.py, for instance")
    meshes.connect(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
    name = Path(config_flags.get_config_filename(FLAGS["config"])).stem
    workdir = FLAGS.workdir or Path("runs") / name
    with contextlib.nullcontext() if FLAGS.dry_run else checkpoint.only_one(workdir):
        train(CONFIG.value, workdir, FLAGS.dry_run, FLAGS.profile, time.time() - cli.age())


if __name__ == "__main__":
    cli.run(main)
