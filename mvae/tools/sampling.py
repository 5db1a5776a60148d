"""Sampling: draw from a model under conditions, and write grids, pictures, arrays and text."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import experts
from ..data.dataset import Data, random_example
from ..errors import UsageError, UserError
from ..files import whole, write_atomically
from ..model import MVAE
from ..run.checkpoint import load_model
from ..run.grids import COLUMNS, VIEWABLE, as_bytes, png, sheet
from .controls import Controls, Picture, Value, endpoint, is_file, parse
from .folder import Build, Examples
from .prior import WithPrior, draw_given

BLOCK = 256  # samples decoded together
STEPS = 8  # rows of an interpolation, including its two ends
SHEET_ROWS = 8  # of the contact sheet
WIDTH = 900  # pixels of a grid's row


@dataclass(kw_only=True)
class Sampling(WithPrior):
    """The flags of every sample.py. An experiment adds condition_on_NAME for its controls."""

    # Samples
    n_samples: int | None = None  # samples per condition (default: 64, or 8 if there are several conditions)
    temperature: float = 1.0  # factor of z's variance, and with --draw divisor of x's logits; < 1: more typical
    draw: bool = False  # draw from p(x | z) instead of taking its mean
    interpolate: tuple[str, str] | None = None  # 8 conditions from one to another, each [CONTROL=]VALUE

    # Output
    out_dir: Path = Path(".")  # folder to write to
    scale: int | None = None  # size of a pixel in grids (default: the largest that fits a row into 900 pixels)
    save: list[Literal["grid", "images", "npy"]] | None = None  # grid (default), folder of pictures, float arrays

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(1, "n_samples", "scale")
        if not 1e-30 <= self.temperature <= 1e30:
            raise UsageError(f"temperature must be > 0, got {self.temperature}")
        if self.prior == "fitted" and self.interpolate:
            raise UsageError("--interpolate can't be combined with --prior fitted")

    def inputs(self) -> list[Path]:
        """Return the files that the conditions name."""
        words = [*(self.interpolate or ())]
        for name, value in vars(self).items():
            words += map(str, value or []) if name.startswith("condition_") else []
        return [Path(word).expanduser() for one in words for word in {one, one.partition("=")[2]} if is_file(word)]

    @property
    def saved(self) -> Sequence[str]:
        return self.save or ["grid"]


class Row(NamedTuple):
    """The condition of a row of samples."""

    said: str  # its description; "" if it is empty
    given: dict[str, Tensor]  # a batch of one example of some modalities; of an interpolation, the nearer end
    mu: Tensor  # of q(z | given), (1, latents); of an interpolation, between the two ends'
    logvar: Tensor


@torch.no_grad()
def conditions(
    model: MVAE,
    controls: Controls,
    given: Mapping[str, Sequence[Value]],
    ends: Sequence[tuple[str, Value]],
    held_out: Callable[[], Data],
) -> list[Row]:
    """Return the rows: one for each combination of the controls' values, or `STEPS` of them between two ends."""
    if twice := sorted({name for name, _ in ends} & given.keys()):
        raise UsageError(f"--interpolate and a condition can't both set {' and '.join(twice)}")
    device = next(model.parameters()).device

    def batch(pairs: Sequence[tuple[str, Value]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in pairs:
            if value.of:
                data = held_out()
                same = (data.tensors[value.of].cpu() == value.x) | value.x.isnan()
                found[name] = random_example(data, same.view(len(same), -1).all(dim=1), f"{value.of} {value.said!r}")[
                    name
                ]
            else:
                found |= controls[name].batch(name, value.x)
        return {name: x.to(device) for name, x in found.items()}

    def said(pairs: Sequence[tuple[str, Value]]) -> str:
        return ", ".join(f"{name} {f'of {value.of} ' if value.of else ''}{value.said}" for name, value in pairs)

    rows = []
    for combination in itertools.product(*given.values()):
        pairs = list(zip(given, combination, strict=True))
        common = batch(pairs)
        if not ends:
            rows.append(Row(said(pairs), common, *model.posterior(common)))
            continue
        start, end = (common | batch([one]) for one in ends)
        (mu, logvar), (end_mu, end_logvar) = model.posterior(start), model.posterior(end)
        for step in range(STEPS):
            share = step / (STEPS - 1)
            words = f"{said([*pairs, ends[0]])} to {said(ends[1:])}, {step}/{STEPS - 1}"
            between = torch.lerp(mu, end_mu, share), torch.lerp(logvar, end_logvar, share)
            rows.append(Row(words, start if share < 0.5 else end, *between))
    return rows


@torch.no_grad()
def draw(
    model: MVAE,
    controls: Controls,
    rows: Sequence[Row],
    n: int,
    seed: int,
    temperature: float = 1,
    draw_x: bool = False,
) -> dict[str, Tensor]:
    """Draw n samples of each row, and return all by control on the CPU, row after row. All rows have the same noise.

    Every distribution that is drawn from is raised to the power 1 / temperature. `draw_x` draws from p(x | z) instead
    of taking its mean. Under a fitted prior, rows that aren't given a picture are drawn from it.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in controls}
    drawn = {one for name, kind in controls.items() if kind.size for one in kind.modalities(name)}
    for row in rows:
        torch.manual_seed(seed)
        if model.prior is None or drawn & row.given.keys():
            noise = torch.randn(n, model.n_latents, generator=torch.Generator().manual_seed(seed))
            latents = experts.draw(row.mu, row.logvar, noise.to(row.mu.device), temperature)
        else:
            latents = draw_given(model, row.given, n, temperature)
        for z in tqdm(latents.split(BLOCK), leave=False, delay=1, disable=None):
            for name, kind in controls.items():
                names = kind.modalities(name)
                draws = {one: model.likelihood(one).sample(z, temperature) for one in names} if draw_x else {}
                found[name].append(kind.join(draws or model.mean(z, names), name).cpu())
    return {name: torch.cat(blocks) for name, blocks in found.items()}


def sample(
    config: Sampling,
    experiment: str,
    build: Build,
    controls: Controls,
    examples: Examples,
    *,
    given: Mapping[str, Sequence[Value]] | None = None,
    stem: str = "sample_",
) -> None:
    """Draw and write the samples that the flags ask for.

    Args:
        examples: the experiment's data, for held-out pictures.
        given: values by control (default: those of the config's condition_on_NAME).
        stem: what file names begin with, followed by the control's name.
    """
    if given is None:
        words = {name: getattr(config, f"condition_on_{name}") or [] for name in controls}
        given = {name: [value for one in words[name] for value in parse(controls, name, one)] for name in controls}
    given = {name: values for name, values in given.items() if values}
    ends = [endpoint(controls, words) for words in config.interpolate or ()]
    model, trained = load_model(config.model_path, experiment, build, config.device())
    config.load_prior(model, config.temperature)
    torch.manual_seed(config.seed)
    held_out = functools.cache(lambda: examples("validation", config, trained["settings"]))
    rows = conditions(model, controls, given, ends, held_out)
    n = config.n_samples or (64 if len(rows) == 1 else COLUMNS)
    files = [f"{stem}{name}.{suffix}" for name in controls for suffix in ("txt", "npy", "png")]
    files += ["contact_sheet.png", f"{stem}given.json"]
    config.check_outputs(*(config.out_dir / file for file in files), inputs=config.inputs())
    drawn = {name: kind for name, kind in controls.items() if kind.size}
    for folder in (config.out_dir / f"{stem}{name}" for name in drawn):
        if "images" in config.saved and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and isn't empty: choose another --out-dir")
    scale = _scale(config, len(rows), n, max((kind.size for kind in drawn.values()), default=1))
    about = {
        "experiment": experiment,
        "epoch": trained.get("epoch"),
        "prior": config.prior,
        "seed": config.seed,
        "temperature": config.temperature,
        "drawn": config.draw,
        "samples of each": n,
        "given": [row.said for row in rows],
    }
    samples = draw(model, controls, rows, n, config.seed, config.temperature, config.draw)
    _write(config, stem, controls, rows, samples, scale, about)
    print(f"wrote {len(rows) * n} samples to {config.out_dir / f'{stem}*'}")


def _scale(config: Sampling, n_rows: int, n: int, side: int) -> int:
    """Return the side of a pixel in grids of n_rows x n samples. Raises UsageError for a grid too large to view."""
    total, columns = n_rows * n, COLUMNS if n_rows == 1 else max(COLUMNS, n)
    scale = config.scale or max(1, min(WIDTH // (columns * side), math.isqrt(VIEWABLE // total) // side))
    if "grid" in config.saved and total * (scale * side) ** 2 > VIEWABLE:
        raise UsageError(f"a grid of {total} samples is too large to view: use fewer --n-samples, or --save images")
    return scale


def _write(
    config: Sampling,
    stem: str,
    controls: Controls,
    rows: Sequence[Row],
    samples: Mapping[str, Tensor],
    scale: int,
    about: Mapping[str, Any],
) -> None:
    """Write the samples of each row, by control: what --save asks for, and of all controls but pictures a text."""
    drawn = {name: kind for name, kind in controls.items() if kind.size}
    pictures = {
        name: np.concatenate([as_bytes(kind.pictures(some)) for some in samples[name].split(BLOCK)])
        for name, kind in drawn.items()
    }
    for name, kind in controls.items():
        path = config.out_dir / f"{stem}{name}"
        if not isinstance(kind, Picture):
            lines = "".join(f"{line}\n" for line in kind.lines(samples[name]))
            write_atomically(Path(f"{path}.txt"), lines.encode())
        if "npy" in config.saved:
            with whole(Path(f"{path}.npy")) as file:
                np.save(file, samples[name].float().numpy())
        if "grid" in config.saved and name in drawn:
            write_atomically(Path(f"{path}.png"), png(_grid(rows, drawn, pictures[name], scale), about))
        if "images" in config.saved and name in drawn:
            path.mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate(pictures[name]):
                given = rows[i // about["samples of each"]].said
                (path / f"{i:05}.png").write_bytes(png(picture, {**about, "given": given}))
    if "npy" in config.saved:
        write_atomically(config.out_dir / f"{stem}given.json", (json.dumps(about, indent=2) + "\n").encode())
    if len(drawn) > 1:
        write_atomically(config.out_dir / "contact_sheet.png", png(_contact_sheet(rows, drawn, pictures), about))


def _grid(rows: Sequence[Row], drawn: Controls, pictures: np.ndarray, scale: int) -> np.ndarray:
    """Arrange the samples of one control: a line for each row, after what is given; a single row fills lines of 8."""
    columns = len(pictures) if len(rows) > 1 else COLUMNS
    lines = [[some[i : i + columns] for i in range(0, len(some), columns)] for some in np.split(pictures, len(rows))]
    given = [list(_given(row, drawn).values()) for row in rows]
    return sheet([row.said for row in rows], given, lines, scale=scale)


def _contact_sheet(rows: Sequence[Row], drawn: Controls, pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Arrange each row's first samples of every control that can be drawn, after what is given."""
    shown = [_given(row, drawn) for row in rows]
    names = [name for name in drawn if any(name in some for some in shown)]
    left = [[some.get(name) for name in names] for some in shown]
    columns = [np.split(some, len(rows)) for some in pictures.values()]
    n_lines = max(1, SHEET_ROWS // len(rows))
    lines = [list(zip(*(some[:n_lines] for some in row), strict=True)) for row in zip(*columns, strict=True)]
    headings = [f"given\n{name}" for name in names] + [f"\n{name}" for name in drawn]
    return sheet([row.said for row in rows], left, lines, headings)


def _given(row: Row, drawn: Controls) -> dict[str, np.ndarray]:
    """Return the pictures that a row is conditioned on, by control."""
    return {name: as_bytes(kind.pictures(row.given[name])[0]) for name, kind in drawn.items() if name in row.given}
