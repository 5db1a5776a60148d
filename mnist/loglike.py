"""Estimate log-likelihoods of MNIST's test split by importance sampling, in nats per example, without λ.

Grey pixels are scored by the Bernoulli cross-entropy, which is not a normalised density; a model trained with
--binarize is scored on binary pixels, drawn once, which is one.
"""

from mvae.scripts import flags, machine, running

import datasets


def main() -> None:
    args = flags.loglike_parser(__doc__).parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    from mvae import checkpoint
    from mvae.estimators import evaluate, of_a_pair
    from mvae.scripts.report import report

    from model import build_model

    device = machine.device(args)
    model, trained = checkpoint.load_model(args.model_path, "mnist", build_model, device)
    with machine.processes(args, device) as processes:
        found = evaluate(
            model,
            datasets.examples(args.split, args, trained["settings"])[: args.limit].to(device),
            quantities=of_a_pair(("image",), ("text",)),
            predictions={"text": ("image",)},
            n_samples=args.n_samples,
            seed=args.seed,
            precision=args.precision,
            processes=processes,
            progress=running.progress,
        )
    right = (found.predictions["text"].argmax(dim=1) == found.truth["text"]).double()
    report(found, {"accuracy of the label predicted from the image": right}, args, trained)


if __name__ == "__main__":
    running.run(main)
