"""The same training on other meshes and in several processes, on fake CPU devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import draws
import jax
import numpy as np
import pytest

from jaxdiff import mesh as meshes
from jaxdiff.errors import InputError

HERE = Path(__file__).parent


def start(shape, devices, *processes):
    return started(devices, "meshes.py", json.dumps(shape), *processes)


def started(devices, script, *arguments):
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    env["NPROC"] = "16"  # XLA's threads: a collective blocks one a device, and with as few threads as cores others starve
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), env.get("PYTHONPATH", "")])
    args = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(*processes):
    told = [process.communicate(timeout=500) for process in processes]
    assert not any(process.returncode for process in processes), "\n\n".join(err[-3000:] for _, err in told)
    return [json.loads(out.splitlines()[-1]) for out, _ in told]


def same(a, b):
    np.testing.assert_allclose(a["losses"], b["losses"], rtol=1e-5)
    np.testing.assert_allclose(a["params"], b["params"], rtol=1e-5)
    # A pixel may be rounded the other way.
    assert np.abs(np.array(a["images"]) - np.array(b["images"])).max() <= 1


@pytest.fixture(scope="module")
def alone():
    return results(start((1, 1), 1))[0]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)])
def test_twenty_steps_are_the_same_on_every_mesh_and_the_state_shrinks_with_fsdp(shape, alone):
    [many] = results(start(shape, 8))
    same(many, alone)
    ratio = many["bytes"] / alone["bytes"]
    # What stays whole is small: biases and norms.
    assert 1 / shape[1] <= ratio < 1 / shape[1] + 0.05


@pytest.mark.slow
def test_two_processes_of_two_devices_are_one_process_of_four(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = results(*(start((2, 2), 2, port, 2, i, tmp_path) for i in range(2)))
    assert first == second
    same(first, alone)
    [one] = results(start((2, 2), 4))
    same(first, one)
    assert first["bytes"] == one["bytes"]


@pytest.mark.slow
def test_a_sample_and_its_noise_are_the_same_on_one_device_and_on_eight(tmp_path):
    process, params = started(8, "draws.py", tmp_path / "drawn.npz"), draws.parameters()
    here = {"noise": draws.noise(params, 64)} | {solver: draws.images(params, solver, 64) for solver in draws.SOLVERS}
    _, said = process.communicate(timeout=500)
    assert process.returncode == 0, said[-3000:]
    there = np.load(tmp_path / "drawn.npz")
    assert there["devices"] == 8 and jax.device_count() == 1
    np.testing.assert_array_equal(there["noise"], here.pop("noise"))
    # Guidance needs no sample of another device.
    here["guided"], _ = draws.guided(params, 64)
    assert list(there["said"]) == []
    for solver, images in here.items():
        assert images.std() > 0.2
        np.testing.assert_allclose(there[solver], images, atol=1e-4, rtol=0, err_msg=solver)


@pytest.mark.parametrize("shape", [(2, 1), (-1, -1), (0, 1), (1,), (-1, 3)])
def test_a_mesh_that_does_not_fit_is_one_line(shape):
    with pytest.raises(InputError, match=r"config\.training\.mesh=.* does not fit 1 device"):
        meshes.make_mesh(shape)


def test_the_rest_of_the_devices_go_where_minus_one_stands():
    assert dict(meshes.make_mesh((-1, 1)).shape) == dict(meshes.make_mesh((1, -1)).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize(
    "given, said",
    [
        (("host:1", 2, None), "--process is missing"),
        ((None, 2, 0), "--coordinator is missing"),
        (("host:1", 2, 2), "--process=2 is out of range; allowed: 0 to 1"),
    ],
)
def test_half_given_processes_are_one_line(given, said):
    with pytest.raises(InputError, match=said):
        meshes.connect(*given)


def test_alone_there_is_nothing_to_connect(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "TPU", "MEGASCALE")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: pytest.fail("connected"))
    meshes.connect(None, None, None)
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: called.append(args))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    meshes.connect(None, None, None)
    assert called == [(None, None, None)]
