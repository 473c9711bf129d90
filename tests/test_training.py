import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from injected import with_nan_at
from tiny import config

from jaxdiff import data, experiment, pictures, run, training
from jaxdiff.errors import InputError
from jaxdiff.training import checkpoint, hardware, metrics, posthoc


@pytest.fixture(scope="module")
def trained():
    """A tiny experiment, its jitted init and step, counted traces, and batches by step."""
    c = config()
    built = experiment.build(c)
    optimizer = training.make_optimizer(c.optimizer)
    # chex counts by where a function is made; a worker may make this fixture twice.
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(training.make_step(built, optimizer), n=1))
    # Restored arrays are committed to a device, which newer JAX traces for once more, as a new process does anyway.
    resumed = jax.jit(training.make_step(built, optimizer))
    init = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))
    digits = data.load("digits")

    def go(state, first, last, restored=False):
        for i in range(first, last):
            state, scalars = (resumed if restored else step)(jax.random.key(1), state, data.batch_at(digits, 0, i, 8))
        return state, scalars

    return c, built, init, go


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_the_step_traces_once_and_learns(trained):
    _, _, init, go = trained
    state, first = go(init(jax.random.key(0)), 0, 1)
    state, last = go(state, 1, 60)  # a second trace would raise
    assert int(state.step) == 60
    assert float(last["loss"]) < 0.7 * float(first["loss"])
    assert float(last["grad_norm"]) > 0


def test_the_averages_follow_their_formula(trained):
    _, _, init, go = trained
    state = init(jax.random.key(0))
    want = {decay: state.params for decay in ("0.9", "0.99")}
    for i in range(4):
        state, _ = go(state, i, i + 1)
        for decay in want:
            d = min(float(decay), (1 + i) / (10 + i))
            want[decay] = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * p, want[decay], state.params)
    chex.assert_trees_all_close(state.ema, want, rtol=1e-5, atol=1e-6)


def test_the_optimizer_is_the_one_named_with_its_schedule_and_clip():
    made = training.make_optimizer(config(**{"optimizer.schedule": "linear_schedule(0, 1, 4)"}).optimizer)
    params, grads = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([30.0, 40.0])}
    want = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda s: 1e-2 * jnp.minimum(s / 4, 1)))
    a, b = made.init(params), want.init(params)
    for _ in range(6):
        u, a = made.update(grads, a, params)
        v, b = want.update(grads, b, params)
        np.testing.assert_allclose(u["w"], v["w"], rtol=1e-6)
    plain = {"optimizer.name": "sgd", "optimizer.clip": 0.0, "optimizer.schedule": "constant_schedule(1)"}
    sgd = training.make_optimizer(config(**plain).optimizer)
    np.testing.assert_allclose(sgd.update(grads, sgd.init(params))[0]["w"], -0.01 * grads["w"])


def test_weight_decay_leaves_a_learned_schedule_alone():
    made = training.make_optimizer(config(**{"optimizer.name": "adamw(weight_decay=0.5)", "optimizer.clip": 0.0}).optimizer)
    part = {"w": jnp.array([1.0, -2.0])}
    for params, moved in (
        ({"network": part, "schedule": part}, {"network": True, "schedule": False}),
        ({"params": part}, {"params": True}),
    ):
        state = made.init(params)
        for _ in range(3):
            updates, state = made.update(jax.tree.map(jnp.zeros_like, params), state, params)
        assert {name: bool((updates[name]["w"] != 0).any()) for name in params} == moved


def one_step(changes, accumulate=1, batch_size=128):
    """Parameters before and after one step of plain gradient descent with rate 1: their difference is the gradient."""
    plain = {"optimizer.name": "sgd", "optimizer.clip": 0.0, "optimizer.schedule": "constant_schedule(1)", "model.dropout": 0.0}
    c = config(**{**plain, "optimizer.learning_rate": 1.0, **changes})
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    state = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))(jax.random.key(0))
    state = state._replace(params=jax.tree.map(lambda a: a + 0.03, state.params))
    given = jax.random.key(1), state, data.batch_at(data.load("digits"), 0, 0, batch_size)
    lowered = jax.jit(training.make_step(built, optimizer, accumulate)).lower(*given)
    step = lowered.compile()
    after, told = step(*given)
    cost = step.memory_analysis().temp_size_in_bytes, lowered.cost_analysis()["flops"]
    return jax.tree.map(jnp.subtract, state.params, after.params), told, cost


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, told, (memory, _) = one_step({})
    pieces, told_pieces, (memory_pieces, _) = one_step({}, accumulate=4)
    chex.assert_trees_all_close(pieces, whole, atol=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole)) > 0.1
    for name in ("loss", "grad_norm", "level_loss", "level_count"):
        np.testing.assert_allclose(told_pieces[name], told[name], rtol=1e-4, atol=1e-4)
    assert memory_pieces < 0.5 * memory


