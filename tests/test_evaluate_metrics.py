"""evaluate.py's distances: what is drawn, kept, cached, compared, told and refused; with a stand-in for the feature network."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.flags import FLAGS
from PIL import Image

import jaxdiff as jd
from jaxdiff import data, experiment, training
from jaxdiff import run as runs
from jaxdiff.errors import InputError
from jaxdiff.evaluation import distances, references, report, samples
from jaxdiff.training import checkpoint

ROOT = Path(__file__).parent.parent


class Features(NamedTuple):
    name: str
    digest: str
    apply: object


def features(width=6, seed=0, name="stand-in", channels=7, **also):
    """A random projection of digits, with spatial features and logits as Inception has them."""
    random = np.random.default_rng(seed)
    ways = {"pool": random.normal(size=(64, width)), "spatial": random.normal(size=(64, channels))}
    ways |= {"logits": random.normal(size=(64, 5)), "logits_unbiased": random.normal(size=(64, 5))} | also

    @jax.jit
    def apply(images):
        x = images.reshape(len(images), -1).astype(jnp.float32) / 255
        return {key: x @ jnp.asarray(way, jnp.float32) for key, way in ways.items()}

    return Features(name, f"{name} {width} {seed}", apply)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train").images, data.load("digits", "test").images


@pytest.fixture(scope="module")
def evaluate():
    # Scripts define their flags when imported, some by the same names, and another file's test may have imported train here.
    others = {flag.name: flag for flag in FLAGS.flags_by_module_dict().get("train", [])}
    for name in others:
        delattr(FLAGS, name)
    sys.path.insert(0, str(ROOT))
    try:
        import evaluate as module

        yield module
    finally:
        sys.path.remove(str(ROOT))
        sys.modules.pop("evaluate", None)
        for flag in list(FLAGS.flags_by_module_dict().get("evaluate", [])):
            delattr(FLAGS, flag.name)
        for name, flag in others.items():
            FLAGS[name] = flag


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir whose network says something."""
    workdir, c = tmp_path_factory.mktemp("run"), tiny.config()
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    shapes = jax.eval_shape(lambda key: training.init_state(built, optimizer, c.training.ema, key), jax.random.key(0))
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    params = tiny.noisy(jax.random.key(1), state.params)
    with checkpoint.manager(workdir) as checkpoints:
        checkpoint.save(checkpoints, state._replace(params=params, ema={name: params for name in state.ema}), c)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    """That workdir without what an earlier test wrote beside its checkpoints."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(trained / "checkpoints")
    return tmp_path / "run"


@pytest.fixture
def call(evaluate, workdir, monkeypatch, tmp_path, capsys):
    """evaluate.py in this process, in which every feature network is the stand-in: its output."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate, "features_of", lambda network, weights: features(name=network))

    def run(**settings):
        evaluate.FLAGS.unparse_flags()
        for name in evaluate.FLAGS:
            if evaluate.FLAGS[name].present:
                evaluate.FLAGS[name].unparse()
        evaluate.FLAGS(["evaluate.py", *(f"--{name}={value}" for name, value in {"workdir": workdir, **settings}.items())])
        capsys.readouterr()
        evaluate.main()
        return capsys.readouterr().out

    return run


def told(workdir, metric):
    """The one figure of a metric."""
    (path,) = (workdir / "evaluation").glob(f"{metric}-*.json")
    return json.loads(path.read_text())


