"""Write the posterior's mean and log-variance for the examples of a split, or for your own files, as one .npz file.

Run it in an experiment's folder: cd mnist && python -m mvae.tools.embed CHECKPOINT. The file also has the examples'
labels; --plot draws a map of the means, coloured by them.
"""

import logging
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .. import cli
from ..data.dataset import consecutive_rows
from ..errors import UsageError, UserError
from ..files import whole
from ..model import Batch
from ..progress import progress
from ..run import maps
from ..run.checkpoint import load_model
from .controls import Controls, Kind
from .folder import Experiment, Tool, experiment, files_of, with_source

log = logging.getLogger(__name__)

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
        self.check_outputs(self.out, self.plot, inputs=self.files)


@torch.no_grad()
def embed(config: Embedding, folder: Experiment) -> None:
    """Write the latents and their map."""
    controls = folder.controls
    given = list(dict.fromkeys(config.given)) or [next(iter(controls))]
    if unknown := set(given) - controls.keys():
        raise UsageError(f"given must be among {', '.join(controls)}, got {', '.join(unknown)}")
    if config.files and (len(given) > 1 or not controls[given[0]].size):
        raise UsageError("with files, given must be one control that files can hold, such as a picture")
    device = config.device()
    model, trained = load_model(config.model_path, folder.name, folder.build_model, device)
    batches: Iterator[tuple[Batch, list[str]]]  # each with the files of its examples
    if config.files:
        files = files_of(config.files)
        n, batches = len(files), _read(files, config.files, given[0], controls[given[0]])
    else:
        data = folder.examples(config.split, config, trained["settings"])[: config.limit].to(device)
        n, batches = len(data), ((data.batch(rows)[0], []) for rows in consecutive_rows(data, BATCH))
    conditioned = [name for one in given for name in controls[one].modalities(one)]
    labelled = {name: kind for name, kind in controls.items() if not kind.size and not config.files}
    found: dict[str, list[Tensor]] = {name: [] for name in ("mu", "logvar", *labelled)}
    sources = []
    for batch, some in progress(batches, "encoding", -(-n // BATCH)):
        sources += some
        posterior = model.fused({name: batch[name].to(device) for name in conditioned})
        values = dict(zip(("mu", "logvar"), posterior, strict=True))
        values |= {name: kind.join(batch, name).byte() for name, kind in labelled.items()}
        for name, x in values.items():
            found[name].append(x.cpu())
    arrays = {name: torch.cat(parts).numpy() for name, parts in found.items()} | {"given": np.array(given)}
    arrays |= {f"{name}_names": np.array(kind.names) for name, kind in labelled.items() if kind.names}
    if config.files:
        arrays["file"] = np.array(sources)
    n, about = len(arrays["mu"]), f"q(z | {', '.join(given)})"
    if config.plot:
        rows = np.sort(np.random.default_rng(config.seed).permutation(n)[:MOST])
        shown = {name: torch.from_numpy(arrays[name][rows]) for name in labelled}
        by, classes, names = colours_of(shown, controls, config.colour_by, len(rows))
        title = f"{config.map} of the means of {about}, {len(rows)} of {n}{by and ', by '}{by}"
        if config.map != "pca":
            log.info("computing a map of %d points by %s", len(rows), config.map)
        points = maps.project(arrays["mu"][rows], config.map, config.seed)
        with whole(config.plot) as file:
            maps.figure(points, classes.numpy(), names, title).savefig(file, format="png")
        print(f"wrote {config.plot}")
    with whole(config.out) as file, zipfile.ZipFile(file, "w") as archive:  # np.savez can't name an array "file"
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.save(member, array)
    print(f"wrote {config.out}: mu and logvar of {about}, {n} x {model.n_latents}")


def _read(files: Sequence[Path], named: Collection[Path], name: str, kind: Kind) -> Iterator[tuple[Batch, list[str]]]:
    """Yield the values of `BATCH` files at a time as a batch, with the file of each.

    A file of a folder that can't be read is skipped and counted in a warning. Raises UserError for one of `named`.
    """
    skipped: list[str] = []
    for start in range(0, len(files), BATCH):
        values = []
        for file in files[start : start + BATCH]:
            try:
                values += [(value.x, str(file)) for value in kind.read(file)]
            except UserError as error:
                if file in named:
                    raise
                skipped.append(str(error))
        if values:
            yield {name: torch.cat([x for x, _ in values])}, [file for _, file in values]
    if len(skipped) == len(files):
        raise UserError(f"no file to read in {', '.join(map(str, named))}: {(skipped or ['it is empty'])[0]}")
    if skipped:
        log.warning("skipped %d of %d files: %s", len(skipped), len(files), "; ".join(skipped[:3]))


def colours_of(
    values: Mapping[str, Tensor], controls: Controls, wanted: str | None, n: int
) -> tuple[str, Tensor, Sequence[str]]:
    """Return the label or attribute `wanted` (default: the first), its classes (n,) and their names; "" for none."""
    known = {by: colours for name, x in values.items() for by, colours in controls[name].colours(name, x).items()}
    if wanted is not None and wanted not in known:
        raise UsageError(f"colour_by must be one of {', '.join(known) or 'nothing here'}, got {wanted}")
    by = wanted or next(iter(known), "")
    return by, *known.get(by, (torch.zeros(n, dtype=torch.long), []))


def main() -> None:
    folder = experiment()
    embed(cli.parse(__doc__, with_source(Embedding, folder.source)), folder)


if __name__ == "__main__":
    cli.run(main)
