"""Draw the paper's figure: five transformations of held-out faces, each as a row of inputs above its rows of outputs.

Writes edges_and_mask.png (of the image), colourisation.png (of gray), completion.png (of obscured) and
watermark_removal.png. An output is the mean of p(output | z), where z is the mean of q(z | input).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mvae.scripts import flags, machine, running, types

import datasets

if TYPE_CHECKING:
    from torch import Tensor

    from mvae import MVAE, Batch

TRANSFORMATIONS: dict[str, tuple[str, ...]] = {
    "edges_and_mask": ("image", "edge", "mask"),
    "colourisation": ("gray", "image"),
    "completion": ("obscured", "image"),
    "watermark_removal": ("watermark", "image"),
}
"""Of each file, the modality that is given and those that are drawn, from the top row to the bottom."""


def transformed(model: "MVAE", batch: "Batch", given: str, *drawn: str) -> "Tensor":
    """The row of what is given and those of what is drawn, (rows * batch, 3, 64, 64)."""
    import torch

    mu, _ = model.posterior({given: batch[given]})
    rows = [batch[given], *(model.likelihood(name).mean(mu) for name in drawn)]
    return torch.cat([row.expand(-1, 3, -1, -1) for row in rows])


def main() -> None:
    parser = flags.model_parser(__doc__)
    parser.add_argument("--n-samples", type=types.positive_int, default=8, help="faces, side by side")
    parser.add_argument("--out-dir", type=types.path, default=Path("./samples"), help="folder to write into")
    datasets.add_flags(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    import torch

    from mvae import checkpoint, pictures

    from model import build_model

    torch.set_grad_enabled(False)
    device = machine.device(args)
    model, _ = checkpoint.load_model(args.model_path, "vision", build_model, device)
    _, validation = datasets.training_data(datasets.folders(args), args.data_dir, args.cache_dir, workers=args.workers)
    faces = torch.randperm(len(validation), generator=torch.Generator().manual_seed(args.seed))[: args.n_samples]
    batch, _ = validation.batch(faces)
    batch = {name: some.to(device) for name, some in batch.items()}
    for name, modalities in TRANSFORMATIONS.items():
        pictures.save_grid(args.out_dir / f"{name}.png", transformed(model, batch, *modalities), columns=len(faces))
    print(f"wrote {', '.join(f'{name}.png' for name in TRANSFORMATIONS)} in {args.out_dir}")


if __name__ == "__main__":
    running.run(main)
