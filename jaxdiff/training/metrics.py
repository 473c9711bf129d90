"""Metrics: one JSON object a line in metrics.jsonl, and the same, with pictures, in TensorBoard."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.training.checkpoint import place
from jaxdiff.training.state import LOGSNR_EDGES


class Writer(NamedTuple):
    """Where a run writes: `scalars(step, {name: number or list})`, `image(step, name, uint8 [H, W, C])`, `close()`."""

    scalars: Callable[[int, dict[str, Any]], None]
    image: Callable[[int, str, np.ndarray], None]
    close: Callable[[], None]


def writer(workdir: str | Path, step: int) -> Writer:
    """The writer of a run that goes on from `step`: what an earlier run wrote of later steps is taken out first."""
    from tensorboardX import SummaryWriter

    path = place(workdir) / "metrics.jsonl"
    # A bucket has no appending: there the lines are kept, and the file is written anew.
    remote = "://" in str(workdir)
    lines = _until(path, step)
    _replace(path, lines)
    board = SummaryWriter(str(place(workdir) / "tensorboard"), purge_step=step + 1 if step else None)
    local = None if remote else Path(path).open("a", buffering=1)

    def scalars(step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"step": step, **values})
        if local is None:
            lines.append(line)
            _replace(path, lines)
        else:
            local.write(line + "\n")
        for name, value in values.items():
            if not isinstance(value, list):
                board.add_scalar(name, value, step)

    def image(step: int, name: str, picture: np.ndarray) -> None:
        board.add_image(name, picture, step, dataformats="HWC")

    def close() -> None:
        if local is not None:
            local.close()
        board.close()

    return Writer(scalars, image, close)


def silent() -> Writer:
    """A writer that writes nothing, for the processes that are not the first."""
    return Writer(lambda step, values: None, lambda step, name, picture: None, lambda: None)


def summary(told: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """One row of metrics from those of several steps: means, the number of skipped steps, the loss by noise level.

    "loss_by_logsnr", where steps told the noise level, has a number for each bin of LOGSNR_EDGES, None where no example fell. Steps
    that were skipped count only as "skipped".
    """
    good = [values for values in told if values["finite"]]
    row: dict[str, Any] = {}
    for name in [n for n in told[0] if n not in ("finite", "worst_logsnr", "level_loss", "level_count")]:
        row[name] = float(np.mean([float(values[name]) for values in good])) if good else float("nan")
    if good and "level_loss" in told[0]:
        loss, count = (np.sum([values[name] for values in good], axis=0) for name in ("level_loss", "level_count"))
        row["loss_by_logsnr"] = [float(s / n) if n else None for s, n in zip(loss, count)]
    if len(good) < len(told):
        row["skipped"] = len(told) - len(good)
    return row


def level_table(by_logsnr: list[float | None]) -> str:
    """The loss by noise level as CSV: from, to (logsnr), loss."""
    ends = ["-inf", *(f"{edge:g}" for edge in LOGSNR_EDGES), "inf"]
    rows = [f"{a},{b},{'' if x is None else f'{x:.6g}'}" for a, b, x in zip(ends, ends[1:], by_logsnr)]
    return "\n".join(["logsnr_from,logsnr_to,loss", *rows]) + "\n"


def level_plot(by_logsnr: list[float | None]) -> np.ndarray:
    """The loss by noise level as a picture, uint8 [H, W, 3]."""
    from matplotlib.figure import Figure

    middles = [LOGSNR_EDGES[0] - 1, *(LOGSNR_EDGES + 1)]
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    points = [(m, x) for m, x in zip(middles, by_logsnr) if x is not None]
    axes.plot(*zip(*points), marker="o") if points else None
    axes.set(xlabel="logsnr (noise on the left, data on the right)", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _until(path, step: int) -> list[str]:
    return [line for line in path.read_text().splitlines() if _step(line) <= step] if path.exists() else []


def _replace(path, lines: list[str]) -> None:
    temporary = path.parent / (path.name + ".partial")
    temporary.write_text("".join(line + "\n" for line in lines))
    temporary.replace(path)


def _step(line: str) -> float:
    # A line cut short by a kill is dropped.
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
