"""The bare network beside PyTorch's:  python benchmarks/forward.py [--batch 4 8 16] [--channels 128] [--repeats 9] [--publish]

The network of configs/cifar.py (35,746,307 parameters, float32) and diffusers' UNet2DModel of the same weights in channels_last,
eager, under inference_mode, with a thread a core; they are held to give the same numbers to 1e-4 first. They take turns in one
process. The ratio is theirs to ours, turn by turn, median and quartiles: above 1 we are faster.

The share is of the machine's ceiling: the operations of the network's products and convolutions a second, counted in the traced
program (`jaxdiff.training.hardware.flops`), over what the machine does in a product of two 2048 x 2048 matrices and in a 3x3
convolution of 128 channels, which take turns with them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import measure, peers
from jaxdiff import compiling, experiment
from jaxdiff.training import hardware

COLUMNS = ("batch", "jaxdiff, ms", f"{peers.PEER}, ms", "theirs / ours", "images/s", "GFLOP/s", "of matmul", "of convolution")


def compared(config, params, model, batch: int, repeats: int, limits: dict[str, measure.Work]) -> list[str]:
    """A row of the table; `model` is None where there is no PyTorch."""
    net, (x, rows, logsnr) = compiling.jit(peers.forward(experiment.build(config))), peers.noisy(batch, config.data.shape[0])
    ours = jnp.asarray(x), jnp.asarray(logsnr)
    runs = {"ours": lambda: net(params, *ours)} | {name: limit.run for name, limit in limits.items()}
    if model is not None:
        import torch

        given, at = peers.torch_images(x), torch.from_numpy(rows)
        runs["theirs"] = lambda: peers.torch_forward(model, given, at)
    seconds = measure.turns(runs, repeats)
    taken = measure.spread(seconds["ours"]).median
    flops = hardware.flops(net.jitted().trace(params, *ours).jaxpr)
    theirs = ("not here", "") if model is None else (
        measure.ms(measure.spread(seconds['theirs']).median), measure.ratio(seconds["theirs"], seconds["ours"])
    )  # fmt: skip
    shares = [f"{share:.1%}" for share in measure.shares(flops, seconds["ours"], limits, seconds)]
    return [f"{batch}", measure.ms(taken), *map(str, theirs), f"{batch / taken:.2f}", f"{flops / taken / 1e9:.1f}", *shares]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--channels", type=int, default=128, help="128 is the network of configs/cifar.py")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--publish", action="store_true", help="adds the entry to docs/benchmarks.md")
    asked = parser.parse_args(argv)
    config = peers.config_of(asked.channels, asked.size)
    params = peers.drawn(experiment.build(config))
    model = peers.torch_network(config, params) if peers.torch_is_here() else None
    same = "" if model is None else f"; the two agree to {peers.check_same(config, params, model):.1e}"
    said = (
        f"{peers.count(params):,} parameters, {asked.size}x{asked.size}, float32, median of {asked.repeats} turns{same}. "
        f"{measure.CEILING}."
    )
    limits = measure.ceilings()
    print(said, flush=True)
    rows = [compared(config, params, model, batch, asked.repeats, limits) for batch in asked.batch]
    body = measure.table(COLUMNS, rows)
    print(body)
    if asked.publish:
        measure.publish("The bare network beside PyTorch's", f"{said}\n\n{body}", measure.command(__file__, argv))


if __name__ == "__main__":
    main()
