"""Estimate log-likelihoods of the test split's pictures by importance sampling, in nats per example, without λ.

Pixels are scored by the Bernoulli cross-entropy, which is not a normalised density.
"""

from mvae.scripts import flags, machine, running

import datasets
from datasets import MODALITIES


def main() -> None:
    parser = flags.loglike_parser(__doc__)
    datasets.add_flags(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    from mvae import checkpoint
    from mvae.estimators import Modalities, Quantity, evaluate
    from mvae.scripts.report import report

    from model import build_model

    # Of each one alone, of all six, and of each of the other five given the image: what each is estimated under.
    image = ("image",)
    quantities: dict[Quantity, list[Modalities]] = {
        **{Quantity((name,)): [(name,), MODALITIES] for name in MODALITIES},
        Quantity(MODALITIES): [image, MODALITIES],
        **{Quantity((name,), image, image): [image, MODALITIES] for name in MODALITIES if name != "image"},
    }
    device = machine.device(args)
    model, trained = checkpoint.load_model(args.model_path, "vision", build_model, device)
    with machine.processes(args, device) as processes:
        found = evaluate(
            model,
            datasets.examples(args.split, args, trained["settings"])[: args.limit].to(device),
            quantities=quantities,
            n_samples=args.n_samples,
            seed=args.seed,
            precision=args.precision,
            processes=processes,
            progress=running.progress,
        )
    report(found, {}, args, trained)


if __name__ == "__main__":
    running.run(main)
