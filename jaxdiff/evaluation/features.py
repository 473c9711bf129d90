"""Feature networks: images uint8 [B, H, W, C] to the vectors that metrics compare, each with a digest of all that decides them.

Inception-v3 is what FID, sFID, IS and KID are defined with; DINOv2 agrees better with what people see (Stein et al. 2023). For data
that neither suits, such as digits, there are the features of a classifier that this project trained, whose figures are no FID.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import compiling, experiment, models, run, shards
from jaxdiff import mesh as meshes
from jaxdiff.denoiser import network_input
from jaxdiff.errors import InputError
from jaxdiff.interop import files, mapping
from jaxdiff.models.classifier import features as classifier_features
from jaxdiff.models.dino import DINOv2
from jaxdiff.models.inception import Inception

Array = jax.Array
Resize = Callable[[Array], Array]


class Features(NamedTuple):
    """A feature network: `apply(images)`, uint8 [B, H, W, C] -> a dict of float32 arrays [B, ...], compiled once a batch's shape.

    Every network says `pool` [B, D], what distances are taken of. `digest` is a SHA-256 of the weights and of how images are
    brought to them: figures with different ones must not be compared. `apply` raises InputError for images that do not fit.
    """

    name: str
    digest: str
    apply: Callable[[Array], dict[str, Array]]


class Published(NamedTuple):
    """Weights that others published: the file's name, its SHA-256, where it is, and the flag that names a copy of it."""

    file: str
    digest: str
    address: str
    flag: str


INCEPTION = Published(
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights",
    "--inception=FILE",
)
DINOV2 = Published(
    "dinov2_vitl14_pretrain.pth",
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "--dinov2=FILE",
)

SIDE = 299  # of what Inception sees
DINO_SIDE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_NAMES = {384: "dinov2_vits14", 768: "dinov2_vitb14", 1024: "dinov2_vitl14"}


def resize_pytorch(images: Array) -> Array:
    """As pytorch-fid brings images to Inception: bilinear between the centres of pixels, 0 ... 255 to [-1, 1].

    uint8 [B, H, W, C] -> float32 [B, 299, 299, C]. Nothing is smoothed before it is made smaller.
    """
    return _bilinear(images, lambda n: ((np.arange(SIDE) + 0.5) * n / SIDE - 0.5).clip(0, n - 1)) / 127.5 - 1


def resize_tensorflow(images: Array) -> Array:
    """As the graph of 2015 itself does it, and so ADM's evaluator and torch-fidelity: bilinear from corner pixels, (k - 128) / 128.

    uint8 [B, H, W, C] -> float32 [B, 299, 299, C]. The image moves up and left by (H / 299 - 1) / 2 pixels against
    `resize_pytorch`.
    """
    return (_bilinear(images, lambda n: np.arange(SIDE) * n / SIDE) - 128) / 128


def _bilinear(images: Array, at: Callable[[int], np.ndarray]) -> Array:
    """Images at positions `at(n)` of each axis of n pixels; beyond the last pixel its value goes on."""
    x = images.astype(jnp.float32)
    for axis, shape in ((1, (1, SIDE, 1, 1)), (2, (1, 1, SIDE, 1))):
        n, where = x.shape[axis], at(x.shape[axis])
        low = np.floor(where).astype(int)
        below, above = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, n - 1), axis)
        x = below + (above - below) * jnp.asarray(where - low, jnp.float32).reshape(shape)
    return x


