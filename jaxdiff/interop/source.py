"""What a SOURCE of published weights is, and so which family reads it."""

from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.interop import files, folder, unet2d
from jaxdiff.interop.workdir import Imported

ALLOWED = "a folder that diffusers wrote a UNet2DModel to, or its DDPMPipeline, DDIMPipeline or PNDMPipeline"


def read(source: str | Path, null_class: bool = False) -> Imported:
    """The model in a folder of diffusers', or in a file of weights. Raises InputError where it is of no family that is read.

    With `null_class` the last class of a class-conditional UNet2DModel is its null label.
    """
    path = Path(source)
    if not path.exists():
        raise InputError(f"SOURCE={path} is not there; allowed: {ALLOWED}")
    kind = _class_of(path) if path.is_dir() else _layout_of(path)
    if kind in ("UNet2DModel", "DDPMPipeline", "DDIMPipeline", "PNDMPipeline"):
        return unet2d.read(path, null_class)
    raise InputError(f"SOURCE={path} ({kind}) is of a family that is not read; allowed: {ALLOWED}")


def _class_of(place: Path) -> str:
    """The class that a folder's model_index.json (a pipeline's) or config.json (a model's) names."""
    for name in ("model_index.json", "config.json"):
        if (place / name).is_file():
            return str(folder.read_json(place / name).get("_class_name"))
    return "with neither model_index.json nor config.json"


def _layout_of(file: Path) -> str:
    """Whose names the tensors of a file have."""
    names = files.read(file)
    if "time_embedding.linear_1.weight" in names:
        return "a file of diffusers' without its config.json; give the folder"
    return f"a file whose first tensor is {next(iter(names), 'missing')}"
