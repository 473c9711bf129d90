"""The noise-aware classifier: its network, what it is trained on, its log-probability, and the scripts on it."""

import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_configs import block, conv, load, mlp, norm
from test_scripts import saved_arrays, script
from test_unet import apply, count, image, random_like, shapes, woken

import jaxdiff as jd
from jaxdiff import data, experiment, models, run, training
from jaxdiff import mesh as meshes
from jaxdiff.classifier import at_label, log_probs
from jaxdiff.evaluation import Settings, accuracy_by_level, evaluate
from jaxdiff.models import parts
from jaxdiff.training import checkpoint, metrics

TINY = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "classes": 3, "heads": 2}
ADM = {
    "block": parts.ADMBlock,
    "attend": functools.partial(parts.Attention, epsilon=1e-5),
    "down": parts.ADMBlockDown,
    "pool": functools.partial(parts.AttentionPool, epsilon=1e-5),
}


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)


# The network.


@pytest.mark.parametrize(
    "size, multipliers, blocks, attention, published",
    [
        (64, (1, 2, 3, 4), 4, (1, 2, 3), 65_438_568),
        (128, (1, 1, 2, 3, 4), 2, (2, 3, 4), 42_568_040),
        (256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 54_096_360),
    ],
)
def test_adms_classifiers_have_the_published_parameters(size, multipliers, blocks, attention, published):
    """ADM table 12: 65M, 43M and 54M."""
    model = models.Classifier(multipliers=multipliers, blocks=blocks, attention=attention, classes=1000, **ADM)
    assert count(shapes(model, jnp.zeros((1, size, size, 3)))) == published


def test_adms_classifier_of_64_by_hand():
    def scaled(i, o):
        return block(i, o, embed=512 * 2 * o + 2 * o)

    def attention(c):
        return norm(c) + 4 * conv(c, c, 1)

    total, before = mlp() + conv(3, 128), 128
    for level, c in enumerate((128, 256, 384, 512)):
        total += scaled(before, c) + 3 * scaled(c, c) + (4 * attention(c) if level else 0)
        total += scaled(c, c) if c < 512 else 0  # the block that halves; its way around has no parameters
        before = c
    total += 2 * scaled(512, 512) + attention(512)
    total += norm(512) + (8 * 8 + 1) * 512 + 3 * conv(512, 512, 1) + conv(512, 1000, 1)
    assert total == 65_438_568


@pytest.mark.parametrize("name, parameters", [("cifar_classifier", 12_993_546), ("digits_classifier", 177_994)])
def test_the_configs_have_the_parameters_they_say(name, parameters):
    module = load(name)
    built = experiment.build(module.get_config())
    assert f"{parameters:,} parameters" in module.__doc__
    assert count(jax.eval_shape(built.init, jax.random.key(0))) == parameters


@pytest.mark.parametrize("axes", [1, 3])
def test_any_number_of_axes_and_parameters_stay_float32(axes):
    model, x = models.Classifier(**TINY | ADM, dtype=jnp.bfloat16), jnp.zeros((2, *(4,) * axes, 3))
    params = shapes(model, x)
    out = jax.eval_shape(model.apply, params, x, jnp.zeros(()))
    assert out.shape == (2, 3) and out.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_samples_do_not_see_each_other_nor_the_label_in_any_precision():
    model, x = models.Classifier(**TINY | ADM), image(2, 4, 4, 3)
    params, snr = woken(model, x), jnp.zeros((2, 1, 1, 1))
    run = apply(model)
    out = run(params, x, snr)
    moved = run(params, x.at[1].add(1.0), snr.at[1].add(1.0))
    close(moved[0], out[0])
    assert out.shape == (2, 3) and jnp.abs(moved[1] - out[1]).max() > 1e-3
    low = apply(model.clone(dtype=jnp.bfloat16))(params, x, snr)
    assert 1e-6 < jnp.abs(low - out).max() / jnp.abs(out).max() < 0.1
    close(apply(model.clone(remat=True))(params, x, snr, {"label": jnp.asarray([0, 1])}), out)


