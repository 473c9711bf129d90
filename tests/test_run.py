import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian
from tiny import config, noisy

import jaxdiff as jd
from jaxdiff import experiment, pictures, run, wrappers


@pytest.fixture(scope="module")
def model():
    c = config()
    built = experiment.build(c)
    params = jax.jit(built.init)(jax.random.key(0))
    return c, built, noisy(jax.random.key(1), params), noisy(jax.random.key(2), params)


def test_one_compiled_sampler_serves_every_number_that_a_request_has(model):
    """Steps, seeds, labels, scales, spacings, parameters, eta and churn: values of one program's arguments."""
    _, _, one, two = model
    c = config(**{"sampling.max_steps": 50})
    built = experiment.build(c)
    run._draw.jitted().clear_cache()
    base = dict(params=one, seed=0, steps=10, label=3, guidance=7.0, eta=0.0, gamma=0.1, times=None)
    changes = [
        dict(),
        dict(steps=20),
        dict(steps=50),
        dict(seed=1),
        dict(label=4),
        dict(guidance=1.0),
        dict(guidance=1.0, label=None),
        dict(eta=1.0),
        dict(gamma=0.0),
        dict(gamma=0.3),
        dict(times="linear(lo=0.01)"),
        dict(params=two),
        dict(params=two, seed=1, steps=50, label=4, guidance=1.0, eta=1.0, gamma=0.3, times="linear(lo=0.01)"),
    ]
    seen = []
    for change in changes:
        asked = {**base, **change}
        params, seed, eta, gamma = (asked.pop(name) for name in ("params", "seed", "eta", "gamma"))

        def churned(denoise, eta=eta, gamma=gamma):
            return wrappers.churn(jd.solvers.ddim(denoise, eta), gamma)

        seen.append(run.of(c, built, params).generate(jax.random.key(seed), 4, solver=churned, **asked))
    assert run._draw.jitted()._cache_size() == 1
    for i, a in enumerate(seen):  # each value matters: no two results are the same
        assert a.shape == (4, 8, 8, 1) and a.dtype == np.uint8
        assert not any((a == b).all() for b in seen[:i])


def test_a_samples_noise_is_the_same_in_a_batch_of_1_3_and_64():
    params = draws.parameters()
    full = draws.noise(params, 64)
    assert abs(full.std() / np.sqrt(64 + 16 + 4 + 1) - 1) < 0.05  # the start's and three steps', all of it
    for n, first in ((1, 40), (3, 7)):  # not the batch's first: one key for all would have those right too
        np.testing.assert_array_equal(draws.noise(params, n, first), full[first : first + n])


@pytest.mark.parametrize("solver", ["ddpm", pytest.param("ddim", marks=pytest.mark.slow)])
def test_a_sample_is_the_same_in_a_batch_of_1_3_and_64(solver):
    params = draws.parameters()
    full = draws.images(params, solver, 64)
    assert full.dtype == np.float32 and full.std() > 0.2 and len(np.unique(full[:, 0, 0, 0])) > 20
    for n, first in ((1, 40), (3, 7)):
        np.testing.assert_allclose(draws.images(params, solver, n, first), full[first : first + n], atol=1e-4, rtol=0)


