"""Download CIFAR-10 or MNIST and prepare it as TFDS does, without TensorFlow.

python -m jaxdiff.data.prepare cifar10 --data_dir=DIR
"""

import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import os
import sys
import tarfile
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxdiff.data.files import lock, move_when_synced, remove, removed_at_the_end
from jaxdiff.data.tfds import default_data_dir, require_array_record
from jaxdiff.errors import InputError, nearest

_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Download(NamedTuple):
    url: str
    size: int  # bytes
    sha256: str  # hexadecimal


class Recipe(NamedTuple):
    """What a set is made from; names, versions, features and example keys are those of the official TFDS sets."""

    name: str
    version: str
    downloads: tuple[Download, ...]
    features: Callable[[Any], dict[str, Any]]  # of the module tfds.features
    examples: Callable[[list[Path], str], Iterator[dict[str, Any]]]  # of the downloaded files and "train" or "test"


def prepare(recipe: Recipe, data_dir: str | os.PathLike[str]) -> Path:
    """Make the set in data_dir/NAME/VERSION, as ArrayRecord, unless it is there; returns that directory.

    Downloads stay in data_dir/downloads, where a file fetched by other means is taken too if its digest is right.

    Raises InputError where a download fails or has the wrong digest, data_dir cannot be written, or has the set in another form.
    """
    root = Path(data_dir).expanduser()
    final = root / recipe.name / recipe.version
    if _is_there(final):  # asked before anything is written: data_dir may be a shared, read-only folder
        return final
    try:
        downloads = root / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that prepares {recipe.name}"
        with lock(downloads / f"{recipe.name}.lock", waiting) as held:
            if _is_there(final):
                return final
            if held:  # so whatever is unfinished was left by a process that died
                for partial in downloads.glob(f"{recipe.name}.*.partial"):
                    remove(partial)
            _make(recipe, downloads, final)
    except OSError as error:
        raise InputError(f"cannot prepare {recipe.name} in {root}: {error}") from error
    print(f"{recipe.name} {recipe.version} is ready in {root}")
    return final


def _is_there(final: Path) -> bool:
    found = (final / "dataset_info.json").exists()
    if found:
        require_array_record(final, final.parent.name)
        print(f"{final.parent.name} {final.name} is already in {final.parent.parent}")
    return found


def _make(recipe: Recipe, downloads: Path, final: Path) -> None:
    unfinished = downloads / f"{recipe.name}.{uuid.uuid4().hex[:8]}.partial"
    with removed_at_the_end(unfinished):
        unfinished.mkdir()
        files = [_fetch(download, downloads, unfinished) for download in recipe.downloads]
        _write(recipe, files, unfinished)
        final.parent.mkdir(exist_ok=True)
        move_when_synced(unfinished / recipe.name / recipe.version, final)


def _fetch(download: Download, downloads: Path, unfinished: Path) -> Path:
    """The downloaded and verified file."""
    name = download.url.rsplit("/", 1)[-1]
    path = downloads / name
    if path.exists():
        if _digest(path) == download.sha256:
            return path
        print(f"{path} has the wrong digest; downloading it again", file=sys.stderr)
        remove(path)
    try:
        with urllib.request.urlopen(download.url, timeout=60) as response, open(unfinished / name, "wb") as file:
            _copy(response, file, download.size, name)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"cannot download {download.url}: {reason}; a copy of the file in {downloads} is taken too") from error
    size, found = (unfinished / name).stat().st_size, _digest(unfinished / name)
    if (size, found) != (download.size, download.sha256):
        raise InputError(
            f"{download.url} is not the file expected, and was removed: "
            f"expected {download.size} bytes with sha256 {download.sha256}, found {size} bytes with sha256 {found}"
        )
    move_when_synced(unfinished / name, path)
    return path