def test_every_class_is_as_likely_at_first_and_the_noise_level_is_seen_later():
    model, x = models.Classifier(**TINY), image(2, 4, 4, 3)
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), x, jnp.zeros(()))
    np.testing.assert_array_equal(apply(model)(params, x, jnp.zeros(())), 0)
    assert not params["params"]["logits"]["kernel"].any() and params["params"]["q"]["kernel"].any()
    run, params = apply(model), random_like(params)
    outs = [run(params, x, jnp.float32(snr)) for snr in (-30.0, -3.0, 0.0, 3.0, 30.0)]
    assert all(jnp.isfinite(out).all() for out in outs)
    assert all(jnp.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(outs))
    with pytest.raises(ValueError, match="divisible by 2"):
        shapes(model, jnp.zeros((1, 5, 4, 3)))


def test_attention_pooling_is_the_means_row_of_self_attention():
    """Radford et al.'s: all tokens attend to all, and the first one, the mean, is kept."""
    part, h = parts.AttentionPool(5, heads=2), image(3, 2, 4, 8)
    params = random_like(jax.eval_shape(lambda: part.init(jax.random.key(0), h)))
    p = jax.tree.map(np.asarray, params["params"])
    tokens = jax.nn.silu(parts.norm(8, jnp.float32).apply({"params": p["norm_out"]}, h)).reshape(3, 8, 8)
    tokens = np.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1) + p["place"]
    q, k, v = ((tokens @ p[n]["kernel"] + p[n]["bias"]).reshape(3, 9, 2, 4) for n in ("q", "k", "v"))
    weights = jax.nn.softmax(np.einsum("bqhc,bkhc->bhqk", q, k) / 2, axis=-1)
    mixed = np.einsum("bhqk,bkhc->bqhc", weights, v).reshape(3, 9, 8)
    close(part.apply(params, h), mixed[:, 0] @ p["logits"]["kernel"] + p["logits"]["bias"], 1e-4)


def test_adms_block_that_halves_only_averages_on_its_way_around():
    x, embedding = image(2, 4, 6, 8), image(2, 32)
    part = parts.ADMBlockDown(8)
    params = random_like(jax.eval_shape(lambda: part.init(jax.random.key(0), x, embedding, False)))
    assert "shortcut" not in params["params"]
    params["params"]["conv2"] = jax.tree.map(jnp.zeros_like, params["params"]["conv2"])
    close(part.apply(params, x, embedding, False), np.asarray(x).reshape(2, 2, 2, 3, 2, 8).mean((2, 4)))
    wider = parts.ADMBlockDown(16)
    params = jax.eval_shape(lambda: wider.init(jax.random.key(0), x, embedding, False))["params"]
    assert params["shortcut"]["kernel"].shape == (8, 16)


# What training minimises.


@pytest.fixture(scope="module")
def model():
    """A tiny config, its experiment and two sets of parameters, none of them zero."""
    c = tiny.classifier()
    built = experiment.build(c)
    params = jax.eval_shape(built.init, jax.random.key(0))
    one = random_like(params)
    return c, built, one, jax.tree.map(lambda a: -a, one)


def test_the_loss_is_minus_the_log_probability_of_the_label_where_it_was_drawn(model):
    c, built, params, _ = model
    batch = data.batch_at(data.load("digits"), 0, 0, 32)
    example = built.prepare((), jax.random.key(1), batch)
    assert set(example) == {"x0", "eps", "t", "label"} and (example["label"] == batch["label"]).all()
    loss = jax.jit(built.loss)
    each, extra, told = loss(params, (), None, example)
    level = jd.schedules.cosine(example["t"].reshape(-1, 1, 1, 1))
    x = jd.diffuse(level, example["x0"], example["eps"])
    classify = run.classifier_of(c, built, params)
    close(each, -classify.log_prob(batch["label"])(x, level), 1e-4)
    close(told["logsnr"], jd.logsnr(level).reshape(-1))
    right = log_probs(built.net(params, None), x, level).argmax(1) == batch["label"]
    np.testing.assert_array_equal(told["accuracy"], right)
    assert extra == () and told["accuracy"].dtype == jnp.float32
    dropped = loss(params, (), jax.random.key(0), example)[0]  # a key turns dropout on
    assert jnp.abs(dropped - each).max() > 1e-4


