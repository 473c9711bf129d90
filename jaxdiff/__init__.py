"""jaxdiff: diffusion models in JAX as pure functions over noise levels."""

from jaxdiff import codec, data, experiment, guidance, losses, models, pictures, schedules, solvers, targets, times
from jaxdiff.denoiser import clip_logsnr, denoiser
from jaxdiff.errors import InputError
from jaxdiff.level import Level, Prediction, beta_std, diffuse, logsnr, posterior_std
from jaxdiff.run import Run, load
from jaxdiff.sampling import prior, sample, sample_keys, solve
from jaxdiff.solvers import Solver
from jaxdiff.times import grid

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Level",
    "Prediction",
    "Run",
    "Solver",
    "beta_std",
    "clip_logsnr",
    "codec",
    "data",
    "denoiser",
    "diffuse",
    "experiment",
    "grid",
    "guidance",
    "load",
    "logsnr",
    "losses",
    "models",
    "pictures",
    "posterior_std",
    "prior",
    "sample",
    "sample_keys",
    "schedules",
    "solve",
    "solvers",
    "targets",
    "times",
]
