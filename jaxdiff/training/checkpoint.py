"""Checkpoints with Orbax: `state`, `ema` and `meta` (the step and the whole config) apart, so that sampling reads the EMA alone.

Orbax writes in the background, under another name, and renames what is complete. Just before that the digests of all files of
all items go into it, and afterwards a seal, the digests of the few files at its top. A checkpoint without digests is
half-written, one that does not match them is damaged, and neither is ever loaded.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from jaxdiff import mesh as meshes
from jaxdiff.errors import InputError, RunError
from jaxdiff.training.state import TrainState

FOLDER = "checkpoints"
SNAPSHOTS = "averages"
DAMAGED = "damaged"
DIGESTS = "digests.json"
SEAL = "seal.json"


class Checkpoints(NamedTuple):
    """A workdir's checkpoints as they are written: Orbax's manager, which step was last begun, and what each one holds."""

    manager: Any
    begun: list[int]
    items: tuple[str, ...]


def place(workdir: str | Path | epath.Path) -> epath.Path:
    """The workdir as a path that may also be gs://BUCKET/..."""
    return epath.Path(workdir) if "://" in str(workdir) else epath.Path(Path(workdir).absolute())


def manager(workdir, keep: int = 3, keep_every: int = 0) -> contextlib.AbstractContextManager[Checkpoints]:
    """A workdir's checkpoints opened for writing, in a `with`: the newest `keep` stay, and every `keep_every`-th step (0: none).

    Its end waits for the save under way. Only the one process that trains may open them: what it finds unfinished, it removes.
    """
    return _open(place(workdir) / FOLDER, keep, keep_every, ("state", "ema", "meta"))


def snapshots(workdir) -> contextlib.AbstractContextManager[Checkpoints]:
    """A workdir's snapshots of averages opened for writing, in a `with`; all stay."""
    return _open(place(workdir) / SNAPSHOTS, None, 0, ("ema", "meta"))


def imported(workdir) -> contextlib.AbstractContextManager[Checkpoints]:
    """A workdir's checkpoints opened for writing averages alone, in a `with`: an imported model has no state to go on from."""
    return _open(place(workdir) / FOLDER, None, 0, ("ema", "meta"))


def snapshot_steps(workdir) -> list[int]:
    """The steps of the good snapshots, newest first."""
    folder = place(workdir) / SNAPSHOTS
    return [step for step in steps(folder) if damage(folder / str(step), ("ema", "meta")) is None]


def forget_later(workdir, step: int) -> None:
    """Removes snapshots of steps that are about to be trained again, and those that are not whole."""
    folder = place(workdir) / SNAPSHOTS
    for number in set(steps(folder)) if meshes.first_process() else ():
        if number > step or damage(folder / str(number), ("ema", "meta")) is not None:
            (folder / str(number)).rmtree()


@contextlib.contextmanager
def _open(directory: epath.Path, keep: int | None, keep_every: int, items: tuple[str, ...]) -> Iterator[Checkpoints]:
    import orbax.checkpoint as ocp  # slow to import, and sampling from parameters at hand does not need it

    begun: list[int] = []

    def digest() -> None:
        # Orbax calls this when all files of all processes are written, before it renames the folder.
        for unfinished in directory.glob(f"{begun[-1]}.*") if meshes.first_process() else ():
            _write_digests(unfinished, DIGESTS, [name for name in _files(unfinished) if "/" in name])

    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every or None,
        create=True,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=digest),
    )
    checkpoints = Checkpoints(ocp.CheckpointManager(directory, options=options, item_names=items), begun, items)
    failed = False
    try:
        yield checkpoints
    except RunError as error:
        failed = error.__cause__ is not None  # a save could not be written; closing would try once more, loudly
        raise
    finally:
        if not failed:
            finish(checkpoints)
            checkpoints.manager.close()


def save(checkpoints: Checkpoints, state: TrainState, config: ConfigDict) -> None:
    """Begins to save the state as its step's checkpoint; the write goes on in the background.

    Raises RunError where this save, or the one before, could not be written.
    """
    import orbax.checkpoint as ocp

    items = {"state": ocp.args.StandardSave(state._replace(ema={})), "ema": ocp.args.StandardSave(state.ema)}
    _save(checkpoints, int(state.step), items, config, state)