def test_an_importance_draw_and_an_augmentation_of_which_the_network_is_told_nothing():
    changes = {"process.schedule": "linear_beta(20)", "process.draw": "draw_importance(20)", "data.augment": "edm(0.5)"}
    built = experiment.build(tiny.classifier(**changes))
    batch = data.batch_at(data.load("digits"), 0, 0, 8)
    params = jax.eval_shape(built.init, jax.random.key(0))
    example = jax.eval_shape(built.prepare, built.extra, jax.random.key(1), batch)
    each, extra, _ = jax.eval_shape(built.loss, params, built.extra, jax.random.key(0), example)
    assert each.shape == (8,) and jax.tree.map(jnp.shape, extra) == jax.tree.map(jnp.shape, built.extra)


@pytest.mark.slow
def test_what_a_tiny_classifier_learns_of_two_patterns():
    """Stripes against their negative: at high signal it is nearly always right, at low signal it can only guess."""
    rng = np.random.default_rng(0)
    sign = np.where(rng.integers(2, size=512) > 0, 1, -1)
    stripes = np.tile([1.0, -1.0], (8, 4))[None, :, :, None] * sign[:, None, None, None]
    images = (127.5 + 40 * stripes + rng.normal(0, 20, stripes.shape)).clip(0, 255).astype(np.uint8)
    dataset = data.Dataset(images, (sign > 0).astype(np.int32), ("a", "b"), "stripes")
    c = tiny.classifier(**{"model.classes": 2, "batch_size": 64, "optimizer.schedule": "constant_schedule(1)"})
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    step = jax.jit(training.make_step(built, optimizer))
    state = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))(jax.random.key(0))
    for i in range(60):
        state, told = step(jax.random.key(1), state, data.batch_at(dataset, 0, i, 64))
    row = metrics.summary([jax.device_get(told)])
    assert row["accuracy"] == float(told["accuracy"]) > 0.6 and len(row["loss_by_logsnr"]) == len(metrics.LOGSNR_EDGES) + 1
    right = accuracy_by_level(built, state.ema["0.9"], dataset, 512, 256, jax.random.key(2), meshes.make_mesh((-1, 1)))
    by = dict(zip(metrics.LOGSNR_EDGES, right))
    assert all(by[at] > 0.95 for at in (2.0, 6.0, 12.0)) and abs(by[-12.0] - 0.5) < 0.12  # 5 standard errors


# The log-probability.

# Nearly data, in between, exploding noise, and noise alone.
LEVEL = jd.Level(*(jnp.asarray(a, jnp.float32).reshape(4, 1, 1, 1) for a in ([1, 0.8, 1, 0], [0.002, 0.6, 80, 1])))
X = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)) * jnp.hypot(LEVEL.alpha, LEVEL.sigma)


def test_labels_share_a_probability_of_one_gradients_are_finite_and_one_trace_serves_them(model):
    c, built, one, two = model
    traces = []

    @jax.jit
    def told(log_prob, x, level):
        traces.append(1)
        return log_prob(x, level), jax.grad(lambda x: log_prob(x, level).sum())(x)

    classify = run.classifier_of(c, built, one)
    each, grads = (jnp.stack(a) for a in zip(*(told(classify.log_prob(label), X, LEVEL) for label in range(10))))
    assert each.shape == (10, 4) and each.dtype == jnp.float32
    close(jax.nn.logsumexp(each, axis=0), np.zeros(4))
    assert jnp.isfinite(grads).all() and float(jnp.abs(grads).max((2, 3, 4)).min()) > 0
    other, _ = told(run.classifier_of(c, built, two).log_prob(3), X, LEVEL)
    again, _ = told(classify.log_prob(3), X, LEVEL._replace(sigma=LEVEL.sigma * 2))
    assert len(traces) == 1 and jnp.abs(other - each[3]).max() > 1e-3 and jnp.abs(again - each[3]).max() > 1e-3
    mixed, _ = told(classify.log_prob(np.array([7, 0, 3, 9])), X, LEVEL)
    close(mixed, each[jnp.asarray([7, 0, 3, 9]), jnp.arange(4)], 1e-4)
    # What jd.guidance makes of it.
    denoise = jd.denoiser(lambda x, logsnr: (jnp.zeros_like(x), None), jd.targets.v)
    guided = jax.jit(jd.guidance.classifier(denoise, classify.log_prob(3), 2.0))(X, LEVEL)
    push = jnp.where(LEVEL.alpha > 0, 2 * LEVEL.sigma * grads[3], 0)
    close((denoise(X, LEVEL).eps - guided.eps) / LEVEL.sigma, push / LEVEL.sigma, 1e-4)


