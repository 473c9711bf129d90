"""An exported sampler is the one at hand, in a file."""

import io
import struct
import zipfile

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny import config, noisy

import jaxdiff as jd
from jaxdiff import experiment, models, run


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
    with pytest.raises(jd.InputError, match=r"platforms=\('gpu',\) is out of range; allowed: cpu, cuda, tpu"):
        jd.export(one, tmp_path / "x", platforms=("gpu",))
    with pytest.raises(jd.InputError, match="did you mean 'ddim'"):
        jd.export(one, tmp_path / "x", "dimm")
    assert not (tmp_path / "x").exists()
    with pytest.raises(jd.InputError, match="steps=21 is out of range; allowed: 1 to 20"):
        jd.load_exported(path).generate(jax.random.key(0), 2, steps=21)
    jd.export(one, tmp_path / "tpu", platforms=("tpu",))
    with pytest.raises(jd.InputError, match="was exported for tpu; this is cpu"):
        jd.load_exported(tmp_path / "tpu")


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def test_it_needs_none_of_the_networks_code(exported, monkeypatch):
    """Neither its construction nor its tree: the parameters are found by the names they were stored under."""
    one, path = exported
    asked = dict(n=3, steps=5, label=[1, 2, 3], guidance=2.5)
    want = one.generate(jax.random.key(7), solver="ddim(eta=0.5)", **asked)

    def gone(*args, **kwargs):
        raise AssertionError("the network's code was used")

    monkeypatch.setattr(models, "build", gone)
    for name in ("init", "apply", "__call__"):
        monkeypatch.setattr(models.UNet, name, gone)
    monkeypatch.setattr(nn.Module, "init", gone)
    monkeypatch.setattr(nn.Module, "apply", gone)
    loaded = jd.load_exported(path)
    np.testing.assert_array_equal(loaded.generate(jax.random.key(7), **asked), want)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(one.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, one.params)


def test_the_parameters_do_not_depend_on_the_order_they_are_stored_in(exported, tmp_path):
    one, path = exported
    content = members(path)
    arrays = np.load(io.BytesIO(content["params.npz"]))
    turned = io.BytesIO()
    np.savez(turned, **{name: arrays[name] for name in reversed(arrays.files)})
    loaded = jd.load_exported(packed(tmp_path / "turned", content | {"params.npz": turned.getvalue()}))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, one.params)


def test_a_learned_schedule_is_read_from_the_file(tmp_path):
    change = {"process.schedule": "learned(-6.0, 8.0, features=16)", "process.loss": "bound", "process.target": "eps"}
    c = config(**change, **{"process.draw": "draw_uniform(0.0, 1.0)"})
    built = experiment.build(c)
    one = run.of(c, built, noisy(jax.random.key(1), jax.jit(built.init)(jax.random.key(0))))
    jd.export(one, tmp_path / "x", platforms=("cpu",))
    asked = dict(n=2, steps=4, label=3)
    got = jd.load_exported(tmp_path / "x").generate(jax.random.key(7), **asked)
    np.testing.assert_array_equal(got, one.generate(jax.random.key(7), **asked))


def damaged(kind, content):
    params = content["params.npz"]
    arrays = dict(np.load(io.BytesIO(params)))
    first = next(iter(arrays))

    def saved(arrays):
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    return {
        "program": {"sampler.stablehlo": b"nothing"},
        "program cut": {"sampler.stablehlo": content["sampler.stablehlo"][:1000]},
        "program empty": {"sampler.stablehlo": b""},
        "params": {"params.npz": b"nothing"},
        "params empty": {"params.npz": b""},
        "params cut": {"params.npz": params[: len(params) // 2]},
        "another name": {"params.npz": saved({first + "_": arrays.pop(first), **arrays})},
        "another shape": {"params.npz": saved(dict(np.load(io.BytesIO(params))) | {first: np.zeros(3, np.float32)})},
        "config": {"config.json": b"{"},
        "config no text": {"config.json": b"\xff\xfe"},
        "config of another": {"config.json": b"{}"},
    }[kind]


@pytest.mark.parametrize(
    "kind",
    """program, program cut, program empty, params, params empty, params cut, another name, another shape, config, config no text,
    config of another""".replace("\n   ", "").split(", "),
)
def test_a_damaged_file_is_one_line(exported, tmp_path, kind):
    content = members(exported[1])
    path = packed(tmp_path / "x", content | damaged(kind, content))
    with pytest.raises(jd.InputError, match="is not an exported sampler") as error:
        jd.load_exported(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_archive_is_one_line(exported, tmp_path):
    """A method of compression there is not, a deflated member that is none, an encrypted one, a cut file."""
    whole = exported[1].read_bytes()
    entry = whole.rindex(b"PK\x01\x02")  # the last of the directory, of the config
    for at, value in ((10, 99), (10, 8), (8, 1)):
        content = bytearray(whole)
        struct.pack_into("<H", content, entry + at, value)
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(jd.InputError, match="is not an exported sampler") as error:
            jd.load_exported(tmp_path / "x")
        assert "\n" not in str(error.value)
    (tmp_path / "x").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(jd.InputError, match="is not an exported sampler"):
        jd.load_exported(tmp_path / "x")


def test_a_folder_or_none_and_a_key_of_another_generator_are_refused(exported, tmp_path):
    one, path = exported
    with pytest.raises(jd.InputError, match="deep/x is in a folder that is not there"):
        jd.export(one, tmp_path / "deep" / "x")
    with pytest.raises(jd.InputError, match="is a folder; give the name of a file"):
        jd.export(one, tmp_path)
    loaded = jd.load_exported(path)
    with pytest.raises(jd.InputError, match="the key is of the generator rbg; allowed: threefry2x32"):
        loaded.generate(jax.random.key(0, impl="rbg"), 2, steps=2)
    legacy = loaded.generate(jax.random.PRNGKey(7), 2, steps=2)
    np.testing.assert_array_equal(legacy, loaded.generate(jax.random.key(7), 2, steps=2))
