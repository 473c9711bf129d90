"""Published weights in and out:  python -m jaxdiff.interop SOURCE WORKDIR, or --export=diffusers WORKDIR FOLDER

The first makes a workdir of a model that was trained elsewhere; sample.py, evaluate.py and jaxdiff.load take it as any other.
The second writes the model in a workdir as a folder that diffusers' pipelines load. docs/interop.md says what is read and written.
"""

import hashlib
from pathlib import Path

import jax
from absl import flags

from jaxdiff import cli
from jaxdiff import run as runs
from jaxdiff.errors import InputError
from jaxdiff.interop import source, unet2d, workdir
from jaxdiff.interop.workdir import Imported
from jaxdiff.training import checkpoint

FLAGS = flags.FLAGS
flags.DEFINE_enum("export", None, ["diffusers"], "Write the model in a WORKDIR as a FOLDER of this library.")
flags.DEFINE_boolean("null_class", False, "The last class of SOURCE means none, so that the model can be guided.")
flags.DEFINE_string("ema", None, "With --export: one of config.training.ema (default: the config's).")
flags.DEFINE_integer("step", None, "With --export: the checkpoint kept at this training step (default: the newest).")


def main(first: str, second: str) -> None:
    if FLAGS.export:
        run = runs.load(first, FLAGS.ema, FLAGS.step)
        unet2d.export(run, second)
        print(f"wrote {second}; in Python: diffusers.DDPMPipeline.from_pretrained({second!r})")
        return
    if FLAGS.ema is not None or FLAGS.step is not None:
        raise InputError("--ema and --step choose what is exported; give them with --export=diffusers")
    if (held := checkpoint.newest(second)) is not None:  # told before anything large is read
        raise InputError(f"workdir {second} holds a checkpoint already (step {held}); give a new folder")
    imported = source.read(first, FLAGS.null_class)
    workdir.write(second, imported.config, imported.params)
    print("\n".join(found(imported)))
    label = " --label=0" if imported.config.model.classes else ""
    print(f"wrote {second}; draw from it with: python sample.py --workdir={second}{label}")


def found(imported: Imported) -> list[str]:
    """What a source turned out to be, line by line."""
    config = imported.config
    count = sum(a.size for a in jax.tree.leaves(imported.params))
    classes = f", {config.model.classes} classes" if config.model.classes else ""
    return [
        f"{imported.family}: {count:,} parameters, images of {'x'.join(map(str, config.data.shape))}{classes}",
        f"schedule {config.process.schedule}, target {config.process.target}, clip {config.sampling.clip}",
        *(f"{path}: sha256 {digest(path)}" for path in imported.weights),
        *imported.notes,
    ]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    cli.run(main, "SOURCE", "WORKDIR")
