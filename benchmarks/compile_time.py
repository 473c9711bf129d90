"""How long a DiT of 28 blocks takes to trace and to compile, its blocks under a scan and one after another; nothing is allocated.

    python benchmarks/compile_time.py [--width=128] [--heads=4] [--depth=28] [--repeats=3] [--batch=8] [--remat]

Both networks are the same function of the same parameters, which tests/test_dit.py holds; unrolled each block has its own. Seconds
are of the processor, all threads together, so that other jobs do not count; each time from nothing, without a cache.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from jaxdiff.models.dit import Block, DiT


def unrolled(model: DiT):
    """The apply of a DiT whose parameters `blocks` are a list, one of each block, in a plain loop."""

    def apply(params, x, snr):
        blocks = params["params"]["blocks"]

        class Unrolled(DiT):
            def through(self, h, embedding, grid):
                block = Block(self.heads, self.dtype, self.mlp_epsilon, self.qk_norm, self.rotate, grid)
                one = jax.checkpoint(block.apply) if self.remat else block.apply
                for own in blocks:
                    h, _ = one({"params": own}, h, embedding)
                return h

        others = {name: a for name, a in params["params"].items() if name != "blocks"}
        fields = {name: getattr(model, name) for name in ("patch", "width", "depth", "heads", "dtype", "remat")}
        return Unrolled(**fields).apply({"params": others}, x, snr)

    return apply


def apart(params, depth: int):
    """Shapes with a list of each block's own in place of a first axis of blocks."""
    own = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), params["params"]["blocks"])
    return {"params": params["params"] | {"blocks": [own] * depth}}


def train_step(apply, optimizer):
    def step(params, state, x, snr):
        grads = jax.grad(lambda p: jnp.square(apply(p, x, snr)).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def timed(function, args, repeats: int) -> tuple[float, float, int]:
    """Median seconds to trace and lower, and to compile; and the lines of the lowered program."""
    lowering, compiling = [], []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.process_time()
        lowered = jax.jit(lambda *args: function(*args)).lower(*args)
        middle = time.process_time()
        lowered.compile()
        lowering.append(middle - start)
        compiling.append(time.process_time() - middle)
    return statistics.median(lowering), statistics.median(compiling), lowered.as_text().count("\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("width", 128), ("heads", 4), ("depth", 28), ("repeats", 3), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--remat", action="store_true")
    asked = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    model = DiT(width=asked.width, depth=asked.depth, heads=asked.heads, remat=asked.remat)
    x, snr = jax.ShapeDtypeStruct((asked.batch, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((asked.batch, 1, 1, 1), jnp.float32)
    stacked, optimizer = jax.eval_shape(model.init, jax.random.key(0), x, snr), optax.adam(1e-4)
    ways = {"scan": (model.apply, stacked), "unrolled": (unrolled(model), apart(stacked, asked.depth))}
    parameters = sum(a.size for a in jax.tree.leaves(stacked))
    print(f"{asked.depth} blocks of width {asked.width}, {parameters:,} parameters, jax {jax.__version__}, {jax.devices()[0]}")
    print("| what | trace and lower, s | compile, s | lines of the lowered program |\n|---|---|---|---|")
    for what in ("forward", "train step"):
        for way, (apply, params) in ways.items():
            function, args = apply, (params, x, snr)
            if what == "train step":
                function, args = train_step(apply, optimizer), (params, jax.eval_shape(optimizer.init, params), x, snr)
            lower, compile_, lines = timed(function, args, asked.repeats)
            print(f"| {what}, {way} | {lower:.2f} | {compile_:.2f} | {lines:,} |", flush=True)


if __name__ == "__main__":
    main()
