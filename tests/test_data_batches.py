"""Batches as a pure function of the step, the flip, and the statistics."""

import jax
import numpy as np
import pytest

from jaxdiff.data import Dataset, batch_at, load, random_flip, statistics
from jaxdiff.errors import InputError


def toy(n, shape=(2, 2, 1)):
    """Image i is filled with i, and its label is i."""
    labels = np.arange(n, dtype=np.int32)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (n, *shape))
    return Dataset(images, labels, (), "toy")


def stream(dataset, seed, batch_size, batches):
    return np.concatenate([batch_at(dataset, seed, step, batch_size)["label"] for step in range(batches)])


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23])  # 4 and 23 span epochs, 23 more than two of them
def test_every_example_comes_once_an_epoch_and_none_is_dropped(batch_size):
    labels = stream(toy(10), 0, batch_size, -(-100 // batch_size))[:100].reshape(10, 10)
    assert (np.sort(labels, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in labels}) == 10, "epochs repeat one order"


def test_the_stream_does_not_depend_on_the_batch_size():
    assert (stream(toy(10), 3, 4, 15) == stream(toy(10), 3, 20, 3)).all()


def test_images_go_with_their_labels():
    batch = batch_at(toy(100), 0, 7, 32)
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    assert (batch["image"] == batch["label"][:, None, None, None]).all() and batch["image"].shape == (32, 2, 2, 1)


def test_a_batch_is_a_pure_function_of_its_arguments():
    late, early = batch_at(toy(50), 5, 31, 16), batch_at(toy(50), 5, 2, 16)
    assert (batch_at(toy(50), 5, 2, 16)["label"] == early["label"]).all()
    assert (batch_at(toy(50), 5, 31, 16)["label"] == late["label"]).all()
    assert (batch_at(toy(50), 6, 2, 16)["label"] != early["label"]).any()


def test_the_order_is_the_same_on_every_machine_and_numpy():
    first, second = [1, 10, 4, 5, 11, 6, 8, 2, 0, 3, 9, 7], [10, 7, 8, 6, 2, 9, 3, 1, 11, 0, 4, 5]
    assert stream(toy(12), 0, 12, 2).tolist() == first + second
    assert stream(toy(12), 7, 12, 1).tolist() == [0, 8, 5, 2, 3, 4, 9, 10, 7, 6, 1, 11]


def test_shares_of_processes_join_to_the_single_process_batch():
    whole = batch_at(toy(10), 0, 3, 12)
    shares = [batch_at(toy(10), 0, 3, 12, process, 3) for process in range(3)]
    for key in ("image", "label"):
        assert (np.concatenate([share[key] for share in shares]) == whole[key]).all()
    assert all(len(share["label"]) == 4 for share in shares)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0, 0, 10, 0, 3), "batch_size 10 is not a positive multiple of the 3 processes"),
        ((0, 0, 0), "batch_size 0 "),
        ((0, 0, 4, 2, 2), "process 2 of 2"),
        ((0, -1, 4), "step -1"),
        ((-1, 0, 4), "seed -1"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(InputError, match=words) as error:
        batch_at(toy(10), *arguments)
    assert "\n" not in str(error.value)


def test_random_flip_mirrors_half_of_the_images_left_to_right():
    images = jax.random.randint(jax.random.key(0), (400, 3, 4, 2), 0, 256).astype(np.uint8)
    flipped = jax.jit(random_flip)(jax.random.key(1), images)
    same = np.asarray((flipped == images).all((1, 2, 3)))
    mirrored = np.asarray((flipped == images[:, :, ::-1]).all((1, 2, 3)))
    assert (same ^ mirrored).all() and flipped.dtype == np.uint8
    assert 140 < mirrored.sum() < 260  # six standard deviations of 200 +- 10
    again = random_flip(jax.random.key(2), images)
    assert (np.asarray((again == images).all((1, 2, 3))) != same).any(), "the key is not used"


def test_statistics_are_exact():
    # 18 MB: more than one chunk.
    images = (np.arange(6000 * 32 * 32 * 3) ** 2 % 251).astype(np.uint8).reshape(6000, 32, 32, 3)
    images[..., 1] //= 3
    mean, std = statistics(Dataset(images, np.zeros(6000, np.int32), (), "toy"))
    # Sums of integers are exact; a float64 sum over so many pixels is not (it is off by 4e-11).
    n = 6000 * 32 * 32
    first = images.sum((0, 1, 2), dtype=np.int64)
    second = (images.astype(np.uint16) ** 2).sum((0, 1, 2), dtype=np.int64)
    assert mean.dtype == std.dtype == np.float64 and mean.shape == std.shape == (3,)
    np.testing.assert_allclose(mean, first / n / 127.5 - 1, rtol=0, atol=1e-13)
    np.testing.assert_allclose(std, np.sqrt(n * second - first**2) / n / 127.5, rtol=0, atol=1e-13)


def test_statistics_of_one_colour():
    mean, std = statistics(Dataset(np.full((3, 2, 2, 1), 255, np.uint8), np.zeros(3, np.int32), (), "white"))
    assert mean == 1 and std == 0


def test_digits_are_those_of_scikit_learn():
    original = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = np.round(original.images * 255 / 16).astype(np.uint8)[..., None]
    test = np.arange(1797) % 6 == 5
    for split, chosen in (("train", ~test), ("test", test)):
        digits = load("digits", split)
        assert (digits.images == pixels[chosen]).all() and (digits.labels == original.target[chosen]).all()
        assert digits.images.dtype == np.uint8 and digits.labels.dtype == np.int32
    assert len(load("digits").labels) == 1498 and digits.name == "digits" and digits.classes == tuple("0123456789")


def test_digits_of_another_size_and_a_wrong_split():
    digits = load("digits", size=16)
    assert digits.images.shape == (1498, 16, 16, 1)
    shrunk = digits.images.reshape(-1, 8, 2, 8, 2, 1).mean((2, 4))
    assert abs(shrunk - load("digits").images).mean() < 12, "enlarged digits do not look like the digits"
    with pytest.raises(InputError, match=r"no split 'tset', only train and test; did you mean 'test'\?"):
        load("digits", "tset")
    with pytest.raises(InputError, match="size 0 is not a positive number of pixels"):
        load("digits", size=0)
