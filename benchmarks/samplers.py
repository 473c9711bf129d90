"""Error against network evaluations of every solver, on a Gaussian mixture whose denoiser is known:  python benchmarks/samplers.py

Deterministic solvers: the order of convergence, of multistep ones with exact history, and the root mean square distance to the end
of the exact probability flow, in float64. All solvers: the energy distance of 4,000 samples to 4,000 of the mixture; stochastic
ones also the errors of mean, covariance and mode weights. Prints the tables as Markdown and writes the plots to
docs/images/samplers.png.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from oracles import mixture

from jaxdiff import sample, schedules, solve, solvers, times

WEIGHTS, MEANS, STDS = np.array([0.5, 0.3, 0.2]), np.array([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]]), np.array([0.15, 0.3, 0.1])
COUNTS = (8, 16, 32, 64, 128, 256)
LO, HI = 0.02, 40.0

# A maker, evaluations a step; the last x0 is one evaluation more.
DETERMINISTIC = {
    "ddim": (solvers.ddim, 1),
    "heun": (solvers.heun, 2),
    "dpm2": (solvers.dpm2, 2),
    "dpmpp_2s": (solvers.dpmpp_2s, 2),
    "dpmpp_2m": (solvers.dpmpp_2m, 1),
    "dpmpp_3m": (solvers.dpmpp_3m, 1),
    "dpmpp_3m_corrected": (solvers.dpmpp_3m_corrected, 1),
    "deis": (solvers.deis, 1),
    "lms": (solvers.lms, 1),
    "unipc": (solvers.unipc, 1),
}
# Stated order, and how many of its first steps begin on the exact path, so that what a multistep solver remembers is exact.
ORDERS = {
    "ddim": (solvers.ddim, 1, 0),
    "euler_maruyama(eta=0.0)": (lambda d: solvers.euler_maruyama(d, 0.0), 1, 0),
    "heun": (solvers.heun, 2, 0),
    "dpm2": (solvers.dpm2, 2, 0),
    "dpmpp_2s": (solvers.dpmpp_2s, 2, 0),
    "dpmpp_2m": (solvers.dpmpp_2m, 2, 1),
    "dpmpp_3m": (solvers.dpmpp_3m, None, 2),
    "dpmpp_3m_corrected": (solvers.dpmpp_3m_corrected, 3, 2),
    **{f"deis(order={k})": (functools.partial(solvers.deis, order=k), k, k - 1) for k in (2, 3, 4)},
    **{f"lms(order={k})": (functools.partial(solvers.lms, order=k), k, k - 1) for k in (2, 3, 4)},
    **{f"unipc(order={k})": (functools.partial(solvers.unipc, order=k), k + 1, k) for k in (1, 2, 3)},
}
STOCHASTIC = {
    "ddpm": (solvers.ddpm, 1),
    "ddpm_large": (solvers.ddpm_large, 1),
    "ddim(eta=0.5)": (lambda d: solvers.ddim(d, 0.5), 1),
    "dpm2_ancestral": (solvers.dpm2_ancestral, 2),
    "dpmpp_2s(eta=1.0)": (lambda d: solvers.dpmpp_2s(d, 1.0), 2),
    "dpmpp_2s_ancestral": (solvers.dpmpp_2s_ancestral, 2),
    "dpmpp_2m(eta=1.0)": (lambda d: solvers.dpmpp_2m(d, 1.0), 1),
    "dpmpp_3m_corrected(eta=1.0)": (lambda d: solvers.dpmpp_3m_corrected(d, 1.0), 1),
    "euler_maruyama": (solvers.euler_maruyama, 1),
    "churned": (solvers.churned, 2),
    "corrected(solver=ddim)": (lambda d: solvers.corrected(d, solvers.ddim), 2),
    "annealed_langevin(steps=3)": (lambda d: solvers.annealed_langevin(d, 0.1, 3), 4),
}


def levels(evaluations: int, each: int):
    steps = max(2, round((evaluations - 1) / each) + 1)
    return schedules.edm(jnp.asarray(times.karras(steps, LO, HI))), each * (steps - 1) + 1


def measured_order(make, history: int, denoise, steps: int = 512) -> float:
    """log2 of how much the error at sigma = 0.3 falls from `steps` to twice as many, from 64 points of the mixture at sigma = 5."""
    start = jnp.asarray(drawn(3, 64) + 5.0 * np.random.default_rng(4).standard_normal((64, 2)))
    solver, errors = make(denoise), []
    step, keys = jax.jit(solver.step), jax.random.split(jax.random.key(0), 64)
    for n in (steps, 2 * steps):
        levels = schedules.edm(jnp.asarray(times.karras(n + 1, 0.3, 5.0)))
        at = [jax.tree.map(lambda a, i=i: a[i], levels) for i in range(n + 1)]
        exact = [start, *(exact_flow(denoise, start, float(at[i].sigma)) for i in (*range(1, history + 1), n))]
        state = solver.init(start)
        for i in range(n):
            if 0 < i <= history:
                state = state._replace(x=exact[i], **({"before": exact[i - 1]} if hasattr(state, "before") else {}))
            state, _ = step(keys, state, at[i], at[i + 1])
        errors.append(np.sqrt(np.mean(np.square(np.asarray(state.x - exact[-1])))))
    return np.log2(errors[0] / errors[1])


def exact_flow(denoise, x, sigma: float):
    """Where the flow takes x from sigma = 5 to a lower one: 6,000 steps of UniPC, order 4."""
    levels = schedules.edm(jnp.asarray(times.karras(6001, sigma, 5.0)))
    return jax.jit(solve)(jax.random.key(0), solvers.unipc(denoise), x, levels)[0].x


def drawn(key, n: int) -> np.ndarray:
    rng = np.random.default_rng(key)
    k = rng.choice(len(WEIGHTS), n, p=WEIGHTS)
    return MEANS[k] + STDS[k, None] * rng.standard_normal((n, 2))


def energy(a: np.ndarray, b: np.ndarray) -> float:
    """Twice the mean distance between a and b less those within each: 0 for equal distributions."""

    def mean(u, v):
        return np.sqrt(np.maximum((u**2).sum(1)[:, None] + (v**2).sum(1)[None] - 2 * u @ v.T, 0)).mean()

    return 2 * mean(a, b) - mean(a, a) - mean(b, b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=4000)
    parser.add_argument("--out", default=str(ROOT / "docs" / "images" / "samplers.png"))
    args = parser.parse_args()
    denoise = mixture(jnp.asarray(WEIGHTS), jnp.asarray(MEANS), jnp.asarray(STDS))
    print("| solver | stated order | measured |\n|---|---|---|")
    for name, (make, order, history) in ORDERS.items():
        stated = "none" if order is None else order
        print(f"| `{name}` | {stated} | {measured_order(make, history, denoise):.2f} |", flush=True)
    print()
    run, truth = jax.jit(sample), drawn(0, args.num)
    x = HI * np.random.default_rng(1).standard_normal((args.num, 2))
    exact = run(jax.random.key(0), solvers.unipc(denoise), jnp.asarray(x), levels(4000, 1)[0])
    floor = np.mean([energy(drawn(i, args.num), truth) for i in range(1, 6)])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))

    print(f"| solver | {' | '.join(str(n) for n in COUNTS)} | slope, 128 to 256 |\n|---|{'---|' * (len(COUNTS) + 1)}")
    for name, (make, each) in DETERMINISTIC.items():
        errors, used = [], []
        for count in COUNTS:
            grid, n = levels(count, each)
            got = np.asarray(run(jax.random.key(0), make(denoise), jnp.asarray(x), grid))
            errors.append(np.sqrt(np.mean((got - exact) ** 2)))
            used.append(n)
        order = np.log(errors[-2] / errors[-1]) / np.log((used[-1] - 1) / (used[-2] - 1))
        print(f"| `{name}` | {' | '.join(f'{e:.1e}' for e in errors)} | {order:.2f} |", flush=True)
        left.loglog(used, errors, label=name)
    state, evaluations = adaptive(denoise, x)
    far = np.sqrt(np.square(state - exact).mean((1, 2)))
    print("\n`adaptive`: " + ", ".join(f"{e:.1e} after {n:.0f}" for e, n in zip(far, evaluations)))

    print(f"\n| solver | {' | '.join(str(n) for n in COUNTS)} | mean | covariance | weights |\n|---|{'---|' * (len(COUNTS) + 3)}")
    for name, (make, each) in {**DETERMINISTIC, **STOCHASTIC}.items():
        far, used = [], []
        for count in COUNTS:
            grid, n = levels(count, each)
            got = np.asarray(run(jax.random.key(2), make(denoise), jnp.asarray(x), grid))
            far.append(energy(got, truth))
            used.append(n)
        near = np.square(got[:, None] - MEANS[None]).sum(-1).argmin(1)
        shares = np.bincount(near, minlength=3) / len(got)
        mean = np.abs(got.mean(0) - WEIGHTS @ MEANS).max()
        covariance = np.abs(np.cov(got.T) - true_covariance()).max()
        cells = " | ".join(f"{e:.4f}" for e in far)
        print(f"| `{name}` | {cells} | {mean:.3f} | {covariance:.3f} | {np.abs(shares - WEIGHTS).max():.3f} |", flush=True)
        right.loglog(used, np.maximum(far, floor / 3), label=name, linestyle="-" if name in STOCHASTIC else ":")
    print(f"\nEnergy distance of {args.num} true samples from others: {floor:.4f}")
    right.axhline(floor, color="black", linewidth=0.8)
    right.set_ylim(top=300)
    left.set(xlabel="evaluations", ylabel="distance from the exact flow's end", title="deterministic solvers")
    right.set(xlabel="evaluations", ylabel="energy distance", title="all solvers; black: true samples")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


def adaptive(denoise, x) -> tuple[np.ndarray, list[float]]:
    """The adaptive solver at three tolerances: what it draws [3, n, 2], and the mean evaluations of a sample."""
    made, used = [], []
    grid = schedules.edm(jnp.asarray([HI, LO]))
    for tolerance in (1e-2, 1e-3, 1e-4):
        solver = solvers.adaptive(denoise, tolerance, tolerance)
        state, _ = jax.jit(solve)(jax.random.key(0), solver, jnp.asarray(x), grid)
        made.append(np.asarray(solver.final(state, jax.tree.map(lambda a: a[-1], grid))))
        used.append(float(state.evaluations.mean()) + 1)
    return np.stack(made), used


def true_covariance() -> np.ndarray:
    mean = WEIGHTS @ MEANS
    spread = MEANS - mean
    return (WEIGHTS[:, None] * spread).T @ spread + np.eye(2) * (WEIGHTS @ STDS**2)


if __name__ == "__main__":
    main()
