"""Training an autoencoder: its losses, two players in one loss, what settles, accumulation, what is refused; and the scripts."""

import json
import shutil
import signal
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image
from test_scripts import ROOT, saved_arrays, script

import jaxdiff as jd
from jaxdiff import autoencoding, data, experiment, first_stage, training
from jaxdiff import codebook as codebooks
from jaxdiff.errors import InputError
from jaxdiff.models.autoencoder import Autoencoder
from jaxdiff.training import checkpoint, dryrun

MODELS = {
    "AutoencoderKL": dict(latent_channels=2),
    "AutoencoderVQ": dict(latent_channels=2, codes=6, code_channels=3),
}
REGULARISERS = {"AutoencoderKL": "kl(0.01)", "AutoencoderVQ": "codebook_ema(0.9, commitment=0.25)"}


class Encoder(nn.Module):
    out_channels: int

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Conv(self.out_channels, (1, 1), name="conv_out")(nn.tanh(nn.Conv(4, (3, 3), 2, name="conv_in")(x)))


class Decoder(nn.Module):
    out_channels: int

    @nn.compact
    def __call__(self, z, train=False):
        h = nn.tanh(nn.Conv(4, (3, 3), name="conv_in")(z.repeat(2, 1).repeat(2, 2)))
        return nn.Conv(self.out_channels, (3, 3), name="conv_out")(h)


@pytest.fixture(autouse=True, scope="module")
def two_convolutions():
    """Both ways of an autoencoder are two convolutions: training does not know the network, and these compile in no time."""
    with pytest.MonkeyPatch.context() as patched:
        ways = lambda self, encoded: (Encoder(encoded), Decoder(self.out_channels))  # noqa: E731
        patched.setattr(Autoencoder, "ways", ways)
        yield


def config(name="AutoencoderVQ", **changes) -> ConfigDict:
    """A tiny autoencoder of digits, 8x8."""
    c = tiny.config(steps=6)
    c.data = dict(name="digits", split="train", shape=(8, 8, 1), size=0, codec="pixels", flip=False)
    c.model = dict(
        name=name,
        channels=4,
        multipliers=(1, 2),
        blocks=1,
        attention=(),
        middle_attend="NoAttention",
        out_channels=1,
        dtype="float32",
        dropout=0.0,
        remat=False,
        **MODELS[name],
    )
    c.process = dict(loss="l1", regulariser=REGULARISERS[name], perceptual="", discriminator="")
    c.sampling = dict(ema=0.9, num=6, batch_size=8)
    for key, value in changes.items():
        c.update_from_flattened_dict({key: value})
    return c


