"""Where arrays live: one mesh ("data", "fsdp") over all devices of all processes, and one rule for the train state.

The batch is split over both axes; parameters, averages and optimizer state are split over "fsdp" and repeated over "data". JAX's
compiler adds the communication.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.errors import InputError

AXES = ("data", "fsdp")
# Arrays smaller than this stay whole: splitting a bias saves nothing and costs a message.
SPLIT_FROM = 4096


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of one run: as given, or by itself on TPU pods, Slurm and GKE; alone elsewhere, with nothing to do.

    `coordinator` is "host:port" of process 0. To be called before anything else touches JAX's devices. Raises InputError where
    only some of the three are given, or the others cannot be reached.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise InputError(f"--{missing[0]} is missing; several processes need --coordinator=HOST:PORT --processes=N --process=I")
    if not missing and not 0 <= process < processes:  # type: ignore[operator]
        raise InputError(f"--process={process} is out of range; allowed: 0 to {processes - 1} (--processes={processes})")  # type: ignore[operator]
    if missing and not _in_cluster():
        return
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of this run did not find each other: {' '.join(str(error).split())[:300]}") from error


def _in_cluster() -> bool:
    """Whether a launcher that JAX knows started several processes."""
    several = [
        int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1,
        int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1,
        "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""),  # GKE
        "," in os.environ.get("TPU_PROCESS_ADDRESSES", ""),
        "MEGASCALE_COORDINATOR_ADDRESS" in os.environ,
    ]
    return any(several) or _on_tpu_pod()


def _on_tpu_pod() -> bool:
    """Whether this is a Cloud TPU VM, whose metadata server knows its siblings; a single one connects to itself alone."""
    if "cpu" in os.environ.get("JAX_PLATFORMS", "") or (not os.path.exists("/dev/accel0") and not os.path.exists("/dev/vfio/0")):
        return False
    from importlib.util import find_spec

    return find_spec("libtpu") is not None


def make_mesh(shape: Sequence[int]) -> Mesh:
    """The mesh of all devices with `shape` (data, fsdp), where one of the two may be -1, the rest.

    Raises InputError where the shape does not fit the number of devices.
    """
    devices, shape = jax.device_count(), tuple(shape)
    wrong = InputError(
        f"config.training.mesh={shape} does not fit {devices} device(s); it is (data, fsdp) with data * fsdp = {devices}, "
        f"and -1 for the rest: (-1, 1), or (-1, {devices}) to split the state over all"
    )
    if len(shape) != 2 or shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise wrong
    if -1 in shape:
        known = -int(np.prod(shape))
        shape = tuple(devices // known if n == -1 else n for n in shape)
    if np.prod(shape) != devices:
        raise wrong
    # Auto: Flax's convolutions fail under Explicit, newer JAX's default.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices: for batches."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes: the longest axis that divides is split over "fsdp".

    The last of equally long axes is taken; arrays under 4,096 numbers, and those with no axis that divides, stay whole.
    """

    def place(leaf: Any) -> NamedSharding:
        fsdp = mesh.shape["fsdp"]
        axes = [(n, i) for i, n in enumerate(leaf.shape) if n % fsdp == 0]
        if fsdp == 1 or not axes or np.prod(leaf.shape) < SPLIT_FROM:
            return replicated(mesh)
        axis = max(axes)[1]
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))

    return jax.tree.map(place, state)


def put(mesh: Mesh, batch_size: int, rows: Callable[[int, int], dict[str, np.ndarray]]) -> dict[str, jax.Array]:
    """The global batch on its devices; `rows(i, n)` reads part i of n, and is asked only for those of this process's devices."""
    sharding = split(mesh)
    where = sharding.addressable_devices_indices_map((batch_size,))
    share = batch_size // mesh.size
    parts = {device: rows((index[0].start or 0) // share, mesh.size) for device, index in where.items() if index}

    def whole(name: str) -> jax.Array:
        pieces = [jax.device_put(part[name], device) for device, part in parts.items()]
        return jax.make_array_from_single_device_arrays((batch_size, *pieces[0].shape[1:]), sharding, pieces)

    return {name: whole(name) for name in next(iter(parts.values()))}


def fetch(tree: Any) -> Any:
    """Arrays as NumPy on this process, gathered from the others where they hold parts; all processes must call it."""
    from jax.experimental import multihost_utils

    def one(a: jax.Array) -> np.ndarray:
        whole = a.is_fully_addressable or a.is_fully_replicated
        return np.asarray(a) if whole else np.asarray(multihost_utils.process_allgather(a, tiled=True))

    return jax.tree.map(one, tree)


def agree(value: Any) -> Any:
    """Process 0's value (numbers or arrays of fixed shape), the same on every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(value)


def first_process() -> bool:
    """Whether this process is the one that writes what all share."""
    return jax.process_index() == 0
