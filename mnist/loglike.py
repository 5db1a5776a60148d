"""Estimate log-likelihoods of MNIST's test split by importance sampling, in nats per example, without λ.

Grey pixels are scored by the Bernoulli cross-entropy, which is not a normalised density; a model trained with
--binarize is scored on binary pixels, drawn once, which is one.
"""

from mvae import checkpoint, cli
from mvae.estimators import Quantity, evaluate

import datasets
from model import build_model

PROPOSALS = (("image",), ("image", "text"))
QUANTITIES = {
    Quantity(("image",)): PROPOSALS,
    Quantity(("image", "text")): PROPOSALS,
    Quantity(("image",), given=("text",)): PROPOSALS,
    Quantity(("text",), given=("image",), given_proposal=("image",)): PROPOSALS,
    Quantity(("text",)): [(), ("text",)],
}


def main() -> None:
    args = cli.loglike_parser(__doc__).parse_args()
    device = cli.device(args.cuda)
    model, settings = checkpoint.load_model(args.model_path, "mnist", build_model, device)
    found = evaluate(
        model,
        datasets.test_data(args.data_dir, binarize=settings["binarize"])[: args.limit].to(device),
        quantities=QUANTITIES,
        predictions={"text": ("image",)},
        n_samples=args.n_samples,
        seed=args.seed,
        progress=cli.progress,
    )
    right = (found.predictions["text"].argmax(dim=1) == found.truth["text"]).double()
    cli.report(found, {"accuracy of the label predicted from the image": right}, args)


if __name__ == "__main__":
    cli.run(main)