def save_snapshot(checkpoints: Checkpoints, step: int, ema: dict[str, Any], config: ConfigDict) -> None:
    """Begins to save averages alone: a snapshot, for reconstructing others from it later, or an imported model."""
    import orbax.checkpoint as ocp

    _save(checkpoints, step, {"ema": ocp.args.StandardSave(ema)}, config, ema)


def _save(checkpoints: Checkpoints, step: int, items: dict[str, Any], config: ConfigDict, arrays: Any) -> None:
    import orbax.checkpoint as ocp

    finish(checkpoints)  # the one before: its digests are written before this one begins
    meta = ocp.args.JsonSave({"step": step, "config": plain(config)})
    checkpoints.begun.append(step)
    _room(checkpoints, sum(a.nbytes for a in jax.tree.leaves(arrays)))
    try:
        saved = checkpoints.manager.save(step, args=ocp.args.Composite(meta=meta, **items), force=True)
    except Exception as error:
        raise _unwritten(checkpoints, error) from error
    if not saved:
        raise RunError(f"checkpoint {checkpoints.manager.directory}/{step} was not saved: there is one already")


def _room(checkpoints: Checkpoints, needed: int) -> None:
    """Raises RunError where a local disk has no room: Orbax would find out half-way, array by array."""
    folder = checkpoints.manager.directory
    free = shutil.disk_usage(folder).free if jax.process_count() == 1 and "://" not in str(folder) else needed
    if free < needed:
        full = OSError(f"no space left on the device, {free / 2**20:,.0f} MiB free of the {needed / 2**20:,.0f} it may take")
        raise _unwritten(checkpoints, full) from full


def finish(checkpoints: Checkpoints) -> None:
    """Waits for the save under way. Raises RunError where it could not be written, a full disk for instance."""
    try:
        checkpoints.manager.wait_until_finished()
        checkpoints.manager.check_for_errors()
        finished = checkpoints.manager.directory / str(checkpoints.begun[-1]) if checkpoints.begun else None
        if finished and meshes.first_process() and finished.exists() and not (finished / SEAL).exists():
            _write_digests(finished, SEAL, [name for name in _files(finished) if "/" not in name])
    except Exception as error:
        raise _unwritten(checkpoints, error) from error


def _unwritten(checkpoints: Checkpoints, error: Exception) -> RunError:
    folder = checkpoints.manager.directory
    good = next((s for s in steps(folder) if damage(folder / str(s), checkpoints.items) is None), None)
    last = "there is no earlier one" if good is None else f"the last good one is step {good}"
    reason = (
        _brief(error) if isinstance(error, OSError) or "no space left" not in str(error).lower() else "no space left on the device"
    )
    return RunError(f"checkpoint {folder}/{checkpoints.begun[-1]} could not be written: {reason}; {last}")


@contextlib.contextmanager
def only_one(workdir) -> Iterator[None]:
    """Holds a workdir for the one run that trains in it; the system frees it when that dies. Raises InputError where one does.

    Two at once would take each other's unfinished checkpoints for leftovers. gs:// and file systems without locks go unheld.
    """
    with contextlib.ExitStack() as stack:
        if "://" not in str(workdir) and meshes.first_process():
            with contextlib.suppress(OSError):  # what cannot be written is told later
                place(workdir).mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(place(workdir) / ".lock", "w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise InputError(
                        f"workdir {workdir} is in use: another train.py trains in it; give another --workdir"
                    ) from None
        yield


def steps(folder: epath.Path) -> list[int]:
    """The steps of the finished checkpoints in a folder, newest first; looks at names only."""
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True) if folder.is_dir() else []


def newest(workdir) -> int | None:
    """The newest finished checkpoint's step, good or not, None where there is none; looks at names only."""
    return next(iter(steps(place(workdir) / FOLDER)), None)