def batch_of(n, size=8, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    return {"image": rng.integers(0, 256, (n, size, size, channels)).astype(np.uint8), "label": np.full(n, -1, np.int32)}


def woken(params, scale=0.2):
    """Parameters away from their start, where the last layers are zero and all latents the same."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + scale * jnp.asarray(rng.standard_normal(a.shape), a.dtype), params)


def started(built):
    return jax.jit(built.init)(jax.random.key(0))


def through(built, params, x, eps=None):
    """What the encoder says of images, and what the decoder makes of the posterior's draw or of the nearest codes."""

    @jax.jit
    def both(params, x, eps):
        found = autoencoding.encoded(built.model, params, x)
        if eps is None:
            return found, autoencoding.reconstructed(built.model, params, x)[0]
        return found, autoencoding.decoded(built.model, params, found[0] + jnp.exp(found[1] / 2) * eps)

    return both(params, jnp.asarray(x, jnp.float32), eps)


def close(a, b, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# The losses.


def test_the_losses_are_means_over_the_entries_of_each_image():
    x, y = jnp.zeros((2, 2, 2, 1)), jnp.asarray([[1.0, -1, 3, -3], [0, 0, 0, 2]]).reshape(2, 2, 2, 1)
    close(autoencoding.l1(x, y), [2.0, 0.5])
    close(autoencoding.l2(x, y), [5.0, 1.0])
    # Real logits above 1 and fake ones below -1 cost the discriminator nothing.
    real, fake = jnp.asarray([[2.0, 0.0], [1.0, -1.0]]), jnp.asarray([[-3.0, -1.0], [0.0, 2.0]])
    close(autoencoding.hinge(real, fake), [0.25, 0.5 * (1 + 2)])
    close(autoencoding.generator(fake), [2.0, -1.0])


def test_the_kl_is_that_of_sampled_gaussians():
    mean, logvar = jnp.asarray([[0.0, 0.0], [1.0, -2.0]]), jnp.asarray([[0.0, 0.0], [-1.0, 0.5]])
    z = mean[None] + jnp.exp(logvar / 2)[None] * jax.random.normal(jax.random.key(0), (200_000, 2, 2))
    log = jax.scipy.stats.norm.logpdf
    drawn = (log(z, mean[None], jnp.exp(logvar / 2)[None]) - log(z)).sum(-1)
    got = autoencoding.normal_kl(mean, logvar)
    assert got[0] == 0
    assert abs(got[1] - drawn[:, 1].mean()) < 5 * drawn[:, 1].std() / 200_000**0.5


def test_the_kls_weight_is_of_the_sum_over_a_latent_divided_by_the_images_entries():
    """Of the published form, sums over an image plus weight times the sum over its latent, both divided by the entries."""
    built = experiment.build(config("AutoencoderKL", **{"process.regulariser": "kl(0.5)"}))
    params = woken(started(built))
    example = built.prepare(built.extra, jax.random.key(1), batch_of(3))
    each, _, told = jax.jit(built.loss)(params, built.extra, jax.random.key(2), example)
    (mean, logvar), y = through(built, params, example["x"], example["eps"])
    sums = jnp.abs(y - example["x"]).sum((1, 2, 3)) + 0.5 * autoencoding.normal_kl(mean, logvar)
    close(each, sums / 64)
    close(told["kl"], autoencoding.normal_kl(mean, logvar))
    assert example["eps"].shape == (3, 4, 4, 2) and abs(float(example["eps"].std()) - 1) < 0.2


# Two players.


def two_players(start=0, weight=0.5, **changes):
    # As small as the discriminator lets it be.
    patch = f"patch({weight}, start={start}, channels=4, layers=1)"
    return experiment.build(config(**{"process.discriminator": patch, **changes}))


BOTH = [pytest.param("AutoencoderKL", marks=pytest.mark.slow), "AutoencoderVQ"]


@pytest.mark.parametrize("name", BOTH)
def test_each_player_has_the_gradient_of_its_own_loss_alone(name):
    c = config(name, **{"process.discriminator": "patch(0.5, start=0, channels=4, layers=1)"})
    built, alone = experiment.build(c), experiment.build(config(name))
    params, key = woken(started(built)), jax.random.key(2)
    example = built.prepare(built.extra, jax.random.key(1), batch_of(4))
    second = autoencoding.patch(channels=4, layers=1).network

    def says(discriminator, images):
        return second.apply({"params": discriminator}, images)

    def given_back(network):
        found = autoencoding.encoded(built.model, {"params": network}, example["x"])
        if name == "AutoencoderKL":
            z = found[0] + jnp.exp(found[1] / 2) * example["eps"]
        else:
            z = codebooks.straight_through(found, codebooks.quantise(network["codebook"], found)[0])
        return autoencoding.decoded(built.model, {"params": network}, z)

    def generators(network):
        return -says(params["discriminator"], given_back(network)).mean()

    def discriminators(discriminator):
        real, fake = says(discriminator, example["x"]), says(discriminator, given_back(params["params"]))
        return 0.5 * (jnp.maximum(1 - real, 0).mean() + jnp.maximum(1 + fake, 0).mean())

    def whole(params):
        each, _, told = built.loss(params, built.extra, key, example)
        return each.mean(), told

    @jax.jit
    def all_of_them():
        (_, told), got = jax.value_and_grad(whole, has_aux=True)(params)
        rest = jax.grad(lambda p: alone.loss(p, alone.extra, key, example)[0].mean())({"params": params["params"]})["params"]
        off = jax.grad(lambda n: jnp.abs(given_back(n) - example["x"]).mean())(params["params"])
        return told, got, rest, off, jax.grad(generators)(params["params"]), jax.grad(discriminators)(params["discriminator"])

    told, got, rest, off, fooling, telling = all_of_them()
    norm = [float(jnp.linalg.norm(g["decoder"]["conv_out"]["kernel"])) for g in (off, fooling)]
    want = 0.5 * norm[0] / (norm[1] + 1e-6)
    assert want > 1e-3
    close(told["adversarial_weight"], jnp.full(4, want), 1e-3)
    close(got["params"], jax.tree.map(lambda a, b: a + want * b, rest, fooling), 2e-3, 1e-5)
    close(got["discriminator"], telling, 1e-3, 1e-6)
    assert float(optax.global_norm(telling)) > 1e-2 and float(optax.global_norm(fooling)) > 1e-2


def test_the_weight_is_bounded_where_the_generators_gradient_vanishes():
    assert autoencoding.adaptive(jnp.ones(4), jnp.zeros(4)) == 1e4
    assert autoencoding.adaptive(jnp.zeros(4), jnp.ones(4)) == 0
    close(autoencoding.adaptive(jnp.full(4, 3.0), jnp.ones(4)), 3.0)


def test_before_it_enters_the_discriminator_gets_nothing_and_says_nothing():
    built = two_players(start=2)
    params = woken(started(built))
    example = built.prepare(built.extra, jax.random.key(1), batch_of(4))

    @jax.jit
    def gradient(params, step):
        def mean(params):
            each, _, told = built.loss(params, built.extra | {"step": step}, jax.random.key(2), example)
            return each.mean(), told

        return jax.value_and_grad(mean, has_aux=True)(params)

    alone = experiment.build(config())
    rest = {"params": params["params"]}
    want = jax.jit(jax.grad(lambda p: alone.loss(p, alone.extra, jax.random.key(2), example)[0].mean()))(rest)
    for step in (0, 1):
        (_, told), got = gradient(params, jnp.int32(step))
        close(got["params"], want["params"], 1e-3)
        assert not any(g.any() for g in jax.tree.leaves(got["discriminator"]))
        assert not told["generator"].any() and not told["discriminator"].any()
    (_, told), got = gradient(params, jnp.int32(2))
    assert float(optax.global_norm(got["discriminator"])) > 1e-3 and told["discriminator"].any()


def convolutions(jaxpr):
    """How many convolutions a program has: those that always run, and those of each branch of its conditions."""
    always, branches = 0, []
    for equation in jaxpr.eqns:
        always += equation.primitive.name == "conv_general_dilated"
        inner = [
            getattr(p, "jaxpr", p) for p in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns"))
        ]
        counts = [convolutions(each) for each in inner if hasattr(each, "eqns")]
        if equation.primitive.name == "cond":
            branches.append([count for count, _ in counts])
        else:
            always += sum(count for count, _ in counts)
            branches += [branch for _, of in counts for branch in of]
    return always, branches


def test_the_discriminators_work_is_skipped_and_not_masked_before_it_enters():
    built = two_players(start=2)
    params = jax.eval_shape(built.init, jax.random.key(0))
    example = jax.eval_shape(built.prepare, built.extra, jax.random.key(1), batch_of(4))
    counts = convolutions(jax.make_jaxpr(built.loss)(params, built.extra, jax.random.key(2), example).jaxpr)
    always, branches = counts
    assert always == 4  # of the autoencoder's two ways
    assert [before for before, _ in branches] == [0] and branches[0][1] > 2 * 3


def test_a_perceptual_distance_is_weighed_and_its_network_is_an_argument(monkeypatch):
    """With a stand-in for LPIPS, whose weights `extra` carries."""

    def each(weights, x, y):
        return weights["w"] * jnp.square(x - y).mean((1, 2, 3))

    def stand_in(vgg, linear, weight=1.0):
        return autoencoding.Perceptual(each, {"w": np.float32(3.0)}, weight)

    monkeypatch.setattr(autoencoding, "lpips", stand_in)
    built = experiment.build(config(**{"process.perceptual": "lpips('a', 'b', weight=0.5)"}))
    plain = experiment.build(config())
    params = woken(started(built))
    example = built.prepare(built.extra, jax.random.key(1), batch_of(4))
    got, extra, told = jax.jit(built.loss)(params, built.extra, jax.random.key(2), example)
    want, _, _ = jax.jit(plain.loss)(params, plain.extra, jax.random.key(2), example)
    _, y = through(built, params, example["x"])
    close(told["perceptual"], 3 * jnp.square(y - example["x"]).mean((1, 2, 3)))
    close(got, want + 0.5 * told["perceptual"])
    assert extra["perceptual"] == {"w": 3.0}
    # Another network, the same program.
    heavier = built.extra | {"perceptual": {"w": np.float32(6.0)}}
    close(jax.jit(built.loss)(params, heavier, jax.random.key(2), example)[2]["perceptual"], 2 * told["perceptual"])


def test_steps_are_counted_as_they_are_settled():
    built = two_players(start=2)
    _, extra = built.settle(jax.random.key(0), built.init(jax.random.key(1)), built.extra)
    assert extra["step"] == 1 and built.extra["step"] == 0


def test_clipping_takes_each_players_own_norm():
    made = training.make_optimizer(ConfigDict(dict(name="sgd", learning_rate=1.0, schedule="constant_schedule(1.0)", clip=1.0)))
    grads = {"params": {"w": jnp.asarray([3.0, 4.0])}, "discriminator": {"w": jnp.asarray([0.3, 0.4]), "v": jnp.asarray(0.0)}}
    got, _ = made.update(grads, made.init(grads), grads)
    close(got, {"params": {"w": [-0.6, -0.8]}, "discriminator": {"w": [-0.3, -0.4], "v": 0.0}})
    large = {**grads, "discriminator": {"w": jnp.asarray([0.0, 50.0]), "v": jnp.asarray(0.0)}}
    got, _ = made.update(large, made.init(large), large)
    close(got, {"params": {"w": [-0.6, -0.8]}, "discriminator": {"w": [0.0, -1.0], "v": 0.0}})
    # What carries nothing may go on with another clip, and with states that were saved before there were players.
    assert jax.tree.leaves(made.init(grads)[0]) == [] and isinstance(made.init(grads)[0], optax.EmptyState)


# What settles.


def test_a_step_settles_the_codebook_as_its_averages_say_and_the_ema_sees_it():
    c = config(**{"process.regulariser": "codebook_ema(0.9, revive=0)", "optimizer.name": "adamw(weight_decay=0.5)"})
    built = experiment.build(c)
    optimizer = training.make_optimizer(c.optimizer)
    state = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))(jax.random.key(0))
    state = state._replace(params=woken(state.params))
    before = state.params
    after, told = jax.jit(training.make_step(built, optimizer))(jax.random.key(1), state, batch_of(8))
    z, _ = through(built, before, batch_of(8)["image"] / 127.5 - 1)
    book = before["params"]["codebook"]
    indices = codebooks.nearest(book, z).reshape(-1)
    want = book
    for k in range(6):
        if (indices == k).any():  # the first batch's mean, without a bias towards the start
            want = want.at[k].set(z.reshape(-1, 3)[indices == k].mean(0))
    assert len(np.unique(indices)) > 2
    close(after.params["params"]["codebook"], want, 1e-4, 1e-5)
    counts = np.bincount(indices, minlength=6)
    close(after.extra["usage"].counts, 0.1 * counts)
    assert after.extra["step"] == 1 and not after.extra["usage"].batch_counts.any()
    shares = counts[counts > 0] / counts.sum()
    assert told["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert told["codes_used"] == pytest.approx((counts > 0).mean())
    # The average moves towards what was settled: its warm-up at the first update is 1/10.
    start = state.ema["0.9"]["params"]["codebook"]
    close(after.ema["0.9"]["params"]["codebook"], 0.1 * start + 0.9 * want, 1e-4, 1e-5)


def test_a_codebook_by_gradient_follows_its_loss_and_dead_codes_are_revived():
    c = config(**{"process.regulariser": "codebook(0.25, revive=0)", "optimizer.name": "sgd", "optimizer.clip": 0.0})
    built = experiment.build(c)
    params = woken(started(built))
    example = built.prepare(built.extra, jax.random.key(1), batch_of(8))

    @jax.jit
    def both(params):
        def mean(params):
            each, extra, _ = built.loss(params, built.extra, jax.random.key(2), example)
            return each.mean(), extra

        return jax.grad(mean, has_aux=True)(params)

    got, extra = both(params)
    got = got["params"]["codebook"]
    z = through(built, params, example["x"])[0].reshape(-1, 3)
    book = params["params"]["codebook"]
    indices = codebooks.nearest(book, z[None])[0]
    want = jnp.stack([2 / z.size * ((book[k][None] - z) * (indices == k)[:, None]).sum(0) for k in range(6)])
    close(got, want, 1e-3, 1e-7)
    # Without revival settling leaves the codes alone; with it, those that nothing fell to move.
    still, _ = built.settle(jax.random.key(3), params, extra)
    np.testing.assert_array_equal(still["params"]["codebook"], book)
    far = jax.tree.map(lambda a: a, params)
    far["params"]["codebook"] = book.at[2].set(100.0)
    reviving = experiment.build(config(**{"process.regulariser": "codebook(0.25)"}))
    _, extra, _ = jax.jit(reviving.loss)(far, reviving.extra, jax.random.key(2), example)
    alive, _ = reviving.settle(jax.random.key(3), far, extra)
    moved = np.asarray(alive["params"]["codebook"])
    assert np.abs(moved[2]).max() < 50 and np.abs(np.asarray(z) - moved[2][None]).max(1).min() < 1e-5
    seen = np.unique(codebooks.nearest(far["params"]["codebook"], z[None]))
    np.testing.assert_array_equal(moved[seen], np.asarray(far["params"]["codebook"])[seen])


@pytest.mark.parametrize("name", BOTH)
def test_a_step_in_pieces_is_the_step_of_the_whole_batch(name):
    more = {"process.regulariser": "codebook_ema(0.9, revive=0)"} if name == "AutoencoderVQ" else {}
    c = config(name, **{"optimizer.name": "sgd", "optimizer.clip": 0.0, **more})
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    state = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))(jax.random.key(0))
    state = state._replace(params=woken(state.params))
    whole, pieces = (jax.jit(training.make_step(built, optimizer, n))(jax.random.key(1), state, batch_of(8)) for n in (1, 2))
    # Which encoder outputs are kept for revival is drawn at random, and otherwise by the pieces.
    dropped = [s._replace(extra={**s.extra, "usage": s.extra["usage"]._replace(candidates=())}) if "usage" in s.extra else s
               for s in (whole[0], pieces[0])]  # fmt: skip
    close(*dropped, 1e-3, 1e-5)
    for key in ("loss", "reconstruction", "grad_norm"):
        np.testing.assert_allclose(whole[1][key], pieces[1][key], rtol=1e-4)