# Describing a set of images.


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_a_set_is_described_the_same_in_every_batch_size(digits, size):
    few, seen = digits[1][:70], features()
    found = references.describe(few, seen, size, "few")
    exact = {key: np.asarray(value, np.float64) for key, value in seen.apply(few).items()}
    for key in ("pool", "spatial"):
        np.testing.assert_allclose(found.moments[key].mean, exact[key].mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.moments[key].cov, np.cov(exact[key].T), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.pool, exact["pool"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.logits, exact["logits_unbiased"], rtol=1e-5, atol=1e-5)  # what the score is of
    assert (found.n, found.network, found.digest) == (70, "stand-in", seen.digest) and set(found.moments) == {"pool", "spatial"}


def test_of_a_large_set_moments_are_of_all_and_kept_features_are_spread(digits, monkeypatch):
    monkeypatch.setattr(references, "KEPT", 10)
    images, seen = digits[1][:100], features()
    found = references.describe(images, seen, 32, "many")
    rows = references.kept_rows(100)
    assert rows[[0, -1]].tolist() == [0, 99] and np.diff(rows).tolist() == [11] * 9
    np.testing.assert_allclose(found.pool, seen.apply(images[rows])["pool"], rtol=1e-5, atol=1e-5)
    assert found.n == found.moments["pool"].n == 100


def test_what_is_not_finite_or_too_few_is_refused(digits):
    broken = features(pool=np.full((64, 6), np.nan))
    with pytest.raises(InputError, match=r"stand-in says what is not finite \(pool\) of image 0"):
        references.describe(digits[1][:5], broken, 4, "few")
    with pytest.raises(InputError, match=r"few is 1 image\(s\), which have no covariance; give at least 2"):
        references.describe(digits[1][:1], features(), 4, "few")


def counted(seen):
    calls = []

    def apply(images):
        calls.append(len(images))
        return seen.apply(images)

    return seen._replace(apply=apply), calls


def test_a_reference_is_computed_once_for_its_images_and_its_network(digits, tmp_path):
    images = digits[1][:40]
    seen, calls = counted(features())
    first = references.cached(images, seen, 40, "a", tmp_path)
    again = references.cached(images, seen, 40, "b", tmp_path)
    assert calls == [40] and again.name == "b"
    for got, want in zip(jax.tree.leaves(again._replace(name="a", logits=references.NONE)),
                         jax.tree.leaves(first._replace(logits=references.NONE))):  # fmt: skip
        np.testing.assert_array_equal(got, want)
    references.cached(255 - images, seen, 40, "a", tmp_path)
    other, more = counted(features(seed=1))
    references.cached(images, other, 40, "a", tmp_path)
    assert calls == [40, 40] and more == [40]
    for file in (tmp_path / "features").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:300])
    references.cached(images, seen, 40, "a", tmp_path)
    assert calls == [40, 40, 40]


# Files of statistics.


def test_statistics_are_written_for_pytorch_fid_and_adm_and_read_back(digits, tmp_path, monkeypatch):
    found = references.describe(digits[1][:30], features(), 30, "few")
    references.write(tmp_path / "s.npz", found)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(arrays.files) and "arr_0" not in arrays.files
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
        np.testing.assert_array_equal(arrays["sigma_s"], found.moments["spatial"].cov)
    back, images = references.read(tmp_path / "s.npz")
    assert images is None and not len(back.pool)
    assert back[1:5] == found[1:5] and back.name == "s.npz (few)" and back.moments["pool"].n == 30
    np.testing.assert_array_equal(back.moments["pool"].cov, found.moments["pool"].cov)
    # With images beside them, a few of many, which ADM's evaluator needs and where single images are the reference here.
    monkeypatch.setattr(references, "IMAGES", 9)
    references.write(tmp_path / "adm.npz", found, digits[1][:30])
    stats, images = references.read(tmp_path / "adm.npz")
    assert images.shape == (9, 8, 8, 1) and images.dtype == np.uint8 and stats.n == 30
    assert {image.tobytes() for image in images} < {image.tobytes() for image in digits[1][:30]}
    for target in (tmp_path / "s.txt", tmp_path):
        with pytest.raises(InputError, match=r"statistics are written to an \.npz file"):
            references.write(target, found)
    with pytest.raises(InputError, match="cannot be written"):
        references.write(tmp_path / "nowhere" / "s.npz", found)