def resize_pillow(images: Array) -> Array:
    """As dgm-eval brings images to DINOv2: Pillow's bicubic, which smooths, and whole numbers after each axis; then standardised.

    uint8 [B, H, W, 3] -> float32 [B, 224, 224, 3].
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):  # Pillow's order
        shape = (*x.shape[:axis], DINO_SIDE, *x.shape[axis + 1 :])
        x = jnp.floor(jnp.clip(jax.image.resize(x, shape, "cubic"), 0, 255) + 0.5)
    mean, std = (jnp.asarray(a, jnp.float32)[None, None, None] for a in (IMAGENET_MEAN, IMAGENET_STD))
    return (x / 255 - mean) / std


def inception(path: str | Path | None, resize: Resize = resize_pytorch) -> Features:
    """Inception-v3's features (`models.inception.Inception`) with the weights of a file in the layout of pytorch-fid's.

    `pool`, `spatial`, `logits`, `logits_unbiased`. Raises InputError where there is no such file, or it holds other tensors.
    """
    state = {name: a for name, a in _read(path, INCEPTION).items() if not name.endswith(".num_batches_tracked")}
    model = Inception()
    params = _load(path, model, SIDE, state, ("AuxLogits.",))
    made = _features("inception", model, resize, params)
    # Figures by the two resizes are not to be compared, and a digest does not say why.
    return made if resize is resize_pytorch else made._replace(name=f"inception, {getattr(resize, '__name__', repr(resize))}")


def dinov2(path: str | Path | None, resize: Resize = resize_pillow) -> Features:
    """DINOv2's class token as `pool`, of ViT-S/14, B/14 or L/14, whichever the file holds.

    The file is laid out as Meta's state dict or as Hugging Face's Dinov2Model. Raises InputError where there is no such file, or it
    holds other tensors, as one with registers does. Source: Stein et al. 2023, whose FD is of ViT-L/14.
    """
    state = _as_published(path, _read(path, DINOV2))
    shape = state["pos_embed"].shape if "pos_embed" in state else None
    if shape is None or len(shape) != 3 or math.isqrt(shape[1] - 1) ** 2 != shape[1] - 1 or shape[2] % 64:
        is_there = "is missing" if shape is None else f"has shape {shape}"
        raise InputError(f"{path}: tensor pos_embed {is_there}; DINOv2's has (1, 1 + n * n, dim), dim a multiple of 64")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    model = DINOv2(shape[2], depth, shape[2] // 64, grid=math.isqrt(shape[1] - 1))
    params = _load(path, model, DINO_SIDE, state, ("mask_token",))
    return _features(DINO_NAMES.get(shape[2], f"dinov2_vit{shape[2]}"), model, resize, params)


def classifier(workdir: str | Path) -> Features:
    """What the logits of a classifier that this project trained are a linear map of, as `pool`, and its `logits`.

    It is shown images without noise, at the highest logsnr it was trained at. Raises InputError as `jaxdiff.load_classifier`.
    """
    trained = run.load_classifier(workdir)
    built, model = experiment.build(trained.config), models.build(trained.config.model)
    level = built.schedule(trained.params)(jnp.asarray(built.draw.first, jnp.float32))

    @compiling.jit
    def net(params: Any, images: Array) -> dict[str, Array]:
        x0 = built.codec.encode(jax.random.key(0), images)
        with jax.default_matmul_precision("highest"):
            pool, logits = classifier_features(model, params, *network_input(level.alpha * x0, level, built.data_std))
        return {"pool": pool, "logits": logits}

    def apply(images: Array) -> dict[str, Array]:
        if _kind(images) != ("uint8", *built.shape):
            raise _refused(images, f"{list(built.shape)}, as this classifier was trained on")
        return net(trained.params, images)

    config = trained.config
    seen = [config.model.to_dict(), config.data.codec, built.data_std, *(float(a) for a in level)]
    return Features("classifier", _digest(seen, trained.params), apply)


def _features(name: str, model: Any, resize: Resize, params: Any) -> Features:
    """The features of a network of photographs, compiled apart from the resize: images of all sizes share one network."""
    digest = _digest([name, getattr(resize, "__name__", repr(resize))], params)
    params = jax.device_put(params, meshes.replicated(meshes.make_mesh((-1, 1))))
    prepare = jax.jit(functools.partial(_coloured, resize))

    def apply(images: Array) -> dict[str, Array]:
        dtype, *shape = _kind(images)
        if dtype != "uint8" or len(shape) != 3 or shape[-1] not in (1, 3):
            raise _refused(images, "[H, W, 1] or [H, W, 3]")
        return _run(model, params, prepare(images))

    return Features(name, digest, apply)


def _coloured(resize: Resize, images: Array) -> Array:
    """Images resized, grey ones repeated to three channels."""
    return resize(jnp.broadcast_to(images, (*images.shape[:3], 3)))


@functools.partial(compiling.jit, static_argnums=0)
def _run(model: Any, params: Any, x: Array) -> dict[str, Array]:
    # Accelerators multiply float32 with fewer digits unless told otherwise, and a figure would depend on where it was measured.
    with jax.default_matmul_precision("highest"):
        return model.apply(params, x)


def _kind(images: Any) -> tuple:
    """(dtype, *shape of one image)."""
    return str(getattr(images, "dtype", type(images).__name__)), *np.shape(images)[1:]


def _refused(images: Any, allowed: str) -> InputError:
    dtype, *shape = _kind(images)
    return InputError(
        f"images of type {dtype} and shape {shape} have no features here; allowed: uint8, 0 to 255, of shape {allowed}"
    )


def _digest(seen: list, params: Any) -> str:
    return hashlib.sha256(json.dumps([*seen, shards.digest(params)]).encode()).hexdigest()


def _read(path: str | Path | None, wanted: Published) -> dict[str, np.ndarray]:
    """The tensors of a file. Raises InputError that says where the published one is to be had."""
    if path is None or not Path(path).is_file():
        missing = "no file is given" if path is None else f"{path} is not there"
        of = f"{wanted.file} (SHA-256 {wanted.digest}) from {wanted.address}"
        raise InputError(f"{wanted.flag}: {missing}; wanted is a copy of {of}, or the same tensors as .safetensors or .npz")
    return files.read(path)


def doubt(path: str | Path, wanted: Published) -> str:
    """A line where a file is not, byte for byte, the published one: figures then hold for its own tensors; else ""."""
    with Path(path).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == wanted.digest:
        return ""
    other = f"SHA-256 {found[:12]}, not {wanted.digest[:12]}"
    return f"{path} is not {wanted.file} itself ({other}): figures are comparable if its tensors are the same"


def _load(path: Any, model: Any, side: int, state: Mapping[str, np.ndarray], ignored: Sequence[str]) -> Any:
    """The parameters of a network of images of `side` pixels out of a state dict. Raises InputError naming file and tensor."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    try:
        return mapping.load(shapes, rows(shapes), state, ignored)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def rows(shapes: Any) -> list[mapping.Row]:
    """The rows of a network whose modules are called as in its PyTorch state dict."""
    called = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    made = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
        *modules, name = (entry.key for entry in path)
        layout = {4: mapping.conv, 2: mapping.dense}[leaf.ndim] if name == "kernel" else mapping.same
        made.append(mapping.Row("/".join([*modules, name]), ".".join([*modules, called.get(name, name)]), layout))
    return made


# Hugging Face's name of each tensor, or its part, and the published one.
RENAMED = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.": "",
    "encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm.": "norm.",
}


def _as_published(path: Any, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DINOv2's tensors under their published names, where queries, keys and values are one map."""
    for theirs, published in RENAMED.items():
        state = {name.replace(theirs, published): a for name, a in state.items()}
    for name in [name for name in state if ".attention.attention.query." in name]:
        three = [name.replace("query", part) for part in ("query", "key", "value")]
        if lost := [each for each in three if each not in state]:
            raise InputError(f"{path}: tensor {lost[0]} is missing: the file is not of this architecture")
        if len({state[each].shape for each in three}) > 1:
            raise InputError(f"{path}: tensors {', '.join(three)} differ in shape: the file is not of this architecture")
        state[name.replace("attention.attention.query", "attn.qkv")] = np.concatenate([state.pop(each) for each in three])
    return state
