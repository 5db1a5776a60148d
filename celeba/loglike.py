"""Estimate log-likelihoods of CelebA's test split by importance sampling, in nats per example, without λ.

Colour pixels are scored by the Bernoulli cross-entropy, which isn't a normalised density. The attributes predicted from
an image are those more probable than not, by the mean of p(attrs | z) over q(z | image).
"""

from mvae import cli
from mvae.data.celeba import ATTRIBUTES
from mvae.run.evaluate import of_a_pair
from mvae.run.metrics import accuracies
from mvae.tools.report import estimate, load, report

from datasets import NAME, Source, examples
from model import build_model


def main() -> None:
    config, model, data, trained = load(__doc__, NAME, Source, build_model, examples)
    found = estimate(config, model, data, of_a_pair(("image",), ("attrs",)), predictions={"attrs": ("image",)})
    report(found, accuracies(found.predictions["attrs"], found.truth["attrs"], ATTRIBUTES), config, trained)


if __name__ == "__main__":
    cli.run(main)
