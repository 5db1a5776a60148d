"""Sampling: draw from a model under conditions, in blocks, and write grids, pictures, arrays and text."""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import experts
from ..data.dataset import Data, random_example
from ..errors import UsageError, UserError
from ..files import npy, whole, write_atomically
from ..model import MVAE
from ..run.checkpoint import load_model
from ..run.grids import COLUMNS, Sheet, as_bytes, png
from .controls import Controls, HeldOut, Kind, Picture, describe, endpoint, parse
from .folder import Build, Examples, Tool

BLOCK = 256  # samples decoded together, which bounds the memory
STEPS = 8  # rows of an interpolation, including its two ends
SHEET_ROWS = 8  # of the contact sheet


@dataclass(kw_only=True)
class Sampling(Tool):
    """The flags of every sample.py. An experiment adds condition_on_NAME for its controls."""

    # Samples
    n_samples: int | None = None  # samples per condition (default: 64, or 8 if there are several conditions)
    temperature: float = 1.0  # factor of z's variance, and with --draw divisor of x's logits; < 1: more typical
    draw: bool = False  # draw from p(x | z) instead of taking its mean
    interpolate: tuple[str, str] | None = None  # 8 conditions from one to another, each [CONTROL=]VALUE

    # Output
    out_dir: Path = Path(".")  # folder to write to
    save: list[Literal["grid", "images", "npy"]] | None = None  # grid (default), folder of pictures, float arrays

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(1, "n_samples")
        if not 1e-30 <= self.temperature <= 1e30:
            raise UsageError(f"temperature must be > 0, got {self.temperature}")


