"""The peer of the speed benchmarks does what ours does: the same outputs, loss, gradient and images; and a step of Adam.

Skipped where torch or diffusers is not installed; nothing is downloaded.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_benchmarks import TINY, shallow

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")
pytest.importorskip("diffusers", reason="a reference implementation; not a dependency")

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import forward, measure, peers, sampling, training_step
from jaxdiff import experiment
from jaxdiff.interop import mapping, unet2d

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A shallow network, and one thread: tests run side by side, and PyTorch's threads wait for each other in a loop."""
    monkeypatch.setattr(peers, "config_of", shallow)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def built(dropout=0.1):
    config = shallow(8, 8, dropout)
    made = experiment.build(config)
    return config, made, peers.drawn(made)


def test_the_two_networks_say_the_same_and_a_wrong_weight_is_found():
    config, _, params = built()
    model = peers.torch_network(config, params)
    assert peers.check_same(config, params, model) < 1e-5
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] += 0.5
    with pytest.raises(AssertionError, match="differ by"):
        peers.check_same(config, params, model)


def test_loss_and_gradient_are_the_same():
    config, made, params = built(dropout=0.0)
    x0, rows, _ = peers.noisy(3, 8)
    eps = np.random.default_rng(5).standard_normal(x0.shape, np.float32)
    example = {"x0": jnp.asarray(x0), "eps": jnp.asarray(eps), "t": jnp.asarray((rows + 1) / 1000, jnp.float32)}

    def loss(params):
        return made.loss(params, made.extra, jax.random.key(0), example)[0].mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    model = peers.torch_network(config, params)
    alpha, sigma = peers.table(config)
    theirs = peers.torch_loss(model, peers.torch_images(x0), peers.torch_images(eps), torch.from_numpy(rows), alpha, sigma)
    theirs.backward()
    assert float(value) == pytest.approx(float(theirs.detach()), rel=1e-5) and float(value) > 0.1
    ours = mapping.save(grads, unet2d.rows(config, params))
    for name, parameter in model.named_parameters():
        want = parameter.grad.numpy()
        np.testing.assert_allclose(ours[name], want, atol=1e-4 * max(np.abs(want).max(), 1e-2), err_msg=name)


def test_a_step_of_theirs_is_one_of_adam():
    config, _, params = built()
    model = peers.torch_network(config, params)
    before = [p.detach().clone() for p in model.parameters()]
    step = peers.torch_step(model, config)
    assert model.training and float(step(peers.torch_images(peers.images(4, 8)))) > 0.1
    moved = torch.cat([(a - b).detach().abs().flatten() for a, b in zip(model.parameters(), before)])
    rate = config.optimizer.learning_rate  # what Adam's first step moves every parameter by, but for its epsilon
    assert float(moved.max()) <= 1.01 * rate and float((moved > 0.5 * rate).float().mean()) > 0.5


def test_both_samplers_draw_the_same_at_the_same_rows():
    made = sampling.sampler(8, 8, 2, 6)
    sample = sampling.theirs(made, 1e-3)
    assert sample().shape == (2, 3, 8, 8) and peers.torch_sampler(None, made.config, 6)[1] == sampling.rows_asked(made)
    with pytest.raises(AssertionError, match="differ by"):
        sampling.theirs(made, -1.0)


def test_the_peers_rows_are_in_the_tables(capsys, monkeypatch):
    limits = {"matmul": measure.product(64), "convolution": measure.convolution(1, 8, 8)}
    monkeypatch.setattr(measure, "ceilings", lambda: limits)
    monkeypatch.setattr(training_step, "table_of_memory", lambda asked: "")
    for benchmark in (forward, training_step):
        benchmark.main([*TINY, "--batch", "2", "--repeats", "2"])
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 |")).split("|")
        theirs, ratio = float(row[3]), float(row[4].split()[0])
        assert theirs >= 0 and ratio > 0