def test_a_sampler_computes_what_its_network_computes_and_keeps_no_trajectory():
    """By the compiler's counts, two evaluations: the loop's body, once, and the last. See benchmarks/sampling_cost.py."""
    c = config(**{"model.classes": 0, "process.drop_label": 0.0, "model.channels": 32, "sampling.max_steps": 1000})
    built = experiment.build(c)
    params = jax.eval_shape(built.init, jax.random.key(0))
    keys, levels, shape = jax.random.split(jax.random.key(0), 16), run.grid(c, built, None, 9), (16, 8, 8, 1)

    def compiled(f, *arguments):
        program = jax.jit(f).lower(params, *arguments).compile()
        cost, memory = program.cost_analysis(), program.memory_analysis()
        return cost["flops"], cost["bytes accessed"], memory.temp_size_in_bytes + memory.output_size_in_bytes

    def draw(params, levels):
        solver = jd.solvers.ddpm(run.denoiser_of(c, built, params, None, 1.0))
        return run.draw_samples(keys, solver, levels, 1.0, None, shape, None)

    def net(params, x, logsnr):
        return built.net(params, None)(x, logsnr)[0]

    flops, moved, _ = compiled(net, jnp.zeros(shape), jnp.zeros(()))
    short, long = (compiled(draw, jax.tree.map(lambda a, n=n: a[:n], levels)) for n in (10, 1000))
    # The body is counted once, however long the loop; a longer one compares a few more levels, to see whether a stretch is padding.
    assert short[0] == pytest.approx(long[0], rel=1e-6)
    assert 2 * flops <= long[0] < 1.02 * 2 * flops
    assert 2 * moved <= long[1] < 1.02 * 2 * moved
    # A kept trajectory would be this much; the levels themselves are a few numbers each.
    assert long[2] - short[2] < 0.01 * 990 * np.prod(shape) * 4


def test_a_sample_does_not_depend_on_what_is_drawn_with_it(model):
    c, built, params, _ = model
    r = run.of(c, built, params)
    labels = np.arange(10)
    many = r.generate(jax.random.key(5), 10, steps=5, solver="ddpm", label=labels, guidance=2.0)  # batches of 4, 4, 2
    few = r.generate(jax.random.key(5), 3, steps=5, solver="ddpm", label=labels[:3], guidance=2.0)
    assert np.abs(many[:3].astype(int) - few).max() <= 1
    assert len(np.unique(many.reshape(10, -1), axis=0)) == 10


