"""The distances of PyPI's lpips package, given the same random VGG and the linear weights that the package itself ships.

Skipped where it is not installed; nothing is downloaded. All weights go through files of torch.save, read here without torch.
"""

import inspect
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")
pytest.importorskip("torchvision", reason="what the reference implementation is built on; not a dependency")
reference = pytest.importorskip("lpips", reason="a reference implementation; not a dependency")

from jaxdiff.interop import lpips as published
from jaxdiff.models import lpips

LINEAR = Path(inspect.getfile(reference)).parent / "weights" / "v0.1" / "vgg.pth"
distance = jax.jit(lpips.lpips)


@pytest.fixture(scope="module")
def theirs():
    """Their distance with its own linear weights and a random VGG, whose activations keep their size."""
    network = reference.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    rng = torch.Generator().manual_seed(0)
    for a in network.net.parameters():
        a.data = torch.randn(a.shape, generator=rng) * ((2 / a[0].numel()) ** 0.5 if a.dim() > 1 else 0.1)
    return network.eval()


@pytest.fixture(scope="module")
def place(theirs, tmp_path_factory):
    """The VGG as torchvision's state dict, in a file."""
    state = {f"features.{name.split('.', 1)[1]}": a for name, a in theirs.net.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


def images(*shape, seed=0):
    """Smooth shapes at [-1, 1], with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.linspace(0, 6, shape[1])[None, :, None, None], np.linspace(0, 5, shape[2])[None, None, :, None]
    waves = np.sin(rows + rng.uniform(0, 6, (shape[0], 1, 1, shape[3]))) * np.cos(columns)
    return (0.7 * waves + rng.normal(0, 0.1, shape)).clip(-1, 1).astype(np.float32)


def first(a):
    return torch.from_numpy(np.moveaxis(a, -1, 1).copy())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 64, 64, 3), (2, 50, 37, 3), (2, 32, 32, 1)])
def test_distances_are_theirs(theirs, place, shape):
    params = published.read(place, LINEAR)
    x, y = images(*shape), images(*shape, seed=1)
    with torch.no_grad():
        want = theirs(*(first(np.broadcast_to(a, (*shape[:3], 3))) for a in (x, y)))[:, 0, 0, 0].numpy()
    assert want.min() > 0.01 and np.ptp(want) > 1e-3
    np.testing.assert_allclose(distance(params, x, y), want, rtol=1e-4)


@pytest.mark.slow
def test_gradients_are_theirs(theirs, place):
    params = published.read(place, LINEAR)
    x, y = images(2, 32, 32, 3), images(2, 32, 32, 3, seed=1)
    given = first(x).requires_grad_()
    theirs(given, first(y)).sum().backward()
    want = np.moveaxis(given.grad.numpy(), 1, -1)
    got = jax.jit(jax.grad(lambda x, y, params: lpips.lpips(params, x, y).sum()))(x, y, params)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.slow
def test_a_whole_torchvision_file_is_read(tmp_path):
    """Of torchvision's own VGG-16, what tells classes apart is passed over."""
    models = pytest.importorskip("torchvision.models", reason="a reference implementation; not a dependency")
    with torch.device("meta"):
        names = {name: a.shape for name, a in models.vgg16(weights=None).state_dict().items()}
    small = {name: torch.zeros(shape) if name.startswith("features") else torch.zeros(1) for name, shape in names.items()}
    torch.save(small, tmp_path / "vgg16.pth")
    params = published.read(tmp_path / "vgg16.pth", LINEAR)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, lpips.shapes())
    assert all((params["params"][f"linear{n}"] >= 0).all() for n in range(1, 6))  # as they were trained