def test_training_learns_uses_its_codes_and_says_so():
    c = config(**{"optimizer.learning_rate": 3e-3, "optimizer.schedule": "constant_schedule(1.0)"})
    built = experiment.build(c)
    optimizer = training.make_optimizer(c.optimizer)
    digits = data.load("digits", "train")
    state = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))(jax.random.key(0))
    step = jax.jit(training.make_step(built, optimizer), donate_argnums=1)
    told = []
    for i in range(150):
        state, values = step(jax.random.key(1), state, data.batch_at(digits, 0, i, 16))
        told.append(jax.device_get(values))
    assert set(told[0]) == {"loss", "grad_norm", "finite", "reconstruction", "commitment", "perplexity", "codes_used"}
    assert told[-1]["reconstruction"] < 0.5 * told[0]["reconstruction"]
    assert told[-1]["codes_used"] > 0.6 and told[-1]["perplexity"] > 2
    assert step._cache_size() == 1


def test_a_step_that_is_not_finite_settles_nothing():
    built = experiment.build(config())
    spoilt = built._replace(loss=lambda *args: (lambda each, extra, told: (each * jnp.nan, extra, told))(*built.loss(*args)))
    c = config()
    optimizer = training.make_optimizer(c.optimizer)
    state = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))(jax.random.key(0))
    after, told = jax.jit(training.make_step(spoilt, optimizer))(jax.random.key(1), state, batch_of(8))
    assert not told["finite"] and "worst_logsnr" not in told and after.step == 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=state.step), state)


