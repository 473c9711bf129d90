"""What a device can do, where that is known, and what a compiled step asks of it."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

# Dense bfloat16 TFLOP/s of one device as JAX counts devices, by a part of its device_kind. Sources: the vendors' data sheets
# (cloud.google.com/tpu/docs for TPUs: v2 and v3 devices are half chips; NVIDIA's for GPUs, SXM parts).
PEAKS = {
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "V100": 125.0,
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}


def peak_flops(device: Any) -> float | None:
    """The device's dense bfloat16 FLOP/s from its data sheet, None where unknown. MFU is always a share of this, as is usual."""
    found = [tera for name, tera in PEAKS.items() if name.lower() in device.device_kind.lower()]
    return found[0] * 1e12 if found else None


def memory(device: Any) -> int:
    """The bytes that a program may use on the device; a CPU device has its share of the machine's memory."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())


def flops(program: Any) -> float:
    """The floating-point operations of a traced program's matrix products and convolutions, a multiply-add as two.

    `program` is a jaxpr, what `jax.make_jaxpr(f)(...)` and `jax.jit(f).trace(...).jaxpr` give. The body of a scan counts as often
    as it runs (XLA's own count has it once), that of a while loop once, of a cond the dearest branch. Products with padding are
    none.
    """
    return sum(_operation(each) for each in getattr(program, "jaxpr", program).eqns)


def _operation(operation: Any) -> float:
    name, given, shapes = operation.primitive.name, operation.params, [v.aval.shape for v in operation.invars]
    if name == "dot_general":
        (contracted, _), _ = given["dimension_numbers"]
        return 2.0 * _size(operation.outvars[0].aval.shape) * _size(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _convolution(shapes[0], shapes[1], operation.outvars[0].aval.shape, given)
    within = [flops(part) for value in given.values() for part in _parts(value)]
    return max(within) if name == "cond" else (given["length"] if name == "scan" else 1) * sum(within)


def _convolution(x: Sequence[int], kernel: Sequence[int], out: Sequence[int], given: Mapping[str, Any]) -> float:
    spec = given["dimension_numbers"]
    along = zip(spec.lhs_spec[2:], spec.rhs_spec[2:], spec.out_spec[2:], given["window_strides"], given["padding"],
                given["lhs_dilation"], given["rhs_dilation"])  # fmt: skip
    meetings = [
        _meetings(x[i], kernel[j], out[k], stride, low, apart, spread) for i, j, k, stride, (low, _), apart, spread in along
    ]
    batch, features = (out[axis] for axis in spec.out_spec[:2])
    return 2.0 * batch * features * kernel[spec.rhs_spec[1]] * _size(meetings)


def _meetings(n: int, taps: int, out: int, stride: int, low: int, apart: int, spread: int) -> int:
    """How often along one axis a tap of the kernel meets an entry of the input, and no padding nor what dilation put between."""
    at = np.arange(out)[:, None] * stride - low + np.arange(taps)[None] * spread
    return int(((at >= 0) & (at <= (n - 1) * apart) & (at % apart == 0)).sum())


def _size(numbers: Iterable[int]) -> int:
    return math.prod(numbers)


def _parts(value: Any) -> list[Any]:
    """The programs within a parameter of an operation."""
    return [
        part for part in (value if isinstance(value, list | tuple) else [value]) if hasattr(part, "jaxpr") or hasattr(part, "eqns")
    ]
