"""A folder of image files as a source."""

import functools
import os
from pathlib import Path

from jaxdiff.data.cache import Item, Source, fingerprint
from jaxdiff.data.images import read_photo
from jaxdiff.errors import InputError, nearest

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def folder_source(split: str, data_dir: str | os.PathLike[str] | None) -> Source:
    """The images (png, jpg, jpeg, webp, bmp) below data_dir, as RGB, in the order of their sorted names.

    Images directly in the folder have no labels; with one subfolder a class, sorted names give the class numbers. Where
    data_dir has a subfolder train or test, its subfolders are the splits, with the same class numbers in all of them;
    otherwise the whole folder is the split "train". Hidden files and folders are left out.

    Raises InputError where the folder, the split or any image in it is missing, or where images lie both beside and
    inside subfolders.
    """
    if data_dir is None:
        raise InputError("the set 'folder' needs data_dir, a folder of images")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise InputError(f"data_dir {root} is not a folder")
    splits = _splits(root)
    if split not in splits:
        raise InputError(f"{root} has no split {split!r}, only {', '.join(splits)}{nearest(split, splits)}")
    names = {part: _image_names(part) for part in splits.values()}
    files = names[splits[split]]
    if not files:
        raise InputError(f"{splits[split]} holds no image ({', '.join(s[1:] for s in _SUFFIXES)})")
    labelled = [name for name in files if "/" in name]
    if labelled and len(labelled) < len(files):
        loose = next(name for name in files if "/" not in name)
        raise InputError(f"{splits[split]} holds images both beside ({loose}) and inside ({labelled[0]}) subfolders")
    # Over all splits, so that a class which one of them lacks does not shift the numbers of the others.
    every = {name.split("/")[0] for part in names.values() for name in part if "/" in name}
    classes = tuple(sorted(every)) if labelled else ()
    return _source(splits[split], split, files, classes)


def _splits(root: Path) -> dict[str, Path]:
    if not any((root / name).is_dir() for name in ("train", "test")):
        return {"train": root}
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def _image_names(root: Path) -> list[str]:
    """Sorted names of the images below root, relative to it, with "/" between their parts."""
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = Path(folder).relative_to(root)
        names += [(prefix / f).as_posix() for f in files if f.lower().endswith(_SUFFIXES) and not f.startswith(".")]
    return sorted(names)


def _source(root: Path, split: str, files: list[str], classes: tuple[str, ...]) -> Source:
    number = {name: index for index, name in enumerate(classes)}

    def items(start: int, stop: int) -> list[Item]:
        return [
            Item(str(root / name), number.get(name.split("/")[0], -1), functools.partial(read_photo, str(root / name)))
            for name in files[start:stop]
        ]

    try:
        stats = [os.stat(root / name) for name in files]
    except OSError as error:
        raise InputError(f"{error.filename} is not a readable image: {error.strerror}") from error
    facts = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(files, stats, strict=True)]
    # And where the folder is: bitmaps of one size, written by one program, may differ in nothing but their pixels.
    place = os.path.realpath(root)
    return Source("folder", "", split, classes, fingerprint([place, facts, classes]), len(files), items)
