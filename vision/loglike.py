"""Estimate log-likelihoods of the test split's pictures by importance sampling, in nats per example, without λ.

Pixels are scored by the Bernoulli cross-entropy, which is not a normalised density.
"""

from mvae import checkpoint
from mvae.estimators import Modalities, Quantity, evaluate
from mvae.scripts import flags
from mvae.scripts.report import report

import datasets
from datasets import MODALITIES
from model import build_model

IMAGE = ("image",)
QUANTITIES: dict[Quantity, list[Modalities]] = {
    **{Quantity((name,)): [(name,), MODALITIES] for name in MODALITIES},
    Quantity(MODALITIES): [IMAGE, MODALITIES],
    **{
        Quantity((name,), given=IMAGE, given_proposal=IMAGE): [IMAGE, MODALITIES]
        for name in MODALITIES
        if name != "image"
    },
}
"""Of each one alone, of all six, and of each of the other five given the image: what each is estimated under."""


def main() -> None:
    parser = flags.loglike_parser(__doc__)
    datasets.add_flags(parser)
    args = parser.parse_args()
    device = flags.device(args.cuda)
    model, trained = checkpoint.load_model(args.model_path, "vision", build_model, device)
    test = datasets.test_data(datasets.folders(args), args.data_dir, args.cache_dir, workers=args.workers)
    found = evaluate(
        model,
        test[: args.limit].to(device),
        quantities=QUANTITIES,
        n_samples=args.n_samples,
        seed=args.seed,
        progress=flags.progress,
    )
    report(found, {}, args, trained)


if __name__ == "__main__":
    flags.run(main)
