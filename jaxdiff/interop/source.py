"""What a SOURCE of published weights is, and so which family reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.errors import InputError
from jaxdiff.interop import autoencoder, dit, files, folder, openai, score_sde, unet2d, unet2d_condition
from jaxdiff.interop.workdir import Imported

ALLOWED = (
    "a folder that diffusers wrote (UNet2DModel, UNet2DConditionModel, AutoencoderKL, VQModel, DiTTransformer2DModel; a DDPM, "
    "DDIM, PNDM, DiT or Stable Diffusion pipeline), or a file of improved-diffusion, guided-diffusion, score_sde (VP, sub-VP), DiT "
    "or a CompVis autoencoder"
)


class Family(NamedTuple):
    """How a family is read, `read(path, **flags) -> Imported`, and which flags it takes."""

    read: Callable[..., Imported]
    flags: tuple[str, ...] = ()


UNETS = Family(unet2d.read, ("null_class",))
CONDITIONED = Family(unet2d_condition.read)
AUTOENCODERS = Family(autoencoder.read, ("image_size",))
TRANSFORMERS = Family(dit.read)
OPENAI = Family(openai.read, openai.FLAGS)
SCORE_SDE = Family(score_sde.read, ("sde", "image_size"))

# By the class that a folder's json names.
FOLDERS = {name: UNETS for name in ("UNet2DModel", "DDPMPipeline", "DDIMPipeline", "PNDMPipeline")}
FOLDERS |= {name: TRANSFORMERS for name in ("DiTTransformer2DModel", "Transformer2DModel", "DiTPipeline")}
FOLDERS |= {name: CONDITIONED for name in ("UNet2DConditionModel", "StableDiffusionPipeline")}
FOLDERS |= dict.fromkeys(autoencoder.CLASSES, AUTOENCODERS)


def read(source: str | Path, **flags: Any) -> Imported:
    """The model in a folder of diffusers', or in a file of weights.

    `flags`, those that are not None, say what the source does not. Raises InputError where it is of no family that is read, and for
    a flag that its family does not take.
    """
    path = Path(source)
    if not (path.is_dir() or path.is_file()):
        raise InputError(f"SOURCE={path} is not there; allowed: {ALLOWED}")
    family = _of_folder(path) if path.is_dir() else _of_file(path)
    given = {name: value for name, value in flags.items() if value is not None}
    for name in given:
        if name not in family.flags:
            takes = ", ".join(f"--{flag}" for flag in family.flags) or "none"
            raise InputError(f"--{name} says nothing of SOURCE={path}; allowed with it: {takes}")
    return family.read(path, **given)


def _of_folder(path: Path) -> Family:
    found = [path / name for name in ("model_index.json", "config.json") if (path / name).is_file()]
    kind = str(folder.read_json(found[0]).get("_class_name")) if found else "neither model_index.json nor config.json"
    if kind not in FOLDERS:
        raise InputError(f"SOURCE={path} ({kind}) is of a family that is not read; allowed: {ALLOWED}")
    return FOLDERS[kind]


def _of_file(path: Path) -> Family:
    if score_sde.is_flax(path):
        return SCORE_SDE
    names = files.read(path)
    if openai.matches(names):
        return OPENAI
    if score_sde.matches(names):
        return SCORE_SDE
    if any(name.endswith("x_embedder.proj.weight") for name in names):
        return TRANSFORMERS
    if any(name.endswith("post_quant_conv.weight") for name in names):
        return AUTOENCODERS
    kind = f"a file whose first tensor is {next(iter(names), 'missing')}"
    if "time_embedding.linear_1.weight" in names or any(name.startswith("transformer_blocks.") for name in names):
        kind = "a file of diffusers' without its config.json; give the folder"
    raise InputError(f"SOURCE={path} ({kind}) is of a family that is not read; allowed: {ALLOWED}")