@pytest.mark.slow
def test_rematerialisation_computes_again_what_it_does_not_keep_and_changes_nothing_else():
    plain, told, (memory, flops) = one_step({"model.blocks": 3})
    again, told_again, (memory_again, flops_again) = one_step({"model.blocks": 3, "model.remat": True})
    chex.assert_trees_all_close(again, plain, atol=1e-5)
    np.testing.assert_allclose(told_again["loss"], told["loss"], rtol=1e-6)
    assert 1.1 * flops < flops_again < 1.4 * flops
    if jax.__version_info__ >= (0, 12):  # older compilers for the CPU see that it is the same twice, and keep it after all
        assert memory_again < 0.9 * memory


def test_a_step_that_is_not_finite_changes_nothing_and_says_where():
    c = config()
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    key, digits = jax.random.key(1), data.load("digits")
    step = jax.jit(training.make_step(with_nan_at(built, 2, 1), optimizer))
    state = training.init_state(built, optimizer, c.training.ema, jax.random.key(0))
    for i in range(4):
        before = state
        state, told = step(key, state, data.batch_at(digits, 0, i, 8))
        assert int(state.step) == i + 1 and bool(told["finite"]) == (i != 2)
        assert equal(state._replace(step=()), before._replace(step=())) == (i == 2)
    example = built.prepare((), jax.random.split(jax.random.fold_in(key, 2))[0], data.batch_at(digits, 0, 2, 8))
    state, told = step(key, before._replace(step=jnp.int32(2)), data.batch_at(digits, 0, 2, 8))
    worst = built.loss(before.params, (), key, example)[2]["logsnr"][2]
    np.testing.assert_allclose(told["worst_logsnr"], worst, rtol=1e-5)


def test_the_loss_by_level_adds_up(trained):
    _, _, init, go = trained
    told = [jax.device_get(go(init(jax.random.key(0)), i, i + 1)[1]) for i in range(3)]
    row = metrics.summary(told)
    count, total = (np.sum([t[name] for t in told], axis=0) for name in ("level_count", "level_loss"))
    assert count.sum() == 24 and len(row["loss_by_logsnr"]) == len(count)
    np.testing.assert_allclose(total.sum() / 24, row["loss"], rtol=1e-5)
    assert [x is None for x in row["loss_by_logsnr"]] == (count == 0).tolist()
    table = metrics.level_table(row["loss_by_logsnr"]).splitlines()
    assert table[0] == "logsnr_from,logsnr_to,loss" and table[1].startswith("-inf,-12,") and table[-1].startswith("12,inf,")
    assert metrics.level_plot(row["loss_by_logsnr"]).shape == (400, 600, 3)
    bad = {**told[0], "finite": np.False_, "loss": np.float32("nan")}
    skipping = metrics.summary([*told, bad])
    assert skipping["skipped"] == 1 and skipping["loss"] == row["loss"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"optimizer.clip": -1.0}, "optimizer.clip=-1.0"),
        ({"optimizer.schedule": "cosine_decay_schedule"}, "needs brackets"),
        ({"optimizer.name": "adamm"}, "did you mean 'adam'"),
        ({"optimizer.name": "adam(c1=2)"}, "optimizer.name='adam(c1=2)'"),
        ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate=0.0"),
        ({"optimizer.schedule": "linear_schedul(0, 1, 2)"}, "did you mean 'linear_schedule'"),
    ],
)
def test_wrong_optimizers_are_refused(changes, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(").replace(")", r"\)")):
        training.make_optimizer(config(**changes).optimizer)


