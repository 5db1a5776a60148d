"""What a sample.py does: draws from the model under conditions, block by block, and writes what is asked for."""

import argparse
import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checkpoint, experts, pictures
from ..data import Data, random_example
from ..errors import UsageError, UserError
from ..files import npy, whole, write_atomically
from ..model import MVAE
from . import flags, kinds, machine, running
from .kinds import Controls, HeldOut, Picture

BLOCK = 256
"""Draws that are decoded together: it bounds the memory."""

Examples = Callable[[str, argparse.Namespace, Mapping[str, Any]], Data]
"""An experiment's data: from a split's name, the flags and the model's settings."""


class Condition(NamedTuple):
    """What a row of samples is given.

    said: in a few words; "" for nothing.
    batch: one example of some modalities.
    end, share: a second such batch, and how far the row lies on the way to it (0 to 1); None and 0 for no way.
    """

    said: str
    batch: dict[str, Tensor]
    end: dict[str, Tensor] | None = None
    share: float = 0.0

    def posterior(self, model: MVAE, device: torch.device) -> tuple[Tensor, Tensor]:
        """mu and logvar, each (1, latents): those of q(z | the batch), or on the way between two of them."""
        mu, logvar = _posterior(model, self.batch, device)
        if self.end is None:
            return mu, logvar
        end_mu, end_logvar = _posterior(model, self.end, device)
        return torch.lerp(mu, end_mu, self.share), torch.lerp(logvar, end_logvar, self.share)


