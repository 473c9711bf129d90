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
