"""Published weights in and out:  python -m jaxdiff.interop SOURCE WORKDIR, or --export=diffusers WORKDIR FOLDER

The first makes a workdir of a model that was trained elsewhere; sample.py, evaluate.py and jaxdiff.load take it as any other.
The second writes the model in a workdir as a folder that diffusers' pipelines load. docs/interop.md says what is read and written.
"""

import hashlib
import shlex
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxdiff import cli, models
from jaxdiff import run as runs
from jaxdiff.errors import InputError
from jaxdiff.interop import openai, source, unet2d, workdir
from jaxdiff.interop.workdir import Imported

FLAGS = flags.FLAGS
flags.DEFINE_enum("export", None, ["diffusers"], "Write the model in a WORKDIR as a FOLDER of this library.")
flags.DEFINE_string("ema", None, "With --export: one of config.training.ema (default: the config's).")
flags.DEFINE_integer("step", None, "With --export: the checkpoint kept at this training step (default: the newest).")
flags.DEFINE_boolean("null_class", None, "UNet2DModel: the last class means none, so that the model can be guided.")
flags.DEFINE_integer("image_size", None, "The size of the images, where SOURCE does not say it.")
flags.DEFINE_integer("heads", None, "OpenAI: heads of attention, of a file that was not published.")
flags.DEFINE_integer("head_channels", None, "OpenAI: channels of a head, instead of --heads.")
flags.DEFINE_integer("steps", None, "OpenAI: of the diffusion it was trained on.")
flags.DEFINE_string("schedule", None, "OpenAI: linear or cosine.")
flags.DEFINE_boolean("rescale_timesteps", None, "OpenAI: the network hears times rescaled to 1000.")
flags.DEFINE_boolean("new_attention_order", None, "OpenAI: attention was trained in the new order.")
flags.DEFINE_string("sde", None, "score_sde: vp, vp_discrete or subvp.")
# What says of a SOURCE what it does not say itself.
SAYS = ("null_class", "sde", *openai.FLAGS)


def main(first: str, second: str) -> None:
    said = {name: FLAGS[name].value for name in SAYS if FLAGS[name].value is not None}
    if FLAGS.export:
        if said:
            raise InputError(f"--{next(iter(said))} is of a SOURCE; with --export allowed: --ema, --step")
        run = runs.load(first, FLAGS.ema, FLAGS.step)
        unet2d.export(run, second)
        print(f"wrote {second}; in Python: diffusers.DDPMPipeline.from_pretrained({second!r})")
        return
    if FLAGS.ema is not None or FLAGS.step is not None:
        raise InputError("--ema and --step choose what is exported; give them with --export=diffusers")
    workdir.vacant(second)  # told before anything large is read
    imported = source.read(first, **said)
    workdir.write_imported(second, imported)
    print("\n".join(found(imported)))
    print(f"wrote {second}; {use(imported.config, second)}")


def found(imported: Imported) -> list[str]:
    """What a source turned out to be, line by line."""
    config = imported.config
    count = sum(a.size for a in jax.tree.leaves(imported.params))
    classes = f", {config.model.classes} classes" if config.model.get("classes") else ""
    says = {"schedule": "process", "target": "process", "codec": "data", "clip": "sampling"}
    told = [f"{key} {config[group][key]}" for key, group in says.items() if key in config.get(group, {})]
    return [
        f"{imported.family}: {count:,} parameters, images of {'x'.join(map(str, config.data.shape))}{classes}",
        ", ".join(told),
        *(f"{path}: sha256 {digest(path)}" for path in imported.weights),
        *imported.notes,
    ]


def use(config: ConfigDict, place: str) -> str:
    """What can be done with an imported workdir."""
    if config.model.name == "Classifier":
        return f"guide by it with: python sample.py --workdir=DIR --classifier={shlex.quote(place)}"
    if config.model.name in models.AUTOENCODERS:
        return f'in Python: jaxdiff.load_codec({place!r}); a config names it with data.codec="autoencoder({place!r})"'
    return f"draw from it with: python sample.py --workdir={shlex.quote(place)}" + (" --label=0" if config.model.classes else "")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    cli.run(main, "SOURCE", "WORKDIR")
