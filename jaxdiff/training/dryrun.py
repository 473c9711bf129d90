"""What a run needs and takes, told before it is started: train.py --dry_run.

Neither the data set need be there, batches being shapes alone, nor is a state made that would not fit.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff import first_stage
from jaxdiff import mesh as meshes
from jaxdiff.codec import Codec
from jaxdiff.data import latents
from jaxdiff.training import hardware
from jaxdiff.training.state import DISCRIMINATOR


def report(config, mesh, step, key, shapes, shardings, batch, say: Callable[[str], None]) -> None:
    """Says parameters by block, GFLOP an image, memory a device by the compiler's own analysis, whether it fits, and the time.

    `step` is the jitted train step, `shapes` and `shardings` those of its state, `batch` what `batch_shapes` says.
    """
    say(blocks(shapes.params))
    device = mesh.devices.flat[0]
    say(f"\nmesh: {dict(mesh.shape)}, {mesh.size} x {device.device_kind}; batch {config.batch_size}, "
        f"{config.batch_size // mesh.size} a device, in {config.training.accumulate} piece(s)")  # fmt: skip
    say("compiling the train step ...")
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    traced = step.trace(key, state, batch)
    flops = hardware.flops(traced.jaxpr)
    compiled = traced.lower().compile()
    say(f"training: {flops / config.batch_size / 1e9:.3g} GFLOP an image, {flops / 1e9:.4g} a step")
    if mesh.shape["fsdp"] > 1:
        say(shares(state))

    memory, limit = needs(compiled, state), hardware.memory(device)
    for name, size in memory.items():
        say(f"{name:>32}: {size / 2**20:10,.1f} MiB a device")
    fits = memory["total"] <= limit
    say(f"{'the device has':>32}: {limit / 2**20:10,.1f} MiB: it {'fits' if fits else 'DOES NOT FIT'}")
    if not fits:
        say("what helps: config.training.accumulate, config.model.remat=True, config.model.dtype=bfloat16, "
            "config.training.mesh with a larger second number, a smaller config.batch_size")  # fmt: skip
        return
    seconds = pace(compiled, key, state, batch)
    total = seconds * config.steps
    say(f"time: {seconds:.3g} s a step, {config.batch_size / seconds:,.1f} images/s, "
        f"{_duration(total)} for {config.steps:,} steps (without sampling and saving)")  # fmt: skip
    peak = hardware.peak_flops(device)
    if peak:
        say(f"MFU: {flops / seconds / (peak * mesh.size):.1%} of {peak / 1e12:g} TFLOP/s a device in bfloat16")


def blocks(params: Any) -> str:
    """A table of the parameters by block: name, arrays, numbers, share."""
    params = {**params.get("params", params), **{name: part for name, part in params.items() if name == DISCRIMINATOR}}
    rows = [(name, jax.tree.leaves(block)) for name, block in params.items()]
    counts = {name: sum(int(np.prod(a.shape)) for a in leaves) for name, leaves in rows}
    total = sum(counts.values())
    lines = [f"{name:<20} {len(leaves):>4} arrays {counts[name]:>14,} {counts[name] / total:>7.1%}" for name, leaves in rows]
    return "\n".join([*lines, f"{'all':<20} {sum(len(a) for _, a in rows):>4} arrays {total:>14,} {1:>7.1%}"])


def state_bytes(state: Any) -> int:
    """The bytes of a state on one device; `state` holds shapes with shardings, or arrays."""
    return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in jax.tree.leaves(state))


def unsplit(state: Any) -> dict[str, int]:
    """The bytes of each array of a state that every device holds whole, by its place in the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): a.size * a.dtype.itemsize for path, a in leaves if a.sharding.is_fully_replicated}


def shares(state: Any) -> str:
    """One line on how much of a state a device holds, and what is not split among the devices."""
    held, whole, kept = state_bytes(state), sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)), unsplit(state)
    return (
        f"state: {held / 2**20:,.1f} of {whole / 2**20:,.1f} MiB a device, {held / whole:.2%}; "
        f"{len(kept)} small arrays, {sum(kept.values()) / 2**20:.2f} MiB, whole on each"
    )


def example_shapes(config, codec: Codec) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch holds of each example, images or what is kept of their latents: for data that is not there."""
    label = jax.ShapeDtypeStruct((), jnp.int32)
    if not first_stage.is_latent(codec):
        return {"image": jax.ShapeDtypeStruct(tuple(config.data.shape), jnp.uint8), "label": label}
    return {"latent": jax.ShapeDtypeStruct(latents.shape(codec, config.data.shape, config.data.flip), jnp.float16), "label": label}


def batch_shapes(config, codec: Codec, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as `meshes.put` would place it, in shapes."""
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *each.shape), each.dtype, sharding=meshes.split(mesh))
        for name, each in example_shapes(config, codec).items()
    }


def needs(compiled: Any, state: Any) -> dict[str, int]:
    """Bytes a device: of the state, of what the step computes with besides (activations, gradients), and in all."""
    analysis = compiled.memory_analysis()
    held = state_bytes(state)
    # What is donated is counted once; outputs that reuse it cost nothing more.
    outputs = max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
    total = analysis.argument_size_in_bytes + outputs + analysis.temp_size_in_bytes
    return {"state": held, "activations and gradients": analysis.temp_size_in_bytes, "total": max(total, held)}


def pace(compiled: Any, key: jax.Array, state: Any, batch: Any, repeats: int = 3) -> float:
    """Seconds a step, the median of a few on a state and a batch of zeros; `state` and `batch` hold shapes with shardings."""
    state, batch = zeros(state), zeros(batch)
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, _ = compiled(key, state, batch)
        jax.block_until_ready(state)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken[1:]))


def zeros(shapes: Any) -> Any:
    """Arrays of zeros of these shapes, each where its sharding says."""
    made = jax.jit(
        lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes),
        out_shardings=jax.tree.map(lambda a: a.sharding, shapes),
    )
    return made()


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