def test_guidance_and_labels_reach_the_denoiser(model):
    c, built, params, _ = model
    with c.unlocked():
        c = c.copy_and_resolve_references()
        c.sampling.clip = False
    r = run.of(c, built, params)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    level = jd.schedules.cosine(jnp.float32(0.5))
    cond, uncond, mixed = (r.denoiser(*a)(x, level) for a in [(3,), (None,), (3, 2.5)])
    np.testing.assert_allclose(mixed.eps, uncond.eps + 2.5 * (cond.eps - uncond.eps), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(level.alpha * mixed.x0 + level.sigma * mixed.eps, x, rtol=1e-4, atol=1e-4)
    rows = r.denoiser(np.array([3, -1]))(x, level)
    np.testing.assert_allclose(rows.x0, jnp.stack([cond.x0[0], uncond.x0[1]]), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(cond.x0 - uncond.x0).max()) > 1e-3
    pair = r.denoiser(np.array([3, 3]), 2.5)(x, level)
    np.testing.assert_allclose(pair.eps, mixed.eps, rtol=1e-4, atol=1e-4)


def test_clipping_holds_black_and_white_of_the_codec(model):
    c, built, params, _ = model
    big = jax.tree.map(lambda a: 5 * a, params)
    p = run.of(c, built, big).denoiser(1)(jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jd.schedules.cosine(jnp.float32(0.9)))
    assert float(p.x0.max()) == 1 and float(p.x0.min()) == -1


@pytest.mark.parametrize(
    "kwargs, said",
    [
        (dict(n=0), "0 images"),
        (dict(steps=0), "steps=0 is out of range; allowed: 1 to 20"),
        (dict(steps=21), "steps=21 is out of range; allowed: 1 to 20"),
        (dict(solver="dimm"), "did you mean 'ddim'"),
        (dict(solver="ddim(eat=1)"), "unexpected keyword argument 'eat'"),
        (dict(label=10), "label=10 is out of range; allowed: 0 to 9"),
        (dict(label=-2), "label=-2"),
        (dict(label=1.5), "label=1.5"),
        (dict(label=[0, 1, 2]), "2 images need one label or 2, got 3"),
        (dict(guidance=2.0), "needs a label"),
        (dict(label=1, guidance=float("nan")), "guidance=nan"),
        (dict(label=1, guidance=1e39), "guidance=1e+39 is not a finite number"),
        (dict(label=1, guidance=None), "guidance=None is not a finite number"),
        (dict(n=2.5), "2.5 images cannot be drawn"),
        (dict(steps=5.5), "steps=5.5 is out of range"),
        (dict(steps="5"), "steps=5 is out of range"),
        (dict(solver=3), "solver=3 is neither the name of a solver"),
        (dict(solver="ddim(eta=7)"), "eta=7.0 is not a number from 0 to 1"),
        (dict(solver="ddim(eta=1e999)"), "eta=inf is not a number from 0 to 1"),
        (dict(solver="ddim(0.5)"), "numbers of a solver are given by name"),
        (dict(solver="ddim(eta=[0.1, 0.2, 0.3])"), "this solver cannot draw"),
        (dict(solver="churned(gamma=-1.0)"), "gamma=-1.0 is not a number from 0"),
        (dict(solver="churned(within=(5, 1))"), "lo=5.0 is above hi=1.0"),
        (dict(solver="annealed_langevin(steps=-1)"), "steps=-1 is not a whole number of at least 1"),
        (dict(solver="corrected(ratio=-1)"), "ratio=-1.0 is not a finite number above 0"),
        (dict(solver="adaptive(rtol=0)"), "rtol=0.0 is not a finite number above 0"),
        (dict(solver="euler_maruyama(eta=-2)"), "eta=-2.0 is not a finite number of at least 0"),
        (dict(times="linear(lo=0.3, hi=1.2)"), "leaves the range of process.schedule='cosine'"),
        (dict(times="karras"), "leaves the range of process.schedule='cosine'"),
    ],
)
def test_wrong_requests_are_one_line(model, kwargs, said):
    c, built, params, _ = model
    with pytest.raises(jd.InputError) as error:
        run.of(c, built, params).generate(jax.random.key(0), **{"n": 2, "steps": 5, **kwargs})
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, kwargs, said",
    [
        ({"model.classes": 0}, dict(label=1), "unconditional"),
        ({"process.drop_label": 0.0}, dict(label=None), "give a label"),
        ({"process.drop_label": 0.0}, dict(label=1, guidance=2.0), "drop_label above 0"),
        ({"process.target": "eps"}, dict(label=1), "says nothing at the first level"),
        ({"sampling.times": "strided(10)"}, dict(label=1, steps=11), "11 sampling steps are more than the 10"),
        ({"sampling.times": "strided(10, spacing='lead')"}, dict(label=1), "unknown spacing 'lead'"),
    ],
)
def test_requests_that_the_model_cannot_meet_are_one_line(changes, kwargs, said):
    c = config(**changes)
    built = experiment.build(c)
    params = jax.eval_shape(built.init, jax.random.key(0))  # refused before any parameter is touched
    with pytest.raises(jd.InputError, match=said) as error:
        run.of(c, built, params).generate(jax.random.key(0), 2, **{"steps": 5, **kwargs})
    assert "\n" not in str(error.value)


def test_the_showcase_draws_each_class_in_turn(model):
    c, built, params, _ = model
    r = run.of(c, built, params)
    images, columns, labels = run.showcase(r, jax.random.key(0), 12, steps=2)
    assert columns == 10 and labels.tolist() == [*range(10), 0, 1]
    again = r.generate(jax.random.key(0), 12, 2, "ddim", labels, c.sampling.guidance)
    assert (images == again).all()
    assert run.showcase(r, jax.random.key(0), 2, label=-1, steps=2)[2].tolist() == [-1, -1]


def test_tiles_lie_row_by_row():
    images = np.stack([np.full((8, 8, 1), 10 * i, np.uint8) for i in range(5)])
    picture = pictures.tile(images, columns=3, gap=2)
    assert picture.shape == (2 * 34 + 2, 3 * 34 + 2, 3)  # 8 pixels shown as 32
    assert [picture[3, 3 + 34 * i, 0] for i in range(3)] == [0, 10, 20]
    assert [picture[37, 3 + 34 * i, 0] for i in range(3)] == [30, 40, 255]
    with pytest.raises(ValueError, match="uint8"):
        pictures.tile(images / 255)