def test_a_saved_and_resumed_run_has_the_same_bits(trained, tmp_path):
    c, _, init, go = trained
    whole, _ = go(init(jax.random.key(0)), 0, 6)
    half, _ = go(init(jax.random.key(0)), 0, 3)
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, half, c)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(init, jax.random.key(0))
    with checkpoint.manager(tmp_path) as checkpoints:
        back = checkpoint.restore(tmp_path, 3, shapes, jax.tree.map(lambda _: here, shapes))
    assert equal(back, half) and int(back.step) == 3
    assert jax.tree.structure(back) == jax.tree.structure(half)
    again, _ = go(back, 3, 6, restored=True)
    assert equal(again, whole)
    assert not equal(again.params, half.params)


def saved(trained, tmp_path, steps=(1, 2)):
    c, _, init, go = trained
    state = init(jax.random.key(0))
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        done = 0
        for n in steps:
            state, _ = go(state, done, n)
            done = n
            checkpoint.save(checkpoints, state, c)
    return state


def test_the_newest_are_kept_and_the_averages_come_back_alone(trained, tmp_path):
    state = saved(trained, tmp_path, (1, 2, 3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]
    assert checkpoint.newest(tmp_path) == 3
    step, c, bad = checkpoint.restore_meta(tmp_path)
    assert bad == {}
    assert step == 3 and c.to_dict() == trained[0].to_dict()
    (tmp_path / "checkpoints" / "3" / "state").rename(tmp_path / "gone")  # the EMA needs nothing of it
    loaded = run.load(tmp_path)
    assert loaded.step == 3 and equal(loaded.params, state.ema["0.9"])


def test_an_earlier_checkpoint_can_be_asked_for(trained, tmp_path):
    saved(trained, tmp_path, (1, 2, 3))
    newest, earlier = run.load(tmp_path), run.load(tmp_path, step=2)
    assert earlier.step == 2 and not equal(earlier.params, newest.params)
    with pytest.raises(InputError, match="no checkpoint of step=1; there are: 3, 2"):
        run.load(tmp_path, step=1)
    next((tmp_path / "checkpoints" / "2" / "ema").rglob("manifest*")).write_bytes(b"")
    with pytest.raises(InputError, match="checkpoints/2 is damaged"):
        run.load(tmp_path, step=2)


def test_no_checkpoint_and_damaged_ones_are_one_line(trained, tmp_path):
    with pytest.raises(InputError, match="is not there"):
        run.load(tmp_path / "none")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no checkpoint"):
        run.load(tmp_path / "empty")


def test_loading_passes_over_a_damaged_checkpoint_and_says_so(trained, tmp_path):
    saved(trained, tmp_path)
    folder = tmp_path / "checkpoints"
    meta = folder / "2" / "meta" / "metadata"
    meta.write_text(meta.read_text()[:50])
    with pytest.warns(UserWarning, match=r"step 2 is damaged \(meta/metadata is not as it was written\); using step 1"):
        assert run.load(tmp_path).step == 1
    (folder / "1" / checkpoint.DIGESTS).unlink()
    with pytest.raises(InputError, match=r"no good checkpoint.*2 is damaged.*all 2 there") as error:
        run.load(tmp_path)
    assert "\n" not in str(error.value)


def files(checkpoint_folder):
    return sorted(p for p in checkpoint_folder.rglob("*") if p.is_file())


def test_every_flipped_bit_and_every_truncation_is_noticed_and_set_aside(trained, tmp_path):
    """Any bit of any file, not only of the arrays'."""
    saved(trained, tmp_path)
    newest, random = tmp_path / "checkpoints" / "2", np.random.default_rng(0)
    there = files(newest)
    sizes = np.array([p.stat().st_size for p in there])
    assert checkpoint.newest_good(tmp_path) == (2, {})
    for n in range(30):
        # Half of the flips fall on a random file, so that the small ones have their share; half on a random byte.
        path = there[random.integers(len(there)) if n % 2 else random.choice(len(there), p=sizes / sizes.sum())]
        good = path.read_bytes()
        bit = int(random.integers(8 * len(good)))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(bad) if n < 25 else good[: bit // 8])
        step, why = checkpoint.newest_good(tmp_path)
        assert step == 1 and 2 in why, f"bit {bit} of {path}"
        path.write_bytes(good)
    assert checkpoint.newest_good(tmp_path) == (2, {})

    path.write_bytes(bytes(bad))
    said = []
    assert checkpoint.recover(tmp_path, said.append) == 1
    assert len(said) == 1 and "step 2 is damaged" in said[0] and "going back to step 1" in said[0]
    assert (tmp_path / "damaged" / "2").is_dir() and not newest.exists()
    (tmp_path / "checkpoints" / "1" / "ema" / "_METADATA").unlink()
    with pytest.raises(InputError, match="ema/_METADATA is missing"):
        checkpoint.recover(tmp_path, said.append)
    (tmp_path / "checkpoints" / "1" / checkpoint.DIGESTS).unlink()  # half-written: the run starts again
    assert checkpoint.recover(tmp_path, said.append) is None and len(said) == 2


def test_loading_leaves_a_save_under_way_alone(trained, tmp_path):
    saved(trained, tmp_path)
    unfinished = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert run.load(tmp_path).step == 2 and unfinished.exists()


def test_metrics_of_steps_that_are_trained_again_are_taken_out(tmp_path):
    first = metrics.writer(tmp_path, 0)
    for step in (2, 4, 6):
        first.scalars(step, {"loss": step / 10})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "lo')  # cut short by a kill
    second = metrics.writer(tmp_path, 4)
    second.scalars(6, {"loss": 7.0})
    second.image(6, "samples", np.zeros((4, 4, 3), np.uint8))
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 2, "loss": 0.2}, {"step": 4, "loss": 0.4}, {"step": 6, "loss": 7.0}]
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_snapshots_give_averages_of_widths_that_were_not_kept(tmp_path):
    names = (0.9, "power(0.05)", "power(0.1)", "power(0.07)")
    c = config(**{"training.ema": names, "training.snapshot_every": 4})
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    step, digits = jax.jit(training.make_step(built, optimizer)), data.load("digits")
    state = jax.jit(lambda key: training.init_state(built, optimizer, names, key))(jax.random.key(0))
    with checkpoint.manager(tmp_path) as checkpoints, checkpoint.snapshots(tmp_path) as snapshots:
        for i in range(80):
            state, _ = step(jax.random.key(1), state, data.batch_at(digits, 0, i, 8))
            if i % 4 == 3:
                checkpoint.save_snapshot(snapshots, i + 1, {name: state.ema[name] for name in names[1:]}, c)
        checkpoint.save(checkpoints, state, c)
    assert checkpoint.snapshot_steps(tmp_path) == list(range(80, 0, -4))

    tracked = run.load(tmp_path, "power(0.07)")
    assert equal(tracked.params, state.ema["power(0.07)"])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tracked.params)
    made = posthoc.reconstruct(tmp_path, c, abstract, "power(0.07)", 80, names[1:3])

    def far(a, b):
        return float(training.state._norm(jax.tree.map(jnp.subtract, a, b)) / training.state._norm(b))

    assert far(made, tracked.params) < 0.01 < min(far(state.ema[str(name)], tracked.params) for name in names[:3])
    wide = run.load(tmp_path, "power(0.2)")
    assert 0.01 < far(wide.params, tracked.params) < 1 and wide.generate(jax.random.key(0), 2, steps=2, label=3).shape == (
        2,
        8,
        8,
        1,
    )
    with pytest.raises(InputError, match=r"ema='power\(0.9\)'|std=0.9"):
        run.load(tmp_path, "power(0.9)")
    with pytest.raises(InputError, match=r"ema=0.5 was not kept; allowed: 0.9, power\(0.05\)"):
        run.load(tmp_path, 0.5)
    checkpoint.forget_later(tmp_path, 40)
    assert checkpoint.snapshot_steps(tmp_path) == list(range(40, 0, -4))
    later = tmp_path / "none"
    with checkpoint.manager(later) as checkpoints:
        checkpoint.save(checkpoints, state, c)
    with pytest.raises(InputError, match="holds none up to step 80"):
        run.load(later, "power(0.2)")


