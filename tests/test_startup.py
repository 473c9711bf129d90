"""What precedes the first step: the start of the state as one quick program, the compile cache, the clock."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tiny_autoencoder

from jaxdiff import cli, experiment, training

HERE = Path(__file__).parent
BEGAN = time.perf_counter()


def transformer():
    c = tiny.config()
    with c.unlocked():
        c.model = dict(name="DiT", patch=2, width=32, depth=2, heads=2, classes=10, dtype="float32", remat=False)
    return c


def init_of(c):
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    return lambda key: training.init_state(built, optimizer, c.training.ema, key)


@pytest.mark.parametrize(
    "config",
    [
        tiny.config,
        pytest.param(transformer, marks=pytest.mark.slow),
        pytest.param(tiny_autoencoder.get_config, marks=pytest.mark.slow),
    ],
)
def test_the_quickly_compiled_start_is_the_same_bit_for_bit(config):
    init = init_of(config())
    key = jax.random.key(3)
    quick, plain = training.jit_init(init)(key), jax.jit(lambda key: init(key))(key)
    drawn = 0
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(quick), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
        drawn += np.std(a) > 0
    assert drawn > 5


SHARDED = """
import jax, json, numpy as np
from test_startup import init_of, transformer
from jaxdiff import mesh as meshes, training
c = transformer()
c.model.width = 128
init, key = init_of(c), jax.random.key(3)
mesh = meshes.make_mesh((1, 8))
shapes = jax.eval_shape(init, key)
shardings = meshes.state_shardings(mesh, shapes)
with jax.set_mesh(mesh):
    start = training.jit_init(init, shardings)
    memory = start.lower(key).compile().memory_analysis()
    state = start(key)
assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), state, shardings)))
whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))
print(json.dumps([whole, held, memory.output_size_in_bytes, memory.temp_size_in_bytes]))
"""


@pytest.mark.slow
def test_the_start_is_born_split():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    whole, held, output, temporary = json.loads(done.stdout.splitlines()[-1])
    assert 1 / 8 <= held / whole < 1 / 8 + 0.05
    assert output < whole / 4
    assert temporary < whole / 2


def test_the_cache_keeps_small_programs_too_unless_jax_has_a_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [jax.config.values[name] for name in names]
    try:
        jax.config.update(names[0], "elsewhere")
        cli.enable_compile_cache()
        assert [jax.config.values[name] for name in names] == ["elsewhere", before[1]]
        jax.config.update(names[0], None)
        cli.enable_compile_cache()
        assert [jax.config.values[name] for name in names] == [str(tmp_path / "jaxdiff" / "xla"), 0.0]
    finally:
        for name, value in zip(names, before):
            jax.config.update(name, value)


def test_the_age_is_that_of_the_process():
    first, then = cli.age(), time.perf_counter()
    time.sleep(0.05)
    assert cli.age() - first == pytest.approx(time.perf_counter() - then, abs=0.02)
    assert first > then - BEGAN  # this file was imported after the process began


@pytest.mark.slow
def test_the_benchmark_tells_what_the_import_takes(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent))
    from benchmarks import startup

    startup.main(["--configs=", "--run=", "--repeats=1"])
    told = capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in told.splitlines() if line.startswith("| ")}
    assert float(rows["import jaxdiff"].split()[0]) > 0.1
    assert "s of the processor more than" in told
