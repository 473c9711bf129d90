"""Bits per dimension over a split: the same however it is cut up or interrupted."""

import json

import jax
import numpy as np
import oracles
import pytest
from test_configs import load
from tiny import config, noisy

import jaxdiff as jd
from jaxdiff import data, evaluation, experiment, likelihood
from jaxdiff.evaluation import Settings
from jaxdiff.evaluation import bits as bits_module


@pytest.fixture(scope="module")
def model():
    c = config(**{"process.loss": "hybrid(0.001)", "process.schedule": "linear_beta(20)", "process.draw": "draw_table(20)"})
    built = experiment.build(c)
    params = noisy(jax.random.key(1), jax.jit(built.init)(jax.random.key(0)))
    few = data.load("digits", "test")
    return c, built, params, few._replace(images=few.images[:7], labels=few.labels[:7])


FEW = Settings(terms=4, steps=4)


def bits(workdir, model, metric="bpd_elbo", size=7, settings=FEW, dataset=None):
    c, built, params, few = model
    return evaluation.evaluate(workdir, metric, c, built, params, few if dataset is None else dataset, size, settings, split="test")


@pytest.mark.parametrize("metric", ["bpd_elbo", "bpd_ode"])
def test_a_stopped_evaluation_goes_on_and_cutting_it_up_changes_nothing(metric, tmp_path, model):
    whole = bits(tmp_path / "a", model, metric)
    assert whole["n"] == 7 and whole["stderr"] > 0
    cut = bits(tmp_path / "b", model, metric, size=3)
    assert cut["bits_per_dim"] == pytest.approx(whole["bits_per_dim"], rel=1e-4)
    kept = next((tmp_path / "b" / "evaluation").glob("*.npy"))
    rows = np.load(kept)
    marked = np.concatenate([rows[:4] + 1, rows[4:]])
    np.save(kept, marked[:4])  # as if it had been stopped there
    again = bits(tmp_path / "b", model, metric, size=3)
    np.testing.assert_allclose(np.load(kept), marked, rtol=1e-4)  # the first four were not looked at again
    assert again["bits_per_dim"] == pytest.approx(cut["bits_per_dim"] + 4 / 7, rel=1e-5)
    assert json.loads(kept.with_suffix(".json").read_text())["bits_per_dim"] == again["bits_per_dim"]


def test_what_was_kept_is_not_used_for_another_model_or_other_images(tmp_path, model):
    c, built, params, few = model
    first = bits(tmp_path, model)
    assert bits(tmp_path, model) == first
    other = jax.tree.map(lambda a: a * 1.01, params)
    clipped = config(**{"process.loss": "hybrid(0.001)", "process.schedule": "linear_beta(20)", "process.draw": "draw_table(20)"})
    clipped.sampling.clip = False
    faster = config(**{"process.loss": "hybrid(0.001)", "process.schedule": "linear_beta(20, 1e-4, 0.3)"})
    faster.process.draw = "draw_table(20)"
    for changed in (
        (c, built, other, few),
        (clipped, built, params, few),
        (faster, experiment.build(faster), params, few),
        (c, built, params, few._replace(images=255 - few.images)),
        (c, built, params, few._replace(labels=(few.labels + 1) % 10)),
    ):
        assert bits(tmp_path, changed)["bits_per_dim"] != first["bits_per_dim"]
    assert len(list((tmp_path / "evaluation").glob("*.json"))) == 6


def gaussian_images(n, std=40.0):
    """Images of 64 pixels, normal about 127.5, the bits of each under their own distribution, and its denoiser's variance."""
    images = np.clip(np.round(np.random.default_rng(3).normal(127.5, std, (n, 8, 8, 1))), 0, 255).astype(np.uint8)
    nats = np.square((images - 127.5) / std) / 2 + np.log(std * np.sqrt(2 * np.pi))
    return images, nats.mean((1, 2, 3)) / np.log(2), (std / 127.5) ** 2


