"""What an embed.py does: writes q(z | some modalities) of a split, or of pictures in files, and draws a map of it."""

import argparse
import contextlib
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import checkpoint, maps, pictures
from ..data import consecutive_rows
from ..errors import UsageError, UserError
from ..files import made, npy, whole, write_atomically
from ..model import MVAE, Batch
from . import machine, running
from .kinds import Controls, Picture
from .sampling import Examples

BATCH = 500
MOST = 5000
"""Examples that are encoded together, and the most that a map shows: they bound the memory."""


@torch.no_grad()
def embed(
    args: argparse.Namespace, experiment: str, build: Callable[[int], MVAE], controls: Controls, examples: Examples
) -> None:
    """Does what the flags of `flags.embedding_parser` ask for.

    Raises UsageError for flags that don't go together; UserError if a file can't be read or written.
    """
    device = machine.device(args)
    given = list(dict.fromkeys(args.given or [next(iter(controls))]))
    if args.files and (len(given) > 1 or not isinstance(controls[given[0]], Picture)):
        raise UsageError("`files` are pictures: `given` takes the name of one picture with them")
    project = maps.projection(args.map)
    model, trained = checkpoint.load_model(args.model_path, experiment, build, device)
    batches: Iterator[Batch]
    if args.files:
        files = [file for path in args.files for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        if not files:
            raise UserError(f"there are no files in {', '.join(map(str, args.files))}")
        n, batches = len(files), _pictures(files, given[0], controls)
    else:
        data = examples(args.split, args, trained["settings"])[: args.limit].to(device)
        n, batches = len(data), (data.batch(rows)[0] for rows in consecutive_rows(data, BATCH))
    wanted = [name for one in given for name in controls[one].modalities(one)]
    said: dict[str, list[np.ndarray]] = {
        name: [] for name, kind in controls.items() if not isinstance(kind, Picture) and not args.files
    }
    # A zip holds one array after the other, and the two grow together: until they are whole they are files.
    with _folder_beside(args.out) as folder:
        paths = {name: folder / f"{name}.npy" for name in ("mu", "logvar")}
        with contextlib.ExitStack() as both:
            append = {name: both.enter_context(npy(path, n)) for name, path in paths.items()}
            for batch in running.progress(batches, total=-(-n // BATCH)):
                posterior = model.posterior({name: batch[name].to(device) for name in wanted})
                for name, part in zip(paths, posterior, strict=True):
                    append[name](part.float().cpu().numpy())
                for name, values in said.items():
                    values.append(controls[name].join(batch, name).to("cpu", torch.uint8).numpy())
        arrays = {name: np.concatenate(values) for name, values in said.items()}
        names = {f"{name}_names": np.array(controls[name].names) for name in said if controls[name].names}
        if args.files:
            names["file"] = np.array([str(file) for file in files])
        with whole(args.out) as file, zipfile.ZipFile(file, "w") as archive:
            for name, path in paths.items():
                archive.write(path, f"{name}.npy")
            for name, array in {"given": np.array(given), **arrays, **names}.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.save(member, array)
        if args.plot:
            rows = np.sort(np.random.default_rng(args.seed).permutation(n)[:MOST])
            points = project(np.load(paths["mu"], mmap_mode="r")[rows], args.seed)
            some = {name: torch.from_numpy(array[rows]) for name, array in arrays.items()}
            by, classes, colours = colours_of(some, controls, args.colour_by, len(rows))
            title = f"{args.map} of the means of q(z | {', '.join(given)}), {len(rows)} of {n}"
            pixels = maps.draw(points, classes.tolist(), colours, f"{title}, by {by}" if by else title)
            write_atomically(args.plot, pictures.png(pixels))
    print(f"wrote {args.out}: mu and logvar of q(z | {', '.join(given)}), {n} x {model.n_latents}")
    if args.plot:
        print(f"wrote {args.plot}")


def _pictures(files: Sequence[Path], name: str, controls: Controls) -> Iterator[Batch]:
    for start in range(0, len(files), BATCH):
        yield {name: torch.cat([controls[name].tensor(file) for file in files[start : start + BATCH]])}


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder that is gone when the block ends. Raises UserError if it can't be made."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made(path.parent))
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name))
        except OSError as error:
            raise UserError(f"can't write in {path.parent}: {error.strerror or error}") from None
        yield Path(folder)


def colours_of(
    values: Mapping[str, Tensor], controls: Controls, wanted: str | None, n: int
) -> tuple[str, Tensor, Sequence[str]]:
    """What n examples are coloured by, their classes (n,), and the classes' names; "" and one class for no values.

    `wanted` is a label's name or an attribute's; None: the first there is. Raises UsageError for another name.
    """
    known: dict[str, tuple[Tensor, Sequence[str]]] = {}
    for name, x in values.items():
        known |= controls[name].colours(name, x)
    if wanted not in known and wanted is not None:
        raise UsageError(f"`colour_by` takes {', '.join(known) or 'nothing here'}, not {wanted}")
    if not known:
        return "", torch.zeros(n, dtype=torch.long), []
    by = wanted or next(iter(known))
    return by, *known[by]
