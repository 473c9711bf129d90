"""Folders of images: order, classes, splits, sizes, and what is said about wrong ones."""

import os

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxdiff.data import load, of_config
from jaxdiff.data.images import fit
from jaxdiff.errors import InputError


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


def plain(value, height=4, width=4):
    return np.full((height, width, 3), value, np.uint8)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "images"


@pytest.fixture
def read(folder, tmp_path):
    return lambda split="train", size=None: load("folder", split, folder, tmp_path / "cache", size)


def test_a_flat_folder_has_sorted_images_and_no_labels(folder, read):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3))
    for name, image in zip(("c.png", "a.PNG", "b.bmp"), pixels, strict=True):
        save(folder / name, image)
    (folder / "notes.txt").write_text("not an image")
    save(folder / ".hidden.png", plain(9))
    data = read()
    assert (data.images == pixels[[1, 2, 0]]).all()
    assert data.labels.tolist() == [-1, -1, -1] and data.classes == () and data.name == "folder"
    assert data.labels.dtype == np.int32 and data.images.dtype == np.uint8


def test_subfolders_are_classes(folder, read):
    for name, value in (("dog/1.png", 30), ("cat/2.png", 20), ("cat/deeper/1.png", 10), ("dog/0.png", 25)):
        save(folder / name, plain(value))
    data = read()
    assert data.classes == ("cat", "dog") and data.labels.tolist() == [0, 0, 1, 1]
    assert data.images[:, 0, 0, 0].tolist() == [20, 10, 25, 30]


def test_splits_share_their_class_numbers(folder, read):
    for name, value in (("train/cat/1.png", 1), ("train/dog/1.png", 2), ("test/dog/1.png", 3)):
        save(folder / name, plain(value))
    assert read("train").labels.tolist() == [0, 1]
    assert read("test").labels.tolist() == [1] and read("test").classes == ("cat", "dog")
    with pytest.raises(InputError, match="no split 'validation', only test, train"):
        read("validation")


def test_grey_palette_and_transparent_images_become_rgb(folder, read):
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    save(folder / "a.png", grey)
    Image.fromarray(grey * 16).convert("P").save(folder / "b.png")
    save(folder / "c.png", np.dstack([plain(7), np.full((4, 4), 99)]))
    images = read().images
    assert (images[0] == grey[..., None]).all() and (images[1] == grey[..., None] * 16).all() and (images[2] == 7).all()


def test_jpeg_and_webp_are_read_and_photos_are_turned_upright(folder, read):
    half = plain(0, 16, 16)
    half[:8] = 255
    save(folder / "a.jpg", half, quality=95)
    save(folder / "b.webp", half, lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 3  # orientation: turned by 180 degrees
    save(folder / "c.jpeg", half, quality=95, exif=turned)
    images = read().images.astype(int)
    assert abs(images[0] - half).max() < 30 and (images[1] == half).all() and abs(images[2] - half[::-1]).max() < 30


def test_fit_crops_the_centre_and_keeps_pixels_that_need_no_scaling():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 3), dtype=np.uint8)
    assert (np.asarray(fit(Image.fromarray(pixels), 4)) == pixels[:, 2:6]).all()
    assert (np.asarray(fit(Image.fromarray(pixels.transpose(1, 0, 2)), 4)) == pixels.transpose(1, 0, 2)[2:6]).all()


def test_fit_does_not_alias():
    board = np.indices((1024, 1536)).sum(0) % 2 * 255
    small = np.asarray(fit(Image.fromarray(board.astype(np.uint8)), 16)).astype(int)
    assert small.shape == (16, 16) and abs(small - 127.5).max() < 2


def test_size_brings_images_of_all_shapes_to_a_square(folder, read):
    for name, pixels in (("a.png", plain(10, 50, 70)), ("b.png", plain(20, 90, 31)), ("c.png", plain(30, 5, 5))):
        save(folder / name, pixels)
    images = read(size=8).images
    assert images.shape == (3, 8, 8, 3)
    assert all((image == value).all() for image, value in zip(images, (10, 20, 30), strict=True))


