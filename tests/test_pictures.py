import numpy as np
import pytest
from PIL import Image

from jaxdiff import pictures
from jaxdiff.errors import InputError


def test_a_picture_comes_back_and_leaves_no_half_of_it(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    pictures.save(tmp_path / "deep" / "a.png", picture)
    assert (np.asarray(Image.open(tmp_path / "deep" / "a.png")) == picture).all()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_a_directory_is_no_place_for_a_picture(tmp_path):
    (tmp_path / "grid.png").mkdir()
    with pytest.raises(InputError, match=r"grid\.png: it is a directory") as error:
        pictures.save(tmp_path / "grid.png", np.zeros((4, 4, 3), np.uint8))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def stored(path, array):
    Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize("dtype, name", [(np.uint16, "a.png"), (np.int32, "a.tiff"), (np.float32, "a.tiff")])
def test_a_picture_of_more_than_8_bits_is_refused_not_saturated(tmp_path, dtype, name):
    path = stored(tmp_path / name, np.arange(16, dtype=dtype).reshape(4, 4) * 100)
    for read in (lambda: pictures.load(path, (4, 4, 1)), lambda: pictures.load_mask(path, (4, 4))):
        with pytest.raises(InputError, match="more than 8 bits a channel") as error:
            read()
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    np.testing.assert_array_equal(pictures.load(stored(tmp_path / "b.png", grey), (4, 4, 1))[..., 0], grey)
    np.testing.assert_array_equal(pictures.load(tmp_path / "b.png", (4, 4, 3)), np.repeat(grey[..., None], 3, -1))


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_a_damaged_picture_is_one_line(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match="is not a picture that can be read"):
        pictures.load(tmp_path / "a.png", (4, 4, 1))


def test_a_mask_is_black_and_white(tmp_path):
    white = np.zeros((4, 6), bool)
    white[1:3, 2:] = True
    grey = np.where(white, 255, 0).astype(np.uint8)
    kinds = [grey, np.repeat(grey[..., None], 3, -1), white]
    kinds += [np.concatenate([kinds[1], np.full((4, 6, 1), 255, np.uint8)], -1)]
    for i, array in enumerate(kinds):
        got = pictures.load_mask(stored(tmp_path / f"{i}.png", array), (4, 6))
        assert got.dtype == bool and (got == white).all(), i
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    assert (pictures.load_mask(tmp_path / "palette.png", (4, 6)) == white).all()


def test_a_mask_of_grey_or_with_transparency_is_refused(tmp_path):
    soft = np.zeros((4, 4), np.uint8)
    soft[0] = 0, 1, 127, 255
    with pytest.raises(InputError, match=r"has pixels of value 1, 127; a mask is black \(0\) and white \(255\)"):
        pictures.load_mask(stored(tmp_path / "soft.png", soft), (4, 4))
    ramp = np.arange(16, dtype=np.uint8).reshape(4, 4)
    with pytest.raises(InputError, match=r"of value 1, 2, 3, \.\.\.;"):
        pictures.load_mask(stored(tmp_path / "ramp.png", ramp), (4, 4))
    clear = np.full((4, 4, 4), 255, np.uint8)
    clear[0, :3, 3] = 0, 128, 254
    with pytest.raises(InputError, match="is transparent at 3 pixels"):
        pictures.load_mask(stored(tmp_path / "clear.png", clear), (4, 4))
    # A colour that is transparent by name.
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "named.png", transparency=0)
    with pytest.raises(InputError, match="is transparent at 16 pixels"):
        pictures.load_mask(tmp_path / "named.png", (4, 4))
    with pytest.raises(InputError, match="has 4x4 pixels; this model's images have 5x4"):
        pictures.load_mask(tmp_path / "named.png", (4, 5))
