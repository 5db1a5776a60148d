"""Estimate log-likelihoods of MultiMNIST's test canvases by importance sampling, in nats per example, without λ.

Grey pixels are scored by the Bernoulli cross-entropy, which isn't a normalised density. An image's text is decoded
greedily from the mean of q(z | image). Its accuracy per digit is the fraction of digits that are right at their place.
"""

from mvae import MVAE, Data, cli
from mvae.data.dataset import consecutive_rows
from mvae.run.evaluate import of_a_pair
from mvae.tools.report import estimate, load, report

import torch
from torch import Tensor

from datasets import FILL, NAME, Source, examples
from model import build_model


@torch.no_grad()
def read_texts(model: MVAE, data: Data) -> Tensor:
    """Return the symbols (n, 4) of the text decoded from each canvas."""
    images = (data.batch(rows)[0]["image"] for rows in consecutive_rows(data, 1000))
    means = [model.posterior({"image": image})[0] for image in images]
    return torch.cat([model.likelihood("text").mean(mean).argmax(dim=2) for mean in means])


def main() -> None:
    config, model, data, trained = load(__doc__, NAME, Source, build_model, examples)
    found = estimate(config, model, data, of_a_pair(("image",), ("text",), y_proposal=("text",)))
    texts = data.tensors["text"]
    right = (read_texts(model, data) == texts).double()
    measures = {"accuracy of the text predicted from the image, whole strings": right.prod(dim=1)}
    digits = texts != FILL
    if digits.any():
        measures["accuracy of the text predicted from the image, per digit"] = right[digits]
    report(found, measures, config, trained)


if __name__ == "__main__":
    cli.run(main)
