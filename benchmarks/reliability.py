"""Does a run survive?  python benchmarks/reliability.py meshes|kills|sigterm|devices|flips|disk|nan [--runs=20]

Each name is one experiment on configs/digits.py, on a CPU; what it prints stands in docs/reliability.md. `kills` takes about a
minute a run on 2 cores, the others a few minutes; `disk` mounts a small tmpfs and needs root.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
QUICK = ["--config.training.sample_every=1000", "--config.sampling.num=10", "--config.sampling.steps=2"]


def command(workdir, steps=300, *more):
    return [
        sys.executable,
        "train.py",
        "--config=configs/digits.py",
        f"--config.steps={steps}",
        f"--workdir={workdir}",
        *QUICK,
        *more,
    ]


def launch(args, devices=1, cache=None):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    if cache:
        # The data cache of each run is its own, so that kills fall on its making too; compiled programs are shared.
        env |= {
            "XDG_CACHE_HOME": str(cache),
            "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "jaxdiff-reliability-xla"),
        }
    return subprocess.Popen(args, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, expect=0):
    out, _ = process.communicate(timeout=1800)
    assert process.returncode == expect, out[-3000:]
    return out


def arrays(workdir, step=300):
    """All arrays of a checkpoint by name."""
    import jax
    import orbax.checkpoint as ocp

    found, here = {}, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in ("state", "ema"):
        reader, path = ocp.StandardCheckpointer(), Path(workdir).absolute() / "checkpoints" / str(step) / item
        # Onto one device, whatever number wrote it.
        shapes = reader.metadata(path).item_metadata.tree
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), shapes)
        tree = reader.restore(path, target)
        found |= {item + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return found


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def difference(a, b):
    return max(float(np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max()) for name in a)


def meshes(args):
    print("mesh    loss at 1    loss at 20   largest difference of 20   state bytes a device")
    first = None
    for shape, devices in (((1, 1), 1), ((8, 1), 8), ((1, 8), 8), ((2, 4), 8)):
        out = finish(launch([sys.executable, "tests/meshes.py", json.dumps(shape)], devices))
        told = json.loads(out.splitlines()[-1])
        first = first or told
        off = np.abs(np.array(told["losses"]) - np.array(first["losses"])).max()
        print(
            f"{shape[0]}x{shape[1]}   {told['losses'][0]:.8f}   {told['losses'][-1]:.8f}   {off:24.1e}   {told['bytes']:20,}",
            flush=True,
        )


def kills(args):
    """Every run is killed at least once, at a moment drawn over the whole length of a run, and started again until it is done."""
    saving = "--config.training.save_every=20"
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        finish(launch(command(f"{folder}/whole", 300, saving), cache=f"{folder}/cache"))
        start = time.time()
        finish(launch(command(f"{folder}/again", 300, saving), cache=f"{folder}/cache2"))
        length, whole = time.time() - start, arrays(f"{folder}/whole")
        assert same_bits(whole, arrays(f"{folder}/again"))
        print(f"uninterrupted: {length:.0f} s, {len(whole)} arrays; a second one has the same bits", flush=True)
        equal, killed, during, draw = 0, 0, [], random.Random(args.seed)
        for run in range(args.runs):
            done = False
            moments = [draw.uniform(0, length) for _ in range(draw.randint(1, 3))]
            while not done:
                process = launch(command(f"{folder}/{run}", 300, saving), cache=f"{folder}/cache-{run}")
                try:
                    out, _ = process.communicate(timeout=moments.pop() if moments else 1800)
                    done = process.returncode == 0
                    assert done, out[-3000:]
                except subprocess.TimeoutExpired:
                    checkpoints = Path(folder, str(run), "checkpoints")
                    during.append(any(".orbax" in p.name for p in checkpoints.iterdir()) if checkpoints.is_dir() else False)
                    process.kill()
                    process.communicate()
                    killed += 1
            good = same_bits(whole, arrays(f"{folder}/{run}"))
            equal += good
            print(f"run {run}: {'the same bits' if good else 'OTHER BITS'}", flush=True)
        print(f"{equal} of {args.runs} runs end with the same bits after {killed} kills, {sum(during)} of them during a save")


def sigterm(args):
    with tempfile.TemporaryDirectory() as folder:
        finish(launch(command(f"{folder}/whole")))
        process = launch(command(f"{folder}/stopped"))
        while not Path(folder, "stopped", "metrics.jsonl").exists() or not Path(folder, "stopped", "metrics.jsonl").read_text():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        print(finish(process).splitlines()[-1])
        print(next(line for line in finish(launch(command(f"{folder}/stopped"))).splitlines() if "going on" in line))
        print("the same bits:", same_bits(arrays(f"{folder}/whole"), arrays(f"{folder}/stopped")))


def devices(args):
    """A checkpoint moves from 8 devices to 2 to 1, each taking a third of 60 steps."""
    mesh = "--config.training.mesh=(2, -1)"
    with tempfile.TemporaryDirectory() as folder:
        finish(launch(command(f"{folder}/one", 60)))
        finish(launch(command(f"{folder}/eight", 60, mesh), 8))
        for steps, count in ((20, 8), (40, 2), (60, 1)):
            finish(launch(command(f"{folder}/moved", steps, *([mesh] if count > 1 else [])), count))
        for steps in (30, 60):
            finish(launch(command(f"{folder}/again", steps, mesh), 8))
        one, moved, eight, again = (arrays(f"{folder}/{name}", 60) for name in ("one", "moved", "eight", "again"))
        scale = difference(one, {name: np.zeros_like(a) for name, a in one.items()})
        print(f"8 devices, stopped at 30 and gone on with 8: the same bits as uninterrupted: {same_bits(eight, again)}")
        print(
            f"8, then 2, then 1 against 1 throughout: largest difference {difference(one, moved):.1e} (largest number {scale:.3g})"
        )
        print(f"8 throughout against 1 throughout:      largest difference {difference(one, eight):.1e}")


def flips(args):
    """100 single bits and 20 truncations of the newest checkpoint."""
    from jaxdiff.training import checkpoint

    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        finish(launch(command(folder, 40, "--config.training.save_every=20")))
        files = sorted(p for p in Path(folder, "checkpoints", "40").rglob("*") if p.is_file())
        sizes = [p.stat().st_size for p in files]
        noticed = 0
        for n in range(120):
            # Half of them fall on a random byte, half on a random file, so that the small ones have their share.
            path = draw.choices(files, sizes)[0] if n % 2 else draw.choice(files)
            good = path.read_bytes()
            bit = draw.randrange(8 * len(good))
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bytes(bad) if n < 100 else good[: bit // 8])
            step, why = checkpoint.newest_good(folder)
            noticed += step == 20 and 40 in why
            if n in (7, 107):
                out = finish(launch(command(folder, 41)))
                print("\n".join(line for line in out.splitlines() if "damaged" in line or "going on" in line))
                Path(folder, "damaged", "40").rename(Path(folder, "checkpoints", "40"))
                for later in Path(folder, "checkpoints").glob("41"):
                    later.rename(Path(folder, f"later{n}"))
            path.write_bytes(good)
        assert checkpoint.newest_good(folder) == (40, {})
        print(f"{noticed} of 100 flips and 20 truncations noticed, and step 20 taken instead of 40; undamaged, 40 is taken")


def disk(args):
    """A workdir on a file system that fills up."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={args.megabytes}m", "tmpfs", folder], check=True)
        try:
            process = launch(command(f"{folder}/run", 300, "--config.training.save_every=50", "--config.training.keep=10"))
            out, _ = process.communicate(timeout=1800)
            print(f"exit code {process.returncode}: {out.splitlines()[-1]}")
            from jaxdiff.training import checkpoint

            print("newest good checkpoint:", checkpoint.newest_good(f"{folder}/run")[0])
            subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
            print(
                "with more space:",
                [s for s in finish(launch(command(f"{folder}/run"))).splitlines() if "going on" in s or "done" in s],
            )
        finally:
            subprocess.run(["umount", folder], check=True)


def nan(args):
    """The loss of one example is not a number at step 52; saves are at every 5th."""
    from jaxdiff.training import checkpoint

    for mode in ("stop", "skip"):
        with tempfile.TemporaryDirectory() as folder:
            process = launch([sys.executable, "tests/injected.py", "52", mode, folder])
            out, _ = process.communicate(timeout=1800)
            lines = [line for line in out.replace("\r", "\n").splitlines() if line.strip()]
            print(f"{mode}: exit code {process.returncode}: {lines[-1]}")
            newest = checkpoint.newest_good(folder)[0]
            finite = all(np.isfinite(a).all() for a in arrays(folder, newest).values())
            rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
            skipped = {row["step"]: row["skipped"] for row in rows if "skipped" in row}
            print(f"  newest checkpoint {newest}, all numbers in it finite: {finite}; skipped: {skipped}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("experiment", choices=["meshes", "kills", "sigterm", "devices", "flips", "disk", "nan"])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=30)
    args = parser.parse_args()
    globals()[args.experiment](args)


if __name__ == "__main__":
    main()