def test_statistics_of_others_are_read_and_what_they_do_not_say_stays_unknown(digits, tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(6), sigma=np.eye(6))
    stats, images = references.read(tmp_path / "theirs.npz")
    assert stats[:5] == ("theirs.npz", None, "", "", "") and images is None and stats.moments["pool"].n is None
    np.savez(tmp_path / "adm.npz", arr_0=digits[1][:9], arr_1=np.zeros(9), mu=np.zeros(6), sigma=np.eye(6), mu_s=np.ones(7),
             sigma_s=np.eye(7))  # fmt: skip
    stats, images = references.read(tmp_path / "adm.npz")
    np.testing.assert_array_equal(images, digits[1][:9])
    assert set(stats.moments) == {"pool", "spatial"}


def arrays(**changed):
    return {"mu": np.zeros(6), "sigma": np.eye(6)} | changed


@pytest.mark.parametrize(
    "content, said",
    [
        ({"a": np.zeros(3)}, r"has neither statistics \(mu and sigma\) nor images \(arr_0\); its keys are a"),
        ({"mu": np.zeros(6)}, "has mu without sigma"),
        (arrays(n=np.zeros(3, int)), r"n=\[0 0 0\] is no number of images"),
        (arrays(n="many"), "n=many is no number of images"),
        (arrays(n=-4), "n=-4 is no number of images"),
        (arrays(sigma=-np.eye(6)), "sigma is no covariance: it is not symmetric, or has a negative variance"),
        (arrays(sigma=np.triu(np.ones((6, 6)))), "sigma is no covariance"),
        (arrays(sigma=np.eye(5)), r"mu and sigma are of shapes \[d\] and \[d, d\], got \(6,\) and \(5, 5\)"),
        (arrays(mu=np.full(6, np.nan)), "mu or sigma holds what is not a finite number"),
        (arrays(mu=np.zeros(6, int)), "mu or sigma holds what is not a finite number"),
        (arrays(sigma=np.array([print, None], object)), "it holds a pickle, which could run code"),
    ],
)
def test_wrong_statistics_are_one_line(tmp_path, content, said):
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(InputError, match=said) as error:
        references.read(tmp_path / "x.npz")
    assert "\n" not in str(error.value) and str(tmp_path / "x.npz") in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 300, 600, -30, -1])
def test_a_truncated_file_is_one_line(tmp_path, keep):
    np.savez(tmp_path / "x.npz", mu=np.random.default_rng(0).normal(size=6), sigma=np.eye(6))
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:keep])
    with pytest.raises(InputError, match=r"x.npz cannot be read: it is damaged, or no .npz$"):
        references.read(tmp_path / "x.npz")
    with pytest.raises(InputError, match="is not there, or is no file"):
        references.read(tmp_path / "y.npz")


def test_statistics_of_another_network_are_refused_before_anything_is_drawn(digits):
    seen = features()
    stats = references.describe(digits[1][:30], seen, 30, "few")._replace(pool=references.NONE)
    widths = {"pool": 6, "spatial": 7}
    references.check(stats, None, seen, widths, {"pool", "spatial"})
    references.check(None, digits[0], seen, widths, {""})
    with pytest.raises(
        InputError, match=r"few is of the feature network stand-in \(stand-in 6 0\), and .* seen by other \(other 6 1"
    ):
        references.check(stats, None, features(seed=1, name="other"), widths, {"pool"})
    foreign = stats._replace(digest="", network="")
    references.check(foreign, None, features(seed=1), widths, {"pool"})
    with pytest.raises(InputError, match=r"few has 6 features \(mu\), and stand-in has 9: it is of another network"):
        references.check(foreign, None, features(9), {"pool": 9}, {"pool"})
    with pytest.raises(
        InputError, match=r"few has mu, sigma, mu_s, sigma_s alone, and these metrics need images: give a file with"
    ):
        references.check(stats, None, seen, widths, {"pool", ""})
    with pytest.raises(InputError, match="has mu, sigma alone, and these metrics need mu_s, sigma_s"):
        references.check(stats._replace(moments={"pool": stats.moments["pool"]}), None, seen, widths, {"spatial"})


