"""Parts of a large request on disk: what is whole is used, what is not is drawn again."""

import json

import numpy as np
import pytest
from etils import epath

from jaxdiff import shards
from jaxdiff.errors import InputError

ASKED = {"seed": 0}


def images(rows):
    return np.stack([np.full((2, 2, 1), i, np.uint8) for i in rows])


@pytest.fixture
def folder(tmp_path):
    """Two of three parts, as a request that was stopped leaves them."""

    def stopped(rows):
        if rows[0] >= 8:
            raise KeyboardInterrupt
        return images(rows)

    made = epath.Path(tmp_path / "out.npz.parts")
    with pytest.raises(KeyboardInterrupt):
        shards.drawn(made, ASKED, 10, 4, stopped)
    return made


def finished(folder, asked=ASKED):
    """The first rows of the parts that had to be drawn, when all are there and right."""
    drawn = []

    def draw(rows):
        drawn.append(int(rows[0]))
        return images(rows)

    got = shards.drawn(folder, asked, 10, 4, draw)
    np.testing.assert_array_equal(got, images(range(10)))
    return drawn


def test_a_request_is_written_once_and_before_its_first_part(folder, tmp_path):
    request = folder / "request.json"
    before = request.stat()
    assert json.loads(request.read_text()) == {"seed": 0, "num": 10, "part": 4}
    assert finished(folder) == [8] and request.stat() == before

    def fails(rows):
        raise RuntimeError

    other = epath.Path(tmp_path / "other")
    with pytest.raises(RuntimeError):
        shards.drawn(other, ASKED, 10, 4, fails)
    assert not other.exists()


@pytest.mark.parametrize("text", ["", '{"seed": 0, "nu', '{"seed": 1, "num": 10, "part": 4}'])
def test_a_folder_without_parts_is_empty_whatever_its_request_says(tmp_path, text):
    folder = epath.Path(tmp_path / "parts")
    folder.mkdir()
    (folder / "request.json").write_text(text)
    (folder / "part_0000000.npy.partial").write_text("half")
    assert not shards.begun(folder) and finished(folder) == [0, 4, 8]
    assert json.loads((folder / "request.json").read_text())["seed"] == 0 and finished(folder) == []


@pytest.mark.parametrize("damage", ["empty", "header cut", "cut", "rows", "text", "zip"])
def test_a_damaged_part_is_drawn_again(folder, damage):
    path = folder / "part_0000004.npy"
    content = path.read_bytes()
    if damage == "rows":
        shards.write(path, images(range(4, 7)))
    else:
        path.write_bytes(
            {"empty": b"", "header cut": content[:20], "cut": content[:-3], "text": b"no", "zip": b"PK\x03\x04"}[damage]
        )
    assert finished(folder) == [4, 8]


@pytest.mark.parametrize("text", ["", '{"seed": 0, "nu', None])
def test_parts_beside_a_damaged_request_are_refused(folder, text):
    request = folder / "request.json"
    request.unlink() if text is None else request.write_text(text)
    with pytest.raises(InputError, match=r"request\.json there, which says of what, is damaged or not there") as error:
        finished(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in folder.glob("part_*.npy")) == ["part_0000000.npy", "part_0000004.npy"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = epath.Path(tmp_path / "out.npz")
    shards.whole(path, lambda file: np.savez(file, a=np.arange(3)))

    def full(file):
        file.write(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        shards.whole(path, full)
    assert np.load(path)["a"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [tmp_path / "out.npz"]


def test_two_may_write_one_file_at_once(tmp_path):
    path = epath.Path(tmp_path / "shared")

    def slow(file):
        file.write(b"sl")
        shards.whole(path, lambda other: other.write(b"fast"))
        assert path.read_bytes() == b"fast"
        file.write(b"ow")

    shards.whole(path, slow)
    assert path.read_bytes() == b"slow" and list(tmp_path.iterdir()) == [tmp_path / "shared"]
