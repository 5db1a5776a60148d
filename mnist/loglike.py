"""Estimate log-likelihoods of MNIST's test split by importance sampling, in nats per example, without λ.

Grey pixels are scored by the Bernoulli cross-entropy, which isn't a normalised density. A model trained with --binarize
is scored on binary pixels, drawn once, where it is one.
"""

from mvae import cli
from mvae.run.evaluate import of_a_pair
from mvae.tools.report import estimate, load, report

from datasets import NAME, Source, examples
from model import build_model


def main() -> None:
    config, model, data, trained = load(__doc__, NAME, Source, build_model, examples)
    found = estimate(config, model, data, of_a_pair(("image",), ("text",)), predictions={"text": ("image",)})
    right = (found.predictions["text"].argmax(dim=1) == found.truth["text"]).double()
    report(found, {"accuracy of the label predicted from the image": right}, config, trained)


if __name__ == "__main__":
    cli.run(main)
