"""Time what is done to pictures: decoding them once, reading them back, and vision/setup.py's three commands.

On the first pictures of CelebA where that is at hand, else on made faces; in one process and one thread. Landmark masks
need --predictor. Prints a Markdown table.
"""

import argparse
import contextlib
import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mvae import Data, UserError
from mvae.data import permuted_rows
from mvae.datasets import celeba, picture_cache
from mvae.scripts import running, types
from mvae.synthetic import __main__ as synthetic
from vision import setup

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("MVAE_DATA_DIR", ROOT / "data")))
    parser.add_argument("--n", type=types.positive_int, default=1000, help="pictures to decode")
    parser.add_argument("--predictor", type=Path, help="a 68-point predictor of dlib, for the masks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("mvae").setLevel(logging.WARNING)  # no lines between the table's
    with tempfile.TemporaryDirectory() as folder:
        report(args, Path(folder))


def report(args: argparse.Namespace, folder: Path) -> None:
    try:
        source, _, _ = celeba.locate(args.data_dir)
        what = "CelebA"
    except UserError:
        synthetic.main(["faces", str(folder), "--train", str(args.n), "--val", "1", "--test", "1"])
        source, what = folder / "celeba" / "img_align_celeba", "made faces"
    entries = list(picture_cache.listing(source).values())[: args.n]
    print(f"## pictures: {len(entries)} of {what}, 178x218 to 64x64\n")
    print("| what | per second, in one process |\n| --- | --- |")

    cache = folder / "pictures"

    def decode() -> None:
        cache.unlink(missing_ok=True)
        picture_cache.make(source, entries, cache)

    row("decoded into the cache", len(entries), "pictures", decode)
    pictures = picture_cache.decoded(source, entries, cache)
    mib = pictures.nbytes / 2**20
    row("cache checked, as at a start", mib, "MiB", lambda: picture_cache.make(source, entries, cache))
    data = Data(tensors={"image": pictures}, transform=lambda rows: {"image": rows["image"].float() / 255})
    batches = permuted_rows(data, 100, seed=0)
    row(
        "read from it, in batches of 100",
        100 * len(batches),
        "pictures",
        lambda: [data.batch(some) for some in batches],
    )

    commands = [("grayscale", None), ("edge", None), *([("mask", args.predictor)] if args.predictor else [])]
    for command, predictor in commands:
        sources = [source / entry.member for entry in entries[:200]]
        row(
            f"setup.py {command}",
            len(sources),
            "pictures",
            functools.partial(convert, command, sources, folder, predictor),
        )


def convert(command: str, sources: Sequence[Path], folder: Path, predictor: Path | None) -> None:
    """What setup.py does to these pictures, one after the other."""
    destination = folder / command
    destination.mkdir(exist_ok=True)
    with setup.predictor_file(predictor) if predictor else contextlib.nullcontext() as file:
        for source in sources:
            outcome = setup.convert(command, destination, True, file, True, source)
            setup.write(destination / outcome.name, outcome.content)


def row(what: str, n: float, unit: str, action: Callable[[], object]) -> None:
    """A row of the table: how much `action`, which does n, does in a second; the best of three times."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    print(f"| {what} | {n / min(seconds):,.0f} {unit} |", flush=True)


if __name__ == "__main__":
    running.run(main)
