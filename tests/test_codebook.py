"""The codebook's functions against closed forms on tiny cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import codebook as cb

CODES = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
# Two images of 1 x 2 vectors, which fall to codes 0 and 1, 1 and 2.
Z = jnp.asarray([[[[0.1, -0.2], [0.8, 0.3]]], [[[1.5, 0.1], [-0.3, 1.7]]]])
WHICH = np.array([[[0, 1]], [[1, 2]]])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_nearest_is_the_least_distance():
    codes, z = normal(50, 3), normal(2, 4, 5, 3, seed=1)
    want = np.argmin(((z[..., None, :] - codes) ** 2).sum(-1), axis=-1)
    got = cb.nearest(jnp.asarray(codes), jnp.asarray(z))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)
    z_q, indices = cb.quantise(jnp.asarray(codes), jnp.asarray(z))
    np.testing.assert_array_equal(indices, want)
    np.testing.assert_array_equal(z_q, codes[want])


def test_of_equal_codes_the_first_is_taken():
    codes = jnp.asarray([[3.0, 0.0], [1.0, 1.0], [1.0, 1.0], [-1.0, 1.0]])
    np.testing.assert_array_equal(cb.nearest(codes, jnp.asarray([[[1.0, 1.0], [0.0, 1.0], [2.9, 0.0]]])), [[1, 1, 0]])


def test_nearest_makes_no_array_of_all_differences():
    made = jax.make_jaxpr(cb.nearest)(jnp.zeros((64, 32)), jnp.zeros((4, 8, 8, 32)))
    assert max(v.aval.size for eqn in made.eqns for v in eqn.outvars) == 4 * 8 * 8 * 64


def test_the_straight_through_gradient_is_that_at_the_codes():
    weight = jnp.asarray(normal(*Z.shape))

    def loss(codes, z):
        z_q, _ = cb.quantise(codes, z)
        return jnp.sum(weight * cb.straight_through(z, z_q) ** 2)

    to_codes, to_z = jax.grad(loss, (0, 1))(CODES, Z)
    z_q = CODES[WHICH]
    np.testing.assert_allclose(cb.straight_through(Z, z_q), z_q, rtol=0, atol=1e-7)
    np.testing.assert_allclose(to_z, 2 * weight * z_q, atol=1e-6)
    np.testing.assert_array_equal(to_codes, 0)


def test_commitment_moves_the_vectors_and_pull_the_codes():
    def of(term):
        return lambda codes, z: term(z, cb.quantise(codes, z)[0]).sum()

    missed = np.asarray(Z - CODES[WHICH])
    entries = missed[0].size
    want = (missed**2).reshape(2, -1).mean(1)
    for term in (cb.commitment, cb.pull):
        np.testing.assert_allclose(term(Z, CODES[WHICH]), want, rtol=1e-6)
    to_codes, to_z = jax.grad(of(cb.commitment), (0, 1))(CODES, Z)
    np.testing.assert_array_equal(to_codes, 0)
    np.testing.assert_allclose(to_z, 2 * missed / entries, rtol=1e-6)
    to_codes, to_z = jax.grad(of(cb.pull), (0, 1))(CODES, Z)
    np.testing.assert_array_equal(to_z, 0)
    by_hand = [missed[WHICH == k].sum(0) * -2 / entries for k in range(3)]
    np.testing.assert_allclose(to_codes, by_hand, rtol=1e-6)


def test_an_averaged_code_is_the_weighted_mean_of_what_fell_to_it():
    """After T batches, sum_t d^(T - t) S_t / sum_t d^(T - t) N_t, from the first batch on; what is not used does not move."""
    decay, usage, codes = 0.7, cb.start(4, 2), jnp.concatenate([CODES, jnp.asarray([[50.0, -50.0]])])
    sums, counts = np.zeros((4, 2)), np.zeros(4)
    for step in range(6):
        z = jnp.asarray(normal(3, 2, 2, 2, seed=step)) + codes[:3, None, None]
        z = z[:2] if step == 3 else z  # not all batches are alike
        indices = cb.nearest(codes, z)
        sums, counts = decay * sums, decay * counts
        np.add.at(sums, np.asarray(indices), np.asarray(z, np.float64))
        np.add.at(counts, np.asarray(indices), 1)
        usage, codes = cb.average(cb.tally(usage, z, indices, jax.random.key(step)), codes, decay)
        np.testing.assert_allclose(codes[:3], sums[:3] / counts[:3, None], rtol=2e-6)
        np.testing.assert_allclose(usage.counts, (1 - decay) * counts, rtol=1e-6)
        np.testing.assert_array_equal(usage.batch_counts, 0)
        np.testing.assert_array_equal(usage.batch_sums, 0)
    assert counts[3] == 0
    np.testing.assert_array_equal(codes[3], [50.0, -50.0])


def test_a_code_that_is_no_longer_used_stays_to_the_last_bit():
    usage, codes = cb.average(cb.tally(cb.start(3, 2), Z, jnp.asarray(WHICH), jax.random.key(0)), CODES, 0.5)
    only, seen = jnp.zeros((1, 1, 1), jnp.int32), codes
    step = jax.jit(lambda usage, codes: cb.average(cb.tally(usage, Z[:1, :, :1], only, jax.random.key(0)), codes, 0.5))
    for _ in range(200):  # 0.5^200 is no float32
        usage, codes = step(usage, codes)
    np.testing.assert_array_equal(codes[1:], seen[1:])
    np.testing.assert_allclose(codes[0], Z[0, 0, 0], rtol=1e-6)


def test_a_tally_in_pieces_is_that_of_the_whole():
    z, codes, empty = jnp.asarray(normal(6, 4, 2)), jnp.asarray(normal(5, 2, seed=1)), cb.start(5, 2)
    which = cb.nearest(codes, z)
    whole = cb.tally(empty, z, which, jax.random.key(0))
    pieces = cb.tally(cb.tally(empty, z[:2], which[:2], jax.random.key(1)), z[2:], which[2:], jax.random.key(2))
    np.testing.assert_array_equal(pieces.batch_counts, whole.batch_counts)
    np.testing.assert_array_equal(whole.batch_counts, np.bincount(np.asarray(which).ravel(), minlength=5))
    np.testing.assert_allclose(pieces.batch_sums, whole.batch_sums, atol=1e-6)
    for field in ("counts", "sums"):
        np.testing.assert_array_equal(getattr(whole, field), 0)


def test_candidates_are_drawn_alike_from_all_pieces():
    """Of 20,000 drawn from pieces of 2, 3 and 5 vectors each vector is a tenth, and a new batch leaves none of the old."""
    z = jnp.arange(10.0).reshape(10, 1, 1)
    usage, which = cb.start(20_000, 1), jnp.zeros((10, 1), jnp.int32)
    for key, piece in enumerate((slice(0, 2), slice(2, 5), slice(5, 10))):
        usage = cb.tally(usage, z[piece], which[piece], jax.random.key(key))
    shares = np.bincount(np.asarray(usage.candidates, int).ravel(), minlength=10) / 20_000
    np.testing.assert_allclose(shares, 0.1, atol=5 * (0.09 / 20_000) ** 0.5)
    usage, _ = cb.average(usage, usage.candidates, 0.9)
    usage = cb.tally(usage, z[:2] + 100, which[:2], jax.random.key(9))
    assert usage.candidates.min() == 100


def revived(counts, least, key=0):
    counts = jnp.asarray(counts)
    codes = jnp.asarray(normal(len(counts), 2))
    usage = cb.start(len(counts), 2)._replace(
        counts=counts, sums=codes * counts[:, None], candidates=jnp.asarray(normal(len(counts), 2, seed=1)) + 10
    )
    return usage, codes, *cb.revive(jax.random.key(key), usage, codes, least)


def test_revival_moves_dead_codes_to_candidates_of_their_own_and_nothing_else():
    before, codes, after, moved = revived([4.0, 0.0, 0.09, 0.11, 5.8, 0.0], 0.06)  # 1/K is 10 / 6, and 0.06 of it 0.1
    dead, live = [1, 2, 5], [0, 3, 4]
    np.testing.assert_array_equal(moved[jnp.array(live)], codes[jnp.array(live)])
    for ours in ("counts", "sums"):
        np.testing.assert_array_equal(getattr(after, ours)[jnp.array(live)], getattr(before, ours)[jnp.array(live)])
    taken = [int(np.flatnonzero((np.asarray(before.candidates) == np.asarray(moved[k])).all(1))[0]) for k in dead]
    assert len(set(taken)) == 3
    np.testing.assert_allclose(after.counts[jnp.array(dead)], 10 / 6, rtol=1e-6)
    np.testing.assert_allclose(after.sums, after.counts[:, None] * moved, rtol=1e-5)


@pytest.mark.parametrize(("counts", "least"), [([1.0, 0.0, 5.0], 0.0), ([0.0, 0.0, 0.0], 0.5), ([2.0, 2.0, 2.0], 0.99)])
def test_revival_leaves_all_where_none_is_dead(counts, least):
    before, codes, after, moved = revived(counts, least)
    np.testing.assert_array_equal(moved, codes)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_candidates_far_from_codes_are_taken_in_proportion_to_the_squared_distance():
    codes = jnp.asarray([[0.0], [100.0], [-100.0]])
    usage = cb.Usage(jnp.asarray([5.0, 5.0, 0.0]), codes, codes[:, 0], codes, jnp.asarray([[1.0], [102.0], [0.0]]))
    revive = jax.vmap(lambda key: cb.revive(key, usage, codes, 0.1)[1][2, 0])
    taken = np.asarray(revive(jax.random.split(jax.random.key(0), 10_000)))
    assert set(taken) == {1.0, 102.0}  # the third is at a code
    np.testing.assert_allclose((taken == 102).mean(), 0.8, atol=5 * (0.16 / 10_000) ** 0.5)


def test_revival_brings_all_codes_into_use():
    """Codes that start at one place, over clusters far apart; without revival most of them are never the nearest."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(-100, 100, (8, 2))
    vectors = jnp.asarray(centres[rng.integers(0, 8, (40, 256))] + rng.standard_normal((40, 256, 2)), jnp.float32)[:, :, None]

    def trained(least):
        def step(carried, of):
            (usage, codes), (key, z) = carried, of
            usage, codes = cb.average(cb.tally(usage, z, cb.nearest(codes, z), key), codes, 0.8)
            return cb.revive(key, usage, codes, least), None

        first = cb.start(32, 2), jnp.asarray(np.random.default_rng(1).uniform(-1 / 32, 1 / 32, (32, 2)), jnp.float32)
        (_, codes), _ = jax.lax.scan(step, first, (jax.random.split(jax.random.key(0), 40), vectors))
        z_q, indices = cb.quantise(codes, vectors[-1])
        return cb.used(jnp.bincount(indices.ravel(), length=32)), cb.commitment(vectors[-1], z_q).mean()

    (share, error), (share_without, error_without) = trained(0.05), trained(0.0)
    assert share > 0.9 and error < 1  # 1 is the variance within a cluster
    assert share_without < 0.5 and error_without > 10


def test_perplexity_and_use():
    np.testing.assert_allclose(cb.perplexity(jnp.full(16, 3.0)), 16, rtol=1e-5)
    np.testing.assert_allclose(cb.perplexity(jnp.zeros(16).at[3].set(7.0)), 1, rtol=1e-6)
    np.testing.assert_allclose(cb.perplexity(jnp.asarray([1.0, 0.0, 1.0, 0.0])), 2, rtol=1e-6)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(cb.perplexity(jnp.asarray([1.0, 3.0])), np.exp(entropy), rtol=1e-6)
    assert [float(cb.used(jnp.asarray(c))) for c in ([0.0, 0.0], [0.0, 2.0], [0.1, 2.0])] == [0, 0.5, 1]
    assert jnp.isfinite(cb.perplexity(jnp.zeros(4)))
