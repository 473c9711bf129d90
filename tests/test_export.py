"""An exported sampler is the one at hand, in a file."""

import zipfile

import jax
import numpy as np
import pytest
from tiny import config, noisy

import jaxdiff as jd
from jaxdiff import experiment, run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    c = config()
    built = experiment.build(c)
    params = noisy(jax.random.key(1), jax.jit(built.init)(jax.random.key(0)))
    one, path = run.of(c, built, params), tmp_path_factory.mktemp("exported") / "sampler.jaxdiff"
    jd.export(one, path, "ddim(eta=0.5)")
    return one, path


@pytest.mark.parametrize("asked", [dict(n=3, steps=5, label=[1, 2, 3], guidance=2.5), dict(n=6, steps=9, times="linear(lo=0.01)")])
def test_it_draws_the_same_bits_for_any_batch_grid_label_and_guidance(exported, asked):
    """Six are two batches of four, the last filled up."""
    one, path = exported
    key = jax.random.key(7)
    got = jd.load_exported(path).generate(key, **asked)
    want = one.generate(key, solver="ddim(eta=0.5)", **asked)
    assert got.dtype == np.uint8 and got.std() > 10
    np.testing.assert_array_equal(got, want)


def test_the_file_holds_one_program_for_three_platforms_with_a_free_batch(exported):
    from jax import export as jax_export

    with zipfile.ZipFile(exported[1]) as archive:
        program = jax_export.deserialize(bytearray(archive.read("sampler.stablehlo")))
    assert program.platforms == ("cpu", "cuda", "tpu")
    (out,) = program.out_avals
    assert not isinstance(out.shape[0], int) and out.shape[1:] == (8, 8, 1) and out.dtype == np.uint8
    # Parameters are arguments: the program holds none of them.
    assert len(program.mlir_module_serialized) < 10 * exported[1].stat().st_size


def test_wrong_requests_are_one_line(exported, tmp_path):
    one, path = exported
    (tmp_path / "no.zip").write_text("nothing")
    with pytest.raises(jd.InputError, match="is not an exported sampler"):
        jd.load_exported(tmp_path / "no.zip")
    with pytest.raises(jd.InputError, match=r"platforms=\('gpu',\) is out of range; allowed: cpu, cuda, rocm, tpu"):
        jd.export(one, tmp_path / "x", platforms=("gpu",))
    with pytest.raises(jd.InputError, match="did you mean 'ddim'"):
        jd.export(one, tmp_path / "x", "dimm")
    assert not (tmp_path / "x").exists()
    with pytest.raises(jd.InputError, match="steps=21 is out of range; allowed: 1 to 20"):
        jd.load_exported(path).generate(jax.random.key(0), 2, steps=21)
    jd.export(one, tmp_path / "tpu", platforms=("tpu",))
    with pytest.raises(jd.InputError, match="was exported for tpu; this is cpu"):
        jd.load_exported(tmp_path / "tpu")
