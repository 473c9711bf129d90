"""Averages of any width after training, put together from the snapshots of power-function averages in a workdir.

Source: Karras et al. 2024 (EDM2), section 3.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxdiff.errors import InputError
from jaxdiff.training import averages, checkpoint


def reconstruct(workdir, config, abstract: Any, ema: float | str, step: int, use: Sequence[str] | None = None) -> Any:
    """The average "power(std)" at `step`, NumPy arrays, from the snapshots up to there; `abstract` has the parameters' shapes.

    `use` names the stored averages it is put together from, all power averages of config.training.ema unless given.
    Raises InputError where `ema` is not a power average, or the workdir holds no snapshots.
    """
    kept = [str(name) for name in config.training.ema]
    std = averages.width(ema)
    if std is None:
        raise InputError(f"ema={ema!r} was not kept; allowed: {', '.join(kept)}, or power(std) where snapshots were saved")
    every = {name: width for name in kept if (width := averages.width(name)) is not None}
    stored = {name: every[name] for name in use or every}
    counts = [count for count in checkpoint.snapshot_steps(workdir) if count <= step]
    if not counts:
        raise InputError(
            f"ema={ema!r} needs snapshots, and {checkpoint.place(workdir) / checkpoint.SNAPSHOTS} holds none up to step {step}; "
            f'they are saved where config.training.snapshot_every is above 0 and config.training.ema has a "power(0.05)", say'
        )
    weights = averages.weights([(count, width) for count in counts for width in stored.values()], step, std)

    def trees() -> Iterator[Any]:
        for count in counts:
            snapshot = checkpoint.restore_ema(workdir, count, {name: abstract for name in every}, checkpoint.SNAPSHOTS)
            yield from (jax.device_get(snapshot[name]) for name in stored)

    return averages.combine(weights, trees())