# Images at hand.


def test_images_at_hand_are_read_from_files_of_both_kinds_and_from_a_folder(digits, tmp_path):
    few = digits[1][:5]
    for key in ("arr_0", "images"):
        np.savez(tmp_path / "x.npz", **{key: few})
        found = samples.at_hand(tmp_path / "x.npz", (8, 8, 1)).images
        np.testing.assert_array_equal(found, few[references.any_rows(5, 5)])  # in any order: a file may be in that of its classes
        assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in few)
    np.testing.assert_array_equal(samples.at_hand(tmp_path / "x.npz", (8, 8, 1), 3).images, found[:3])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(few):
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    at_hand = samples.at_hand(folder, (8, 8, 1))
    np.testing.assert_array_equal(at_hand.images, found)
    assert at_hand.facts["images"] == samples.at_hand(tmp_path / "x.npz", (8, 8, 1)).facts["images"]
    with pytest.raises(InputError, match="has 5 images, fewer than num=6"):
        samples.at_hand(tmp_path / "x.npz", (8, 8, 1), 6)


@pytest.mark.parametrize(
    "content, said",
    [
        (
            {"arr_0": np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 8, 8, 1)},
            "holds float32, -1 to 1; images are uint8, 0 to 255",
        ),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, r"images of shape \(8, 8, 3\), and this model's are \(8, 8, 1\)"),
        ({"images": np.zeros((2, 1, 8, 8), np.uint8)}, r"images of shape \(1, 8, 8\)"),
        ({"images": np.zeros((8, 8), np.uint8)}, r"images of shape \(8,\)"),
        ({"x": np.zeros((2, 8, 8, 1), np.uint8)}, "has no images: neither the key images nor arr_0; its keys are x"),
    ],
)
def test_images_that_do_not_fit_are_one_line(tmp_path, content, said):
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(InputError, match=said):
        samples.at_hand(tmp_path / "x.npz", (8, 8, 1))


# Figures.


def described(x, name="set", n=None, **changed):
    known = {"pool": distances.moments(x)}
    return references.Described(name, n or len(x), "images", "net", "digest", known, x, np.eye(5)[np.arange(len(x)) % 5])._replace(
        **changed
    )


