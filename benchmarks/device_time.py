"""Where a device's time went, from a profile:  python benchmarks/device_time.py FOLDER [--steps=5] [--hlo=FOLDER/step.hlo.txt]

FOLDER is what `jax.profiler.trace` wrote (or a torch.profiler's trace, one .json file) of `steps` steps of one program, and the HLO
is that program's text (`compiled.as_text()`), which says of each kernel what it computes and which part of the network asked for
it. Three tables: time a step by kind of kernel with what is idle, by part of the network forward and backward, and the costliest
instructions. Without the HLO kinds are told by the kernels' names alone. A kernel that the profile gives no instruction (those
inside a CUDA graph) has its name looked up: profile a program compiled without them, `xla_gpu_enable_command_buffer=""`.
"""

import argparse
import collections
import gzip
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import measure

# Operations that only move what others made; a fusion of these alone is a copy.
MOVES = set(
    "parameter constant bitcast bitcast-convert copy transpose reshape broadcast concatenate slice pad convert tuple "
    "get-tuple-element reverse dynamic-slice dynamic-update-slice iota".split()
)
# What does not tell which part of the network a fusion belongs to.
SILENT = {"parameter", "constant", "bitcast", "broadcast", "tuple", "get-tuple-element", "iota", "convert"}
# A kernel's kind by its name, the first that is found: what is left where no program says it.
NAMES = {
    "copies and transposes": r"memcpy|nchwTo|nhwcTo|ToNchw|ToNhwc|convertTensor|transpose|copy|memset",
    "convolution, backward": r"dgrad|wgrad|bwd.*conv|conv.*(bwd|backward)",
    "attention": r"fmha|flash|attention|softmax",
    "convolution": r"conv|fprop|implicit|xmma_fprop|cudnn",
    "matrix product": r"gemm|nvjet|cutlass|matmul|\bdot",
    "optimizer and average": r"adam|multi_tensor_apply",
    "random bits": r"threefry|philox|random|rng|distribution|dropout",
    "reductions": r"reduce|triton_red|triton_per|norm",
    "elementwise": r"fusion|elementwise|triton_poi|loop|wrapped|select|add|multiply",
}
# The part of a network by the names along an instruction's path, the first that is found.
PARTS = {
    "dropout and its random bits": r"dropout|bernoulli",
    "attention": r"_attention|dot_product_attention",
    "norm and SiLU": r"norm|silu|logistic",
    "convolutions": r"conv|shortcut",
    "embedding of the level": r"embed|/time",
    "concatenating skips, resampling": r"concatenate|repeat|avg_pool|reduce_window|/(up|down)\d+/",
}


class Kernel(NamedTuple):
    """What ran on the device: its name, the instruction it was launched for ("" unknown), start and length in microseconds."""

    name: str
    instruction: str
    start: float
    length: float


class Instruction(NamedTuple):
    """What of an instruction matters here: the kind of what it computes, and the path of the part that asked for it."""

    kind: str
    path: str


def kernels(folder: Path | str) -> list[Kernel]:
    """All that ran on a GPU, or on a CPU all that was an XLA instruction, from the newest trace under a folder, or from a file.

    Raises FileNotFoundError where there is none.
    """
    found = (
        [Path(folder)] if Path(folder).is_file() else sorted(Path(folder).rglob("*.trace.json.gz"), key=lambda p: p.stat().st_mtime)
    )
    if not found:
        raise FileNotFoundError(f"no *.trace.json.gz under {folder}")
    opened = gzip.open if found[-1].suffix == ".gz" else open
    with opened(found[-1], "rt") as file:
        return of_events(json.load(file)["traceEvents"])


