"""Estimate log-likelihoods of CelebA's test split by importance sampling, in nats per example, without λ.

Colour pixels are scored by the Bernoulli cross-entropy, which is not a normalised density. The attributes predicted
from an image are those more probable than not, by the mean of p(attribute | z) over q(z | image).
"""

import torch

from mvae import checkpoint, metrics
from mvae.datasets.celeba import ATTRIBUTES
from mvae.estimators import evaluate, of_a_pair
from mvae.scripts import faces, flags
from mvae.scripts.report import report

import datasets
from model import build_model

QUANTITIES = of_a_pair(("image",), ATTRIBUTES)


def main() -> None:
    parser = flags.loglike_parser(__doc__)
    faces.add_flags(parser)
    args = parser.parse_args()
    device = flags.device(args.cuda)
    model, trained = checkpoint.load_model(args.model_path, "celeba19", build_model, device)
    test = datasets.test_data(args.data_dir, args.cache_dir, allow_missing=args.allow_missing, workers=args.workers)
    found = evaluate(
        model,
        test[: args.limit].to(device),
        quantities=QUANTITIES,
        predictions=dict.fromkeys(ATTRIBUTES, ("image",)),
        n_samples=args.n_samples,
        seed=args.seed,
        progress=flags.progress,
    )
    predicted, truth = (
        torch.stack([part[name] for name in ATTRIBUTES], dim=1) for part in (found.predictions, found.truth)
    )
    report(found, metrics.accuracies(predicted, truth, ATTRIBUTES), args, trained)


if __name__ == "__main__":
    flags.run(main)
