"""A workdir of parameters that were trained elsewhere."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdiff.errors import InputError
from jaxdiff.training import checkpoint

# The one average that an imported workdir has.
EMA = 0.0


def write(workdir: str | Path, config: ConfigDict, params: Any) -> None:
    """Writes a workdir that `jaxdiff.load` takes: a checkpoint of step 0 whose one average is `params`.

    Raises InputError where there are checkpoints already: nothing trained is ever written over.
    """
    if (held := checkpoint.newest(workdir)) is not None:
        raise InputError(f"workdir {workdir} holds a checkpoint already (step {held}); give a new folder")
    with checkpoint.imported(workdir) as checkpoints:
        checkpoint.save_snapshot(checkpoints, 0, {str(EMA): jax.tree.map(jnp.asarray, params)}, config)
