"""LPIPS's weights as they are published: VGG-16 of torchvision, and the linear weights that are in the lpips package."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.interop import files, mapping
from jaxdiff.interop.mapping import Layout, Row
from jaxdiff.models.lpips import STAGES, shapes

# The part of VGG that tells the classes apart, which LPIPS does not look at.
IGNORED = ("classifier.",)
# A weight a channel is a convolution by 1x1 to one channel there.
LINEAR = Layout(lambda a: a.reshape(-1), lambda a: a.reshape(1, -1, 1, 1))


def read(vgg_file: str | Path, linear_file: str | Path) -> Any:
    """The params of `models.lpips.lpips`, float32, out of two files, .pth or .safetensors, without torch.

    `vgg_file` is torchvision's vgg16 (`vgg16-397923af.pth`), `linear_file` the lpips package's `weights/v0.1/vgg.pth`. Raises
    InputError that names the file, and the tensor of it that is missing or belongs to nothing.
    """
    return {"params": _read(vgg_file, vgg_rows(), IGNORED) | read_linear(linear_file)}


def read_linear(path: str | Path) -> dict[str, Any]:
    """The linear weights alone, by stage. Raises InputError as `read` does."""
    return _read(path, linear_rows())


def vgg_rows() -> list[Row]:
    """VGG's convolutions by torchvision's names, which count its rectifiers and pools as well."""
    made, place = [], 0
    for stage, (_, convolutions) in enumerate(STAGES):
        for i in range(convolutions):
            made += mapping.module(f"conv{stage + 1}_{i + 1}", f"features.{place}", mapping.conv)
            place += 2
        place += 1
    return made


def linear_rows() -> list[Row]:
    return [Row(f"linear{stage + 1}", f"lin{stage}.model.1.weight", LINEAR) for stage in range(len(STAGES))]


def _read(path: str | Path, rows: Sequence[Row], ignored: Sequence[str] = ()) -> dict[str, Any]:
    state: Mapping[str, np.ndarray] = files.read(path)
    names = {row.ours.split("/")[0] for row in rows}
    wanted = {"params": {name: of for name, of in shapes()["params"].items() if name in names}}
    try:
        return mapping.load(wanted, rows, state, ignored)["params"]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