def test_averages_leave_the_discriminator_out_and_the_dry_run_tells_of_it():
    built = two_players()
    optimizer = training.make_optimizer(config().optimizer)
    state = jax.eval_shape(lambda key: training.init_state(built, optimizer, (0.9,), key), jax.random.key(0))
    assert set(state.params) == {"params", "discriminator"} and set(state.ema["0.9"]) == {"params"}
    table = dryrun.blocks(state.params)
    assert "discriminator" in table and "decoder" in table


def test_the_codec_of_parameters_at_hand_is_that_of_a_first_stage():
    built = experiment.build(config("AutoencoderKL"))
    params = woken(started(built))
    codec = built.codec(params)
    image = batch_of(2)["image"]
    z = codec.encode(jax.random.key(1), image)
    (mean, logvar), y = through(built, params, image / 127.5 - 1)
    close(z, mean + jnp.exp(logvar / 2) * jax.random.normal(jax.random.key(1), mean.shape), 1e-3, 1e-4)
    back = np.asarray(codec.decode(mean)).astype(int)
    assert np.abs(back - np.clip(np.round((np.asarray(y) + 1) * 127.5), 0, 255)).max() <= 1 and first_stage.is_latent(codec)


# What is refused.


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("AutoencoderVQ", {"data.shape": (7, 8, 1)}, "(7, 8, 1) does not fit 2 levels of model.multipliers: each size of an"),
        ("AutoencoderVQ", {"data.shape": (8, 8, 3)}, "model.out_channels=1 but images of data.shape=(8, 8, 3) have 3 channel"),
        ("AutoencoderVQ", {"process.loss": "l3"}, "process.loss='l3' is unknown; allowed: l1, l2"),
        ("AutoencoderVQ", {"process.loss": "simple"}, "process.loss='simple' is unknown; allowed: l1, l2"),
        (
            "AutoencoderVQ",
            {"process.regulariser": "kl(1e-6)"},
            "is of AutoencoderKL; allowed with model.name='AutoencoderVQ': codebo",
        ),
        (
            "AutoencoderKL",
            {"process.regulariser": "codebook_ema"},
            "is of AutoencoderVQ; allowed with model.name='AutoencoderKL': kl",
        ),
        (
            "AutoencoderVQ",
            {"process.regulariser": "l1"},
            "process.regulariser='l1' is unknown; allowed: codebook, codebook_ema, kl",
        ),
        ("AutoencoderVQ", {"process.regulariser": "codebook_ema(1.0)"}, "decay=1.0 is out of range; it is at least 0 and below 1"),
        ("AutoencoderVQ", {"process.regulariser": "codebook_ema(revive=1)"}, "revive=1 is out of range"),
        ("AutoencoderVQ", {"process.regulariser": "codebook(-1)"}, "commitment=-1 is out of range"),
        ("AutoencoderVQ", {"process.regulariser": "codebook(beta=1)"}, "unexpected keyword argument 'beta'"),
        ("AutoencoderKL", {"process.regulariser": "kl(-1e-6)"}, "weight=-1e-06 is out of range; it is a finite number, at least 0"),
        (
            "AutoencoderKL",
            {"process.discriminator": "patch(start=-1)"},
            "start=-1 is out of range; it is a whole number, at least 0",
        ),
        ("AutoencoderKL", {"process.discriminator": "patch(start=2147483648)"}, "steps are counted up to 2147483647; leave"),
        (
            "AutoencoderKL",
            {"process.discriminator": "patch"},
            "process.discriminator='patch' does not fit data.shape=(8, 8, 1): ",
        ),
        ("AutoencoderKL", {"process.discriminator": "lpips('a', 'b')"}, "is unknown; allowed: patch"),
        ("AutoencoderKL", {"process.perceptual": "lpips('none.pth', 'none.pth')"}, "none.pth"),
        ("AutoencoderKL", {"process.perceptual": "vgg"}, "process.perceptual='vgg' is unknown; allowed: lpips"),
        (
            "AutoencoderKL",
            {"data.codec": "centred"},
            "data.codec='centred' is not what an autoencoder is trained on; allowed: pixels",
        ),
        ("AutoencoderKL", {"model.multipliers": (1, 0)}, "model.multipliers=(1, 0) is out of range"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(name, changes, said):
    with pytest.raises(InputError) as error:
        experiment.build(config(name, **changes))
    assert said in str(error.value) and "\n" not in str(error.value)


def with_key(c, group, key, value):
    with c.unlocked():
        c[group][key] = value
    return c


@pytest.mark.parametrize(
    "c, said",
    [
        (
            with_key(config(), "process", "schedule", "cosine"),
            "process.schedule says nothing to model.name='AutoencoderVQ'; leave it",
        ),
        (with_key(config(), "sampling", "steps", 50), "sampling.steps says nothing to model.name='AutoencoderVQ'"),
        (with_key(config(), "data", "augment", ""), "data.augment says nothing to model.name='AutoencoderVQ'"),
        (with_key(config(), "data", "latents", "x"), "data.latents says nothing to model.name='AutoencoderVQ'"),
        (
            with_key(config(), "process", "regularizer", "kl"),
            "process.regularizer is unknown; did you mean 'regulariser'?; allowed: loss,",
        ),
        (
            with_key(tiny.config(), "process", "regulariser", "kl"),
            "process.regulariser says nothing to model.name='UNet'; leave it out",
        ),
        (with_key(tiny.classifier(), "process", "perceptual", ""), "process.perceptual says nothing to model.name='Classifier'"),
    ],
)
def test_keys_of_another_kind_of_model_are_told(c, said):
    with pytest.raises(InputError) as error:
        experiment.check_keys(c)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_regulariser_is_needed_and_the_players_are_not():
    c = config()
    with c.unlocked():
        del c.process["discriminator"], c.process["perceptual"], c.process["loss"]
    experiment.check_keys(c)
    built, said = (experiment.build(each) for each in (c, config(**{"process.loss": "l1"})))
    params = woken(started(built))
    assert "discriminator" not in params and experiment.optional(c, "process", "loss") == "l1"
    example = built.prepare(built.extra, jax.random.key(1), batch_of(2))
    got, want = (each.loss(params, each.extra, jax.random.key(2), example)[0] for each in (built, said))
    np.testing.assert_array_equal(got, want)
    with c.unlocked():
        del c.process["regulariser"]
    with pytest.raises(InputError, match=r"config key process\.regulariser is missing"):
        experiment.check_keys(c)


def saved(workdir, c):
    """A workdir with random parameters of a config."""
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    state = jax.jit(lambda key: training.init_state(built, optimizer, c.training.ema, key))(jax.random.key(0))
    state = state._replace(params=woken(state.params), ema={name: woken(each) for name, each in state.ema.items()})
    with checkpoint.manager(workdir) as checkpoints:
        checkpoint.save(checkpoints, state, c)
    return state


@pytest.mark.parametrize("load", [jd.load, jd.load_classifier])
def test_an_autoencoders_workdir_is_no_model_that_draws(load, tmp_path):
    saved(tmp_path, config())
    with pytest.raises(InputError, match="holds an autoencoder, which draws no images"):
        load(tmp_path)


# The scripts.

FLAGS = [
    "--config=tests/tiny_autoencoder.py",
    "--config.training.log_every=2",
    "--config.training.save_every=3",
]


@pytest.mark.slow
def test_train_go_on_show_and_evaluate(tmp_path):
    """A codebook of averages with revival and a discriminator that enters half-way: cut in two, the run ends with the same bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    dry = script("train.py", *FLAGS, "--dry_run", f"--workdir={whole}")
    assert dry.returncode == 0 and "codebook" in dry.stdout and "discriminator" in dry.stdout, dry.stderr
    assert not whole.exists()
    for flags in (
        [*FLAGS, f"--workdir={whole}"],
        [*FLAGS, "--config.steps=3", f"--workdir={parts}"],
        [*FLAGS, f"--workdir={parts}"],
    ):
        done = script("train.py", *flags)
        assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stdout and "held out: 299 images, digits test" in done.stdout
    assert f"diffuse its latents with: --config.data.codec=\"autoencoder('{parts}')\"" in done.stdout
    assert "step 6: PSNR " in done.stdout and "of 16 codes used, perplexity" in done.stdout and "of 299 images" in done.stdout
    a, b = (saved_arrays(folder, 6) for folder in (whole, parts))
    assert a.keys() == b.keys() and any("discriminator" in name for name in a) and any("usage" in name for name in a)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    pictures = [np.asarray(Image.open(folder / "samples" / "step_0000006.png")) for folder in (whole, parts)]
    assert (pictures[0] == pictures[1]).all() and pictures[0].shape == (4 * 33 + 1, 4 * 33 + 1, 3)

    rows = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "held_out_psnr" in row][-1]
    assert held_out["step"] == 6 and 0 < held_out["held_out_ssim"] < 1 and 0 < held_out["held_out_codes_used"] <= 1
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [2, 3, 4, 6] and not any("loss_by_logsnr" in row for row in trained)
    assert [row["discriminator"] > 0 for row in trained] == [False, False, True, True]  # it enters after 3 steps
    assert not (parts / "loss_by_logsnr.csv").exists()

    figures = script("evaluate.py", f"--workdir={parts}")
    assert figures.returncode == 0, figures.stderr
    assert figures.stdout.startswith("psnr (n=299): ") and "ssim (n=299): " in figures.stdout
    row = json.loads(next((parts / "evaluation").glob("psnr-*.json")).read_text())
    assert row["value"] == pytest.approx(held_out["held_out_psnr"], rel=1e-3)  # along the way, too, of all of these few images
    shutil.rmtree(parts / "evaluation")
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "16"}
    many = script("evaluate.py", f"--workdir={parts}", "--metrics=psnr,usage", **devices)
    assert many.returncode == 0, many.stderr
    again = json.loads(next((parts / "evaluation").glob("psnr-*.json")).read_text())
    assert again["value"] == pytest.approx(row["value"], rel=1e-3) and again["n"] == 299

    for args, said in (
        (["sample.py", f"--workdir={parts}"], "holds an autoencoder, which draws no images"),
        (["train.py", *FLAGS, "--config.process.loss=l1", f"--workdir={parts}"], "its process.loss is 'l2', now 'l1'"),
        (
            ["train.py", *FLAGS, "--config.data.shape=15,16,1", f"--workdir={tmp_path}/new"],
            "each size of an image must be divisible",
        ),
    ):
        refused = script(*args)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and said in refused.stderr, refused.stderr


@pytest.mark.slow
def test_many_devices_train_as_one_and_sigterm_saves(tmp_path):
    one = script("train.py", *FLAGS, f"--workdir={tmp_path}/1")
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "16"}
    many = script("train.py", *FLAGS, "--config.training.mesh=(2, 2)", f"--workdir={tmp_path}/4", **devices)
    assert one.returncode == 0 and many.returncode == 0, one.stderr + many.stderr
    last = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in "14"]
    assert last[0]["held_out_psnr"] == pytest.approx(last[1]["held_out_psnr"], rel=1e-3)

    args = [sys.executable, "train.py", *FLAGS, "--config.steps=100000", f"--workdir={tmp_path}/1"]
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while (checkpoint.newest(tmp_path / "1") or 0) < 9:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by SIGTERM at step" in out
    stopped = int(out.split("at step ")[1].split(",")[0])
    assert checkpoint.newest_good(tmp_path / "1") == (stopped, {})


@pytest.mark.slow
def test_without_a_test_split_training_images_are_shown(tmp_path):
    digits, folder = data.load("digits"), tmp_path / "images"
    for i, image in enumerate(digits.images[:40]):
        jd.pictures.save(folder / "0" / f"{i}.png", np.repeat(image, 3, axis=-1))
    alone = [
        "--config.data.name=folder",
        f"--config.data_dir={folder}",
        "--config.data.shape=16,16,3",
        "--config.model.out_channels=3",
    ]
    alone += ["--config.steps=1", "--config.process.discriminator="]
    done = script("train.py", *FLAGS, *alone, f"--workdir={tmp_path}/w", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "has no split test or validation" in done.stdout and "of 40 images" in done.stdout
