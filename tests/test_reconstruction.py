"""PSNR and SSIM in closed forms, what is measured of an autoencoder over many images, and how it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_autoencoding import batch_of, config, saved, two_convolutions
from test_evaluate_metrics import call, evaluate, told

import jaxdiff as jd
from jaxdiff import data, experiment
from jaxdiff import mesh as meshes
from jaxdiff.errors import InputError
from jaxdiff.evaluation import reconstruction

assert call and evaluate and two_convolutions  # fixtures; the first finds the workdir of this file


def images(n=3, size=16, channels=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels)).astype(np.uint8)


def test_the_same_images_have_no_error():
    x = images(channels=3)
    assert np.isinf(reconstruction.psnr(x, x)).all()
    np.testing.assert_allclose(reconstruction.ssim(x, x), 1, atol=1e-6)


def test_psnr_of_a_constant_shift_is_known_and_each_image_has_its_own():
    x = np.full((3, 4, 4, 1), 100, np.uint8)
    y = x + np.array([1, 10, 100], np.uint8).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(reconstruction.psnr(x, y), 20 * np.log10(255 / np.array([1, 10, 100])), rtol=1e-5)
    half = x.copy()
    half[:, :2] += 10
    np.testing.assert_allclose(reconstruction.psnr(x, half), 10 * np.log10(255**2 / 50), rtol=1e-5)


def test_ssim_of_flat_images_is_its_luminance_and_of_opposite_ones_its_structure():
    """Without variance the second factor is 1; at equal means the first one is."""
    x, y = np.full((2, 16, 16, 3), 100, np.uint8), np.full((2, 16, 16, 3), 150, np.uint8)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    np.testing.assert_allclose(reconstruction.ssim(x, y), (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), rtol=1e-5)
    # A checkerboard seen through a window whose weights sum to 1/2 on either colour, but for (sum of (-1)^n taps)^2 / 2.
    at = np.arange(-5, 6)
    taps = np.exp(-(at**2) / 4.5)
    odd = float((taps * (-1.0) ** at).sum() / taps.sum()) ** 2
    board = np.indices((16, 16)).sum(0) % 2
    x = (100 + 40 * board).astype(np.uint8)[None, :, :, None]
    y = (140 - 40 * board).astype(np.uint8)[None, :, :, None]
    variance = 20**2 * (1 - odd**2)
    got = float(reconstruction.ssim(x, y)[0])
    assert got == pytest.approx((-2 * variance + c2) / (2 * variance + c2), abs=2e-4)


def test_ssim_sees_no_image_smaller_than_its_window():
    with pytest.raises(ValueError, match="SSIM needs sizes of 11 at least"):
        reconstruction.ssim(images(size=10), images(size=10))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with an autoencoder of random parameters, and what was saved."""
    workdir = tmp_path_factory.mktemp("vq")
    return workdir, saved(workdir, config())


@pytest.fixture(scope="module")
def loaded(trained):
    found = reconstruction.load(trained[0])
    assert found is not None
    return found


def test_a_workdir_is_loaded_with_the_average_asked_for(trained, loaded, tmp_path):
    workdir, state = trained
    jax.tree.map(np.testing.assert_array_equal, loaded.params, state.ema["0.9"])
    assert (loaded.shape, loaded.step, loaded.model.codes) == ((8, 8, 1), 0, 6)
    other = reconstruction.load(workdir, 0.99)
    jax.tree.map(np.testing.assert_array_equal, other.params, state.ema["0.99"])
    with pytest.raises(InputError, match="holds no checkpoint"):
        reconstruction.load(tmp_path)


def test_what_is_measured_is_the_same_in_any_batches(loaded):
    built = experiment.build(config())
    through, mesh = reconstruction.through(loaded.model, built.pixel), meshes.make_mesh((-1, 1))
    x = batch_of(10)["image"]
    whole, parts = (reconstruction.measure(through, loaded.params, x, size, 6, mesh) for size in (10, 4))
    assert np.abs(whole.images.astype(int) - parts.images).max() <= 1
    np.testing.assert_allclose(whole.psnr, parts.psnr, rtol=1e-2)
    np.testing.assert_allclose(whole.psnr, reconstruction.psnr(x, whole.images), rtol=1e-5)
    assert whole.psnr.shape == (10,) and whole.ssim.shape == (0,)
    assert whole.counts.sum() == parts.counts.sum() == 10 * 16 and whole.counts.shape == (6,)
    assert not (whole.images == whole.images[0]).all()


