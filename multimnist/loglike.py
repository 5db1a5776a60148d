"""Estimate log-likelihoods of MultiMNIST's test canvases by importance sampling, in nats per example, without λ.

Grey pixels are scored by the Bernoulli cross-entropy, which is not a normalised density. A text is read off an image by
decoding greedily from the mean of q(z | image). Its accuracy per digit is the share of the digits shown that are read
right at their place.
"""

from typing import TYPE_CHECKING

from mvae.scripts import flags, machine, running

import datasets

if TYPE_CHECKING:
    from torch import Tensor

    from mvae import MVAE, Data


def read_texts(model: "MVAE", examples: "Data") -> "Tensor":
    """The symbols (n, 4) of the text read off each canvas."""
    import torch

    from mvae.data import consecutive_rows

    images = (examples.batch(rows)[0]["image"] for rows in consecutive_rows(examples, 1000))
    means = [model.posterior({"image": image})[0] for image in images]
    return torch.cat([model.likelihood("text").mean(mean).argmax(dim=2) for mean in means])


def main() -> None:
    parser = flags.loglike_parser(__doc__)
    datasets.add_canvas_dir(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    import torch

    from mvae import checkpoint
    from mvae.estimators import evaluate, of_a_pair
    from mvae.scripts.report import report

    from model import build_model

    torch.set_grad_enabled(False)
    device = machine.device(args)
    model, trained = checkpoint.load_model(args.model_path, "multimnist", build_model, device)
    examples = datasets.examples(args.split, args, trained["settings"])[: args.limit].to(device)
    with machine.processes(args, device) as processes:
        found = evaluate(
            model,
            examples,
            quantities=of_a_pair(("image",), ("text",), y_proposal=("text",)),
            n_samples=args.n_samples,
            seed=args.seed,
            precision=args.precision,
            processes=processes,
            progress=running.progress,
        )
    texts = examples.tensors["text"]
    right = (read_texts(model, examples) == texts).double()
    measures = {
        "accuracy of the text read off the image, whole strings": right.prod(dim=1),
    }
    digits = texts != datasets.FILL
    if digits.any():
        measures["accuracy of the text read off the image, per digit"] = right[digits]
    report(found, measures, args, trained)


if __name__ == "__main__":
    running.run(main)
