"""Bits per dimension over a split: the same however it is cut up or interrupted."""

import json

import jax
import numpy as np
import pytest
from test_run import noisy
from tiny import config

import jaxdiff as jd
from jaxdiff import data, evaluation, experiment
from jaxdiff.evaluation import Settings


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
    np.save(kept, rows[:4])  # as if it had been stopped there
    few = model[3]
    black = few._replace(images=np.concatenate([np.zeros_like(few.images[:4]), few.images[4:]]))
    again = bits(tmp_path / "b", model, metric, size=3, dataset=black)
    np.testing.assert_allclose(np.load(kept), rows, rtol=1e-4)  # the first four were not looked at again
    assert again["bits_per_dim"] == pytest.approx(cut["bits_per_dim"], rel=1e-5)
    assert json.loads(kept.with_suffix(".json").read_text())["bits_per_dim"] == again["bits_per_dim"]


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