def test_a_classifier_of_any_network_and_scale_of_data():
    """Two Gaussians of deviation 0.5 about -1 and 1: the log-odds of the noisy sample are known."""

    def net(x, logsnr):
        # At unit scale (data_std 2): x is the sample over q = hypot(2 alpha, sigma).
        snr = jnp.exp(logsnr)
        alpha, sigma = jnp.sqrt(snr / (1 + snr)), jnp.sqrt(1 / (1 + snr))
        odds = 2 * alpha * x[:, 0] * jnp.hypot(2 * alpha, sigma) / (0.25 * alpha**2 + sigma**2)
        return jnp.stack([-odds / 2, odds / 2], axis=-1), None

    x = jnp.linspace(-2, 2, 5)[:, None]
    level = jd.Level(jnp.float32(0.8), jnp.float32(0.6))
    got = jd.classifier(net, 1, data_std=2.0)(x, level)
    density = [np.exp(-((np.asarray(x)[:, 0] - m * 0.8) ** 2) / (2 * (0.25 * 0.64 + 0.36))) for m in (-1, 1)]
    close(got, np.log(density[1] / (density[0] + density[1])))
    close(
        at_label(log_probs(net, x, level, 2.0), jnp.asarray([0, 1, 0, 1, 0])),
        np.where([0, 1, 0, 1, 0], got, np.log1p(-np.exp(got))),
    )
    assert jnp.isnan(jd.classifier(net, 2)(x, level)).all()


@pytest.mark.parametrize("label, said", [(10, "label=10"), (-1, "label=-1"), (1.5, "label=1.5"), ([[1]], r"label=\[\[1\]\]")])
def test_labels_that_are_none_are_refused(model, label, said):
    c, built, params, _ = model
    with pytest.raises(jd.InputError, match=f"{said} is out of range; allowed: 0 to 9"):
        run.classifier_of(c, built, params).log_prob(label)


def test_accuracy_by_level_is_that_of_the_images_asked_for(model):
    """A network that reads a constant image's grey: right where there is signal, and whatever the batch."""
    _, built, _, _ = model
    labels = np.arange(90, dtype=np.int32) % 2
    images = np.broadcast_to((255 * labels).astype(np.uint8)[:, None, None, None], (90, 8, 8, 1))
    dataset = data.Dataset(images, labels, ("black", "white"), "flat")

    def net(x, logsnr):
        return jnp.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], axis=-1), None

    flat = built._replace(net=lambda params, cond: jax.tree_util.Partial(net))
    measure = functools.partial(accuracy_by_level, flat, None, dataset, key=jax.random.key(0), mesh=meshes.make_mesh((-1, 1)))
    right = measure(num=90, size=90)
    assert right.shape == metrics.LOGSNR_EDGES.shape and (right[metrics.LOGSNR_EDGES >= 0] == 1).all()
    assert 0.3 < right[0] < 0.8  # alpha is 0.0025, and the mean of 64 numbers has a deviation of an eighth
    np.testing.assert_array_equal(measure(num=90, size=20), right)
    assert set(np.round(measure(num=9, size=4) * 9, 6)) <= set(range(10))


# What cannot be.


def named(**changes):
    c = tiny.classifier()
    with c.unlocked():
        for key, value in changes.items():
            group, name = key.split("__")
            c[group][name] = value
    return c