def written(workdir) -> str:
    """The newest finished checkpoint's step and digests, as text: another where it was trained anew; "" where there is none."""
    step = newest(workdir)
    path = place(workdir) / FOLDER / str(step) / DIGESTS
    return f"{step} {path.read_text()}" if step is not None and path.exists() else ""


def damage(checkpoint: epath.Path, items: tuple[str, ...] = ("state", "ema", "meta")) -> str | None:
    """What is wrong with these items of a checkpoint, None where every file has the digest it was written with."""
    if not (checkpoint / DIGESTS).exists():
        return f"half-written: {DIGESTS} is missing"
    try:
        want = {name: value for name, value in _digests(checkpoint, DIGESTS).items() if name.split("/")[0] in items}
        sealed = _digests(checkpoint, SEAL) if (checkpoint / SEAL).exists() else {}
        have = {name for name in _files(checkpoint) if name.split("/")[0] in items or name in sealed}
        odd = sorted((want | sealed).keys() ^ have) + [item for item in items if not any(n.startswith(item + "/") for n in want)]
        if odd:
            return f"{odd[0]} is missing, or was added later"
        for name, digest in (want | sealed).items():
            if _digest(checkpoint / name) != digest:
                return f"{name} is not as it was written"
    except (OSError, ValueError, AttributeError) as error:
        return _brief(error)
    return None


def newest_good(workdir, items: tuple[str, ...] = ("state", "ema", "meta")) -> tuple[int | None, dict[int, str]]:
    """The newest checkpoint without damage, None where there is none, and what is wrong with each one passed over."""
    folder = place(workdir) / FOLDER
    bad: dict[int, str] = {}
    for step in steps(folder):
        problem = damage(folder / str(step), items)
        if problem is None:
            return step, bad
        bad[step] = problem
    return None, bad


def recover(workdir, report: Callable[[str], None]) -> int | None:
    """The step to go on from. Checkpoints with damage are reported and moved to `damaged/`, so that training can write them again.

    Raises InputError where there are finished checkpoints and every one is damaged, and for an imported model's workdir.
    """
    for number in steps(place(workdir) / FOLDER):
        alone = place(workdir) / FOLDER / str(number)
        if not (alone / "state").exists() and damage(alone, ("ema", "meta")) is None:
            raise InputError(f"workdir {workdir} holds an imported model, without a state to go on from; give another --workdir")
    step, bad = newest_good(workdir)
    folder, aside = place(workdir) / FOLDER, place(workdir) / DAMAGED
    if step is None and any(not problem.startswith("half-written") for problem in bad.values()):
        raise InputError(_all_damaged(workdir, bad))
    for number, problem in bad.items():
        aside.mkdir(parents=True, exist_ok=True)
        free = next(aside / name for name in _names(number) if not (aside / name).exists())
        (folder / str(number)).rename(free)
        instead = "there is none before it" if step is None else f"going back to step {step}"
        report(f"checkpoint of step {number} is damaged ({problem}), moved to {free}; {instead}")
    return step


def _names(number: int):
    yield str(number)
    for i in range(1, 1000):
        yield f"{number}-{i}"


def restore(workdir, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
    """The state of that step, with these shapes, dtypes and shardings, on whatever devices these name.

    Raises InputError where the files hold other shapes.
    """
    abstract = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, shardings)
    folder = place(workdir) / FOLDER / str(step)
    state = _restore(folder / "state", abstract._replace(ema={}))
    return state._replace(ema=_restore(folder / "ema", abstract.ema))


def restore_ema(workdir, step: int, abstract: dict[str, Any], folder: str = FOLDER) -> dict[str, Any]:
    """The averaged parameters of that step by name, alone. Raises InputError where they have other shapes."""
    return _restore(place(workdir) / folder / str(step) / "ema", abstract)


