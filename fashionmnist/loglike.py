"""Estimate log-likelihoods of FashionMNIST's test split by importance sampling, in nats per example, without λ.

Grey pixels are scored by the Bernoulli cross-entropy, which is not a normalised density; a model trained with
--binarize is scored on binary pixels, drawn once, which is one.
"""

from mvae import checkpoint, cli
from mvae.estimators import evaluate, of_a_pair

import datasets
from model import build_model

QUANTITIES = of_a_pair(("image",), ("text",))


def main() -> None:
    args = cli.loglike_parser(__doc__).parse_args()
    device = cli.device(args.cuda)
    model, settings = checkpoint.load_model(args.model_path, "fashionmnist", build_model, device)
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
