"""What a device can do, where that is known, and what a compiled step asks of it."""

import os
from typing import Any

import jax

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


def step_flops(lowered: Any, accumulate: int = 1) -> float | None:
    """The floating-point operations of one training step over all devices, by XLA's count; None on a backend that has none.

    CUDA has none: what it counts in a compiled program leaves out cuDNN's convolutions.
    """
    costs = lowered.cost_analysis() or {}
    # XLA counts the body of a loop once, however often it runs.
    return float(costs["flops"]) * accumulate if "flops" in costs else None
