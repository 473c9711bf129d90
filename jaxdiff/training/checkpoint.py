"""Checkpoints with Orbax: `state`, `ema` and `meta` (the step and the whole config) apart, so that sampling reads the EMA alone.

Orbax writes a checkpoint under another name and renames it when it is complete, so a killed save leaves the one before.
"""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdiff.errors import InputError
from jaxdiff.training.state import TrainState

FOLDER = "checkpoints"


def manager(workdir: str | Path, keep: int = 3):
    """Orbax's manager of a workdir's checkpoints, which keeps the newest `keep`; close it, or use it in a `with`."""
    import orbax.checkpoint as ocp  # slow to import, and sampling from parameters at hand does not need it

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(Path(workdir).absolute() / FOLDER, options=options, item_names=("state", "ema", "meta"))


def save(checkpoints, state: TrainState, config: ConfigDict) -> None:
    """Begins to save the state as its step's checkpoint; the write goes on in the background."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(
        state=ocp.args.StandardSave(_without_ema(state)),
        ema=ocp.args.StandardSave(state.ema),
        meta=ocp.args.JsonSave({"step": int(state.step), "config": plain(config)}),
    )
    if not checkpoints.save(int(state.step), args=args, force=True):
        raise RuntimeError(f"the checkpoint of step {int(state.step)} was not saved")


def newest(workdir: str | Path) -> int | None:
    """The newest finished checkpoint's step, None where there is none; looks at names only."""
    folder = Path(workdir) / FOLDER
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def restore(checkpoints, shapes: TrainState, shardings: TrainState) -> TrainState:
    """The newest state, with these shapes, dtypes and shardings; without shardings another topology could not read it.

    Raises InputError where the files are damaged or hold other shapes.
    """
    import orbax.checkpoint as ocp

    step = checkpoints.latest_step()
    abstract = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, shardings)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_without_ema(abstract)), ema=ocp.args.StandardRestore(abstract.ema))
    items = _guarded(checkpoints.directory, step, lambda: checkpoints.restore(step, args=args))
    return items.state._replace(ema=items.ema)


def restore_meta(workdir: str | Path) -> tuple[int, ConfigDict]:
    """The newest checkpoint's step and config. Raises InputError where there is none, or it is damaged."""
    import json

    workdir = Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"workdir {workdir} is not there")
    step = newest(workdir)
    if step is None:
        raise InputError(f"{workdir} holds no checkpoint ({workdir / FOLDER} is empty or missing); train one there first")
    folder = workdir / FOLDER
    meta = _guarded(folder, step, lambda: json.loads((folder / str(step) / "meta" / "metadata").read_text()))
    return step, _guarded(folder, step, lambda: ConfigDict(_tuples(meta["config"])))


def restore_ema(workdir: str | Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The newest checkpoint's averaged parameters by decay, alone. Raises InputError where they are damaged."""
    import orbax.checkpoint as ocp

    step = newest(workdir)
    with manager(workdir) as checkpoints:
        args = ocp.args.Composite(ema=ocp.args.StandardRestore(abstract))
        return _guarded(checkpoints.directory, step, lambda: checkpoints.restore(step, args=args)).ema


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON has it: dicts, lists, numbers and strings."""
    import json

    return json.loads(config.to_json())


def _tuples(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _tuples(v) for k, v in tree.items()}
    return tuple(_tuples(v) for v in tree) if isinstance(tree, list) else tree


def _without_ema(state: TrainState) -> TrainState:
    return state._replace(ema={})


def _guarded(folder: Any, step: int | None, read) -> Any:
    # Orbax, TensorStore and JSON each raise their own kinds for a damaged file; to the user they are one thing.
    try:
        return read()
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"checkpoint {folder}/{step} is damaged or of another model; delete that folder to use the one before ({reason})"
        ) from error