def of_events(events: Sequence[Mapping[str, Any]]) -> list[Kernel]:
    """The kernels among the events of a trace in Chrome's format, by start."""
    threads = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("ph") == "M" and e["name"] == "thread_name"}
    devices = {e["pid"] for e in events if e.get("ph") == "M" and e["name"] == "process_name" and "/device:" in e["args"]["name"]}
    streams = {place for place, name in threads.items() if place[0] in devices and "Stream" in name}
    complete = [e for e in events if e.get("ph") == "X" and "name" in e]
    theirs = [e for e in complete if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    on_streams = [e for e in complete if (e["pid"], e.get("tid")) in streams]
    instructions = [e for e in complete if "hlo_op" in e.get("args", {}) and not re.match(r"(while|call|conditional)\b", e["name"])]
    chosen = theirs or on_streams or instructions
    made = [Kernel(e["name"], str(e.get("args", {}).get("hlo_op", "")), float(e["ts"]), float(e.get("dur", 0.0))) for e in chosen]
    return sorted(made, key=lambda kernel: kernel.start)


def busy(found: Sequence[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, end = 0.0, float("-inf")
    for kernel in found:
        total += max(0.0, kernel.start + kernel.length - max(end, kernel.start))
        end = max(end, kernel.start + kernel.length)
    return total


def instructions(hlo: str) -> dict[str, Instruction]:
    """The instructions of a program's text by name, also by the name with every sign but letters and digits an underscore."""
    computations: dict[str, list[tuple[str, str, str]]] = {}
    current: list[tuple[str, str, str]] = []
    for line in hlo.splitlines():
        if begin := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = computations.setdefault(begin[1], [])
        elif made := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            operation = re.search(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(", made[2])
            current.append((made[1], operation[1] if operation else "", made[2]))
    texts = {name: text for each in computations.values() for name, _, text in each}
    told = {name: _instruction(operation, text, computations) for each in computations.values() for name, operation, text in each}
    for _ in range(2):
        told = _lent(told, texts)
    return {re.sub(r"\W", "_", name): value for name, value in told.items()} | told


def _lent(told: Mapping[str, Instruction], texts: Mapping[str, str]) -> dict[str, Instruction]:
    """What the compiler put in without a path, a copy in another layout say, has that of who uses it, or of what it is made of."""
    near: dict[str, str] = {}
    for name, text in texts.items():
        operands = [each for each in re.findall(r"%([\w.\-]+)", text.partition("metadata=")[0]) if each in told]
        for each in operands:
            near[each] = near.get(each) or told[name].path
    for name, text in texts.items():
        operands = [told[each].path for each in re.findall(r"%([\w.\-]+)", text) if each in told and told[each].path]
        near[name] = near.get(name) or (operands[0] if operands else "")
    # What everybody uses is nobody's.
    own = {name for name, each in told.items() if each.path or re.search(r"\b(parameter|constant)\(", texts[name])}
    return {name: each if name in own else each._replace(path=near[name]) for name, each in told.items()}


def _instruction(operation: str, text: str, computations: Mapping[str, Any]) -> Instruction:
    called = re.search(r"calls=%?([\w.\-]+)", text)
    inner = _within(called[1], computations) if called else []
    operations = {each for _, each, _ in inner} or {operation}
    paths = collections.Counter(path for _, each, said in inner if each not in SILENT and (path := _path(said)))
    own = _path(text)
    return Instruction(_kind(operation, operations, text), paths.most_common(1)[0][0] if paths else own)


def _within(name: str, computations: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """All instructions of a computation and of those it calls."""
    lines = list(computations.get(name, []))
    for _, _, text in computations.get(name, []):
        if called := re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", text):
            lines += _within(called[1], computations) if "to_apply" not in text else []
    return lines


def _path(text: str) -> str:
    found = re.search(r'op_name="([^"]*)"', text)
    return found[1] if found else ""


def _kind(operation: str, within: set[str], text: str) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', text)
    if target:
        return _of_target(target[1])
    if "convolution" in within:
        return "convolution, backward" if "transpose(jvp" in text else "convolution"
    if "dot" in within:
        return "matrix product"
    if "rng-bit-generator" in within or {"xor", "shift-left"} <= within:  # a round of threefry rotates
        return "random bits"
    if within & {"reduce", "reduce-window", "sort"}:
        return "reductions"
    return "copies and transposes" if within <= MOVES or operation in MOVES else "elementwise"


def _of_target(target: str) -> str:
    for kind, pattern in {
        "convolution, backward": r"conv.*(BackwardInput|BackwardFilter)",
        "convolution": r"conv",
        "attention": r"fmha|softmax|flash",
        "matrix product": r"gemm|matmul|cublas|dot",
        "random bits": r"threefry|rng",
        "reductions": r"norm|reduce|topk",
    }.items():
        if re.search(pattern, target, re.IGNORECASE):
            return kind
    return target


def described(kernel: Kernel, program: Mapping[str, Instruction]) -> Instruction:
    """A kernel's instruction; of one that the program does not know, what its name tells."""
    known = program.get(kernel.instruction) or program.get(re.sub(r"\W", "_", kernel.name))
    by_name = next((kind for kind, pattern in NAMES.items() if re.search(pattern, kernel.name, re.IGNORECASE)), "other")
    if known is None:
        return Instruction(by_name, "")
    # A library lays its operands out anew around what it was asked for.
    rearranged = re.search(r"nchwTo|nhwcTo|ToNchw|ToNhwc|convertTensor", kernel.name)
    return known._replace(kind="copies and transposes") if rearranged else known


def part_of(path: str) -> str:
    """Which part of the network an instruction's path belongs to; what is no part of it is the batch before, the update after."""
    if not path:
        return "not told"
    if "jvp" not in path:
        return "batch and noise" if re.search(r"random|uniform|normal|flip|threefry|erf_inv", path) else "clip, optimizer, average"
    return next((part for part, pattern in PARTS.items() if re.search(pattern, path, re.IGNORECASE)), "loss, sums around blocks")


def by_kind(found: Sequence[Kernel], program: Mapping[str, Instruction], steps: int) -> str:
    """A table of the time a step by kind of kernel, and of what is idle between the first and the last."""
    time: collections.Counter = collections.Counter()
    count: collections.Counter = collections.Counter()
    for kernel in found:
        kind = described(kernel, program).kind
        time[kind] += kernel.length
        count[kind] += 1
    window = max(k.start + k.length for k in found) - found[0].start
    time["idle"] = max(0.0, window - busy(found))
    rows = [
        (kind, f"{us / steps / 1e3:.3f}", f"{us / window:.1%}", f"{count[kind] / steps:.0f}") for kind, us in time.most_common()
    ]
    total = ("all, by the clock", f"{window / steps / 1e3:.3f}", "", f"{len(found) / steps:.0f}")
    return measure.table(("kind of kernel", "ms a step", "share", "kernels a step"), [*rows, total])


def by_part(found: Sequence[Kernel], program: Mapping[str, Instruction], steps: int) -> str:
    """A table of the time a step by part of the network, forward and backward."""
    forward: collections.Counter = collections.Counter()
    backward: collections.Counter = collections.Counter()
    for kernel in found:
        kind, path = described(kernel, program)
        part = "convolutions" if kind.startswith("convolution") else part_of(path)
        (backward if "transpose(" in path or "backward" in kind else forward)[part] += kernel.length
    every, total = forward + backward, sum(k.length for k in found)
    rows = [
        (part, *(f"{side[part] / steps / 1e3:.3f}" for side in (forward, backward)), f"{us / total:.1%}")
        for part, us in every.most_common()
    ]
    return measure.table(("part", "forward, ms a step", "backward", "of the busy time"), rows)


def costliest(found: Sequence[Kernel], program: Mapping[str, Instruction], steps: int, most: int = 20) -> str:
    """A table of the instructions that took longest, and for whom."""
    time: collections.Counter = collections.Counter()
    names: dict[str, Kernel] = {}
    for kernel in found:
        name = kernel.instruction or kernel.name
        time[name] += kernel.length
        names[name] = max(names.get(name, kernel), kernel, key=lambda k: k.length)
    rows = []
    for name, us in time.most_common(most):
        kind, path = described(names[name], program)
        where = "/".join(path.split("/")[-4:])
        rows.append((f"`{name[:40]}`", f"`{names[name].name[:70]}`", kind, f"{us / steps / 1e3:.3f}", f"`{where}`"))
    return measure.table(("instruction", "kernel", "kind", "ms a step", "of"), rows)


def report(folder: Path | str, hlo: str = "", steps: int = 1, most: int = 20) -> str:
    """The three tables of a profile, Markdown; of a GPU's instructions the part of the network only where the HLO is given."""
    found, program = kernels(folder), instructions(hlo)
    if not found:
        return f"The trace under {folder} has no kernels."
    parts = [by_part(found, program, steps)] if program else []
    return "\n\n".join([by_kind(found, program, steps), *parts, costliest(found, program, steps, most)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1, help="how many steps the profile holds")
    parser.add_argument("--hlo", type=Path, help="the program's text; FOLDER/step.hlo.txt where that is there")
    parser.add_argument("--most", type=int, default=20, help="how many instructions are listed")
    args = parser.parse_args(argv)
    hlo = args.hlo or args.folder / "step.hlo.txt"
    print(report(args.folder, hlo.read_text() if hlo.is_file() else "", args.steps, args.most))


if __name__ == "__main__":
    main()