def test_a_trajectory_ends_with_what_generate_draws(model):
    c, built, params, _ = model
    r = run.of(c, built, params)
    told = r.trajectory(jax.random.key(3), 3, frames=5, steps=8, label=2, guidance=2.0)
    assert told.x0.shape == told.x.shape == (5, 3, 8, 8, 1) and told.x0.dtype == np.uint8
    want = r.generate(jax.random.key(3), 3, steps=8, label=2, guidance=2.0)
    assert np.abs(told.x0[-1].astype(int) - want).max() <= 1 and (told.x[-1] == told.x0[-1]).all()
    # The first frame is where sampling begins: noise, and what the network makes of it.
    start = jd.grid(jd.schedules.cosine, jd.times.uniform(8))
    keys = jax.vmap(lambda k: jax.random.fold_in(k, 0))(jd.sample_keys(jax.random.key(3), 3))
    x = jd.prior(keys, jd.Level(start.alpha[0], start.sigma[0]), (3, 8, 8, 1))
    np.testing.assert_array_equal(told.x[0], built.codec.decode(x))
    # No more images are decoded at once than are drawn at once, however many frames there are.
    seen: list = []
    watched = built.codec._replace(decode=lambda z: seen.append(z.shape) or built.codec.decode(z))
    run.of(c, built._replace(codec=watched), params).trajectory(jax.random.key(3), 3, 5, steps=8, label=2, guidance=2.0)
    assert seen == [(3, 8, 8, 1)] * 10
    with pytest.raises(jd.InputError, match="frames=9 is out of range; allowed: 2 to 8, the sampling steps"):
        r.trajectory(jax.random.key(3), 3, frames=9, steps=8)


def test_trajectories_share_one_program_and_are_drawn_in_batches(model):
    """6 samples in batches of 4: every one as alone, and its frames those of the stacked predictions of `solve`."""
    c, built, params, _ = model
    r, key, labels = run.of(c, built, params), jax.random.key(3), np.arange(6)
    before = run._draw_path.jitted()._cache_size()
    six = r.trajectory(key, 6, frames=5, steps=5, solver="ddpm", label=labels)
    r.trajectory(key, 6, frames=5, steps=9, solver="ddpm", label=labels, guidance=2.0)
    assert run._draw_path.jitted()._cache_size() == before + 1
    one = r.trajectory(jd.sample_keys(key, 6)[5:], 1, frames=5, steps=5, solver="ddpm", label=labels[5:])
    assert six.x.shape == (5, 6, 8, 8, 1) and np.abs(six.x[:, 5:].astype(int) - one.x).max() <= 1

    wanted = run.request(c, built, params, key, 6, 5, "ddpm", labels)
    levels = jax.tree.map(lambda a: a[:5], wanted.levels)
    k_prior, k_solve = (jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(wanted.keys) for i in range(2))
    x = jd.prior(k_prior, jax.tree.map(lambda a: a[0], levels), (6, 8, 8, 1))
    _, told = jax.jit(jd.solve)(k_solve, wanted.make(labels), x, levels)
    want = jax.vmap(built.codec.decode)(told.x0)
    assert np.abs(six.x0[:4].astype(int) - np.asarray(want)).max() <= 1


@pytest.mark.parametrize("resample", [1, 3])
def test_inpainting_keeps_the_known_pixels_and_draws_the_others(model, resample):
    c, built, params, _ = model
    r, image = run.of(c, built, params), np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4
    mask = np.zeros((8, 8))
    mask[3:, 2:6] = 1
    got = r.edit(jax.random.key(0), np.stack([image] * 3), mask, resample=resample, steps=5)
    drawn = mask.astype(bool)
    assert (got[:, ~drawn] == image[~drawn]).all()
    assert len(np.unique(got.reshape(3, -1), axis=0)) == 3
    alone = r.edit(jax.random.key(0), image, mask, resample=resample, steps=5)
    assert np.abs(alone[0].astype(int) - got[0]).max() <= 1


