"""LPIPS by hand, on a VGG whose convolutions pass three channels through; and the files that its weights come in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import InputError
from jaxdiff.interop import files
from jaxdiff.interop import lpips as published
from jaxdiff.models import lpips


def passing():
    """Weights with which every stage sees the image itself: each convolution keeps the first three channels."""
    params = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), lpips.shapes())
    for name, of in params["params"].items():
        if name.startswith("conv"):
            of["kernel"][1, 1, :3, :3] = np.eye(3)
    for stage in range(5):
        params["params"][f"linear{stage + 1}"][:3] = np.arange(1.0, 4) * (stage + 1)
    return params


def pooled(a):
    batch, height, width, channels = a.shape
    cut = a[:, : height // 2 * 2, : width // 2 * 2]
    return cut.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def by_hand(x, y):
    """Of images whose every position has a channel that the first rectifier passes."""
    total = 0
    seen = [np.maximum((a - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450]), 0) for a in (x, y)]
    for stage in range(5):
        unit_x, unit_y = (a / np.sqrt((a**2).sum(-1, keepdims=True)) for a in seen)
        total = total + ((unit_x - unit_y) ** 2 * np.arange(1, 4) * (stage + 1)).sum(-1).mean((1, 2))
        seen = [pooled(a) for a in seen]
    return total


def images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-0.9, 1, shape).astype(np.float32)


distance = jax.jit(lpips.lpips)


def test_the_distance_is_that_by_hand():
    x, y = images(2, 18, 20, 3), images(2, 18, 20, 3, seed=1)
    x[..., 1] = np.abs(x[..., 1])
    y[..., 2] = np.abs(y[..., 2])
    got = distance(passing(), x, y)
    assert got.shape == (2,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, by_hand(x, y), rtol=1e-5)
    np.testing.assert_allclose(got, distance(passing(), y, x), rtol=1e-6)
    np.testing.assert_allclose(distance(passing(), x, x), 0, atol=1e-12)
    grey_x, grey_y = np.abs(x[..., :1]), np.abs(y[..., :1])
    np.testing.assert_allclose(
        distance(passing(), grey_x, grey_y), by_hand(*(a.repeat(3, -1) for a in (grey_x, grey_y))), rtol=1e-5
    )


@pytest.mark.slow
def test_the_gradient_is_finite_where_nothing_is_seen():
    x, y = np.full((1, 16, 16, 1), -1, np.float32), images(1, 16, 16, 1)  # no channel of x passes the first rectifier
    gradient = jax.jit(jax.grad(lambda x, y, params: lpips.lpips(params, x, y).sum()))(x, y, passing())
    np.testing.assert_array_equal(gradient, 0)
    assert distance(passing(), x, y)[0] > 1


@pytest.mark.parametrize("shape", [(2, 15, 32, 3), (2, 32, 32, 2), (32, 32, 3)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"LPIPS sees images .B, H, W, 1. or .B, H, W, 3. of 16 pixels at least"):
        lpips.lpips(passing(), np.zeros(shape), np.zeros(shape))


def random_state(rows):
    """Tensors as they are published, of these rows."""
    rng = np.random.default_rng(0)
    wanted = lpips.shapes()["params"]
    state = {}
    for row in rows:
        leaf = wanted
        for name in row.ours.split("/"):
            leaf = leaf[name]
        state[row.theirs] = row.layout.save(rng.standard_normal(leaf.shape, np.float32))
    return state


def test_the_published_names_and_shapes_are_read(tmp_path):
    vgg, linear = random_state(published.vgg_rows()), random_state(published.linear_rows())
    names = [f"features.{n}" for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
    assert list(vgg) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert vgg["features.5.weight"].shape == (128, 64, 3, 3) and vgg["features.28.bias"].shape == (512,)
    assert {name: a.shape for name, a in linear.items()} == {
        f"lin{n}.model.1.weight": (1, c, 1, 1) for n, c in enumerate((64, 128, 256, 512, 512))
    }
    files.write(tmp_path / "vgg16.safetensors", vgg | {"classifier.0.bias": np.zeros(4096, np.float32)})
    files.write(tmp_path / "vgg.safetensors", linear)
    params = published.read(tmp_path / "vgg16.safetensors", tmp_path / "vgg.safetensors")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda a: a.shape, lpips.shapes())
    ours = params["params"]
    np.testing.assert_array_equal(ours["conv3_2"]["kernel"][0, 2, 5, 7], vgg["features.12.weight"][7, 5, 0, 2])
    np.testing.assert_array_equal(ours["linear4"], linear["lin3.model.1.weight"][0, :, 0, 0])


def test_files_of_other_networks_are_refused_in_one_line(tmp_path):
    linear = random_state(published.linear_rows())
    alex = {f"lin{n}.model.1.weight": np.zeros((1, c, 1, 1), np.float32) for n, c in enumerate((64, 192, 384, 256, 256))}
    squeeze = linear | {"lin5.model.1.weight": np.zeros((1, 512, 1, 1), np.float32)}
    for name, state in {"linear": linear, "alex": alex, "squeeze": squeeze}.items():
        files.write(tmp_path / f"{name}.safetensors", state)
    (tmp_path / "text.pth").write_text("no tensors at all")

    def refused(call, text):
        with pytest.raises(InputError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)

    refused(lambda: published.read(tmp_path / "linear.safetensors", tmp_path / "linear.safetensors"),
            "linear.safetensors: tensor features.0.weight is missing.*but holds lin")  # fmt: skip
    refused(lambda: published.read(tmp_path / "nothing.pth", tmp_path / "linear.safetensors"), "nothing.pth is not there")
    refused(lambda: published.read(tmp_path / "text.pth", tmp_path / "linear.safetensors"), "text.pth is no file of torch.save")
    for name, text in {
        "alex": "lin1.model.1.weight has shape .1, 192, 1, 1.",
        "squeeze": "lin5.model.1.weight belongs to no",
    }.items():
        refused(lambda name=name: published.read_linear(tmp_path / f"{name}.safetensors"), f"{name}.safetensors: tensor {text}")
