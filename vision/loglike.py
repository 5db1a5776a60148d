"""Estimate log-likelihoods of the test split's pictures by importance sampling, in nats per example, without λ.

Pixels are scored by the Bernoulli cross-entropy, which isn't a normalised density.
"""

from mvae import Quantity, cli
from mvae.tools.report import estimate, load, report

from datasets import MODALITIES, NAME, Source, examples
from model import build_model

IMAGE = ("image",)
PROPOSALS = {
    **{Quantity((name,)): [(name,), MODALITIES] for name in MODALITIES},
    Quantity(MODALITIES): [IMAGE, MODALITIES],
    **{Quantity((name,), IMAGE, IMAGE): [IMAGE, MODALITIES] for name in MODALITIES if name != "image"},
}
"""Quantities to estimate, each with its proposals: each picture, all six, and each of five given the image."""


def main() -> None:
    config, model, data, trained = load(__doc__, NAME, Source, build_model, examples)
    report(estimate(config, model, data, PROPOSALS), {}, config, trained)


if __name__ == "__main__":
    cli.run(main)
