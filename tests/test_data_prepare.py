"""The TF-free preparer, against small archives served on this machine."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

import jaxdiff.data.prepare as preparing
from jaxdiff.data import load
from jaxdiff.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")

# Six batches of four records: the label, then the red, green and blue planes. NumPy keeps raw Philox words for ever.
RECORDS = np.random.Philox(0).random_raw(24 * 3073).astype(np.uint8).reshape(6, 4, 3073)
RECORDS[..., 0] %= 10
IMAGES = RECORDS[..., 1:].reshape(24, 3, 32, 32).transpose(0, 2, 3, 1)
DIGITS = (np.arange(9 * 28 * 28) * 31 % 256).astype(np.uint8).reshape(9, 28, 28)


def cifar10_archive():
    file = io.BytesIO()
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, records in reversed(list(zip(names, RECORDS, strict=True))):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = records.nbytes
            archive.addfile(member, io.BytesIO(records.tobytes()))
    return file.getvalue()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; what begins with "short" breaks off half-way, and "stuck" stops there until the client dies."""

    def do_GET(self):
        name = self.path.strip("/")
        if not name.startswith(("short", "stuck")):
            return super().do_GET()
        content = (Path(self.directory) / "cifar.tar.gz").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if name.startswith("stuck"):
            self.rfile.read(1)  # returns when the client has closed

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder that is served, and its URL."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "cifar.tar.gz").write_bytes(cifar10_archive())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(served, name, content=None):
    content = (served[0] / "cifar.tar.gz").read_bytes() if content is None else content
    return preparing.Download(f"{served[1]}/{name}", len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def cifar10(served):
    return preparing.CIFAR10._replace(downloads=(download(served, "cifar.tar.gz"),))


def refused(call, words):
    with pytest.raises(InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def nothing_left(data_dir):
    names = sorted(path.relative_to(data_dir).as_posix() for path in data_dir.rglob("*"))
    return names == ["downloads", "downloads/cifar10.lock"]


def test_cifar10_reads_back_through_load(cifar10, tmp_path, capsys):
    assert preparing.prepare(cifar10, tmp_path) == tmp_path / "cifar10" / "3.0.2"
    assert "cifar.tar.gz: 100%" in capsys.readouterr().err, "no progress bar"
    for split, expected, labels in (("train", IMAGES[:20], RECORDS[:5]), ("test", IMAGES[20:], RECORDS[5:])):
        data = load("cifar10", split, tmp_path, tmp_path / "cache")
        order = [next(i for i in range(len(expected)) if (expected[i] == image).all()) for image in data.images]
        assert sorted(order) == list(range(len(expected)))
        assert (data.labels == labels[..., 0].reshape(-1)[order]).all()
    assert data.classes[:3] == ("airplane", "automobile", "bird") and data.classes[9] == "truck"
    ids = tfds.builder_from_directory(tmp_path / "cifar10" / "3.0.2").as_data_source("test")
    assert sorted(example["id"] for example in ids) == [f"test_{i:05d}".encode() for i in range(4)]
    assert sorted(path.name for path in (tmp_path / "downloads").iterdir()) == ["cifar.tar.gz", "cifar10.lock"]


def test_decoded_images_keep_their_digests(cifar10, tmp_path):
    preparing.prepare(cifar10, tmp_path)
    images = load("cifar10", "test", tmp_path, tmp_path / "cache").images
    digests = sorted(hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in images)
    assert digests == ["0b034378e026b129", "4bd64009e59233f5", "a1b052c5e8f75cc1", "c774a93a4e1d0ac2"]


def test_mnist_reads_back_through_load(served, tmp_path):
    labels = np.arange(9, dtype=np.uint8)
    contents = []
    for part in (slice(0, 6), slice(6, 9)):
        contents += [b"\0" * 16 + DIGITS[part].tobytes(), b"\0" * 8 + labels[part].tobytes()]
    packed = [gzip.compress(content) for content in contents]
    for i, content in enumerate(packed):
        (served[0] / f"{i}.gz").write_bytes(content)
    recipe = preparing.MNIST._replace(downloads=tuple(download(served, f"{i}.gz", c) for i, c in enumerate(packed)))
    preparing.prepare(recipe, tmp_path)
    train, test = (load("mnist", split, tmp_path, tmp_path / "cache") for split in ("train", "test"))
    assert sorted(train.labels) == list(range(6)) and sorted(test.labels) == [6, 7, 8] and test.images.shape[3] == 1
    for data in (train, test):
        assert (data.images[..., 0] == DIGITS[data.labels]).all()


def test_what_is_there_is_not_made_again(cifar10, tmp_path, capsys):
    preparing.prepare(cifar10, tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    broken = cifar10._replace(downloads=(cifar10.downloads[0]._replace(url="http://127.0.0.1:9/no"),))
    capsys.readouterr()
    preparing.prepare(broken, tmp_path)
    assert capsys.readouterr().out == f"cifar10 3.0.2 is already in {tmp_path}\n"
    assert preparing.main(["cifar10", f"--data_dir={tmp_path}"]) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_set_in_another_format_is_not_there(cifar10, tmp_path, capsys):
    """What training refuses is no reason to say that all is done."""
    info = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text(json.dumps({"name": "cifar10", "fileFormat": "tfrecord"}))
    refused(
        lambda: preparing.prepare(cifar10, tmp_path),
        "holds tfrecord files, and only array_record can be read; "
        "to get it: python -m jaxdiff.data.prepare cifar10 --data_dir=ANOTHER_DIR",
    )
    assert preparing.main(["cifar10", f"--data_dir={tmp_path}"]) == 2
    assert "already" not in capsys.readouterr().out
    info.write_text(json.dumps({"name": "cifar10", "fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}))
    assert preparing.prepare(cifar10, tmp_path) == info.parent


def test_a_file_with_the_right_digest_is_not_downloaded(cifar10, served, tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "cifar.tar.gz").write_bytes((served[0] / "cifar.tar.gz").read_bytes())
    offline = cifar10._replace(downloads=(cifar10.downloads[0]._replace(url="http://127.0.0.1:9/cifar.tar.gz"),))
    preparing.prepare(offline, tmp_path)
    assert (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").exists()


def test_a_wrong_file_in_the_way_is_downloaded_again(cifar10, tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "cifar.tar.gz").write_bytes(b"half of it")
    preparing.prepare(cifar10, tmp_path)
    assert (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").exists()


def test_a_wrong_digest_is_refused_and_the_file_removed(cifar10, tmp_path):
    right = cifar10.downloads[0]
    wrong = cifar10._replace(downloads=(right._replace(sha256="0" * 64),))
    refused(lambda: preparing.prepare(wrong, tmp_path), f"sha256 {'0' * 64}, found {right.size} bytes .*{right.sha256}")
    assert nothing_left(tmp_path)
    preparing.prepare(cifar10, tmp_path)


@pytest.mark.parametrize("name, words", [("short.gz", "is not the file expected"), ("no.gz", "file not found")])
def test_a_failed_download_is_one_line(cifar10, served, tmp_path, name, words):
    recipe = cifar10._replace(downloads=(cifar10.downloads[0]._replace(url=f"{served[1]}/{name}"),))
    refused(lambda: preparing.prepare(recipe, tmp_path), f"(?i){name}.*{words}")
    assert nothing_left(tmp_path)


def test_no_more_than_the_expected_size_is_downloaded(cifar10, tmp_path):
    small = cifar10._replace(downloads=(cifar10.downloads[0]._replace(size=10),))
    refused(lambda: preparing.prepare(small, tmp_path), "expected 10 bytes .* found 65536 bytes")


def test_a_killed_download_leaves_nothing_that_counts(cifar10, served, tmp_path):
    script = """
import sys
from jaxdiff.data.prepare import CIFAR10, Download, prepare
prepare(CIFAR10._replace(downloads=(Download(sys.argv[1], 10**6, ""),)), sys.argv[2])
"""
    root = str(Path(preparing.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", script, f"{served[1]}/stuck.gz", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
    )
    assert process.stderr.read(8) == b"\rstuck.g"  # the bar: the download has begun
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (partial,) = (tmp_path / "downloads").glob("*.partial")
    assert not (tmp_path / "cifar10").exists()
    preparing.prepare(cifar10, tmp_path)
    assert not partial.exists() and len(load("cifar10", "train", tmp_path, tmp_path / "cache").labels) == 20


def test_the_command_line_prints_one_line_and_leaves_with_2(tmp_path, capsys):
    assert preparing.main(["cifar11", f"--data_dir={tmp_path}"]) == 2
    expected = "error: cannot prepare 'cifar11', only cifar10 and mnist; did you mean 'cifar10'?\n"
    assert capsys.readouterr().err == expected
    (tmp_path / "file").touch()
    assert preparing.main(["mnist", f"--data_dir={tmp_path / 'file'}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot prepare mnist in ") and err.count("\n") == 1


def test_sizes_and_digests_are_those_that_tfds_records():
    recorded = {}
    for name in ("cifar10", "mnist"):
        for line in (Path(tfds.__file__).parent / "url_checksums" / f"{name}.txt").read_text().splitlines():
            url, size, digest, _ = line.split("\t")
            recorded[url] = (int(size), digest)
    for item in preparing.CIFAR10.downloads + preparing.MNIST.downloads:
        assert recorded[item.url] == (item.size, item.sha256)
    assert len(preparing.MNIST.downloads) == 4
