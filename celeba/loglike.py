"""Estimate log-likelihoods of CelebA's test split by importance sampling, in nats per example, without λ.

Colour pixels are scored by the Bernoulli cross-entropy, which is not a normalised density. The attributes predicted
from an image are those more probable than not, by the mean of p(attrs | z) over q(z | image).
"""

from mvae.datasets.celeba import ATTRIBUTES
from mvae.scripts import faces, flags, machine, running

import datasets


def main() -> None:
    parser = flags.loglike_parser(__doc__)
    faces.add_flags(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    from mvae import checkpoint, metrics
    from mvae.estimators import evaluate, of_a_pair
    from mvae.scripts.report import report

    from model import build_model

    device = machine.device(args)
    model, trained = checkpoint.load_model(args.model_path, "celeba", build_model, device)
    with machine.processes(args, device) as processes:
        found = evaluate(
            model,
            datasets.examples(args.split, args, trained["settings"])[: args.limit].to(device),
            quantities=of_a_pair(("image",), ("attrs",)),
            predictions={"attrs": ("image",)},
            n_samples=args.n_samples,
            seed=args.seed,
            precision=args.precision,
            processes=processes,
            progress=running.progress,
        )
    report(found, metrics.accuracies(found.predictions["attrs"], found.truth["attrs"], ATTRIBUTES), args, trained)


if __name__ == "__main__":
    running.run(main)