@pytest.mark.parametrize(
    "c, said",
    [
        (named(model__classes=0), "model.classes=0 is out of range; it is a whole number, at least 2"),
        (named(model__classes=1), "model.classes=1 is out of range"),
        (named(process__loss="simple"), "process.loss='simple' needs a network that predicts images; allowed with model.name"),
        (named(process__loss="hybrid(0.1)"), "process.loss='hybrid(0.1)' needs a network that predicts images"),
        (tiny.config(**{"process.loss": "cross_entropy"}), "trains a classifier, and model.name='UNet' is none"),
        (
            named(process__schedule="learned(-6.0, 8.0)", process__draw="draw_uniform(0.0, 1.0)"),
            "does not train a learned schedule",
        ),
        (named(process__target="v"), "config key process.target says nothing to model.name='Classifier'; leave it out"),
        (named(process__drop_label=0.1), "config key process.drop_label says nothing to"),
        (named(process__weight="unit"), "config key process.weight says nothing to"),
        (named(sampling__solver="ddim"), "config key sampling.solver says nothing to"),
        (named(model__augment=9), "model.augment is unknown to model.name='Classifier'"),
        (named(model__up="Up"), "model.up is unknown to model.name='Classifier'"),
        (named(model__name="Clasifier"), "did you mean 'Classifier'"),
        (named(model__heads=3), "model.heads=3 does not divide"),
        (named(model__pool="Leave"), "model.pool='Leave' is unknown"),
        (named(data__shape=(7, 8, 1), model__multipliers=(1, 2)), "data.shape=(7, 8, 1)"),
        (named(process__draw="draw_uniform(0.0, 1.0)"), "draws a logsnr up to inf"),
    ],
    ids=lambda x: x[:60] if isinstance(x, str) else "",
)
def test_what_cannot_work_is_one_line(c, said):
    with pytest.raises(jd.InputError) as error:
        experiment.build(c)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_keys_that_a_classifier_needs_are_checked():
    experiment.check_keys(tiny.classifier())
    c = tiny.classifier()
    del c.sampling.ema
    with pytest.raises(jd.InputError, match=r"config key sampling\.ema is missing"):
        experiment.check_keys(c)
    with pytest.raises(jd.InputError, match=r"sampling\.batch_size=0 is out of range"):
        run.check(named(sampling__batch_size=0), experiment.build(tiny.classifier()))


def test_a_classifier_neither_draws_nor_has_bits_per_dimension(model, tmp_path):
    c, built, params, _ = model
    with pytest.raises(jd.InputError, match="predicts no images"):
        run.of(c, built, params)
    digits = data.load("digits", "test")
    with pytest.raises(jd.InputError, match="predicts no images"):
        evaluate(tmp_path, "bpd_elbo", c, built, params, digits, 10, Settings())
    run.check(c, built)


@pytest.mark.parametrize(
    "c, load, said", [(tiny.config(), jd.load_classifier, "a UNet, no classifier"), (tiny.classifier(), jd.load, "a classifier")]
)
def test_a_workdir_of_the_other_kind_is_refused(c, load, said, tmp_path):
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    shapes = jax.eval_shape(lambda key: training.init_state(built, optimizer, c.training.ema, key), jax.random.key(0))
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes), c)
    with pytest.raises(jd.InputError, match=f"holds {said}"):
        load(tmp_path)


# Drawing with one.


def unclipped(**changes):
    return tiny.config(**{"sampling.clip": False, **changes})


@pytest.fixture(scope="module")
def drawn(model):
    """A model of labels and one without, of parameters that say something, and a classifier as sharp as trained ones are."""
    c, built, params, _ = model
    runs = []
    for changes in ({}, {"model.classes": 0}):
        experiment_of = experiment.build(unclipped(**changes))
        params_of = random_like(jax.eval_shape(experiment_of.init, jax.random.key(0)))
        runs.append(run.of(unclipped(**changes), experiment_of, params_of))
    return *runs, run.classifier_of(c, built, params)


def test_a_classifier_adds_its_gradient_to_what_the_model_says(drawn):
    """Of an unconditional model, of a conditional one and of that at guidance 0, which is the unconditional one."""
    labelled, plain, classify = drawn
    label, level = np.array([7, 0, 3, 9]), jd.Level(jnp.float32(0.8), jnp.float32(0.6))
    predicted = jax.jit(lambda denoise, x: denoise(x, level))
    push = 300 * 0.6 * jax.jit(jax.grad(lambda x: classify.log_prob(label)(x, level).sum()))(X)
    most = float(jnp.abs(push).max())
    assert most > 0.1
    for made, guidance, alone in (
        (plain, 1.0, plain.denoiser()),
        (labelled, 1.0, labelled.denoiser(label)),
        (labelled, 2.5, labelled.denoiser(label, 2.5)),
        (labelled, 0.0, labelled.denoiser()),
    ):
        got, was = predicted(made.denoiser(label, guidance, classify, 300.0), X), predicted(alone, X)
        close(was.eps - got.eps, push, 1e-3 * most)
        close(got.x0 - was.x0, 0.6 / 0.8 * push, 1e-3 * most)
        close(0.8 * got.x0 + 0.6 * got.eps, X, 1e-3)