def test_figures_are_of_the_counts_and_means():
    seen = reconstruction.Reconstructed(images(2), np.array([20.0, 30.0]), np.array([0.5, 0.7]), np.array([5, 5, 0, 0]))
    row = reconstruction.summary(seen)
    assert row == pytest.approx({"psnr": 25, "ssim": 0.6, "perplexity": 2, "codes_used": 0.5})
    assert reconstruction.told(row, 4) == "PSNR 25.00 dB, SSIM 0.6000, 2 of 4 codes used, perplexity 2.0"
    assert reconstruction.figure("psnr", seen) == {"metric": "psnr", "value": 25, "std": 5, "n": 2}
    told = reconstruction.figure("usage", seen)
    assert (told["codes_used"], told["codes"], told["share"], told["n"]) == (2, 4, 0.5, 2)
    plain = reconstruction.summary(seen._replace(ssim=np.zeros(0), counts=np.zeros(0, int)))
    assert plain == {"psnr": 25} and reconstruction.told(plain, 0) == "PSNR 25.00 dB"
    same = reconstruction.figure("psnr", seen._replace(psnr=np.array([np.inf, 30.0])))
    assert same["value"] == np.inf and same["std"] is None


def test_the_picture_has_each_image_above_what_was_given_back():
    x, back = np.full((5, 32, 32, 1), 10, np.uint8), np.full((5, 32, 32, 1), 200, np.uint8)
    picture = reconstruction.grid(x, back)
    assert picture.shape == (4 * 33 + 1, 4 * 33 + 1, 3)  # four columns, two pairs of rows
    column = picture[[17, 50, 83, 116], 17, 0]
    assert column.tolist() == [10, 200, 10, 200]
    assert picture[83, 17 + 33, 0] == 255  # the fifth image is the last


# evaluate.py.


@pytest.fixture
def workdir(trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(trained[0] / "checkpoints")
    return tmp_path / "run"


def test_evaluate_tells_an_autoencoders_figures(call, workdir, loaded):
    out = call(metrics="psnr,usage", num=20)
    psnr, usage = told(workdir, "psnr"), told(workdir, "usage")
    assert "psnr (n=20): " in out and "of 20 images of digits test given back at step 0" in out
    assert f"{usage['codes_used']} of 6 codes used" in out
    test = jnp.asarray(data.load("digits", "test").images[:20])
    y = reconstruction.through(loaded.model, experiment.build(config()).pixel)(loaded.params, test)["images"]
    assert psnr["value"] == pytest.approx(float(reconstruction.psnr(test, y).mean()), rel=1e-2)
    assert (psnr["n"], psnr["ema"], psnr["step"]) == (20, "0.9", 0)


def test_distances_are_of_what_is_given_back_from_the_originals(call, workdir):
    out = call(metrics="fd_own,kd_own", classifier="x")
    row = told(workdir, "fd_own")
    assert row["n"] == row["reference"]["n"] == 299
    assert row["reference"]["name"] == row["samples"]["reconstructed"] == "digits test"
    assert row["reference"]["images"] == row["samples"]["originals"] != row["samples"]["images"]
    assert "against digits test (n=299" in out and row["value"] > 0 and told(workdir, "kd_own")["n"] == 299


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"metrics": "ssim"}, "metrics='ssim' needs images of 11 pixels at least, and these are (8, 8)"),
        ({"metrics": "bpd_elbo"}, "metrics='bpd_elbo' is of a model that draws images, and"),
        ({"metrics": "fd_own,floor", "classifier": "x"}, "metrics='floor' is of a model that draws images"),
        ({"metrics": "psnr", "steps": 5}, "--steps is of drawing images, and"),
        ({"metrics": "psnr", "reference": "x.npz"}, "--reference is of distances, and metrics='psnr' are none"),
        ({"metrics": ""}, "metrics='' is unknown; allowed: bpd_elbo"),
    ],
)
def test_what_an_autoencoder_has_not_is_one_line(call, flags, said):
    with pytest.raises(jd.InputError) as error:
        call(**flags)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_usage_is_of_codebooks_alone(call, tmp_path):
    saved(tmp_path / "kl", config("AutoencoderKL"))
    with pytest.raises(jd.InputError, match="metrics='usage' is of a codebook, and this autoencoder has none; allowed: psnr, ssim"):
        call(workdir=tmp_path / "kl", metrics="usage")
