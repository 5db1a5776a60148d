"""The highest mean log p(image) that any model can reach: a decoder that returns the picture itself.

Grey and colour pixels are scored by x log m + (1 - x) log(1 - m), summed over a picture. m = x maximises it. How far
below 0 that is differs between sets of pictures, so log p of different sets compares only less this.
"""

from typing import Any

from mvae import cli
from mvae.data.dataset import consecutive_rows
from mvae.run.evaluate import mean_and_error

import torch

from common import ROOT, about, as_json, write
from quality import EXPERIMENTS, Where


def main() -> None:
    where = cli.parse(__doc__, Where)
    found: dict[str, dict[str, Any]] = {}
    for name in ("mnist", "fashionmnist", "multimnist", "celeba"):
        for split in ("train", "validation", "test"):
            data = EXPERIMENTS[name].examples(split, where, {"n_val": 5000, "canvases": None})
            parts = []
            for rows in consecutive_rows(data, 1000):
                x = data.batch(rows)[0]["image"].double()
                parts.append((torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).flatten(1).sum(dim=1))
            scores = torch.cat(parts)
            found.setdefault(name, {})[split] = {"n": len(scores), **as_json(mean_and_error(scores))}
            print(name, split, found[name][split], flush=True)
    write(ROOT / "results" / "ceiling.json", {**about(), "sets": found})


if __name__ == "__main__":
    cli.run(main)