def test_the_classifier_guides_within_the_clipping(drawn):
    labelled, _, classify = drawn
    clipped = run.of(tiny.config(), experiment.build(tiny.config()), labelled.params)
    p = clipped.denoiser(3, 1.0, classify, 1e4)(X, jd.Level(jnp.float32(0.8), jnp.float32(0.6)))
    assert float(p.x0.max()) == 1 and float(p.x0.min()) == -1


def test_one_program_serves_classifiers_labels_and_scales_and_every_row_has_its_own_label(drawn, model):
    labelled, plain, classify = drawn
    c, built, _, two = model
    other = run.classifier_of(c, built, two)
    key = jax.random.key(0)
    for made in (labelled, plain):
        run._draw.jitted().clear_cache()
        seen = [
            made.generate(key, 4, steps=5, label=label, classifier=of, classifier_scale=scale)
            for label, scale, of in [
                (3, 30.0, classify),
                (4, 30.0, classify),
                (np.array([1, 2, 0, 4]), 30.0, classify),
                (3, 60.0, classify),
                (3, 30.0, other),
            ]
        ]
        assert run._draw.jitted()._cache_size() == 1
        for i, a in enumerate(seen):
            assert not any((a == b).all() for b in seen[:i])
        # Ten in batches of four, the last filled up: each image is what its key and its label make it.
        labels = np.arange(10)[::-1]
        settings = dict(steps=5, classifier=classify, classifier_scale=30.0)
        many = made.generate(key, 10, label=labels, **settings)
        keys = jd.sample_keys(key, 10)
        rows = np.array([1, 3, 6, 9])
        few = made.generate(keys[rows], 4, label=labels[rows], **settings)
        wrong = made.generate(keys[rows], 4, label=labels[rows - 1], **settings)
        assert np.abs(many[rows].astype(int) - few).max() <= 1
        assert all(np.abs(a.astype(int) - b).max() > 1 for a, b in zip(many[rows], wrong))


def test_films_edits_and_showcases_are_guided_too(drawn):
    _, plain, classify = drawn
    key, settings = jax.random.key(0), dict(classifier=classify, classifier_scale=30.0)
    want = plain.generate(key, 4, 3, label=7, **settings)
    told = plain.trajectory(key, 4, frames=2, steps=3, label=7, **settings)
    assert np.abs(told.x0[-1].astype(int) - want).max() <= 1
    image, mask = np.zeros((4, 8, 8, 1), np.uint8), np.ones((8, 8))
    mask[:4] = 0
    a, b = (plain.edit(key, image, mask, steps=3, label=label, **settings) for label in (7, 4))
    assert (a[:, :4] == 0).all() and (b[:, :4] == 0).all() and (a != b).any()
    # Without a label each class is drawn in turn, and guidance, which a model without classes has not, stays away.
    images, columns, labels = run.showcase(plain, key, 12, steps=3, **settings)
    assert columns == 10 and labels.tolist() == [*range(10), 0, 1]
    close(images, plain.generate(key, 12, 3, "ddim", labels, **settings), 1)


@pytest.mark.parametrize(
    "changes, asked, said",
    [
        ({"data.shape": (16, 16, 1)}, {}, "the classifier is of images of shape (16, 16, 1), this model draws (8, 8, 1)"),
        ({"data.codec": "centred"}, {}, "the classifier was trained with another data.codec, 'centred', than this model"),
        ({"model.classes": 11}, {}, "the classifier knows 11 classes, this model 10"),
        ({}, dict(classifier_scale=float("nan")), "classifier_scale=nan is not a finite number"),
        ({}, dict(classifier_scale=float("inf")), "classifier_scale=inf is not a finite number"),
        ({}, dict(label=10), "label=10 is out of range; allowed: 0 to 9"),
        ({}, dict(label=-1), "label=-1 is out of range; allowed: 0 to 9"),
        ({}, dict(label=[0, 1, 2]), "2 images need one label or 2, got 3"),
        ({}, dict(label=None), "a classifier needs a label"),
    ],
)
def test_a_classifier_that_does_not_fit_is_one_line_before_anything_is_compiled(drawn, changes, asked, said):
    c = tiny.classifier(**changes)
    built = experiment.build(c)
    classify = run.classifier_of(c, built, jax.eval_shape(built.init, jax.random.key(0)))  # no parameter is touched
    for made in drawn[:2]:
        if "model.classes" in changes and not made.config.model.classes:
            continue
        with pytest.raises(jd.InputError) as error:
            made.generate(jax.random.key(0), 2, **{"steps": 3, "label": 3, "classifier": classify, **asked})
        assert said in str(error.value) and "\n" not in str(error.value)


