"""The scripts as a user runs them, each in a process of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdiff.training import checkpoint

ROOT = Path(__file__).parent.parent

TINY = [
    "--config=configs/digits.py",
    "--config.steps=6",
    "--config.batch_size=8",
    "--config.model.channels=8",
    "--config.model.multipliers=1",
    "--config.model.attention=0",
    "--config.training.log_every=2",
    "--config.training.save_every=3",
    "--config.sampling.steps=2",
    "--config.sampling.num=10",
]


def script(*args, **env):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}, timeout=300)


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def sampled(workdir, tmp_path):
    """sample.py films, goes on with a large request, and edits pictures; nothing it refuses is drawn first."""
    sample = ["sample.py", f"--workdir={workdir}", "--steps=4"]
    done = script(*sample, "--num=4", f"--out={tmp_path}/a.png", f"--trajectory={tmp_path}/film.gif")
    assert done.returncode == 0 and "film.gif" in done.stdout, done.stderr
    assert done.stdout.index("a.png") < done.stdout.index("film.gif")  # the images first: a film may fail
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 4

    one = script(*sample[:2], "--steps=1", "--num=4", f"--out={tmp_path}/one.png", f"--trajectory={tmp_path}/one.gif")
    assert one.returncode == 2 and one.stderr.count("\n") == 1 and "at least 2 sampling steps to show, got steps=1" in one.stderr
    assert "drawing" not in one.stdout and not list(tmp_path.glob("one.*"))

    large = [*sample, "--num=600", f"--out={tmp_path}/many.npz"]
    process = subprocess.Popen([sys.executable, *large], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "many.npz.parts"
    while process.poll() is None and not (parts / "part_0000000.npy").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    first = (parts / "part_0000000.npy").stat().st_mtime_ns if parts.exists() else None
    if first is not None:  # killed in time: another request is refused, the same one goes on
        other = script(*large, "--seed=1")
        assert other.returncode == 2 and "holds part of another request" in other.stderr
        assert (parts / "part_0000000.npy").stat().st_mtime_ns == first
    else:
        assert not parts.exists()
        parts.mkdir()
        (parts / "part_0000000.npy").write_bytes(b"")
        (parts / "request.json").write_text("another")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    # A request that keeps no parts itself leaves these alone.
    for flags in (["--num=3"], ["--num=600", f"--image={tmp_path}/black.png", "--strength=0.5"]):
        small = script(*large, *flags)
        assert small.returncode == 2 and small.stderr.count("\n") == 1, small.stderr
        assert f"{parts} holds part of a larger request" in small.stderr and "drawing" not in small.stdout
        assert (parts / "part_0000000.npy").exists() and ((tmp_path / "many.npz").exists() == (first is None))
    if first is None:
        shutil.rmtree(parts)
    assert script(*large).returncode == 0 and not parts.exists()
    images = np.load(tmp_path / "many.npz")["images"]
    assert images.shape == (600, 8, 8, 1)
    again = script(*sample, "--num=600", f"--out={tmp_path}/again.npz")
    # The last part, of fewer images, is filled up, so that one program does for all.
    assert again.returncode == 0 and again.stderr.count("compiling the sampler") == 1, again.stderr
    assert not list(tmp_path.glob("*.partial"))
    np.testing.assert_array_equal(np.load(tmp_path / "again.npz")["images"], images)

    picture, mask = images[0, ..., 0], np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask // 2).save(tmp_path / "soft.png")
    edit = [*sample, f"--image={tmp_path}/picture.png", "--num=3", f"--out={tmp_path}/edited.npz"]
    assert script(*edit, f"--mask={tmp_path}/mask.png", "--resample=2").returncode == 0
    edited = np.load(tmp_path / "edited.npz")["images"]
    assert (edited[:, 4:, :, 0] == picture[4:]).all() and (edited[:, :4, :, 0] != picture[:4]).any()
    for flags, said in (
        ([], "--image needs --mask=FILE, or --strength below 1"),
        (["--strength=2"], "strength=2.0 is out of range"),
        ([f"--mask={tmp_path}/many.npz"], "is not a picture that can be read"),
        ([f"--mask={tmp_path}/a.png"], "pixels; this model's images have 8x8"),
        ([f"--mask={tmp_path}/soft.png"], "soft.png has pixels of value 127; a mask is black (0) and white (255)"),
    ):
        refused = script(*edit, *flags)
        assert refused.returncode == 2 and said in refused.stderr and refused.stderr.count("\n") == 1, (flags, refused.stderr)


@pytest.mark.slow
def test_train_then_go_on_then_sample(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = script("train.py", *TINY, "--config.steps=4", f"--workdir={parts}")
    assert first.returncode == 0, first.stderr
    assert "compiling" in first.stdout and "done: step 4" in first.stdout
    second = script("train.py", *TINY, f"--workdir={parts}")
    assert second.returncode == 0, second.stderr
    assert "going on from step 4" in second.stdout
    third = script("train.py", *TINY, f"--workdir={parts}")
    assert third.returncode == 0 and "nothing to do" in third.stdout
    assert script("train.py", *TINY, f"--workdir={whole}").returncode == 0
    assert losses(parts) == losses(whole) and sorted(losses(whole)) == [2, 4, 6]
    a, b = (np.asarray(Image.open(d / "samples" / "step_0000006.png")) for d in (whole, parts))
    assert (a == b).all() and len(np.unique(a)) > 20

    figures = script("evaluate.py", f"--workdir={parts}", "--metrics=bpd_elbo,bpd_ode", "--num=5", "--terms=3", "--steps=3")
    assert figures.returncode == 0, figures.stderr
    assert "bpd_elbo: " in figures.stdout and "bpd_ode: " in figures.stdout and "on 5 images" in figures.stdout
    row = json.loads(next((parts / "evaluation").glob("bpd_elbo*.json")).read_text())
    shutil.rmtree(parts / "evaluation")
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "16"}
    split = script("evaluate.py", f"--workdir={parts}", "--num=5", "--terms=3", **devices)
    assert "4 cpu device(s)" in split.stdout, split.stderr
    again = json.loads(next((parts / "evaluation").glob("bpd_elbo*.json")).read_text())
    assert again.pop("bits_per_dim") == pytest.approx(row.pop("bits_per_dim"), rel=1e-5) and again["n"] == row["n"] == 5
    wrong = script("evaluate.py", f"--workdir={parts}", "--metrics=bpd")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("evaluate.py: metrics='bpd' is unknown; allowed: bpd_elbo, bpd_ode, fid, ")

    drawn = script("sample.py", f"--workdir={parts}", "--num=3", "--label=7", "--steps=2", f"--out={tmp_path}/x.npz")
    assert drawn.returncode == 0, drawn.stderr
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["images"].shape == (3, 8, 8, 1) and arrays["images"].dtype == np.uint8
    assert arrays["labels"].tolist() == [7, 7, 7]
    assert script("sample.py", f"--workdir={parts}", "--num=3", "--solver=heun", "--steps=2").returncode == 0
    sampled(parts, tmp_path)
    assert Image.open(parts / "samples.png").size == (10 * 33 + 1, 34)

    other = script("train.py", *TINY, "--config.model.channels=16", f"--workdir={parts}")
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "holds another experiment: its model.channels is 8, now 16" in other.stderr


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    args = [sys.executable, "train.py", *TINY, "--config.steps=100000", f"--workdir={tmp_path}"]
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path):
            assert process.poll() is None
            time.sleep(0.2)
        second = script("train.py", *TINY, f"--workdir={tmp_path}")
        assert second.returncode == 2 and "is in use: another train.py" in second.stderr and second.stderr.count("\n") == 1
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by SIGTERM at step" in out
    stopped = int(out.split("at step ")[1].split(",")[0])
    again = script("train.py", *TINY, f"--config.steps={stopped + 2}", f"--workdir={tmp_path}")
    assert again.returncode == 0 and f"going on from step {stopped}" in again.stdout


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    args = [*TINY, "--config.steps=60", "--config.training.save_every=3", "--config.training.sample_every=1000"]
    assert script("train.py", *args, f"--workdir={tmp_path}/whole").returncode == 0
    random = np.random.default_rng(0)
    for first in (1, 20):  # killed as soon as there is a checkpoint of this step or a later one, perhaps within the next save
        process = subprocess.Popen(
            [sys.executable, "train.py", *args, f"--workdir={tmp_path}/killed"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and (checkpoint.newest(tmp_path / "killed") or 0) < first:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.wait()
    last = script("train.py", *args, f"--workdir={tmp_path}/killed")
    assert last.returncode == 0 and "going on from step" in last.stdout, last.stderr
    a, b = (saved_arrays(tmp_path / name, 60) for name in ("whole", "killed"))
    assert a.keys() == b.keys() and len(a) > 30
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def saved_arrays(workdir, step):
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step)
    trees = {item: ocp.StandardCheckpointer().restore(folder / item) for item in ("state", "ema")}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_nan_stops_the_run_or_is_skipped_and_nothing_bad_is_saved(mode, tmp_path):
    done = script("tests/injected.py", "7", mode, str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    if mode == "stop":
        assert done.returncode == 1 and "Traceback" not in done.stderr
        said = done.stderr.replace("\r", "\n").splitlines()[-1]
        assert "step 7 is not finite: loss nan" in said and "worst at logsnr" in said and "nothing is saved after step 5" in said
        assert checkpoint.newest_good(tmp_path) == (5, {}) and [row["step"] for row in rows] == [5]
    else:
        assert done.returncode == 0, done.stderr
        assert checkpoint.newest_good(tmp_path) == (14, {})
        assert [row.get("skipped") for row in rows] == [None, 1, None]
    newest = checkpoint.newest(tmp_path)
    assert all(np.isfinite(a).all() for a in saved_arrays(tmp_path, newest).values())


@pytest.mark.slow
def test_the_dry_run_tells_what_the_run_takes_and_leaves_nothing_behind(tmp_path):
    done = script("train.py", *TINY, "--config.training.mesh=(-1, 1)", "--dry_run", f"--workdir={tmp_path}/w")
    assert done.returncode == 0, done.stderr
    for said in ("down0_0_block", "GFLOP an image", "MiB a device", "it fits", "s a step"):
        assert said in done.stdout
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_the_dry_run_needs_no_data_and_tells_what_each_of_eight_devices_holds(tmp_path):
    where = ["--config=configs/mnist.py", "--config.data_dir=/nowhere", "--config.training.mesh=(1, 8)", f"--workdir={tmp_path}/w"]
    done = script("train.py", *where, *TINY[2:6], "--dry_run", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert done.returncode == 0, done.stderr
    for said in ("8 x cpu; batch 8, 1 a device", "MiB, whole on each", "it fits", "s a step"):
        assert said in done.stdout
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_eight_devices_train_as_one(tmp_path):
    one = script("train.py", *TINY, f"--workdir={tmp_path}/1")
    many = script("train.py", *TINY, f"--workdir={tmp_path}/8", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert one.returncode == 0 and many.returncode == 0, one.stderr + many.stderr
    assert "8 cpu device(s)" in many.stdout
    a, b = losses(tmp_path / "1"), losses(tmp_path / "8")
    assert a.keys() == b.keys()
    np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, said",
    [
        (["train.py"], "Give --config=configs/digits.py"),
        (["train.py", "--config=configs/digit.py"], "did you mean 'configs/digits.py'"),
        (["train.py", "--config=configs/digits.py", "--config.stpes=3"], "unknown config key config.stpes; did you mean 'steps'"),
        (["train.py", "--config=configs/digits.py", "--config.steps=many"], "--config.steps=many"),
        (["train.py", "--config=configs/digits.py", "--config.data.name=digit"], "digit"),
        (["train.py", "--config=configs/cifar.py", "--config.data_dir=/nowhere"], "/nowhere"),
        (["train.py", "--config=configs/digits.py", "--config.sampling.steps=1001"], "1 to 1000"),
        (["train.py", "--config=configs/digits.py", "--config.sampling.solver=dimm"], "did you mean 'ddim'"),
        (["train.py", "--config=configs/digits.py", "--config.process.drop_label=0.0"], "drop_label above 0"),
        (["sample.py", "--workdir=/nowhere"], "/nowhere is not there"),
        (["sample.py", "--workdir=/tmp", "--out=x.jpg"], "neither a .png nor an .npz file"),
        (["sample.py", "--workdir=/tmp", "--setps=3"], "Did you mean: steps"),
        (["sample.py", "--workdir=/tmp", "--mask=m.png"], "edit a picture; give it with --image=FILE"),
        (["sample.py", "--workdir=/tmp", "--trajectory=x.jpg"], "x.jpg is no .gif or .png file"),
        (["sample.py", "--workdir=/tmp", "--trajectory=x.gif", "--image=i.png", "--strength=0.5"], "give one of the two"),
        (["sample.py", "--workdir=/tmp", "--num=0"], "flag --num=0: 0 is not a positive integer"),
        (["sample.py", "--workdir=/tmp", "--num=-1"], "flag --num=-1: -1 is not a positive integer"),
        (["sample.py", "--workdir=/tmp", "--seed=99999999999999999999"], "is not an integer in the range [0, 4294967295]"),
        (["sample.py", "--workdir=/tmp", "--seed=-1"], "is not an integer in the range [0, 4294967295]"),
    ],
    ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else "",
)
def test_wrong_input_is_one_line_on_stderr_and_exit_code_2(args, said, tmp_path):
    done = script(*args, *([f"--workdir={tmp_path}/w"] if args[0] == "train.py" else []))
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "w" / "checkpoints").exists()


def pair(workdir, *more):
    """train.py in two processes of two fake devices each, on one workdir."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "NPROC": "16"}
    args = [sys.executable, "train.py", *TINY, "--config.training.mesh=(2, 2)", f"--workdir={workdir}", *more]
    args += [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    return [
        subprocess.Popen([*args, f"--process={i}"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]


@pytest.mark.slow
def test_two_processes_share_a_workdir_stop_together_and_go_on(tmp_path):
    first = pair(tmp_path, "--config.steps=100000")
    while not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path):
        assert all(process.poll() is None for process in first), first[0].communicate()
        time.sleep(0.2)
    first[1].send_signal(signal.SIGTERM)  # the platform tells one; both must stop after the same step
    told = [process.communicate(timeout=200) for process in first]
    assert [process.returncode for process in first] == [0, 0], told
    assert "2 process(es)" in told[0][0] and "stopped by" in told[0][0] and "step" not in told[1][0]
    stopped = checkpoint.newest_good(tmp_path)
    assert stopped[0] is not None and not stopped[1]

    again = script("train.py", *TINY, f"--config.steps={stopped[0] + 2}", f"--workdir={tmp_path}")
    assert again.returncode == 0 and f"going on from step {stopped[0]}" in again.stdout, again.stderr
    rows = losses(tmp_path)
    assert rows[2] == pytest.approx(rows_alone(tmp_path / "alone")[2], rel=1e-4)


def rows_alone(workdir):
    assert script("train.py", *TINY, "--config.steps=2", f"--workdir={workdir}").returncode == 0
    return losses(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
    "process",
    [
        ("loss=vlb", "draw=draw_importance(20, history=1)", "schedule=linear_beta(20)", "target=eps"),
        ("loss=bound", "draw=draw_uniform(0.0, 1.0)", "schedule=learned(-6.0, 8.0, features=16)", "target=eps"),
    ],
    ids=["importance", "learned-schedule"],
)
def test_what_training_carries_besides_parameters_goes_on_too(tmp_path, process):
    flags = [*TINY, *(f"--config.process.{key}" for key in process)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for command in (
        [*flags, f"--workdir={whole}"],
        [*flags, "--config.steps=3", f"--workdir={parts}"],
        [*flags, f"--workdir={parts}"],
    ):
        done = script("train.py", *command)
        assert done.returncode == 0, done.stderr
    assert losses(parts)[6] == losses(whole)[6]
    a, b = (np.asarray(Image.open(d / "samples" / "step_0000006.png")) for d in (whole, parts))
    assert (a == b).all()
    figures = script("evaluate.py", f"--workdir={parts}", "--metrics=bpd_elbo,bpd_ode", "--num=3", "--terms=3", "--steps=3")
    assert figures.returncode == 0 and "bpd_ode: " in figures.stdout, figures.stderr
