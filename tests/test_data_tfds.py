"""Prepared TFDS sets, read without TensorFlow; small ones are written here."""

import hashlib
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data import load
from jaxdiff.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")
features = tfds.features

# Raw Philox words, because NumPy keeps them the same in every version.
PIXELS = np.random.Philox(0).random_raw(24 * 6 * 5 * 3).astype(np.uint8).reshape(24, 6, 5, 3)


def write(data_dir, spec, examples, name="animals", version="1.2.3", supervised=None):
    """Prepare a set whose split "train" has `examples` and "test" the first of them."""

    class Set(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            every = features.FeaturesDict(spec)
            return tfds.core.DatasetInfo(builder=self, features=every, supervised_keys=supervised)

        def _split_generators(self, _):
            return {"train": enumerate(examples), "test": enumerate(examples[:1])}

        def _generate_examples(self):
            raise NotImplementedError

    Set.name = name
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    Set(data_dir=data_dir, file_format="array_record").download_and_prepare(
        download_dir=data_dir.parent / "downloads", download_config=config
    )


def animals(count=24):
    rows = range(count)
    return [{"picture": Image.fromarray(PIXELS[i]), "kind": i % 3, "note": f"{i}", "other": i % 2} for i in rows]


ANIMALS = {
    "note": features.Text(),
    "kind": features.ClassLabel(names=["cat", "dog", "emu"]),
    "other": features.ClassLabel(num_classes=2),
    "picture": features.Image(shape=(6, 5, 3)),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("prepared") / "data"
    write(data_dir, ANIMALS, animals())
    return data_dir


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture
def read(tmp_path):
    return lambda name, data_dir, split="train", size=None: load(name, split, data_dir, tmp_path / "cache", size)


def refused(call, words):
    with pytest.raises(InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_images_and_labels_come_back_exactly(prepared, read):
    data = read("animals", prepared)
    assert sorted(digest(image) for image in data.images) == sorted(digest(image) for image in PIXELS)
    order = [next(i for i in range(24) if (PIXELS[i] == image).all()) for image in data.images]
    assert data.labels.tolist() == [i % 3 for i in order] and order != sorted(order)
    assert data.classes == ("cat", "dog", "emu") and data.name == "animals" and data.labels.dtype == np.int32
    assert (read("animals:1.2.3", prepared, "test").images == PIXELS[:1]).all()


def digest(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def test_decoding_is_lossless_and_keeps_its_digests(prepared, read):
    found = sorted(digest(image) for image in read("animals", prepared).images)
    assert hashlib.sha256("".join(found).encode()).hexdigest() == (
        "4291cef6c894aac14b7c94d0eb920b01e48ac7f45d88e2b7f53dd2fc144a068f"
    )
    assert digest(read("animals", prepared, "test").images[0]) == (
        "cdb13c0fabd41c56df023c6c2178ac1e28bc0fe216082a255311f36e31f0d933"
    )


def test_tensorflow_is_never_imported(prepared, read):
    read("animals", prepared)
    assert "tensorflow" not in sys.modules


def test_size_scales_and_crops(prepared, read):
    assert (read("animals", prepared, "test", size=5).images == PIXELS[:1, :5]).all()  # 6x5: one row is cropped
    assert read("animals", prepared, size=3).images.shape == (24, 3, 3, 3)


def test_the_newest_version_unless_one_is_given(copy, read):
    write(copy, ANIMALS, animals(5), version="1.10.0")
    assert len(read("animals", copy).labels) == 5 and len(read("animals:1.2.3", copy).labels) == 24
    refused(lambda: read("animals:2.0.0", copy), "which holds animals in version 1.2.3, 1.10.0")


def test_grey_images_and_no_labels(read, tmp_path):
    spec = {"image": features.Image(shape=(6, 5, 1))}
    write(tmp_path / "data", spec, [{"image": Image.fromarray(PIXELS[i, ..., 0])} for i in range(3)], "grey")
    data = read("grey", tmp_path / "data", "test")
    assert (data.images == PIXELS[:1, ..., :1]).all() and data.labels.tolist() == [-1] and data.classes == ()


def test_the_supervised_keys_decide_between_two_labels(read, tmp_path):
    write(tmp_path / "data", ANIMALS, animals(), supervised=("picture", "other"))
    data = read("animals", tmp_path / "data")
    order = [next(i for i in range(24) if (PIXELS[i] == image).all()) for image in data.images]
    assert data.labels.tolist() == [i % 2 for i in order] and data.classes == ("0", "1")


def test_configurations(copy, read):
    shutil.move(copy / "animals" / "1.2.3", copy / "animals" / "small" / "1.2.3")
    assert len(read("animals/small:1.2.3", copy).labels) == len(read("animals/small", copy).labels) == 24
    refused(lambda: read("animals", copy), "animals has configurations, name one of them: animals/small")


def test_a_replaced_record_file_is_decoded_again(copy, read):
    before = read("animals", copy)
    shutil.rmtree(copy)
    write(copy, ANIMALS, animals(7))
    assert len(before.labels) == 24 and len(read("animals", copy).labels) == 7


def test_a_set_that_is_not_there(copy, read, tmp_path):
    how = r'pip install "jaxdiff\[tf\]" and tfds build {} --file_format=array_record --data_dir=.*data'
    refused(lambda: read("animls", copy), "which holds animals; did you mean 'animals'")
    refused(lambda: read("celeb_a", copy), "celeb_a is not in .*data, which holds animals; .*" + how.format("celeb_a"))
    refused(lambda: read("cifar10", copy), "python -m jaxdiff.data.prepare cifar10 --data_dir=.*data")
    for name, near in (
        ("digit", "digits"),
        ("foldr", "folder"),
        ("cifar-10", "cifar10"),
        ("mnits", "mnist"),
        ("animls", "animals"),
    ):
        refused(lambda name=name: read(name, copy), f"{name} is not in .*; did you mean '{near}'")
        if near != "animals":
            refused(
                lambda name=name: read(name, tmp_path / "no"), f"{name} is not prepared; did you mean '{near}'.; data_dir .*no "
            )
    refused(lambda: read("mnist", tmp_path / "no"), "data_dir .*no does not exist; .*jaxdiff.data.prepare mnist")
    refused(lambda: read("../data/animals", copy), "is not the name of a set")
    refused(lambda: read("", copy), "'' is not the name of a set")


def test_the_default_data_dir_is_that_of_tfds(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(load("animals", cache_dir=tmp_path).labels) == 24
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(lambda: load("animals"), f"data_dir {tmp_path}/tensorflow_datasets does not exist")


def test_a_split_that_is_not_there(prepared, read):
    refused(lambda: read("animals", prepared, "tain"), "animals has no split 'tain', only .*did you mean 'train'")


def edit(directory, file, change):
    path = directory / "animals" / "1.2.3" / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_other_file_formats(copy, read):
    edit(copy, "dataset_info.json", lambda info: info | {"fileFormat": "tfrecord"})
    refused(
        lambda: read("animals", copy),
        "holds tfrecord files, and only array_record can be read; to get it: pip install .* "
        "tfds build animals --file_format=array_record --data_dir=ANOTHER_DIR, then give that data_dir",
    )
    edit(copy, "dataset_info.json", lambda info: {k: v for k, v in info.items() if k != "fileFormat"})
    refused(lambda: read("animals", copy), "holds tfrecord files")


def test_another_format_of_a_set_with_configurations_or_of_a_recipe_names_its_own_command(copy, read):
    edit(copy, "dataset_info.json", lambda info: info | {"fileFormat": "tfrecord"})
    (copy / "cifar10").mkdir()
    shutil.copytree(copy / "animals" / "1.2.3", copy / "cifar10" / "1.2.3")
    refused(lambda: read("cifar10", copy), "to get it: python -m jaxdiff.data.prepare cifar10 --data_dir=ANOTHER_DIR, then")
    shutil.move(copy / "animals" / "1.2.3", copy / "animals" / "small" / "1.2.3")
    refused(lambda: read("animals/small", copy), "tfds build animals/small --file_format=array_record")


@pytest.mark.parametrize(
    "spec, words",
    [
        ({"number": features.Scalar(np.int64)}, r"tables has no image feature, only number \(Scalar\)"),
        ({"number": features.Image(shape=(2, 2, 1), dtype=np.uint16)}, "only uint8 images"),
    ],
)
def test_a_set_without_a_usable_image(read, tmp_path, spec, words):
    example = 3 if "Scalar" in words else Image.fromarray(np.zeros((2, 2), np.uint16))
    write(tmp_path / "data", spec, [{"number": example}], "tables")
    refused(lambda: read("tables", tmp_path / "data"), words)


def test_missing_and_damaged_files(copy, read):
    name = next((copy / "animals" / "1.2.3").glob("*train*"))
    content = name.read_bytes()
    # Cut to half, array_record gives empty records instead of an error; a changed byte does not match its hash.
    flipped = content[:1338] + bytes([content[1338] ^ 255]) + content[1339:]
    for damaged in (content[: len(content) // 2], content[:-1000], content[:999], flipped):
        name.write_bytes(damaged)
        refused(lambda: read("animals", copy), r"cannot read animals in .*1\.2\.3: copy or prepare it again")
    name.unlink()
    refused(lambda: read("animals", copy), f"{name} is missing: copy or prepare animals again")
    (copy / "animals" / "1.2.3" / "features.json").write_text("{}")
    refused(lambda: read("animals", copy), "is not a readable TFDS set")
    (copy / "animals" / "1.2.3" / "dataset_info.json").write_text("{")
    refused(lambda: read("animals", copy), "dataset_info.json is not readable")