def test_metrics_and_pictures_are_written_to_a_bucket(monkeypatch):
    """A bucket in memory: it cannot append, and Path("gs://b") would be a local folder."""
    fsspec = pytest.importorskip("fsspec", reason="needs fsspec, which gcsfs brings")
    import tensorboardX
    from fsspec.implementations.memory import MemoryFileSystem

    class Board:
        def __init__(self, *args, **kwargs):
            assert args[0].startswith("gs://bucket/run/")

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    class Bucket(MemoryFileSystem):
        protocol, store, pseudo_dirs = ("gs", "gcs"), {}, [""]  # type: ignore[assignment]

    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    monkeypatch.setattr(tensorboardX, "SummaryWriter", Board)
    for step in (2, 4):
        writer = metrics.writer("gs://bucket/run", step - 2)
        writer.scalars(step, {"loss": step / 10})
        writer.scalars(step + 1, {"loss": 9.0})  # of a step that the second run trains again
        writer.close()
    where = checkpoint.place("gs://bucket/run")
    rows = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5] and rows[2]["loss"] == 9.0
    pictures.save(where / "samples" / "a.png", np.zeros((4, 4, 3), np.uint8))
    assert (where / "samples" / "a.png").read_bytes().startswith(b"\x89PNG")


def flops(f, *args):
    return hardware.flops(jax.make_jaxpr(f)(*args))


