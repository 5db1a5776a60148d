"""The Multimodal Variational Autoencoder of Wu & Goodman (2018): what a user imports.

A name is imported from its module when it is first asked for, so that a script answers -h without waiting for torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_model
    from .data import Data
    from .errors import UsageError, UserError
    from .estimators import Quantity, evaluate, log_likelihood, of_a_pair
    from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
    from .model import MVAE, Batch
    from .objective import Objective, Term, random_subsets
    from .training import Options, fit, train_step

OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300"}
"""How OpenMP's threads wait for each other: awake for a moment, a few microseconds, and then asleep. By default they
spin for milliseconds, and so keep a core from those that they wait for where other processes compute, too. Threads that
sleep at once are slow to wake where none do. benchmarks/threads.py measures the three."""

if not OPENMP.keys() & os.environ.keys():
    os.environ.update(OPENMP)  # read when torch is loaded; a user's choice stands

_HOMES = {
    "checkpoint": ["load_model"],
    "data": ["Data"],
    "errors": ["UsageError", "UserError"],
    "estimators": ["Quantity", "evaluate", "log_likelihood", "of_a_pair"],
    "likelihoods": ["Bernoulli", "Categorical", "Gaussian", "Likelihood"],
    "model": ["MVAE", "Batch"],
    "objective": ["Objective", "Term", "random_subsets"],
    "training": ["Options", "fit", "train_step"],
}

__all__ = [
    "MVAE",
    "Batch",
    "Bernoulli",
    "Categorical",
    "Data",
    "Gaussian",
    "Likelihood",
    "Objective",
    "Options",
    "Quantity",
    "Term",
    "UsageError",
    "UserError",
    "evaluate",
    "fit",
    "load_model",
    "log_likelihood",
    "of_a_pair",
    "random_subsets",
    "train_step",
]


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{home}", __name__), name)