def test_less_strength_leaves_more_of_the_picture(model):
    c, built, params, _ = model
    r, image = run.of(c, built, params), np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1) * 4
    far = [
        np.abs(r.edit(jax.random.key(0), image, strength=strength, steps=20).astype(int) - image).mean()
        for strength in (0.05, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2] and far[0] < 20


@pytest.mark.parametrize(
    "kwargs, said",
    [
        (dict(image=np.zeros((8, 8, 1))), r"uint8 of shape \(8, 8, 1\) or \[n, ...\], got float64"),
        (dict(image=np.zeros((9, 8, 1), np.uint8)), r"got uint8 .*9, 8, 1"),
        (dict(mask=np.zeros((8, 9))), r"a mask is of shape \(8, 8\) .* got \(8, 9\)"),
        (dict(mask=np.full((8, 8), 0.5)), "1 where the image is drawn anew and 0 elsewhere"),
        (dict(strength=0.0), "strength=0.0 is out of range"),
        (dict(strength=float("nan")), "strength=nan is out of range"),
        (
            dict(strength=0.5, resample=3),
            "resample=3 is out of range; allowed: whole numbers from 1, and with a mask alone above 1",
        ),
        (dict(mask=np.ones((8, 8)), resample=2.5), "resample=2.5 is out of range"),
        (dict(mask=np.ones((8, 8)), resample=0), "resample|times"),
        (dict(mask=np.ones((8, 8)), resample=50), "more than the maximum 20"),
        (dict(steps=21), "steps=21 is out of range"),
    ],
)
def test_wrong_edits_are_one_line(model, kwargs, said):
    c, built, params, _ = model
    with pytest.raises(jd.InputError, match=said) as error:
        run.of(c, built, params).edit(jax.random.key(0), **{"image": np.zeros((8, 8, 1), np.uint8), "steps": 5, **kwargs})
    assert "\n" not in str(error.value)


def test_a_solver_may_be_a_function_of_a_denoiser(model):
    c, built, params, _ = model
    r = run.of(c, built, params)
    got = r.generate(jax.random.key(0), 2, steps=5, solver=lambda d: jd.solvers.heun(d), label=1)
    np.testing.assert_array_equal(got, r.generate(jax.random.key(0), 2, steps=5, solver="heun", label=1))


def test_every_solver_is_had_by_its_name():
    """Traced, not compiled: what each does is tested with the solvers."""
    keys, levels = jax.random.split(jax.random.key(0), 2), jd.grid(jd.schedules.cosine, jd.times.uniform(3), 20)
    for name in set(jd.solvers.__all__) - {"ddpm_learned"}:  # this denoiser says nothing of its variance
        solver = run.solver_of(name, "solver", gaussian(0.0, 1.0))
        out = jax.eval_shape(lambda made: run.draw_samples(keys, made, levels, 1.0, None, (2, 8, 8, 1), None), solver)
        assert out.shape == (2, 8, 8, 1) and out.dtype == jnp.float32, name


def test_a_stopped_request_of_many_images_goes_on(tmp_path):
    from etils import epath

    from jaxdiff import shards

    calls = []

    def draw(rows, stop=None):
        if stop is not None and rows[0] >= stop:
            raise KeyboardInterrupt
        calls.append(rows.tolist())
        return np.stack([np.full((2, 2, 1), i, np.uint8) for i in rows])

    folder = epath.Path(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        shards.drawn(folder, {"seed": 0}, 10, 4, lambda rows: draw(rows, 8))
    (folder / "part_0000008.npy.partial").write_text("half")
    images = shards.drawn(folder, {"seed": 0}, 10, 4, draw)
    assert images[:, 0, 0, 0].tolist() == list(range(10))
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for asked, n, size in (({"seed": 1}, 10, 4), ({"seed": 0}, 12, 4), ({"seed": 0}, 10, 5)):
        with pytest.raises(jd.InputError, match="holds part of another request"):
            shards.drawn(folder, asked, n, size, draw)


def test_digests_see_names_shapes_and_bits():
    from jaxdiff import shards

    a = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2)}
    others = [
        {"a": np.zeros((3, 2), np.float32), "b": np.ones(2)},
        {"c": a["a"], "b": a["b"]},
        {**a, "b": np.nextafter(np.ones(2), 2)},
    ]
    assert shards.digest(a) == shards.digest(dict(reversed(a.items())))
    assert len({shards.digest(tree) for tree in (a, *others)}) == 4
