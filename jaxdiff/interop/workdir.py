"""A workdir of parameters that were trained elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxdiff.errors import InputError
from jaxdiff.training import checkpoint

# The one average that an imported workdir has.
EMA = 0.0
# Where in a workdir its autoencoder is, as data.codec="autoencoder('first_stage')" says.
FIRST_STAGE = "first_stage"


class Imported(NamedTuple):
    """A published model as read: its family, its config and parameters here, the files they are from, and what is to be known.

    `first_stage` is the config and the parameters of the autoencoder whose latents it diffuses, where they came along.
    """

    family: str
    config: ConfigDict
    params: Any
    weights: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    first_stage: tuple[ConfigDict, Any] | None = None


def describe(
    shape: tuple[int, ...], model: Mapping[str, Any], process: Mapping[str, Any], sampling: Mapping[str, Any], codec: str = "pixels"
) -> ConfigDict:
    """The config of a model that was trained elsewhere, all keys in it; of its training nothing but the groups given is known."""
    return ConfigDict(
        dict(
            seed=0,
            steps=0,
            batch_size=128,
            data_dir="",
            data=dict(name="folder", split="train", shape=shape, size=_square(shape), codec=codec, flip=False, augment=""),
            model=dict(model),
            process=dict(process),
            optimizer=dict(name="adam", learning_rate=1e-4, schedule="constant_schedule(1.0)", clip=0.0),
            training=dict(
                ema=(EMA,),
                log_every=100,
                sample_every=5000,
                save_every=5000,
                keep=3,
                keep_every=0,
                snapshot_every=0,
                mesh=(-1, 1),
                accumulate=1,
                nonfinite="stop",
            ),
            sampling=dict(ema=EMA, **sampling),
        )
    )


def _square(shape: tuple[int, ...]) -> int:
    """The size that images are scaled to, in pixels; 0, as they are, for another shape."""
    return shape[0] if shape[0] == shape[1] else 0


def write_imported(workdir: str | Path, imported: Imported) -> None:
    """`write` of a model as read, its first stage before it. Raises InputError as `vacant` does."""
    vacant(workdir)
    if imported.first_stage is not None:
        write(Path(workdir) / FIRST_STAGE, *imported.first_stage)
    write(workdir, imported.config, imported.params)


def write(workdir: str | Path, config: ConfigDict, params: Any) -> None:
    """Writes a workdir that `jaxdiff.load` takes: a checkpoint of step 0 whose one average is `params`.

    Raises InputError as `vacant` does, and where the folder cannot be made.
    """
    vacant(workdir)
    try:
        checkpoint.place(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error.strerror or error}") from error
    with checkpoint.imported(workdir) as checkpoints:
        checkpoint.save_snapshot(checkpoints, 0, {str(EMA): params}, config)


def vacant(workdir: str | Path) -> None:
    """Raises InputError where there are checkpoints already, for nothing trained is ever written over, or is a file."""
    if (held := checkpoint.newest(workdir)) is not None:
        raise InputError(f"workdir {workdir} holds a checkpoint already (step {held}); give a new folder")
    if checkpoint.place(workdir).exists() and not checkpoint.place(workdir).is_dir():
        raise InputError(f"workdir {workdir} is a file; give a new folder")