def _posterior(model: MVAE, batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    if not batch:
        return torch.zeros(1, model.n_latents, device=device), torch.zeros(1, model.n_latents, device=device)
    return model.posterior({name: x.to(device) for name, x in batch.items()})


def conditions(
    given: Mapping[str, Sequence[Any]],
    ends: Sequence[tuple[str, Any]] | None,
    controls: Controls,
    held_out: Callable[[], Data],
) -> list[Condition]:
    """The rows: one for each combination of the controls' values, and `flags.STEPS` of them on the way between `ends`.

    Raises UsageError if the ends give what is given already; UserError if a picture can't be had.
    """
    if twice := sorted({name for name, _ in ends or ()} & given.keys()):
        raise UsageError(f"--interpolate gives {' and '.join(twice)}, and so does a condition: give it once")

    def batch(pairs: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in pairs:
            if isinstance(value, HeldOut):
                data = held_out()
                fits = controls[value.name].where(data.tensors[value.name].cpu(), value.value)
                example = random_example(data, fits, f"{value.name} {controls[value.name].say(value.value)!r}")
                found[name] = example[name]
            else:
                found |= controls[name].batch(name, value)
        return found

    def said(pairs: Sequence[tuple[str, Any]]) -> str:
        return ", ".join(kinds.say(controls, name, value) for name, value in pairs)

    rows = []
    for combination in itertools.product(*given.values()):
        pairs = list(zip(given, combination, strict=True))
        common = batch(pairs)
        if not ends:
            rows.append(Condition(said(pairs), common))
            continue
        start, end = (common | batch([pair]) for pair in ends)
        for step in range(flags.STEPS):
            words = f"{said([*pairs, ends[0]])} to {said([ends[1]])}, {step}/{flags.STEPS - 1}"
            rows.append(Condition(words, start, end, step / (flags.STEPS - 1)))
    return rows


class Drawn(NamedTuple):
    """A block of a row's samples: the row's number, the first sample's, and each control's values (n, *event).

    values: draws or means; likeliest: the draws, or the most probable values.
    """

    row: int
    start: int
    values: dict[str, Tensor]
    likeliest: dict[str, Tensor]


@torch.no_grad()
def draw(
    model: MVAE,
    rows: Sequence[Condition],
    controls: Controls,
    *,
    n: int,
    seed: int,
    device: torch.device,
    temperature: float = 1.0,
    draw_x: bool = False,
) -> Iterator[Drawn]:
    """n samples of each row, in blocks, on the CPU. The rows have the same noise, so that they differ by what is given.

    Args:
        temperature: every distribution that is drawn from is raised to the power 1 / temperature: the variance of z is
            multiplied by it, and the logits of x are divided by it.
        draw_x: draws from p(x | z), in place of the means.
    """
    for number, row in enumerate(rows):
        mu, logvar = row.posterior(model, device)
        rng = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        for start in range(0, n, BLOCK):
            noise = torch.randn(min(BLOCK, n - start), model.n_latents, generator=rng).to(device)
            z = experts.draw(mu, logvar, noise, temperature)
            values, likeliest = {}, {}
            for name, kind in controls.items():
                names = kind.modalities(name)
                if draw_x:
                    batch = {one: model.likelihood(one).sample(z, temperature).cpu() for one in names}
                    values[name] = likeliest[name] = kind.join(batch, name)
                else:
                    batch = {one: mean.cpu() for one, mean in model.mean(z, names).items()}
                    values[name] = kind.join(batch, name)
                    likeliest[name] = kind.likeliest(values[name])
            yield Drawn(number, start, values, likeliest)


Write = Callable[[Drawn], None]
"""Writes a block of samples."""


@torch.no_grad()
def sample(
    args: argparse.Namespace,
    experiment: str,
    build: Callable[[int], MVAE],
    controls: Controls,
    examples: Examples,
    *,
    given: Mapping[str, Sequence[Any]] | None = None,
    stem: str = "sample_",
) -> tuple[list[Condition], dict[str, Tensor], dict[str, Any]]:
    """Draws what the flags of `flags.sampling_parser` ask for, and writes it to --out-dir.

    Args:
        examples: the experiment's data, from which held-out pictures are taken.
        given: the values of each control, in place of those of --condition-on-....
        stem: what the files' names begin with, before a control's name.

    Returns the rows; of each picture the first samples of each row, (rows, n, *event); and what is said in the files.
    """
    device = machine.device(args)
    model, trained = checkpoint.load_model(args.model_path, experiment, build, device)
    torch.manual_seed(args.seed)
    held_out = functools.cache(lambda: examples("validation", args, trained["settings"]))
    rows = conditions(flags.given(args, controls) if given is None else given, args.interpolate, controls, held_out)
    n = args.n_samples or (64 if len(rows) == 1 else pictures.COLUMNS)
    about = {
        "experiment": experiment,
        "epoch": trained.get("epoch"),
        "seed": args.seed,
        "temperature": args.temperature,
        "drawn": args.draw,
        "samples of each": n,
        "given": [row.said for row in rows],
    }
    ways = set(args.save or ["grid"])
    written: list[str] = []
    first: dict[str, list[Tensor]] = {}
    with contextlib.ExitStack() as files:
        writers: list[Write] = []

        def add(name: str, ending: str, writer: Callable[..., AbstractContextManager[Write]]) -> None:
            written.append(stem + name + ending)
            writers.append(files.enter_context(writer(args.out_dir / written[-1], name, controls, rows, n, about)))

        for name, kind in controls.items():
            if not isinstance(kind, Picture):
                add(name, ".txt", _lines)
            elif "grid" in ways:
                add(name, ".png", _grid)
            if "images" in ways and isinstance(kind, Picture):
                add(name, "", _images)
            if "npy" in ways:
                add(name, ".npy", _array)
        if "npy" in ways:
            written.append(f"{stem}given.json")
            write_atomically(args.out_dir / written[-1], (json.dumps(about, indent=2) + "\n").encode())
        options = {"n": n, "seed": args.seed, "temperature": args.temperature, "draw_x": args.draw}
        blocks = draw(model, rows, controls, device=device, **options)
        for block in running.progress(blocks, total=len(rows) * -(-n // BLOCK)):
            for write in writers:
                write(block)
            for name, values in block.values.items():
                if isinstance(controls[name], Picture) and block.start == 0:
                    first.setdefault(name, []).append(values[: pictures.COLUMNS])
    print(f"wrote {', '.join(written[:-1])} and {written[-1]} in {args.out_dir}")
    return rows, {name: torch.stack(some) for name, some in first.items()}, about


# The ways to write samples. Each takes a path, the control's name, the controls, the rows, n, and what is to be said.


@contextlib.contextmanager
def _grid(
    path: Path, name: str, controls: Controls, rows: Sequence[Condition], n: int, about: Mapping[str, Any]
) -> Iterator[Write]:
    """A PNG with a row for each condition, what is given beside it; one condition's samples fill rows of eight."""
    kind = controls[name]
    assert isinstance(kind, Picture)
    columns = n if len(rows) > 1 else min(pictures.COLUMNS, n)
    lines = -(-n // columns)
    shown = [given_pictures(row, controls) for row in rows]
    margin = max(map(len, shown))
    labels = {i * lines: (row.said, lines) for i, row in enumerate(rows)}
    sheet = pictures.Sheet(len(rows) * lines, margin + columns, kind.size, beside=labels)
    for i, some in enumerate(shown):
        for j, picture in enumerate(some.values()):
            sheet.put(i * lines, j, picture)

    def write(block: Drawn) -> None:
        for i, picture in enumerate(block.values[name], block.start):
            sheet.put(block.row * lines + i // columns, margin + i % columns, picture)

    yield write
    sheet.save(path, about)


@contextlib.contextmanager
def _images(
    path: Path, name: str, controls: Controls, rows: Sequence[Condition], n: int, about: Mapping[str, Any]
) -> Iterator[Write]:
    """A folder of a PNG for each sample, 00000.png and so on, and nothing else."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already, and not empty: name another `out_dir`")

    def write(block: Drawn) -> None:
        said = {**about, "given": rows[block.row].said}
        try:
            path.mkdir(parents=True, exist_ok=True)
            for i, pixels in enumerate(pictures.as_bytes(block.values[name]), block.row * n + block.start):
                (path / f"{i:05}.png").write_bytes(pictures.png(pixels, said))
        except OSError as error:
            raise UserError(f"can't write {path}: {error.strerror or error}") from None

    yield write


@contextlib.contextmanager
def _array(
    path: Path, name: str, controls: Controls, rows: Sequence[Condition], n: int, about: Mapping[str, Any]
) -> Iterator[Write]:
    """A float32 array of all samples, row by row."""
    with npy(path, len(rows) * n) as append:
        yield lambda block: append(block.values[name].numpy())


@contextlib.contextmanager
def _lines(
    path: Path, name: str, controls: Controls, rows: Sequence[Condition], n: int, about: Mapping[str, Any]
) -> Iterator[Write]:
    """A line for each sample, in the order of the grid."""
    with whole(path) as file:
        yield lambda block: file.writelines(
            f"{line}\n".encode() for line in controls[name].lines(block.likeliest[name])
        )


def given_pictures(row: Condition, controls: Controls) -> dict[str, Tensor]:
    """The pictures (channels, size, size) that a row is given; between two ends, those of the nearer one."""
    batch = row.batch if row.end is None or row.share < 0.5 else row.end
    return {name: batch[name][0] for name, kind in controls.items() if isinstance(kind, Picture) and name in batch}
