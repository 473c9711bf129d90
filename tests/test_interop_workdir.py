"""A workdir of parameters trained elsewhere is drawn from like any other, and never trained over."""

import jax
import numpy as np
import pytest
import tiny

import jaxdiff as jd
from jaxdiff import experiment
from jaxdiff.errors import InputError
from jaxdiff.interop import workdir
from jaxdiff.training import checkpoint


def written(folder):
    config = tiny.config(**{"training.ema": (0.0,), "sampling.ema": 0.0})
    params = tiny.noisy(jax.random.key(1), experiment.build(config).init(jax.random.key(0)))
    params = jax.tree.map(np.asarray, params)  # as they are read
    workdir.write(folder, config, params)
    return params


def test_it_is_loaded_and_drawn_from(tmp_path):
    params = written(tmp_path / "w")
    run = jd.load(tmp_path / "w")
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(run.params))
    assert run.step == 0
    assert run.generate(jax.random.key(0), 2, steps=2, label=1).shape == (2, 8, 8, 1)


def test_nothing_is_written_over_it(tmp_path):
    written(tmp_path / "w")
    with pytest.raises(InputError, match=r"holds a checkpoint already \(step 0\)"):
        written(tmp_path / "w")
    with pytest.raises(InputError, match="holds an imported model, without a state to go on from"):
        checkpoint.recover(tmp_path / "w", print)
    assert checkpoint.newest(tmp_path / "w") == 0


def test_a_file_is_no_workdir_and_is_left_as_it_was(tmp_path):
    (tmp_path / "w").write_text("mine")
    for place, said in (
        (tmp_path / "w", "is a file; give a new folder$"),
        (tmp_path / "w" / "below", "cannot be written: Not a d"),
    ):
        with pytest.raises(InputError, match=said):
            written(place)
    assert (tmp_path / "w").read_text() == "mine"