@pytest.mark.parametrize("name", ["cifar_edm", "cifar_flow", "cifar_score_sde", "cifar_subvp", "cifar_vdm"])
def test_the_continuous_bound_of_every_config_is_tight_for_a_model_known_in_closed_form(name):
    """Over the ends that evaluation takes of its schedule and draw; only VDM's goes to noise far below a value's width."""
    c = load(name).get_config()
    built = experiment.build(c)
    images, exact, var = gaussian_images(128)
    learns = c.process.loss == "bound"
    levels = bits_module.path(built, None, 1, np.inf if learns else bits_module.FINEST)
    denoise = oracles.gaussian(0.0, var * (127.5 / 128) ** 2 if learns else var)
    found = jax.jit(lambda key: likelihood.image_continuous_elbo(key, denoise, built.codec, images, levels, 64, built.data_std))
    gap = np.asarray(found(jax.random.key(0)).each) - exact
    error = gap.std(ddof=1) / np.sqrt(len(gap))
    assert gap.std() < 0.3, gap.std()
    assert -4 * error < gap.mean() < (0.7 if learns else 0.03) + 4 * error, (gap.mean(), error)


def test_the_continuous_bound_ends_where_its_line_says(tmp_path):
    for changes, last in (({}, "10"), ({"process.draw": "draw_uniform(0.05, 1.0)"}, "5.084")):
        c = config(**changes)
        built = experiment.build(c)
        _, line = evaluation.estimator("bpd_elbo", c, built, built.init(jax.random.key(0)), Settings())
        assert f"even in logsnr up to {last}" in line
    c = config(
        **{"process.loss": "bound", "process.schedule": "learned(-6.0, 13.0, features=16)", "process.draw": "draw_uniform()"}
    )
    built = experiment.build(c)
    assert "up to 13," in evaluation.estimator("bpd_elbo", c, built, built.init(jax.random.key(0)), Settings())[1]


def test_the_bound_is_told_by_its_terms(tmp_path, model):
    row = bits(tmp_path, model)
    assert row["bits_per_dim"] == pytest.approx(row["prior"] + row["diffusion"] + row["decoder"], rel=1e-5)
    assert "learned variance" in row["how"] and "4 of 19 terms" in row["how"]
    every = bits(tmp_path, model, settings=Settings(terms=0))
    assert "all 19 terms" in every["how"] and every["bits_per_dim"] != row["bits_per_dim"]


def test_a_torn_file_of_an_earlier_evaluation_starts_anew(tmp_path, model):
    row = bits(tmp_path, model)
    kept = next((tmp_path / "evaluation").glob("*.npy"))
    kept.write_bytes(kept.read_bytes()[:60])
    assert bits(tmp_path, model) == row


def test_continuous_times_get_the_continuous_bound(tmp_path):
    c = config()
    built = experiment.build(c)
    params = noisy(jax.random.key(1), jax.jit(built.init)(jax.random.key(0)))
    few = data.load("digits", "test")
    few = few._replace(images=few.images[:3], labels=few.labels[:3])
    row = evaluation.evaluate(tmp_path, "bpd_elbo", c, built, params, few, 3, Settings(terms=4))
    assert "continuous-time" in row["how"] and row["bits_per_dim"] > 0


def test_what_cannot_be_evaluated_is_one_line(model):
    c, built, params, _ = model
    with pytest.raises(jd.InputError, match="metrics='fidd' is unknown; allowed: bpd_elbo, bpd_ode"):
        evaluation.estimator("fidd", c, built, params, Settings())
    with pytest.raises(jd.InputError, match="out of range"):
        evaluation.estimator("bpd_ode", c, built, params, Settings(steps=0))
    singular = config(**{"process.target": "eps", "process.draw": "draw_table(20)"})
    with pytest.raises(jd.InputError, match="says nothing at a level"):
        evaluation.estimator("bpd_elbo", singular, experiment.build(singular), params, Settings())
