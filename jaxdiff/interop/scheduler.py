"""diffusers' scheduler_config.json in and out: the table of noise levels that a network was trained on, and its target.

Names and meanings: diffusers 0.42, schedulers/. What else the file says is how they walk the table, which here a solver does.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxdiff import codec as codecs
from jaxdiff import experiment, names, schedules, targets, times
from jaxdiff.errors import InputError
from jaxdiff.interop import folder

# What the file may say that matters here, and what their schedulers take where it says nothing.
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "thresholding": False,
    "clip_sample_range": 1.0,
    "rescale_betas_zero_snr": False,
}
# The schedulers of a table of betas, and whether they clip where clip_sample is not said.
CLIPS = {"DDPMScheduler": True, "DDIMScheduler": True, "PNDMScheduler": False}
# beta_schedule -> our schedule, and the part of a network that hears its rows.
TABLES = {
    "linear": ("linear_beta", "LinearBetaSinusoidal"),
    "scaled_linear": ("scaled_linear_beta", "ScaledLinearBetaSinusoidal"),
    "squaredcos_cap_v2": ("cosine_beta", "CosineBetaSinusoidal"),
}
TARGETS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SPACINGS = ("leading", "trailing", "linspace")
# The keys of which some values are read.
READ: dict[str, tuple[Any, ...]] = {
    "beta_schedule": tuple(TABLES),
    "trained_betas": (None,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"),
    "prediction_type": tuple(TARGETS),
    "timestep_spacing": SPACINGS,
    "thresholding": (False,),
    "clip_sample_range": (1.0,),
    "rescale_betas_zero_snr": (False,),
}
# Which values the others may have. A table is held whole.
KINDS = {
    "num_train_timesteps": folder.Kind("a whole number from 1 to 100,000", lambda v: names.whole(v, 1) and v <= 100_000),
    "beta_start": folder.POSITIVE,
    "beta_end": folder.POSITIVE,
    "clip_sample": folder.FLAG,
}


def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The whole of a scheduler_config.json, as far as it matters here. Raises InputError that names what is not read."""
    name = str(theirs.get("_class_name", "DDPMScheduler"))
    if name not in CLIPS:
        raise InputError(f"scheduler_config.json: _class_name={name!r} is not read; allowed: {', '.join(CLIPS)}")
    said = DEFAULTS | {"clip_sample": CLIPS[name]} | dict(theirs)
    folder.only("scheduler_config.json", said, READ)
    folder.check("scheduler_config.json", said, KINDS)
    return said


def process(said: Mapping[str, Any], drop_label: float = 0.0) -> dict[str, Any]:
    """Our group `process` of a whole scheduler_config.json."""
    return dict(
        schedule=text(TABLES[said["beta_schedule"]][0], **_numbers(said)),
        target=TARGETS[said["prediction_type"]],
        draw=f"draw_table({said['num_train_timesteps']})",
        weight="unit",
        loss="hybrid(0.001)" if said["variance_type"] == "learned_range" else "simple",
        data_std=1.0,
        drop_label=drop_label,
    )


def sampling(said: Mapping[str, Any]) -> dict[str, Any]:
    """Our group `sampling`, but for its average: 50 steps of DDIM along their spacing, clipped where they clip."""
    steps, spacing = said["num_train_timesteps"], said["timestep_spacing"]
    return dict(
        times=text("strided", steps, **({} if spacing == "leading" else {"spacing": spacing})),
        solver="ddim",
        steps=min(50, steps),
        max_steps=steps,
        guidance=1.0,
        num=16,
        batch_size=64,
        clip=bool(said["clip_sample"]),
    )


def hears(said: Mapping[str, Any], **sines: int) -> str:
    """Our model's `time`: the part that hears the rows of the table."""
    return text(TABLES[said["beta_schedule"]][1], **_numbers(said), **sines)


def _numbers(said: Mapping[str, Any]) -> dict[str, Any]:
    ends = {} if said["beta_schedule"] == "squaredcos_cap_v2" else {"first": said["beta_start"], "last": said["beta_end"]}
    return {"steps": said["num_train_timesteps"]} | ends


def text(name: str, *positional: Any, **numbers: Any) -> str:
    """A name with numbers, as a config writes it."""
    return f"{name}({', '.join([*map(repr, positional), *(f'{key}={value!r}' for key, value in numbers.items())])})"


def write(config: ConfigDict) -> dict[str, Any]:
    """scheduler_config.json of our process. Raises InputError for one that none of their schedulers has."""
    (table, numbers), process = table_of(config), config.process
    target = names.parse(targets, process.target, "process.target")[0].__name__
    predictions = {ours: theirs for theirs, ours in TARGETS.items()}
    if target not in predictions:
        raise InputError(f"process.target={process.target!r} cannot be exported; allowed: {', '.join(predictions)}")
    if process.data_std != 1:
        raise InputError(f"process.data_std={process.data_std!r} cannot be exported; allowed: 1.0")
    if names.parse(codecs, config.data.codec, "data.codec")[0] is not codecs.pixels:
        raise InputError(f"data.codec={config.data.codec!r} cannot be exported; allowed: pixels")
    learned = experiment.build(config).objective.outputs > 1
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": numbers["steps"],
        "beta_schedule": table,
        "beta_start": numbers.get("first", DEFAULTS["beta_start"]),
        "beta_end": numbers.get("last", DEFAULTS["beta_end"]),
        "prediction_type": predictions[target],
        "variance_type": "learned_range" if learned else "fixed_small",
        "clip_sample": bool(config.sampling.clip),
        "timestep_spacing": _spacing(config.sampling.times),
    }


def table_of(config: ConfigDict) -> tuple[str, dict[str, Any]]:
    """beta_schedule and the numbers of our schedule. Raises InputError for one that is none of theirs."""
    said = config.process.schedule
    name, numbers = _bound(schedules, said, "process.schedule")
    found = [theirs for theirs, (ours, _) in TABLES.items() if ours == name]
    if not found or (numbers.pop("s", 0.008), numbers.pop("largest", 0.999)) != (0.008, 0.999):
        allowed = ", ".join(ours for ours, _ in TABLES.values())
        raise InputError(f"process.schedule={said!r} cannot be exported; allowed: {allowed} with its own s and largest")
    return found[0], numbers


def _spacing(said: str) -> str:
    """What they call the strides of our grid; "leading" for a grid that they have not."""
    name, arguments = _bound(times, said, "sampling.times")
    spacing = arguments.get("spacing") if name == "strided" else None
    return spacing if spacing in SPACINGS else "leading"


def _bound(module: Any, said: str, key: str) -> tuple[str, dict[str, Any]]:
    """The function that a config names, and its arguments with its defaults."""
    function, args, kwargs = names.parse(module, said, key)
    bound = inspect.signature(function).bind_partial(*args, **kwargs)
    bound.apply_defaults()
    return function.__name__, dict(bound.arguments)
