"""Write the posterior's mean and log-variance for the examples of a split, or for your own files, as one .npz file.

Run it in an experiment's folder: cd mnist && python -m mvae.tools.embed CHECKPOINT. The file also has the examples'
labels; --plot draws a map of the means, coloured by them.
"""

import dataclasses
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import cli
from ..data.dataset import consecutive_rows
from ..errors import UsageError, UserError
from ..files import whole
from ..model import Batch
from ..run import maps
from ..run.checkpoint import load_model
from .controls import Controls
from .folder import Experiment, Tool, experiment

BATCH = 500  # examples encoded together
MOST = 5000  # points on a map


@dataclass(kw_only=True)
class Embedding(Tool):
    """The flags of this tool; the experiment's Source adds its own."""

    # Examples
    given: tuple[str, ...] = ()  # controls that the posterior is conditioned on (default: the first)
    split: Literal["train", "validation", "test"] = "test"  # split to read
    limit: int | None = None  # read the first N examples only
    files: tuple[Path, ...] = ()  # files of your own, or folders of them, instead of a split

    # Output
    out: Path = Path("latents.npz")  # file to write
    plot: Path | None = None  # PNG file of a map in two dimensions
    map: Literal["pca", "tsne", "umap"] = "pca"  # projection; umap needs umap-learn
    colour_by: str | None = None  # label or attribute that colours the map (default: the first label)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(1, "limit")
        self.check_outputs("out", "plot", inputs=self.files)


@torch.no_grad()
def embed(config: Embedding, folder: Experiment) -> None:
    """Write the latents and their map. Raises UsageError for wrong flags; UserError for files that can't be used."""
    controls = folder.controls
    given = list(dict.fromkeys(config.given)) or [next(iter(controls))]
    if unknown := set(given) - controls.keys():
        raise UsageError(f"given must be among {', '.join(controls)}, got {', '.join(unknown)}")
    if config.files and (len(given) > 1 or not controls[given[0]].size):
        raise UsageError("with files, given must be one control that files can hold, such as a picture")
    project = maps.projection(config.map)
    device = config.device()
    model, trained = load_model(config.model_path, folder.name, folder.build_model, device)
    batches: Iterator[Batch]
    if config.files:
        files = [file for path in config.files for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        kind = controls[given[0]]
        examples = [(file, value) for file in files for value in kind.read(file)]
        if not examples:
            raise UserError(f"no files in {', '.join(map(str, config.files))}")
        n, batches = len(examples), _read([value for _, value in examples], given[0], controls)
    else:
        data = folder.examples(config.split, config, trained["settings"])[: config.limit].to(device)
        n, batches = len(data), (data.batch(rows)[0] for rows in consecutive_rows(data, BATCH))
    conditioned = [name for one in given for name in controls[one].modalities(one)]
    mu, logvar = np.empty((2, n, model.n_latents), np.float32)
    parts: dict[str, list[Tensor]] = {name: [] for name, kind in controls.items() if not kind.size and not config.files}
    starts = range(0, n, BATCH)
    for start, batch in tqdm(zip(starts, batches, strict=True), total=len(starts), leave=False, disable=None):
        posterior = model.posterior({name: batch[name].to(device) for name in conditioned})
        for array, part in zip((mu, logvar), posterior, strict=True):
            array[start : start + BATCH] = part.float().cpu()
        for name, values in parts.items():
            values.append(controls[name].join(batch, name).to("cpu", torch.uint8))
    labels = {name: torch.cat(values) for name, values in parts.items()}
    arrays = {"mu": mu, "logvar": logvar, "given": np.array(given), **{name: x.numpy() for name, x in labels.items()}}
    arrays |= {f"{name}_names": np.array(controls[name].names) for name in labels if controls[name].names}
    if config.files:
        arrays["file"] = np.array([str(file) for file, _ in examples])
    with whole(config.out) as file, zipfile.ZipFile(file, "w") as archive:  # np.savez can't name an array "file"
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.save(member, array)
    print(f"wrote {config.out}: mu and logvar of q(z | {', '.join(given)}), {n} x {model.n_latents}")
    if config.plot:
        rows = np.sort(np.random.default_rng(config.seed).permutation(n)[:MOST])
        shown = {name: x[rows] for name, x in labels.items()}
        by, classes, names = colours_of(shown, controls, config.colour_by, len(rows))
        title = f"{config.map} of the means of q(z | {', '.join(given)}), {len(rows)} of {n}{by and ', by '}{by}"
        figure = maps.figure(project(mu[rows], config.seed), classes.numpy(), names, title)
        with whole(config.plot) as file:
            figure.savefig(file, format="png")
        print(f"wrote {config.plot}")


def _read(values: Sequence[object], name: str, controls: Controls) -> Iterator[Batch]:
    for start in range(0, len(values), BATCH):
        yield {name: torch.cat([controls[name].tensor(value) for value in values[start : start + BATCH]])}


def colours_of(
    values: Mapping[str, Tensor], controls: Controls, wanted: str | None, n: int
) -> tuple[str, Tensor, Sequence[str]]:
    """Return what colours n examples, their classes (n,) and the classes' names; "" and one class if nothing does.

    `wanted` is the name of a label or an attribute (default: the first). Raises UsageError for an unknown name.
    """
    known: dict[str, tuple[Tensor, Sequence[str]]] = {}
    for name, x in values.items():
        known |= controls[name].colours(name, x)
    if wanted not in known and wanted is not None:
        raise UsageError(f"colour_by must be one of {', '.join(known) or 'nothing here'}, got {wanted}")
    if not known:
        return "", torch.zeros(n, dtype=torch.long), []
    by = wanted or next(iter(known))
    return by, *known[by]


def main() -> None:
    folder = experiment()
    config = dataclasses.make_dataclass("Config", [], bases=(Embedding, folder.source), kw_only=True)
    embed(cli.parse(__doc__, config), folder)


if __name__ == "__main__":
    cli.run(main)