class Condition(NamedTuple):
    """The condition of a row of samples.

    said: its description; "" if it is empty.
    batch: one example of some modalities.
    end, share: of an interpolation, a second such batch, and how far the row is on the way to it (0 to 1).
    """

    said: str
    batch: dict[str, Tensor]
    end: dict[str, Tensor] | None = None
    share: float = 0.0

    def posterior(self, model: MVAE, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mu and logvar, each (1, latents), of q(z | batch), or interpolated between two of them."""
        mu, logvar = model.posterior({name: x.to(device) for name, x in self.batch.items()})
        if self.end is None:
            return mu, logvar
        end_mu, end_logvar = model.posterior({name: x.to(device) for name, x in self.end.items()})
        return torch.lerp(mu, end_mu, self.share), torch.lerp(logvar, end_logvar, self.share)

    def pictures(self, controls: Controls) -> dict[str, Tensor]:
        """Return what was given and can be drawn, by control: (channels, size, size); of two ends, the nearer one's."""
        batch = self.batch if self.end is None or self.share < 0.5 else self.end
        return {name: kind.pictures(batch[name])[0] for name, kind in controls.items() if kind.size and name in batch}


def conditions(
    given: Mapping[str, Sequence[Any]],
    ends: Sequence[tuple[str, Any]] | None,
    controls: Controls,
    held_out: Callable[[], Data],
) -> list[Condition]:
    """Return the rows: one for each combination of the controls' values, or `STEPS` of them between `ends`.

    Raises UsageError if an end is a control that is given too; UserError for a picture that can't be read or found.
    """
    if twice := sorted({name for name, _ in ends or ()} & given.keys()):
        raise UsageError(f"--interpolate and a condition can't both set {' and '.join(twice)}")

    def batch(pairs: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in pairs:
            if isinstance(value, HeldOut):
                data, kind = held_out(), controls[value.name]
                fits = kind.where(data.tensors[value.name].cpu(), value.value)
                found[name] = random_example(data, fits, f"{value.name} {kind.say(value.value)!r}")[name]
            else:
                found |= controls[name].batch(name, value)
        return found

    def said(pairs: Sequence[tuple[str, Any]]) -> str:
        return ", ".join(describe(controls, name, value) for name, value in pairs)

    rows = []
    for combination in itertools.product(*given.values()):
        pairs = list(zip(given, combination, strict=True))
        common = batch(pairs)
        if not ends:
            rows.append(Condition(said(pairs), common))
            continue
        start, end = (common | batch([pair]) for pair in ends)
        for step in range(STEPS):
            words = f"{said([*pairs, ends[0]])} to {said([ends[1]])}, {step}/{STEPS - 1}"
            rows.append(Condition(words, start, end, step / (STEPS - 1)))
    return rows


class Drawn(NamedTuple):
    """A block of a row's samples: the row's number, the first sample's number, and draws or means by control."""

    row: int
    start: int
    values: dict[str, Tensor]


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
    """Draw n samples of each row, in blocks, onto the CPU. All rows have the same noise.

    Args:
        temperature: every distribution that is drawn from is raised to the power 1 / temperature: the variance of z is
            multiplied by it, and the logits of x are divided by it.
        draw_x: draw from p(x | z) instead of taking the means.
    """
    for number, row in enumerate(rows):
        mu, logvar = row.posterior(model, device)
        rng = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        for start in range(0, n, BLOCK):
            noise = torch.randn(min(BLOCK, n - start), model.n_latents, generator=rng).to(device)
            z = experts.draw(mu, logvar, noise, temperature)
            values = {}
            for name, kind in controls.items():
                names = kind.modalities(name)
                draws = {one: model.likelihood(one).sample(z, temperature) for one in names} if draw_x else {}
                values[name] = kind.join(draws or model.mean(z, names), name).cpu()
            yield Drawn(number, start, values)


class Job(NamedTuple):
    """What is sampled: n samples of each row, and what the files say about it."""

    rows: list[Condition]
    n: int
    controls: Controls
    about: dict[str, Any]


@torch.no_grad()
def sample(
    config: Sampling,
    experiment: str,
    build: Build,
    controls: Controls,
    examples: Examples,
    *,
    given: Mapping[str, Sequence[Any]] | None = None,
    stem: str = "sample_",
) -> None:
    """Draw and write the samples that the flags ask for.

    If several controls can be drawn, contact_sheet.png shows the first samples of all of them next to each other.

    Args:
        examples: the experiment's data, for held-out pictures.
        given: values by control (default: those of the config's condition_on_NAME).
        stem: what file names begin with, followed by the control's name.
    """
    if given is None:
        words = {name: getattr(config, f"condition_on_{name}") or () for name in controls}
        given = {name: [value for one in some for value in parse(controls, name, one)] for name, some in words.items()}
        given = {name: values for name, values in given.items() if values}
    ends = [endpoint(controls, words) for words in config.interpolate] if config.interpolate else None
    device = config.device()
    model, trained = load_model(config.model_path, experiment, build, device)
    torch.manual_seed(config.seed)
    held_out = functools.cache(lambda: examples("validation", config, trained["settings"]))
    rows = conditions(given, ends, controls, held_out)
    n = config.n_samples or (64 if len(rows) == 1 else COLUMNS)
    about = {
        "experiment": experiment,
        "epoch": trained.get("epoch"),
        "seed": config.seed,
        "temperature": config.temperature,
        "drawn": config.draw,
        "samples of each": n,
        "given": [row.said for row in rows],
    }
    job, save = Job(rows, n, controls, about), config.save or ["grid"]
    files: dict[str, AbstractContextManager[Write]] = {}

    def add(file: str, writer: Callable[..., AbstractContextManager[Write]], *what: Any) -> None:
        files[file] = writer(config.out_dir / file, job, *what)

    for name, kind in controls.items():
        if not isinstance(kind, Picture):
            add(f"{stem}{name}.txt", _lines, name, kind)
        if kind.size and "grid" in save:
            add(f"{stem}{name}.png", _grid, name, kind)
        if kind.size and "images" in save:
            add(f"{stem}{name}", _images, name, kind)
        if "npy" in save:
            add(f"{stem}{name}.npy", _array, name)
    if "npy" in save:
        add(f"{stem}given.json", _about)
    if sum(kind.size > 0 for kind in controls.values()) > 1:
        add("contact_sheet.png", _contact_sheet)
    how: dict[str, Any] = {"n": n, "seed": config.seed, "temperature": config.temperature, "draw_x": config.draw}
    blocks = draw(model, rows, controls, device=device, **how)
    with contextlib.ExitStack() as opened:
        writers = [opened.enter_context(file) for file in files.values()]
        for block in tqdm(blocks, total=len(rows) * -(-n // BLOCK), leave=False, disable=None):
            for write in writers:
                write(block)
    print(f"wrote {', '.join(files)} in {config.out_dir}")


Write = Callable[[Drawn], None]
"""Writes a block of samples."""


@contextlib.contextmanager
def _grid(path: Path, job: Job, name: str, kind: Kind) -> Iterator[Write]:
    """Write a PNG with a row for each condition, shown at its left. One condition's samples fill rows of eight."""
    columns = job.n if len(job.rows) > 1 else min(COLUMNS, job.n)
    lines = -(-job.n // columns)
    shown = [list(row.pictures(job.controls).values()) for row in job.rows]
    size = max([kind.size, *(picture.shape[-1] for some in shown for picture in some)])
    margin = max(map(len, shown))
    labels = {i * lines: (row.said, lines) for i, row in enumerate(job.rows)}
    sheet = Sheet(len(job.rows) * lines, margin + columns, size, captions=labels)
    for i, some in enumerate(shown):
        for j, picture in enumerate(some):
            sheet.put(i * lines, j, picture)

    def write(block: Drawn) -> None:
        for i, picture in enumerate(kind.pictures(block.values[name]), block.start):
            sheet.put(block.row * lines + i // columns, margin + i % columns, picture)

    yield write
    sheet.save(path, job.about)


@contextlib.contextmanager
def _images(path: Path, job: Job, name: str, kind: Kind) -> Iterator[Write]:
    """Write a folder of one PNG for each sample, 00000.png and so on."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and isn't empty: choose another --out-dir")

    def write(block: Drawn) -> None:
        about = {**job.about, "given": job.rows[block.row].said}
        try:
            path.mkdir(parents=True, exist_ok=True)
            pictures = as_bytes(kind.pictures(block.values[name]))
            for i, pixels in enumerate(pictures, block.row * job.n + block.start):
                (path / f"{i:05}.png").write_bytes(png(pixels, about))
        except OSError as error:
            raise UserError(f"can't write {path}: {error.strerror or error}") from None

    yield write


@contextlib.contextmanager
def _array(path: Path, job: Job, name: str) -> Iterator[Write]:
    """Write a float32 array of all samples, row by row."""
    with npy(path, len(job.rows) * job.n) as append:
        yield lambda block: append(block.values[name].numpy())


@contextlib.contextmanager
def _lines(path: Path, job: Job, name: str, kind: Kind) -> Iterator[Write]:
    """Write a line of text for each sample, in the order of the grid."""
    with whole(path) as file:

        def write(block: Drawn) -> None:
            values = block.values[name] if job.about["drawn"] else kind.likeliest(block.values[name])
            file.writelines(f"{line}\n".encode() for line in kind.lines(values))

        yield write


@contextlib.contextmanager
def _about(path: Path, job: Job) -> Iterator[Write]:
    """Write what the files have in common, as JSON."""
    write_atomically(path, (json.dumps(job.about, indent=2) + "\n").encode())
    yield lambda block: None


@contextlib.contextmanager
def _contact_sheet(path: Path, job: Job) -> Iterator[Write]:
    """Write a PNG of each row's first samples of every control that can be drawn, next to what was given."""
    kinds = {name: kind for name, kind in job.controls.items() if kind.size}
    shown = [row.pictures(kinds) for row in job.rows]
    given = [name for name in kinds if any(name in some for some in shown)]
    n = min(max(1, SHEET_ROWS // len(job.rows)), job.n)
    sheet = Sheet(
        len(job.rows) * n,
        len(given) + len(kinds),
        max(kind.size for kind in kinds.values()),
        captions={i * n: (row.said, n) for i, row in enumerate(job.rows)},
        headings=[f"given\n{name}" for name in given] + [f"\n{name}" for name in kinds],
    )
    for i, some in enumerate(shown):
        for name, picture in some.items():
            sheet.put(i * n, given.index(name), picture)

    def write(block: Drawn) -> None:
        for column, (name, kind) in enumerate(kinds.items(), len(given)):
            for j, picture in enumerate(kind.pictures(block.values[name][:n]) if block.start == 0 else ()):
                sheet.put(block.row * n + j, column, picture)

    yield write
    sheet.save(path, job.about)