def rows(n, d=4, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


@pytest.mark.parametrize("metric", sorted(report.METRICS))
def test_a_figure_of_fewer_than_fifty_thousand_is_shown_with_its_n_and_own_features_are_never_called_fid(metric):
    few, many = described(rows(30)), described(rows(30), n=50_000)
    few, many = (each._replace(moments=each.moments | {"spatial": each.moments["pool"]}) for each in (few, many))
    reference = described(rows(40, seed=1))._replace(moments={"pool": few.moments["pool"], "spatial": few.moments["pool"]})
    row, full = report.figure(metric, few, reference), report.figure(metric, many, reference)
    assert "n=30" in row["label"] and "n=30" in report.line(row) and row["n"] == 30
    assert "n=" not in full["label"] and full["n"] == 50_000
    assert row["features"] == {"network": "net", "digest": "digest"} and row["reference"]["n"] == 40
    assert json.loads(json.dumps(row)) == row
    is_inception = report.METRICS[metric].network == "inception"
    assert metric not in ("fid", "sfid", "kid") or row["label"].startswith(f"{metric} (n=30)")
    if not is_inception:
        text = json.dumps({key: value for key, value in row.items() if key != "metric"}).lower() + report.line(row).lower()
        assert "fid" not in text and "kid" not in text and "inception" not in text
        assert ("own" in text and "(of net" in text) == metric.endswith("_own")


def test_figures_are_those_of_the_distances():
    a, b = rows(30), rows(40, seed=1, shift=1.0)
    x, y = described(a), described(b)
    assert report.figure("fd_own", x, y)["value"] == distances.frechet(distances.moments(a), distances.moments(b))
    assert report.figure("kd_own", x, y)["value"] == distances.kernel_distance(a, b).mean
    assert report.figure("pr_own", x, y)["precision"] == distances.precision_recall(b, a)[0]
    assert report.figure("dc_own", x, y)["coverage"] == distances.density_coverage(b, a)[1]
    assert report.figure("is_own", x, None)["value"] == distances.inception_score(np.eye(5)[np.arange(30) % 5])[0]


def test_what_makes_a_figure_doubtful_is_noted():
    foreign = described(rows(40, seed=1), "theirs.npz", digest="", network="")
    noted = report.figure("fid", described(rows(4)), foreign)
    assert noted["notes"] == ["samples: " + distances.shortage(4, 4), "theirs.npz does not say of which feature network it is"]
    assert all(note in report.line(noted) for note in noted["notes"]) and noted["reference"]["network"] == "unknown network"
    assert report.figure("fid", described(rows(5)), described(rows(40)))["notes"] == []


def test_the_floor_is_of_as_many_samples_as_held_out_images():
    a, held_out, reference = rows(30), rows(12, seed=2), rows(40, seed=1, shift=1.0)
    row = report.floor("fd_own", described(a), described(held_out, "held out"), np.arange(12), described(reference))
    of = [pytest.approx(distances.frechet(distances.moments(x), distances.moments(reference))) for x in (held_out, a[:12])]
    assert [row["value"], row["samples_at_n"]["value"]] == of
    assert row["metric"] == "floor_fd_own" and row["label"] == "floor (held out) of own-feature distance (of net, n=12)"
    # Of a larger split its first may be all of one kind; the caller says which.
    any_rows = references.any_rows(200, 200)
    by_kind = np.concatenate([rows(100, seed=2), rows(100, seed=3, shift=9.0)])
    more = report.floor("fd_own", described(a), described(by_kind, "held out"), any_rows, described(by_kind))
    assert more["n"] == 30 and more["value"] < 0.3 * distances.frechet(*map(distances.moments, (by_kind[:30], by_kind)))
    more = report.floor("fd_own", described(a), described(by_kind, "held out"), any_rows, described(reference))
    assert more["samples_at_n"]["value"] == report.figure("fd_own", described(a), described(reference))["value"]


def test_a_reference_is_told_with_the_digest_of_its_images_or_else_of_its_statistics(tmp_path):
    known = report.figure("fid", described(rows(30)), described(rows(40, seed=1)))
    assert (known["reference"]["images"], known["reference"]["statistics"]) == ("images", None)
    assert report.line(known).endswith("against set (n=40, images), features of net (digest)")
    digests, files = set(), set()
    for seed in (1, 2):  # two files of one name
        foreign = described(rows(40, seed=seed), "theirs.npz", n=None, images="", digest="", network="")
        row = report.figure("fid", described(rows(30)), foreign._replace(n=None))
        digests.add(row["reference"]["statistics"])
        files.add(report.save(tmp_path, row))
        assert row["reference"]["images"] is None and f"(unknown n, {row['reference']['statistics'][:12]})" in report.line(row)
    assert len(digests) == len(files) == 2


def test_held_out_images_that_are_training_images_are_refused(digits):
    same = references.describe(digits[0][:50], features(), 50, "set")
    with pytest.raises(InputError, match="most images of valid are images of set as well"):
        report.nearest(same, same._replace(name="valid"), same)


def test_copies_of_training_images_show_as_nearest(digits):
    train, test = digits[0][:50], digits[1]
    seen = features()
    known, real = (references.describe(images, seen, 50, "set") for images in (train, test))
    copies = train[[7, 3, 30]]
    row = report.nearest(references.describe(copies, seen, 3, "samples"), real, known)
    assert row["value"] < 1e-3 and [each["train"][0] for each in row["shown"]] == [7, 3, 30]
    assert all(np.diff(each["distance"]).min() >= 0 and len(each["train"]) == 7 for each in row["shown"])
    picture = report.picture(row, copies, train)
    cell = picture[1:33, 1:33]
    np.testing.assert_array_equal(cell, picture[1:33, 34:66])  # the sample, and its copy beside it
    np.testing.assert_array_equal(cell, jd.pictures.tile(train[[7]])[1:-1, 1:-1])
    honest = report.nearest(references.describe(test[:100], seen, 50, "samples"), real, known)
    assert 0.7 < honest["value"] < 1.4


# The script.


@pytest.mark.slow
def test_metrics_of_one_request_share_its_samples_and_one_pass_and_a_stopped_one_goes_on(call, workdir, monkeypatch, evaluate):
    draw, made = runs._draw, []

    def counting(*args, **settings):
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return draw(*args, **settings)

    monkeypatch.setattr(runs, "_draw", counting)
    seen, calls = counted(features(name="inception"))
    monkeypatch.setattr(evaluate, "features_of", lambda network, weights: seen)
    with pytest.raises(KeyboardInterrupt):
        call(metrics="fid", num=11)
    out = call(metrics="fid,sfid,is,kid,pr,dc", num=11)
    assert len(made) == 4  # of three parts of 4, 4 and 3 the first was there, and the second was drawn twice
    assert len(calls) - 1 == 15 + 1  # 1,498 images of the reference by 100, the samples, and once for the shapes
    call(metrics="fid,floor,nearest", num=11)
    assert len(made) == 4 and len(list((workdir / "evaluation").glob("samples-*"))) == 1
    for metric in ("fid", "sfid", "is", "kid", "pr", "dc", "nearest", "floor_fid"):
        assert told(workdir, metric)["label"] + ":" in out or metric in ("nearest", "floor_fid")
    call(metrics="fid", num=11, seed=1)
    assert len(made) == 7 and len(list((workdir / "evaluation").glob("fid-*.json"))) == 2


@pytest.mark.slow
def test_a_figure_says_all_that_it_is_of_and_is_of_the_images_that_were_drawn(call, workdir, digits):
    out = call(metrics="fid", num=12, steps=2, guidance=2.0, batch_size=5)
    row = told(workdir, "fid")
    run = jd.load(workdir)
    images = run.generate(jax.random.key(0), 12, steps=2, guidance=2.0, label=np.arange(12) % 10)
    seen = features(name="inception")
    exact = distances.frechet(*(references.describe(x, seen, 100, "x").moments["pool"] for x in (images, digits[0])))
    assert row["value"] == pytest.approx(exact, rel=1e-4) and row["value"] > 1
    assert f"fid (n=12): {row['value']:.5g} against digits train (n=1498, {row['reference']['images'][:12]}), features of" in out
    kept = {"solver": "ddim", "steps": 2, "times": "uniform", "guidance": 2.0, "seed": 0, "labels": "each class in turn", "step": 0}
    assert kept.items() <= row["samples"].items() and row["samples"]["ema"] == "0.9"
    assert row["n"] == 12 and row["features"]["digest"] == seen.digest
    assert row["reference"]["n"] == 1498 and row["reference"]["images"] == jd.shards.digest(np.asarray(digits[0]))
    call(metrics="fid", num=12, label=3)
    assert sorted(str(json.loads(p.read_text())["samples"]["labels"]) for p in (workdir / "evaluation").glob("fid-*.json")) == [
        "3", "each class in turn",
    ]  # fmt: skip


def test_a_set_of_images_at_hand_has_no_distance_from_itself(call, workdir, digits, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=digits[0][::5])
    call(metrics="fd_own,sfid,pr,floor,nearest", samples=tmp_path / "x.npz", reference=tmp_path / "x.npz")
    assert abs(told(workdir, "fd_own")["value"]) < 1e-6 and abs(told(workdir, "sfid")["value"]) < 1e-6
    assert told(workdir, "pr")["n"] == 300 and told(workdir, "pr")["precision"] == told(workdir, "pr")["recall"] == 1.0
    floor = told(workdir, "floor_fd_own")
    assert floor["n"] == 299 and 0 < floor["samples_at_n"]["value"] < 0.01 * floor["value"]  # all images of the reference but one
    near = [json.loads(p.read_text()) for p in (workdir / "evaluation").glob("nearest-*.json")]
    assert len(near) == 2 and all(row["value"] == 0 for row in near)  # one of each feature network
    assert len(list((workdir / "evaluation").glob("nearest-*.png"))) == 2


def test_nearest_alone_is_by_the_network_whose_weights_are_given(call, workdir, digits, tmp_path):
    np.savez(tmp_path / "x.npz", images=digits[0][:20])
    call(metrics="nearest", samples=tmp_path / "x.npz", dinov2="weights")
    row = told(workdir, "nearest")
    assert row["value"] == 0 and row["features"]["network"] == "dinov2" and row["n"] == 20
    assert (row["reference"]["name"], row["held_out"]["name"]) == ("digits train", "digits test")


def test_statistics_written_are_the_same_reference_as_the_images(call, workdir, digits, tmp_path):
    np.savez(tmp_path / "x.npz", images=digits[1][:50])
    call(metrics="fid,sfid", samples=tmp_path / "x.npz", save_reference=tmp_path / "s.npz")
    call(metrics="fid,sfid,kid", samples=tmp_path / "x.npz", reference=tmp_path / "s.npz")
    assert told(workdir, "kid")["reference"]["images"] == jd.shards.digest(digits[0])
    for metric in ("fid", "sfid"):
        values = [json.loads(p.read_text())["value"] for p in (workdir / "evaluation").glob(f"{metric}-*.json")]
        assert len(values) in (1, 2) and max(values) == pytest.approx(min(values), rel=1e-12)
    np.savez(tmp_path / "adm.npz", arr_0=digits[0], mu=np.zeros(6), sigma=np.eye(6))
    out = call(metrics="fid,kid", samples=tmp_path / "x.npz", reference=tmp_path / "adm.npz")
    assert "fid (n=50): " in out and "adm.npz does not say of which feature network it is" in out
    other = jd.shards.digest(digits[0])
    kids = [json.loads(p.read_text())["reference"] for p in (workdir / "evaluation").glob("kid-*.json")]
    assert {(kid["name"], kid["images"]) for kid in kids} == {("adm.npz", other), ("s.npz (digits train)", other)}


def test_without_a_number_there_are_as_many_samples_as_the_field_or_the_reference_has(evaluate):
    images = np.zeros((70, 8, 8, 1), np.uint8)
    assert evaluate.how_many(["own"], None, images) == 70
    assert evaluate.how_many(["inception"], None, images) == evaluate.how_many(["inception", "own"], None, images) == 50_000
    stats = described(rows(9), n=60_000)
    assert evaluate.how_many(["own"], stats._replace(n=300), images) == 300  # of which the file holds some images
    assert evaluate.how_many(["own"], stats._replace(n=None), images) == 70
    assert evaluate.how_many(["own"], stats, None) == 50_000
    assert (
        evaluate.how_many(["own"], stats._replace(n=None), None) == 50_000
        and evaluate.how_many(["own"], stats._replace(n=9), None) == 9
    )


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"metrics": "fid,fidd"}, "metrics='fid,fidd' is unknown; allowed: bpd_elbo, bpd_ode, fid, sfid, is, kid"),
        ({"metrics": ""}, "metrics='' is unknown"),
        ({"num": 1}, "num=1 is too few images: fid needs 2 at least"),
        ({"num": 9, "metrics": "fid,is"}, "num=9 is too few images: is needs 10 at least"),
        ({"num": -1}, "num=-1 is negative"),
        ({"label": 10}, "label=10 is out of range; allowed: 0 to 9, or -1 for none"),
        ({"label": -1, "guidance": 2}, "guidance=2.0 needs a label"),
        ({"steps": 21}, "steps=21 is out of range; allowed: 1 to 20"),
        ({"solver": "ddimm"}, "solver='ddimm' is unknown; did you mean 'ddim'"),
        ({"metrics": "fid,floor", "held_out": "train"}, "held_out=train is what the model was trained on"),
        ({"metrics": "nearest"}, "need a feature network: give --inception, --dinov2 or --classifier"),
        ({"metrics": "is,floor"}, "floor is of the distances that are asked for beside it, such as fid or fd_own"),
        ({"split": "valid"}, "digits has no split 'valid'"),
        ({"metrics": "fid", "save_reference": "s.txt"}, "statistics are written to an .npz file, got s.txt"),
        ({"metrics": "fid", "save_reference": "nowhere/s.npz"}, "nowhere/s.npz cannot be written: the folder"),
        ({"metrics": "bpd_elbo", "samples": "x.npz"}, "--samples is of distances, and metrics='bpd_elbo' are none"),
        ({"samples": "nowhere.npz"}, "nowhere.npz is not there"),
        ({"samples": "nowhere.npz", "steps": 3}, "--steps is of drawing, and --samples are images at hand"),
        ({"reference": "nowhere.npz"}, "nowhere.npz is not there"),
        ({"metrics": "fid,fd_own", "save_reference": "s.npz"}, "--save_reference writes one network's statistics"),
        ({"workdir": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_draws_nothing(call, workdir, settings, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(").replace("?", r"\?")) as error:
        call(**{"metrics": "fid", "num": 4, **settings})
    assert "\n" not in str(error.value) and not list((workdir / "evaluation").glob("**/part_*"))


def test_too_few_images_of_either_set_are_told_before_any_figure(call, workdir, digits, tmp_path):
    np.savez(tmp_path / "x.npz", images=digits[0][:5])
    for settings, said in (
        ({"reference": tmp_path / "x.npz"}, r"x\.npz, n=5, is too few images: dc needs 6 at least"),
        ({"samples": tmp_path / "x.npz"}, r"x\.npz, n=5, is too few images: dc needs 6 at least"),
    ):
        with pytest.raises(InputError, match=said):
            call(metrics="fid,dc", **({"num": 8} if "samples" not in settings else {}), **settings)
    assert not list((workdir / "evaluation").glob("*"))


def test_own_features_without_a_classifier_are_one_line(evaluate):
    with pytest.raises(InputError, match="end in _own are by a classifier of such images; give its workdir, --classifier=DIR"):
        evaluate.features_of("own", None)


def test_rows_in_turn_have_every_class_equally_often_until_one_ends():
    labels = np.repeat([3, 5, 9], [4, 2, 10])
    rows = references.in_turn(labels, 100)
    assert labels[rows].tolist() == [3, 5, 9] * 2 and len(set(rows.tolist())) == 6
    assert labels[references.in_turn(labels, 4)].tolist() == [3, 5, 9, 3]
    assert sorted(references.in_turn(np.full(7, -1), 100).tolist()) == list(range(7))


def test_a_floor_has_each_class_as_often_as_samples_have_it(call, workdir, digits):
    call(metrics="fd_own,floor", num=60)
    labels = jd.data.load("digits", "test").labels
    rows = references.in_turn(labels, 60)
    assert np.bincount(labels[rows]).tolist() == [6] * 10
    both = jd.data.load("digits", "test").images[rows], digits[0]
    floor = told(workdir, "floor_fd_own")
    assert floor["n"] == 60 and floor["value"] == pytest.approx(
        distances.frechet(*(references.describe(x, features(), 100, "x").moments["pool"] for x in both)), rel=1e-4
    )
