"""The cache: written once, whole or not at all, whatever happens meanwhile."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxdiff.data.cache
from jaxdiff.data import load
from jaxdiff.data.cache import Item, Source, cached
from jaxdiff.errors import InputError

TOTAL = 200  # four chunks

# The toy source, for this process and for others: image i is filled with i and labelled i % 7; `pause(i)` comes first.
TOY = f"""
import numpy as np
from PIL import Image
from jaxdiff.data.cache import Item, Source, cached

def toy(pause=lambda i: None, fingerprint="a"):
    def image(i):
        pause(i)
        return Image.fromarray(np.full((4, 5, 3), i, np.uint8))
    items = lambda start, stop: [Item(f"example {{i}}", i % 7, lambda i=i: image(i)) for i in range(start, stop)]
    return Source("toy", "1.0.0", "train", ("zero", "one"), fingerprint, {TOTAL}, items)
"""
scope: dict = {}
exec(TOY, scope)
toy = scope["toy"]


def assert_good(arrays):
    images, labels = arrays
    assert images.shape == (TOTAL, 4, 5, 3) and images.dtype == np.uint8
    assert (images == np.arange(TOTAL)[:, None, None, None]).all() and labels.dtype == np.int32
    assert (labels == np.arange(TOTAL) % 7).all()


def forbidden(i):
    raise AssertionError("decoded again")


def start(script, *arguments):
    """A Python process with the toy source, running `script`."""
    root = str(Path(jaxdiff.data.cache.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", TOY + textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_decoded_once_into_a_read_only_memory_map(tmp_path, capsys):
    assert_good(cached(toy(), None, tmp_path))
    err = capsys.readouterr().err
    assert "decoding toy train" in err and f"{TOTAL}/{TOTAL}" in err, "no progress bar"
    images, labels = cached(toy(forbidden), None, tmp_path)
    assert_good((images, labels))
    assert isinstance(images, np.memmap) and not images.flags.writeable and capsys.readouterr().err == ""


def test_size_split_and_fingerprint_have_their_own_copies(tmp_path):
    assert_good(cached(toy(), None, tmp_path))
    assert cached(toy(), 2, tmp_path)[0].shape == (TOTAL, 2, 2, 3)
    for other in (toy(forbidden, "b"), toy(forbidden)._replace(split="test"), toy(forbidden)._replace(version="2.0.0")):
        with pytest.raises(InputError, match="decoded again"):
            cached(other, None, tmp_path)


def test_a_changed_folder_is_decoded_again(tmp_path):
    path = tmp_path / "images" / "a.bmp"
    path.parent.mkdir()
    for value, name in ((1, "a"), (2, "a"), (2, "b")):
        for file in path.parent.iterdir():
            file.unlink()
        path = path.with_stem(name)
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)
        os.utime(path, ns=(value, value))  # same name and size, other time
        assert (load("folder", data_dir=path.parent, cache_dir=tmp_path / "cache").images == value).all()
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 3


@pytest.mark.parametrize("file, keep", [("images.npy", -1), ("images.npy", 50), ("labels.npy", -1), ("meta.json", -2)])
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_a_damaged_copy_is_made_again_and_says_so(tmp_path, capsys, file, keep, how):
    cached(toy(), None, tmp_path)
    (path,) = tmp_path.glob(f"*/{file}")
    if how == "cut":
        path.write_bytes(path.read_bytes()[:keep])
    else:
        path.unlink()
    capsys.readouterr()
    assert_good(cached(toy(), None, tmp_path))
    assert f"the cache {path.parent} is damaged; making it again" in capsys.readouterr().err
    assert_good(cached(toy(forbidden), None, tmp_path))


def test_arrays_that_do_not_match_the_description_are_made_again(tmp_path, capsys):
    cached(toy(), None, tmp_path)
    (path,) = tmp_path.glob("*/labels.npy")
    np.save(path, np.zeros(TOTAL - 1, np.int32))
    assert_good(cached(toy(), None, tmp_path))
    assert "damaged" in capsys.readouterr().err


def test_a_killed_build_leaves_nothing_that_counts(tmp_path):
    script = """
        import sys, time
        def pause(i):
            if i == 150:
                print("half", flush=True)
                time.sleep(60)
        cached(toy(pause), None, sys.argv[1])
    """
    process = start(script, tmp_path)
    assert process.stdout.readline() == "half\n", process.stderr.read()
    (partial,) = tmp_path.glob("*.partial")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert (partial / "images.npy").stat().st_size > 64 * 60
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [partial]
    # The next build, even of something else, removes what the dead process left.
    cached(toy()._replace(split="test"), None, tmp_path)
    assert not partial.exists()
    assert_good(cached(toy(), None, tmp_path))


def test_two_processes_share_one_build(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        def pause(i):
            if i == 100:
                print("half", flush=True)
                while not Path(sys.argv[2]).exists(): time.sleep(0.01)
        images, labels = cached(toy(pause), None, sys.argv[1])
        print(images.sum(), labels.sum())
    """
    go = tmp_path / "go"
    first = start(script, tmp_path, go)
    assert first.stdout.readline() == "half\n", first.stderr.read()
    second = start(script, tmp_path, go)
    line = second.stderr.readline()
    assert "waiting for another process" in line, line
    go.touch()
    expected = f"{np.arange(TOTAL).sum() * 60} {(np.arange(TOTAL) % 7).sum()}\n"
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [out for out, _ in outputs] == [expected, expected], "the second process should not decode"
    assert first.returncode == second.returncode == 0 and not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    # A limit on the file size stands for the full disk: writing fails in the same place, with OSError.
    script = """
        import resource, sys
        from jaxdiff.errors import InputError
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            cached(toy(), None, sys.argv[1])
        except InputError as error:
            print(error)
    """
    out, err = start(script, tmp_path).communicate(timeout=60)
    assert f"cannot write the cache in {tmp_path}: File too large" in out and out.count("\n") == 1, err
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_unwritable_cache_dir_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write the cache in .*file/cache: .*another cache_dir"):
        cached(toy(), None, tmp_path / "file" / "cache")


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def interrupt(i):
        if i == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(toy(interrupt), None, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    left = tmp_path / "toy.12345678.partial"
    left.mkdir()
    assert_good(cached(toy(), None, tmp_path))
    assert left.exists(), "without a lock it may belong to a living process"


def test_the_default_place_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert_good(cached(toy(), None, None))
    assert len(list((tmp_path / "jaxdiff").glob("toy-1.0.0-train-full-*/images.npy"))) == 1


def test_an_empty_split_is_refused(tmp_path):
    empty = Source("toy", "", "train", (), "a", 0, lambda start, stop: [Item("", 0, forbidden)])
    with pytest.raises(InputError, match="split 'train' of toy holds no images"):
        cached(empty, None, tmp_path)