def test_images_of_different_sizes_without_size(folder, read):
    save(folder / "a.png", plain(1))
    save(folder / "b.png", plain(1, height=5, width=7))
    check(read, r"a\.png is 4x4 but .*b\.png is 7x5: give size=")


def check(call, words):
    with pytest.raises(InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_large_image_is_decoded_like_a_small_one(folder, read):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 400, 400, 3))  # large enough for the threads
    save(folder / "a.png", pixels[0])
    save(folder / "b.png", pixels[1])
    assert (read().images == pixels).all()


def test_wrong_folders(folder, read, tmp_path):
    check(lambda: load("folder"), "needs data_dir")
    check(read, "images is not a folder")
    folder.mkdir()
    check(read, r"images holds no image \(png, jpg, jpeg, webp, bmp\)")
    save(folder / "a.png", plain(1))
    check(lambda: read("test"), "no split 'test', only train")
    save(folder / "cat" / "b.png", plain(1))
    check(read, r"both beside \(a\.png\) and inside \(cat/b\.png\)")


def test_two_folders_with_equal_names_sizes_and_times_are_not_one(tmp_path):
    for value in (1, 2):
        path = tmp_path / str(value) / "a.bmp"  # of one length, whatever the pixels
        save(path, plain(value))
        os.utime(path, ns=(0, 0))
        assert (load("folder", "train", path.parent, tmp_path / "cache").images == value).all()
    (tmp_path / "link").symlink_to(tmp_path / "1")
    assert (load("folder", "train", tmp_path / "link", tmp_path / "cache").images == 1).all()
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 2, "another name of the same folder is the same folder"


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header", "sixteen bits", "dangling"])
def test_an_unreadable_image_is_named(folder, read, damage):
    save(folder / "a.png", plain(1))
    bad = folder / "b.png"
    save(bad, np.random.default_rng(0).integers(0, 256, (30, 30, 3)))
    whole = bad.read_bytes()
    if damage == "dangling":
        bad.unlink()
        bad.symlink_to(folder / "nowhere.png")
    elif damage == "sixteen bits":
        Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(bad)
    else:
        bad.write_bytes({"empty": b"", "text": b"hello", "cut": whole[:900], "header": whole[:20]}[damage])
    check(read, r"b\.png is not a readable image")
    assert not list(folder.parent.glob("cache/*.partial"))


def test_a_border_is_black_and_lies_around_what_was_fitted(folder, tmp_path):
    image = np.random.default_rng(0).integers(1, 256, (6, 4, 3))
    save(folder / "a.png", image)
    plain_data, padded, scaled = (
        load("folder", "train", folder, tmp_path / "cache", size, pad) for size, pad in ((None, 0), (None, 2), (8, 1))
    )
    assert padded.images.shape == (1, 10, 8, 3) and isinstance(padded.images, np.memmap)
    np.testing.assert_array_equal(padded.images[0, 2:-2, 2:-2], plain_data.images[0])
    assert padded.images.sum() == plain_data.images.sum()  # all else is black
    assert scaled.images.shape == (1, 10, 10, 3)
    np.testing.assert_array_equal(scaled.images[0, 1:-1, 1:-1], load("folder", "train", folder, tmp_path / "cache", 8).images[0])
    digits = load("digits", pad=3)
    assert digits.images.shape == (1498, 14, 14, 1)
    np.testing.assert_array_equal(np.pad(load("digits").images, ((0, 0), (3, 3), (3, 3), (0, 0))), digits.images)
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(InputError, match="is not a number of pixels: it is whole, and at least 0"):
            load("digits", pad=wrong)


def test_the_datas_config_names_everything_that_load_takes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save(folder / "train" / "a.png", plain(7))
    save(folder / "other" / "a.png", plain(9, 6, 6))
    config = ConfigDict({"data_dir": str(folder / "train"), "data": {"name": "folder", "split": "train", "size": 8, "pad": 1}})
    assert of_config(config).images.shape == (1, 10, 10, 3)
    del config.data.pad
    config.data.size = 0
    assert of_config(config).images.shape == (1, 4, 4, 3)
    assert of_config(config, data_dir=folder / "other").images.shape == (1, 6, 6, 3)
    config.data.name = "digits"
    assert len(of_config(config, "test").images) == 299
