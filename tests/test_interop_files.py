"""Files of tensors: what is read, what is refused and in which words."""

import gc
import io
import json
import math
import pickle
import weakref
import zipfile

import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.interop import files, folder, mapping, torchfile


def tensors():
    rng = np.random.default_rng(0)
    return {"a.weight": rng.standard_normal((2, 3)).astype(np.float32), "a.bias": np.arange(3, dtype=np.int64)}


def same(one, other):
    assert set(one) == set(other)
    for name, a in one.items():
        np.testing.assert_array_equal(a, other[name])
        assert a.dtype == other[name].dtype


class Named:
    """Pickled as a global of that name, or as what calling it with these arguments gives."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


class Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python can write names of modules that are not there
    def persistent_id(self, thing):
        return thing.arguments if isinstance(thing, Named) and thing.name == "persistent" else None

    def save(self, thing, save_persistent_id=True):
        if isinstance(thing, Named) and thing.name != "persistent":
            self.write(b"c" + f"{thing.module}\n{thing.name}\n".encode())
            if thing.arguments:
                super().save(thing.arguments)
                self.write(b"R")
            return
        super().save(thing, save_persistent_id)


def pickled(tree):
    out = io.BytesIO()
    Pickler(out, 2).dump(tree)
    return out.getvalue()


def storage(key, kind, count):
    return Named("", "persistent", "storage", Named("torch", kind), key, "cpu", count)


def tensor(key, kind, offset, shape, stride, count):
    return Named("torch._utils", "_rebuild_tensor_v2", storage(key, kind, count), offset, shape, stride, False, {})


def torch_zip(path, tree, entries):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(tree))
        for key, a in entries.items():
            archive.writestr(f"archive/data/{key}", a.tobytes())
    return path


def test_safetensors_and_npz_go_out_and_come_back(tmp_path):
    files.write(tmp_path / "a.safetensors", tensors())
    same(files.read(tmp_path / "a.safetensors"), tensors())
    np.savez(tmp_path / "a.npz", **tensors())
    same(files.read(tmp_path / "a.npz"), tensors())


def test_low_precision_safetensors_keep_their_values(tmp_path):
    values = np.array([1.0, -2.5, 3.140625], np.float32)
    header = json.dumps({"h": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw)
    got = files.read(tmp_path / "b.safetensors")["h"]
    assert got.dtype.name == "bfloat16"
    np.testing.assert_array_equal(got.astype(np.float32), values)


def test_the_content_says_what_a_file_is(tmp_path):
    files.write(tmp_path / "a.bin", tensors())
    same(files.read(tmp_path / "a.bin"), tensors())


def test_torch_archive_with_views_and_nesting(tmp_path):
    numbers = np.arange(6, dtype=np.float32)
    # A transposed view, another from the third number on, and one that shares their storage.
    tree = {
        "state_dict": {
            "t": tensor("0", "FloatStorage", 0, (3, 2), (1, 3), 6),
            "from2": tensor("0", "FloatStorage", 2, (2,), (1,), 6),
        },
        "list": [tensor("1", "HalfStorage", 0, (), (), 1)],
        "step": 7,
    }
    path = torch_zip(tmp_path / "a.pt", tree, {"0": numbers, "1": np.float16([1.5])})
    same(
        files.read(path),
        {"state_dict.t": numbers.reshape(2, 3).T, "state_dict.from2": numbers[2:4], "list.0": np.float16(1.5).reshape(())},
    )
    assert torchfile.read(path)["step"] == 7
    same(files.below(files.read(path), "list."), {"0": np.float16(1.5).reshape(())})


def test_older_stream_of_pickles(tmp_path):
    numbers = np.arange(4, dtype=np.float32)
    legacy = Named("", "persistent", "storage", Named("torch", "FloatStorage"), "17", "cpu", 4, None)
    tree = {"w": Named("torch._utils", "_rebuild_tensor_v2", legacy, 0, (2, 2), (2, 1), False, {})}
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickled(each) for each in (torchfile.MAGIC, 1001, info, tree, ["17"]))
    path = tmp_path / "old.pth"
    path.write_bytes(head + (4).to_bytes(8, "little") + numbers.tobytes())
    same(files.read(path), {"w": numbers.reshape(2, 2)})
    path.write_bytes(head + (4).to_bytes(8, "little") + numbers.tobytes()[:-1])
    with pytest.raises(InputError, match=r"old.pth is no file of torch.save, or is cut short"):
        files.read(path)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    path = torch_zip(tmp_path / "evil.pt", {"w": Named("os", "mkdir", str(tmp_path / "ran"))}, {})
    with pytest.raises(InputError, match=r"evil.pt: its pickle asks for os.mkdir, which is refused"):
        files.read(path)
    (tmp_path / "evil.pth").write_bytes(pickled(Named("os", "mkdir", str(tmp_path / "ran"))))
    with pytest.raises(InputError, match=r"os.mkdir, which is refused"):
        files.read(tmp_path / "evil.pth")
    np.savez(tmp_path / "evil.npz", a=np.array([{1: 2}], object))
    with pytest.raises(InputError, match="pickle could run code"):
        files.read(tmp_path / "evil.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("view", [(3, (2, 2), (2, 1)), (0, (2, 2), (2, -1)), (0, (2,), (1 << 40,)), (-1, (1,), (1,))])
def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path, view):
    offset, shape, stride = view
    path = torch_zip(
        tmp_path / "a.pt", {"w": tensor("0", "FloatStorage", offset, shape, stride, 4)}, {"0": np.zeros(4, np.float32)}
    )
    with pytest.raises(InputError, match="reaches outside its storage of 4 numbers"):
        files.read(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.pt"])
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_files_cut_short_are_refused_in_one_line(tmp_path, name, share):
    path = tmp_path / name
    if name == "a.safetensors":
        files.write(path, tensors())
    elif name == "a.npz":
        np.savez(path, **tensors())
    else:
        torch_zip(path, {"w": tensor("0", "FloatStorage", 0, (1000,), (1,), 1000)}, {"0": np.zeros(1000, np.float32)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match="cut short") as error:
        files.read(path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_missing_empty_and_foreign_files(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        files.read(tmp_path / "none.pt")
    for content in (b"", b"hello, world, this is text", bytes(100)):
        (tmp_path / "odd").write_bytes(content)
        with pytest.raises(InputError, match="odd"):
            files.read(tmp_path / "odd")


def test_safetensors_in_parts(tmp_path):
    a = tensors()
    files.write(tmp_path / "one.safetensors", {"a.weight": a["a.weight"]})
    files.write(tmp_path / "two.safetensors", {"a.bias": a["a.bias"]})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "one.safetensors", "a.bias": "two.safetensors"}}))
    same(files.read(index), a)
    index.write_text(json.dumps({"weight_map": {"b": "one.safetensors"}}))
    with pytest.raises(InputError, match=r"names b, which one.safetensors does not hold"):
        files.read(index)
    for wrong in ({"weight_map": ["a"]}, {"weight_map": {"a": 3}}, {}, []):
        index.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="has no weight_map of names to files"):
            files.read(index)


SHAPES = {"params": {"c": {"kernel": np.zeros((3, 3, 2, 4)), "bias": np.zeros(4)}, "d": {"kernel": np.zeros((2, 5))}}}
ROWS = [*mapping.module("c", "conv", mapping.conv), *mapping.module("d", "lin", mapping.pointwise, bias=False)]


def state():
    rng = np.random.default_rng(1)
    return {
        "conv.weight": rng.normal(size=(4, 2, 3, 3)),
        "conv.bias": rng.normal(size=4),
        "lin.weight": rng.normal(size=(5, 2, 1, 1)),
    }


def test_mapping_there_and_back():
    params = mapping.load(SHAPES, ROWS, state())
    assert params["params"]["c"]["kernel"][2, 1, 0, 3] == np.float32(state()["conv.weight"][3, 0, 2, 1])
    assert params["params"]["d"]["kernel"][1, 4] == np.float32(state()["lin.weight"][4, 1, 0, 0])
    same(mapping.save(params, ROWS), {name: a.astype(np.float32) for name, a in state().items()})


def test_mapping_names_what_does_not_fit():
    lost = {name: a for name, a in state().items() if name != "conv.bias"}
    with pytest.raises(InputError, match=r"tensor conv.bias is missing"):
        mapping.load(SHAPES, ROWS, lost)
    with pytest.raises(InputError, match=r"tensor odd belongs to nothing"):
        mapping.load(SHAPES, ROWS, state() | {"odd": np.zeros(1)})
    mapping.load(SHAPES, ROWS, state() | {"odd": np.zeros(1)}, ignored=("od",))
    with pytest.raises(InputError, match=r"tensor conv.weight has shape \(4, 2, 1, 1\), this architecture's has \(4, 2, 3, 3\)"):
        mapping.load(SHAPES, ROWS, state() | {"conv.weight": np.zeros((4, 2, 1, 1))})
    for bad in (np.nan, np.inf, 1e300):  # the last is too large for float32
        with pytest.raises(InputError, match=r"tensor conv.bias has numbers that are not finite in float32"):
            mapping.load(SHAPES, ROWS, state() | {"conv.bias": np.array([0, 0, bad, 0])})


def test_what_trainers_leave_beside_the_tensors_is_passed_over_and_does_nothing(tmp_path):
    tree = {
        "w": tensor("0", "FloatStorage", 0, (2,), (1,), 2),
        "args": Named("argparse", "Namespace", "lr", 1e-4),
        "callbacks": {"saver": Named("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")},
        "best": Named("numpy.core.multiarray", "scalar", Named("numpy", "dtype", "f8"), Named("_codecs", "encode", "x", "latin1")),
    }
    numbers = np.arange(2, dtype=np.float32)
    same(files.read(torch_zip(tmp_path / "a.ckpt", tree, {"0": numbers})), {"w": numbers})
    with pytest.raises(InputError, match=r"its pickle asks for pytorch_lightning.callbacks.model_checkpoint.os"):
        files.read(torch_zip(tmp_path / "b.ckpt", {"x": Named("pytorch_lightning.callbacks.model_checkpoint", "os")}, {}))


def test_tensors_are_let_go_after_their_last_use(tmp_path):
    """A file of weights may be as large as half the memory: nothing may hold it until the garbage collector happens to run."""
    path = torch_zip(tmp_path / "a.pt", {"w": tensor("0", "FloatStorage", 0, (3,), (1,), 3)}, {"0": np.arange(3, dtype=np.float32)})
    gc.disable()
    try:
        held = weakref.ref(files.read(path)["w"].base)
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("kind", "able", "unable"),
    [
        (folder.COUNT, [1, 7], [0, -1, 1.0, True, "1", None, [1]]),
        (folder.OFFSET, [0, 7], [-1, 0.0, False, None]),
        (folder.NUMBER, [0, 0.5, 2], [-1, math.inf, math.nan, True, "0", None]),
        (folder.POSITIVE, [1e-6, 2], [0, -1, math.inf, "1", None]),
        (folder.FLAG, [True, False], [0, 1, None, "no"]),
        (folder.COUNTS, [[1, 2], (3,)], [[], [0], [1.5], 3, None, "12"]),
        (folder.WORDS, [["a"], ("a", "b")], [[], "a", [1], None]),
        (folder.SIZE, [8, [8, 16]], [0, [8], [8, 8, 8], [], "8", None]),
        (folder.or_null(folder.COUNT), [None, 2], [0, "1"]),
    ],
)
def test_a_value_of_a_foreign_config_is_of_its_kind_or_named(kind, able, unable):
    for value in able:
        folder.check("config.json", {"key": value}, {"key": kind, "other": kind})
    for value in unable:
        with pytest.raises(InputError) as caught:
            folder.check("config.json", {"key": value}, {"key": kind})
        assert str(caught.value) == f"config.json: key={value!r} is out of range; it is {kind.words}"