def _copy(response: IO[bytes], file: IO[bytes], size: int, name: str) -> None:
    """Copy with a progress bar, at most one block beyond the expected size: a wrong file must not fill the disk."""
    with tqdm(total=size, desc=name, unit="B", unit_scale=True, file=sys.stderr) as bar:
        while bar.n <= size and (block := response.read(2**16)):
            file.write(block)
            bar.update(len(block))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(recipe: Recipe, files: list[Path], data_dir: Path) -> None:
    import tensorflow_datasets as tfds

    # Unregistered: a second class of the same name would clash in TFDS's registry.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = recipe.name
        VERSION = tfds.core.Version(recipe.version)

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(recipe.features(tfds.features))
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in ("train", "test")}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            # The key decides the shuffled order; TFDS's own sets use the index too.
            yield from enumerate(recipe.examples(files, split))

    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder = Builder(data_dir=data_dir, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # lines about the temporary directory; the bars go to stderr
        builder.download_and_prepare(download_dir=data_dir / "none", download_config=config)


def _cifar10_features(features: Any) -> dict[str, Any]:
    return {
        "id": features.Text(),
        "image": features.Image(shape=(32, 32, 3)),
        "label": features.ClassLabel(names=_CIFAR10_CLASSES),
    }


def _cifar10_examples(files: list[Path], split: str) -> Iterator[dict[str, Any]]:
    """Records of 1 + 3072 bytes: label, then red, green and blue planes (https://www.cs.toronto.edu/~kriz/cifar.html)."""
    from PIL import Image

    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    with tarfile.open(files[0]) as archive:
        found = {Path(member.name).name: archive.extractfile(member) for member in archive if member.isfile()}
        batches = [found[name].read() for name in names]  # type: ignore[union-attr]
    for index, record in enumerate(np.frombuffer(b"".join(batches), np.uint8).reshape(-1, 3073)):
        image = np.ascontiguousarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        # An image and not an array: TFDS would encode an array with TensorFlow.
        yield {"id": f"{split}_{index:05d}", "image": Image.fromarray(image), "label": int(record[0])}


def _mnist_features(features: Any) -> dict[str, Any]:
    return {"image": features.Image(shape=(28, 28, 1)), "label": features.ClassLabel(num_classes=10)}


def _mnist_examples(files: list[Path], split: str) -> Iterator[dict[str, Any]]:
    """IDX files: a header of 16 bytes before the images and of 8 before the labels (yann.lecun.com/exdb/mnist)."""
    from PIL import Image

    images, labels = files[:2] if split == "train" else files[2:]
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    numbers = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    for image, label in zip(pixels, numbers, strict=True):
        yield {"image": Image.fromarray(image), "label": int(label)}


# Sizes and digests: url_checksums/cifar10.txt and url_checksums/mnist.txt of tensorflow_datasets 4.9.10.
CIFAR10 = Recipe(
    "cifar10",
    "3.0.2",
    (
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            170052171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    _cifar10_features,
    _cifar10_examples,
)
MNIST = Recipe(
    "mnist",
    "3.0.1",
    (
        Download(
            _MNIST + "train-images-idx3-ubyte.gz",
            9912422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        Download(
            _MNIST + "train-labels-idx1-ubyte.gz",
            28881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        Download(
            _MNIST + "t10k-images-idx3-ubyte.gz",
            1648877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        Download(
            _MNIST + "t10k-labels-idx1-ubyte.gz",
            4542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    _mnist_features,
    _mnist_examples,
)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line on stderr for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m jaxdiff.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="cifar10 or mnist")
    parser.add_argument("--data_dir", type=Path, default=default_data_dir(), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    recipes = {recipe.name: recipe for recipe in (CIFAR10, MNIST)}
    try:
        if arguments.name not in recipes:
            near = nearest(arguments.name, recipes)
            raise InputError(f"cannot prepare {arguments.name!r}, only {' and '.join(recipes)}{near}")
        prepare(recipes[arguments.name], arguments.data_dir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
