"""Draw the paper's figure: four transformations of held-out faces, each as a row of inputs above rows of outputs.

Writes edges_and_mask.png (from the image), colourisation.png (from gray), completion.png (from obscured) and
watermark_removal.png. An output is the mean of p(output | z) at the mean of q(z | input).
"""

from dataclasses import dataclass
from pathlib import Path

from mvae import MVAE, Batch, UsageError, cli, load_model
from mvae.run.device import Machine
from mvae.run.grids import save_grid

import torch
from torch import Tensor

from datasets import NAME, Source, examples
from model import build_model

TRANSFORMATIONS: dict[str, tuple[str, ...]] = {
    "edges_and_mask": ("image", "edge", "mask"),
    "colourisation": ("gray", "image"),
    "completion": ("obscured", "image"),
    "watermark_removal": ("watermark", "image"),
}
"""The input and the outputs of each file."""


@dataclass(kw_only=True)
class Config(Source, Machine):
    model_path: Path  # checkpoint, such as trained_models/model_best.pth.tar

    # Figure
    n_samples: int = 8  # number of faces
    out_dir: Path = Path("samples")  # folder to write into
    seed: int = 0  # random seed

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_samples < 1:
            raise UsageError(f"n_samples must be an integer >= 1, got {self.n_samples}")


def transformed(model: MVAE, batch: Batch, given: str, *outputs: str) -> Tensor:
    """Return the row of inputs and the rows of outputs, (rows * batch, 3, 64, 64)."""
    mu, _ = model.posterior({given: batch[given]})
    rows = [batch[given], *(model.likelihood(name).mean(mu) for name in outputs)]
    return torch.cat([row.expand(-1, 3, -1, -1) for row in rows])


@torch.no_grad()
def main() -> None:
    config = cli.parse(__doc__, Config)
    device = config.device()
    model, trained = load_model(config.model_path, NAME, build_model, device)
    validation = examples("validation", config, trained["settings"])
    order = torch.randperm(len(validation), generator=torch.Generator().manual_seed(config.seed))
    batch, _ = validation.batch(order[: config.n_samples])
    batch = {name: x.to(device) for name, x in batch.items()}
    for name, (given, *outputs) in TRANSFORMATIONS.items():
        pictures = transformed(model, batch, given, *outputs)
        save_grid(config.out_dir / f"{name}.png", pictures, columns=len(batch[given]))
    print(f"wrote {', '.join(f'{name}.png' for name in TRANSFORMATIONS)} in {config.out_dir}")


if __name__ == "__main__":
    cli.run(main)