def restore_some(workdir, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """`restore_ema` of what `abstract` names alone: other averages, and other collections of one, are not read.

    Raises InputError where an array is not there, or has another shape.
    """
    import orbax.checkpoint as ocp

    def read(item: epath.Path) -> dict[str, Any]:
        places = ocp.checkpoint_utils.construct_restore_args(abstract)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(item, args=ocp.args.PyTreeRestore(abstract, places, partial_restore=True))
        # What is not there Orbax leaves as it was asked for.
        absent = [path for path, leaf in jax.tree_util.tree_leaves_with_path(found) if not isinstance(leaf, jax.Array)]
        if absent or jax.tree.structure(found) != jax.tree.structure(abstract):  # type: ignore[operator]
            raise ValueError(f"{jax.tree_util.keystr(absent[0]) if absent else 'an array'} is missing")
        return found

    return _told(place(workdir) / FOLDER / str(step) / "ema", read)


def _restore(item: epath.Path, abstract: Any) -> Any:
    import orbax.checkpoint as ocp

    def read(item: epath.Path) -> Any:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(item, abstract)

    return _told(item, read)


def _told(item: epath.Path, read: Callable[[epath.Path], Any]) -> Any:
    try:
        return read(item)
    except Exception as error:  # Orbax and TensorStore each raise their own kinds; to the user they are one thing
        raise InputError(f"checkpoint {item.parent} is of another model or optimizer ({_brief(error)})") from error


def restore_meta(
    workdir, step: int | None = None, items: tuple[str, ...] = ("ema", "meta")
) -> tuple[int, ConfigDict, dict[int, str]]:
    """The step and config of a checkpoint (the newest good one), and what is wrong with the newer ones that were passed over.

    Raises InputError where there is none, where every one is damaged, and for a `step` that is not there or damaged.
    """
    folder = place(workdir) / FOLDER
    bad: dict[int, str] = {}
    if not place(workdir).is_dir():
        raise InputError(f"workdir {workdir} is not there")
    if step is None:
        step, bad = newest_good(workdir, items)
        if step is None and bad:
            raise InputError(_all_damaged(workdir, bad))
        if step is None:
            raise InputError(f"{workdir} holds no checkpoint ({folder} is empty or missing); train one there first")
    elif step not in steps(folder):
        held = ", ".join(str(number) for number in steps(folder)) or "none"
        raise InputError(f"{workdir} holds no checkpoint of step={step}; there are: {held}")
    elif problem := damage(folder / str(step), items):
        raise InputError(f"checkpoint {folder}/{step} is damaged ({problem})")
    meta = json.loads((folder / str(step) / "meta" / "metadata").read_text())
    return step, ConfigDict(_tuples(meta["config"])), bad


def read_config(text: str) -> ConfigDict:
    """The config of a text that its `to_json` gave, with tuples where JSON has lists."""
    return ConfigDict(_tuples(json.loads(text)))


def _all_damaged(workdir, bad: dict[int, str]) -> str:
    newest = max(bad)
    return f"no good checkpoint in {place(workdir) / FOLDER}: {newest} is damaged ({bad[newest]}), as are all {len(bad)} there"


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON has it: dicts, lists, numbers and strings."""
    return json.loads(config.to_json())


def _tuples(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _tuples(v) for k, v in tree.items()}
    return tuple(_tuples(v) for v in tree) if isinstance(tree, list) else tree


def _write_digests(checkpoint: epath.Path, file: str, names: list[str]) -> None:
    """Writes the digests of these files, under another name first: they are there whole or not at all."""
    partial = checkpoint / (file + ".partial")
    # No spaces: a flipped bit anywhere in it must show.
    partial.write_text(json.dumps({name: _digest(checkpoint / name) for name in names}, separators=(",", ":")))
    partial.rename(checkpoint / file)


def _digests(checkpoint: epath.Path, file: str) -> dict[str, str]:
    try:
        return dict(json.loads((checkpoint / file).read_text()).items())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read") from error


def _files(checkpoint: epath.Path) -> list[str]:
    found, folders = [], [checkpoint]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            elif not path.name.startswith(SEAL) and not path.name.endswith(".partial"):
                found.append(str(path.relative_to(checkpoint)))
    return sorted(found)


def _digest(path: epath.Path) -> str:
    seen = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            seen.update(chunk)
    return seen.hexdigest()


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
