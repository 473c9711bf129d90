"""Metrics: one JSON object a line in metrics.jsonl, and the same, with pictures, in TensorBoard."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Writer(NamedTuple):
    """Where a run writes: `scalars(step, {name: number})`, `image(step, name, uint8 [H, W, C])`, `close()`."""

    scalars: Callable[[int, dict[str, float]], None]
    image: Callable[[int, str, np.ndarray], None]
    close: Callable[[], None]


def writer(workdir: str | Path, step: int) -> Writer:
    """The writer of a run that goes on from `step`: what an earlier run wrote of later steps is taken out first."""
    from tensorboardX import SummaryWriter

    path = Path(workdir) / "metrics.jsonl"
    _keep_until(path, step)
    lines = path.open("a", buffering=1)
    board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1 if step else None)

    def scalars(step: int, values: dict[str, float]) -> None:
        lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            board.add_scalar(name, value, step)

    def image(step: int, name: str, picture: np.ndarray) -> None:
        board.add_image(name, picture, step, dataformats="HWC")

    def close() -> None:
        lines.close()
        board.close()

    return Writer(scalars, image, close)


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)


def _step(line: str) -> float:
    # A line cut short by a kill is dropped.
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
