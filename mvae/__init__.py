"""The Multimodal Variational Autoencoder of Wu & Goodman (2018)."""

import os

OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300"}
"""How OpenMP's threads wait for each other: awake for a few microseconds, then asleep. By default they spin for
milliseconds, which blocks a core that another process could use; threads that sleep at once are slow to wake."""

if not OPENMP.keys() & os.environ.keys():
    os.environ.update(OPENMP)  # read when torch is loaded, so this comes first; a user's choice is kept

from .data.dataset import Data  # noqa: E402
from .errors import UsageError, UserError  # noqa: E402
from .estimators import log_likelihood  # noqa: E402
from .likelihoods import Bernoulli, Categorical, Distribution, Gaussian, Likelihood  # noqa: E402
from .model import MVAE, Batch  # noqa: E402
from .objective import Objective, Term, random_subsets  # noqa: E402
from .run.checkpoint import load_model  # noqa: E402
from .run.config import Training  # noqa: E402
from .run.evaluate import Quantity, evaluate, of_a_pair  # noqa: E402
from .run.run import Run  # noqa: E402

__all__ = [
    "MVAE",
    "Batch",
    "Bernoulli",
    "Categorical",
    "Data",
    "Distribution",
    "Gaussian",
    "Likelihood",
    "Objective",
    "Quantity",
    "Run",
    "Term",
    "Training",
    "UsageError",
    "UserError",
    "evaluate",
    "load_model",
    "log_likelihood",
    "of_a_pair",
    "random_subsets",
]