def test_an_unconditional_models_label_is_one_of_the_classifiers(drawn):
    c = tiny.classifier(**{"model.classes": 11})
    built = experiment.build(c)
    classify = run.classifier_of(c, built, random_like(jax.eval_shape(built.init, jax.random.key(0))))
    _, plain, _ = drawn
    plain.denoiser(10, classifier=classify)
    with pytest.raises(jd.InputError, match="label=11 is out of range; allowed: 0 to 10"):
        plain.generate(jax.random.key(0), 1, 2, label=11, classifier=classify)
    with pytest.raises(jd.InputError, match="label=3 was given, but this model is unconditional"):
        plain.generate(jax.random.key(0), 1, 2, label=3)


def saved(workdir, c):
    """A workdir with random parameters of a config."""
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    shapes = jax.eval_shape(lambda key: training.init_state(built, optimizer, c.training.ema, key), jax.random.key(0))
    with checkpoint.manager(workdir) as checkpoints:
        checkpoint.save(checkpoints, random_like(shapes), c)


@pytest.mark.slow
def test_sample_draws_with_a_classifier_and_goes_on_with_the_same_one_only(tmp_path):
    model, classify, other = (tmp_path / name for name in ("model", "classifier", "other"))
    saved(model, tiny.config(**{"model.classes": 0}))
    saved(classify, tiny.classifier())
    saved(other, tiny.classifier(**{"model.channels": 16}))
    out = tmp_path / "x.npz"
    command = ["sample.py", f"--workdir={model}", "--num=10", "--steps=3", f"--out={out}"]
    guided = [*command, f"--classifier={classify}", "--classifier_scale=30"]
    done = script(*guided)
    assert done.returncode == 0, done.stderr
    arrays = np.load(out)
    want = jd.load(model).generate(
        jax.random.key(0), 10, 3, label=np.arange(10), classifier=jd.load_classifier(classify), classifier_scale=30.0
    )
    close(arrays["images"], want, 1)
    assert arrays["labels"].tolist() == list(range(10))

    # As if it had been stopped after the first of three parts: that one is not drawn again, and belongs to this classifier alone.
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    stopped = script("-c", STOPPED, *guided[1:])
    assert stopped.returncode == 3 and len(list(parts.glob("part_*.npy"))) == 1, stopped.stderr
    for flags in (
        [*command, f"--classifier={other}", "--classifier_scale=30"],
        [*command, f"--classifier={classify}", "--classifier_scale=29"],
    ):
        refused = script(*flags)
        assert refused.returncode == 2 and "holds part of another request" in refused.stderr, refused.stderr
    before = next(parts.glob("part_*.npy")).stat().st_mtime_ns
    assert before and script(*guided).returncode == 0 and not parts.exists()
    np.testing.assert_array_equal(np.load(out)["images"], arrays["images"])

    for flags, said in (
        ([*command, f"--classifier={model}"], "holds a UNet, no classifier"),
        ([*command, "--classifier_scale=2"], "--classifier_scale is of a classifier; give its workdir with --classifier=DIR"),
        ([*guided, "--label=10"], "label=10 is out of range; allowed: 0 to 9"),
        ([*command, f"--classifier={classify}", "--classifier_scale=nan"], "classifier_scale=nan is not a finite number"),
    ):
        refused = script(*flags)
        assert refused.returncode == 2 and said in refused.stderr and refused.stderr.count("\n") == 1, (flags, refused.stderr)
        # Nothing is kept of what was refused, so that it does not stand in the way of the next request.
        assert not parts.exists()


# sample.py, but the process ends once a part has been written.
STOPPED = """
import os, sys
from jaxdiff import shards
sys.argv[0] = "sample.py"
write = shards.write
shards.write = lambda *args: (write(*args), os._exit(3))
import runpy
runpy.run_path("sample.py", run_name="__main__")
"""


