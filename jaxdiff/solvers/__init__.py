"""Solvers: how to go from one noise level to the next. Each takes a denoiser and numbers; docs/solvers.md is the table of them.

What a config or a command line may name as a solver is in __all__; the wrappers in `jaxdiff.wrappers` take a solver and give one.
"""

from jaxdiff.solvers.adaptive import adaptive
from jaxdiff.solvers.base import Noise as Noise
from jaxdiff.solvers.base import Solver as Solver
from jaxdiff.solvers.base import State as State
from jaxdiff.solvers.base import Std as Std
from jaxdiff.solvers.base import deterministic as deterministic
from jaxdiff.solvers.base import dial as dial
from jaxdiff.solvers.multistep import deis, dpmpp_2m, dpmpp_3m, dpmpp_3m_corrected, lms, unipc
from jaxdiff.solvers.multistep import multistep as multistep
from jaxdiff.solvers.single import (
    annealed_langevin,
    churned,
    consistency,
    corrected,
    ddim,
    ddpm,
    ddpm_large,
    ddpm_learned,
    dpm2,
    dpm2_ancestral,
    dpmpp_1s,
    dpmpp_2s,
    dpmpp_2s_ancestral,
    euler,
    euler_ancestral,
    euler_maruyama,
    heun,
    line,
)

__all__ = [
    "adaptive",
    "annealed_langevin",
    "churned",
    "consistency",
    "corrected",
    "ddim",
    "ddpm",
    "ddpm_large",
    "ddpm_learned",
    "deis",
    "dpm2",
    "dpm2_ancestral",
    "dpmpp_1s",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_2s_ancestral",
    "dpmpp_3m",
    "dpmpp_3m_corrected",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "heun",
    "line",
    "lms",
    "unipc",
]
