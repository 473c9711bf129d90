"""Bits per dimension of one small network trained on three objectives:  python benchmarks/objectives.py mnist [--data_dir=DIR]

`simple`, `hybrid` and `vlb` (with importance sampling) on the same batches for the same number of steps, evaluated on the same test
images and random numbers, beside models that learn nothing or little: uniform values, noise, and Gaussians fitted to the data. With
--gradients it prints how much importance sampling lowers the variance of the bound's gradient instead.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import digits
from jaxdiff import data, evaluation, experiment, times
from jaxdiff.training import init_state, make_optimizer, make_step

SETS = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


def config_of(name: str, loss: str, channels: int) -> ConfigDict:
    """A small U-Net on a 1000-step cosine table with the target eps, as Improved DDPM has it."""
    config = digits.get_config()
    config.data.name, config.data.shape = name, SETS[name]
    config.model.update(channels=channels, multipliers=(1, 2, 2) if name != "digits" else (1, 2), blocks=1, attention=(), classes=0)
    draw = "draw_importance(1000)" if loss == "vlb" else "draw_table(1000)"
    config.process.update(schedule="cosine_beta(1000)", target="eps", draw=draw, loss=loss, drop_label=0.0)
    config.optimizer.update(learning_rate=5e-4, schedule="linear_schedule(0, 1, 100)")
    config.training.ema = (0.995,)
    config.sampling.update(ema=0.995, times="strided(1000)")
    return config


def train(config, dataset, steps: int, batch: int):
    """(the experiment, the averaged parameters, the state, minutes)."""
    built, optimizer = experiment.build(config), make_optimizer(config.optimizer)
    state = jax.jit(lambda key: init_state(built, optimizer, config.training.ema, key))(jax.random.key(0))
    step, start = jax.jit(make_step(built, optimizer), donate_argnums=1), time.time()
    for i in range(steps):
        state, told = step(jax.random.key(0), state, data.batch_at(dataset, 0, i, batch))
        if i % 50 == 0 or i == steps - 1:
            print(f"  {config.process.loss} step {i}: loss {float(told['loss']):.4f}", file=sys.stderr, flush=True)
    return built, state.ema["0.995"], state, (time.time() - start) / 60


def baselines(train_set, test) -> dict[str, np.ndarray]:
    """Bits per dimension of each test image under models without a network."""
    rng = np.random.default_rng(0)

    def flat(images):
        return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1

    known, x = flat(train_set.images[:20000]), flat(test.images)
    dims, width = x.shape[1], 1 / 127.5
    dequantized = x + width * rng.uniform(-0.5, 0.5, x.shape)

    def bits(nats):
        return -nats / dims / np.log(2) - np.log2(width)

    noise = (-np.square(dequantized) / 2 - np.log(2 * np.pi) / 2).sum(1)
    mean, covariance = known.mean(0), np.cov(known.T) + np.eye(dims) * width**2 / 12
    spread = np.sqrt(np.diag(covariance))
    diagonal = (-np.square((dequantized - mean) / spread) / 2 - np.log(spread * np.sqrt(2 * np.pi))).sum(1)
    lower = np.linalg.cholesky(covariance)
    white = np.linalg.solve(lower, (dequantized - mean).T)
    full = -np.square(white).sum(0) / 2 - np.log(np.diag(lower)).sum() - dims * np.log(2 * np.pi) / 2
    rows = {"noise, N(0, 1)": noise, "Gaussian, each pixel": diagonal, "Gaussian, full covariance": full}
    return {"uniform": np.full(len(x), 8.0)} | {name: bits(nats) for name, nats in rows.items()}


def gradients(config, built, params, state, dataset) -> None:
    """The variance of the bound's gradient, over batches, with uniform and with importance-drawn rows."""
    history = state.extra
    adaptive = times.draw_importance(1000)
    batch = data.batch_at(dataset, 1, 0, 64)

    def gradient(params, key, draw):
        def mean(params):
            example = built.prepare(history, key, batch)
            t = draw.sample(jax.random.fold_in(key, 9), len(batch["label"]))
            each, _, _ = built.loss(params, history, key, example | {"t": t, "density": draw.density(t)})
            return each.mean()

        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(jax.grad(mean)(params))])

    found = {}
    for name, draw in {"uniform": times.draw_table(1000), "importance": adaptive.draw(history)}.items():
        one = jax.jit(lambda key, draw=draw: gradient(params, key, draw))
        rows = np.stack([np.asarray(one(jax.random.key(i))) for i in range(64)])
        found[name] = rows.var(0, ddof=1).sum()
    print(f"variance of the gradient: uniform {found['uniform']:.4g}, importance {found['importance']:.4g}, "
          f"ratio {found['uniform'] / found['importance']:.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data_dir")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--terms", type=int, default=100)
    parser.add_argument("--gradients", action="store_true")
    args = parser.parse_args()
    known = data.load(args.set, "train", args.data_dir)
    test = data.load(args.set, "test", args.data_dir)
    test = test._replace(images=np.asarray(test.images[: args.num]), labels=test.labels[: args.num])
    if args.gradients:
        config = config_of(args.set, "vlb", args.channels)
        built, _, state, _ = train(config, known, args.steps, args.batch)
        gradients(config, built, state.params, state, known)
        return
    print("| model | bits/dim | standard error | less than simple by | prior | steps between | decoder | minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for name, each in baselines(known, test).items():
        print(f"| {name} | {each.mean():.3f} | {each.std(ddof=1) / len(each) ** 0.5:.3f} | | | | | |", flush=True)
    first = None
    for loss in ("simple", "hybrid", "vlb"):
        config = config_of(args.set, loss, args.channels)
        built, params, _, minutes = train(config, known, args.steps, args.batch)
        with tempfile.TemporaryDirectory() as workdir:
            settings = evaluation.Settings(args.terms)
            row = evaluation.evaluate(workdir, "bpd_elbo", config, built, params, test, 64, settings)
            each = np.load(next(Path(workdir, "evaluation").glob("*.npy")))[:, 0]
        first = each if first is None else first
        less = first - each
        error = less.std(ddof=1) / len(less) ** 0.5
        print(
            f"| {loss} | {row['bits_per_dim']:.3f} | {row['stderr']:.3f} | {less.mean():.3f} +- {error:.3f} | {row['prior']:.4f} | "
            f"{row['diffusion']:.3f} | {row['decoder']:.3f} | {minutes:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