# The scripts.

FLAGS = [
    "--config=configs/digits_classifier.py",
    "--config.steps=6",
    "--config.batch_size=8",
    "--config.model.channels=8",
    "--config.model.multipliers=1",
    "--config.training.log_every=2",
    "--config.training.save_every=3",
]


@pytest.mark.slow
def test_train_go_on_load_and_be_refused(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    dry = script("train.py", *FLAGS, "--dry_run", f"--workdir={whole}")
    assert dry.returncode == 0 and "down0_0_block" in dry.stdout and not whole.exists(), dry.stderr
    for flags in (
        [*FLAGS, f"--workdir={whole}"],
        [*FLAGS, "--config.steps=3", f"--workdir={parts}"],
        [*FLAGS, f"--workdir={parts}"],
    ):
        done = script("train.py", *flags)
        assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stdout and "jaxdiff.load_classifier" in done.stdout
    assert "held out: 299 images, digits test" in done.stdout and "% of 299 held-out images right at logsnr -12" in done.stdout
    a, b = (saved_arrays(folder, 6) for folder in (whole, parts))
    assert a.keys() == b.keys() and len(a) > 30
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, parts)]
    told = [[r for r in of if "held_out_accuracy" in r and r["step"] == 6] for of in rows]
    assert told[0] == told[1] and len(told[0]) == 1
    by_level = told[0][0]["held_out_by_logsnr"]
    assert [at for at, _ in by_level] == metrics.LOGSNR_EDGES.tolist()
    assert np.mean([share for _, share in by_level]) == pytest.approx(told[0][0]["held_out_accuracy"])
    trained = [r for r in rows[1] if "loss" in r]
    assert [r["step"] for r in trained] == [2, 3, 4, 6] and all(0 <= r["accuracy"] <= 1 for r in trained)
    assert not (parts / "samples").exists() and (parts / "loss_by_logsnr.csv").exists()

    for args in (["sample.py"], ["evaluate.py"]):
        refused = script(*args, f"--workdir={parts}")
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert "holds a classifier, which draws no images" in refused.stderr and not (parts / "samples.png").exists()
    classify = jd.load_classifier(parts)
    assert (classify.step, classify.shape, classify.config.model.name) == (6, (8, 8, 1), "Classifier")
    for name, value in jax.tree_util.tree_leaves_with_path(classify.params):
        np.testing.assert_array_equal(value, b["['ema']['0.995']" + jax.tree_util.keystr(name)])
    with pytest.raises(jd.InputError, match="holds a classifier"):
        jd.load(parts)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    assert classify.log_prob(3)(x, jd.schedules.cosine(jnp.float32(0.3))).shape == (2,)
    other = script("train.py", *FLAGS, "--config.model.classes=11", f"--workdir={parts}")
    assert other.returncode == 2 and "holds another experiment: its model.classes is 10, now 11" in other.stderr


@pytest.mark.slow
def test_many_devices_train_and_measure_as_one_and_a_set_without_a_test_split_is_trained_on(tmp_path):
    one = script("train.py", *FLAGS, f"--workdir={tmp_path}/1")
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "16"}
    many = script("train.py", *FLAGS, "--config.training.mesh=(2, 2)", f"--workdir={tmp_path}/4", **devices)
    assert one.returncode == 0 and many.returncode == 0, one.stderr + many.stderr
    last = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in "14"]
    assert last[0]["step"] == last[1]["step"] == 6
    np.testing.assert_allclose(last[0]["held_out_by_logsnr"], last[1]["held_out_by_logsnr"], atol=2 / 299)
    shutil.rmtree(tmp_path / "4")

    digits, folder = data.load("digits"), tmp_path / "images"
    for i, label in enumerate(digits.labels[:40]):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        jd.pictures.save(folder / str(label) / f"{i}.png", np.repeat(digits.images[i], 3, axis=-1))
    alone = ["--config.data.name=folder", f"--config.data_dir={folder}", "--config.data.shape=8,8,3"]
    done = script("train.py", *FLAGS, *alone, f"--workdir={tmp_path}/folder", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "has no labelled split test or validation" in done.stdout and "step 6: no held-out images" in done.stdout
