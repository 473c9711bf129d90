"""jaxdiff: diffusion models in JAX as pure functions over noise levels."""

from jaxdiff import (
    autoencoding,
    codebook,
    codec,
    data,
    editing,
    experiment,
    guidance,
    likelihood,
    losses,
    models,
    objectives,
    pictures,
    schedules,
    score,
    solvers,
    targets,
    tiles,
    times,
    weights,
)
from jaxdiff.classifier import classifier
from jaxdiff.denoiser import clip_logsnr, denoiser
from jaxdiff.errors import InputError
from jaxdiff.export import Exported, export, load_exported
from jaxdiff.first_stage import load_codec
from jaxdiff.level import Level, Prediction, beta_std, diffuse, learned_std, logsnr, posterior_std
from jaxdiff.run import Classifier, Run, Trajectory, load, load_classifier
from jaxdiff.sampling import prior, sample, sample_keys, solve
from jaxdiff.solvers import Solver, wrappers
from jaxdiff.times import grid

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "Exported",
    "InputError",
    "Level",
    "Prediction",
    "Run",
    "Solver",
    "Trajectory",
    "autoencoding",
    "beta_std",
    "classifier",
    "clip_logsnr",
    "codebook",
    "codec",
    "data",
    "denoiser",
    "diffuse",
    "editing",
    "experiment",
    "export",
    "grid",
    "guidance",
    "learned_std",
    "likelihood",
    "load",
    "load_classifier",
    "load_codec",
    "load_exported",
    "logsnr",
    "losses",
    "models",
    "objectives",
    "pictures",
    "posterior_std",
    "prior",
    "sample",
    "sample_keys",
    "schedules",
    "score",
    "solve",
    "solvers",
    "targets",
    "tiles",
    "times",
    "weights",
    "wrappers",
]