def test_products_are_counted_as_often_as_they_run():
    a = jnp.ones((8, 8))
    once = 2 * 8**3
    assert flops(lambda a: a @ a, a) == once
    assert flops(lambda a: jnp.einsum("bij,bkj->bik", a, a), jnp.ones((3, 8, 8))) == 3 * once
    assert flops(jax.jit(lambda a: jnp.sin(a @ a) + a), a) == once
    assert flops(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=28)[0], a) == 28 * once
    assert flops(lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a), a) == 2 * once
    assert flops(jax.grad(lambda a: (a @ a).sum()), a) == 3 * once
    assert flops(lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c @ a, a), a) == once

    @jax.custom_vjp
    def squared(a):
        return a @ a

    squared.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a.T + a.T @ g,))
    assert flops(squared, a) == once and flops(jax.grad(lambda a: squared(a).sum()), a) == 3 * once


def test_what_is_computed_again_for_the_gradient_counts_again():
    a, once = jnp.ones((8, 8)), 2 * 8**3

    def f(a):
        return jnp.sin(jnp.sin(a @ a) @ a).sum()

    assert flops(f, a) == 2 * once
    assert flops(jax.grad(f), a) == 6 * once
    assert flops(jax.grad(jax.checkpoint(f)), a) == 8 * once


@pytest.mark.parametrize("changes", [{}, {"stride": 2}, {"width": 1}, {"padding": "VALID"}, {"groups": 4}, {"spread": 2}])
def test_convolutions_are_counted_as_xla_counts_them(changes):
    """Forward and backward, where strides become dilations; XLA adds the adding of the sum that is differentiated."""
    given = {"stride": 1, "width": 3, "padding": "SAME", "groups": 1, "spread": 1} | changes

    def f(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (given["stride"],) * 2, given["padding"], rhs_dilation=(given["spread"],) * 2,
            feature_group_count=given["groups"], dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    x, kernel = jnp.ones((2, 8, 6, 16)), jnp.ones((given["width"],) * 2 + (16 // given["groups"], 8))

    def gradient(x, kernel):
        return jax.grad(lambda x, kernel: jnp.square(f(x, kernel)).sum(), argnums=(0, 1))(x, kernel)

    for function in (f, gradient):
        xla = jax.jit(function).lower(x, kernel).cost_analysis()["flops"]
        assert flops(function, x, kernel) == pytest.approx(xla, rel=0.03)


def test_a_training_step_has_the_operations_that_xla_counts_and_accumulation_adds_none():
    c = config(**{"batch_size": 32, "model.channels": 32})
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    state = jax.eval_shape(lambda key: training.init_state(built, optimizer, c.training.ema, key), jax.random.key(0))
    batch = {"image": jax.ShapeDtypeStruct((32, 8, 8, 1), jnp.uint8), "label": jax.ShapeDtypeStruct((32,), jnp.int32)}
    steps = [jax.jit(training.make_step(built, optimizer, n)).trace(jax.random.key(0), state, batch) for n in (1, 4)]
    whole, pieces = (hardware.flops(step.jaxpr) for step in steps)
    assert pieces == pytest.approx(whole, rel=1e-3)
    assert whole == pytest.approx(steps[0].lower().cost_analysis()["flops"], rel=0.1)  # XLA counts what is done to each entry too
