"""Files of results, and Markdown."""

import csv
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mvae.errors import UserError

NOTHING = "*There are no results for this table yet.*"


def read(path: Path) -> dict[str, Any]:
    """Return a JSON file. Raises UserError, naming it, if it can't be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {error}") from None


def read_csv(path: Path, names: Iterable[str]) -> dict[str, list[float]]:
    """Return columns of a CSV file. Raises UserError, naming it, if they can't be read."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't read {path}: {error!r}") from None


def by_recipe(folder: Path, prefix: str, suffix: str = ".json") -> dict[str, dict[int, Path]]:
    """Return the files PREFIX-RECIPE-SEED of a folder by recipe and seed."""
    found: dict[str, dict[int, Path]] = {}
    named = ((re.fullmatch(rf"{prefix}-(.+)-(\d+)", path.stem), path) for path in folder.glob(f"*{suffix}"))
    for recipe, seed, path in sorted((name[1], int(name[2]), path) for name, path in named if name):
        found.setdefault(recipe, {})[seed] = path
    return found


def agreed(files: Iterable[Mapping[str, Any]], name: str, whose: str) -> Any:
    """Return the value that all files have for `name`. Raises UserError, naming whose they are, if they differ."""
    values = {file[name] for file in files}
    if len(values) > 1:
        raise UserError(f"{whose} differ in {name}: {sorted(values)}")
    return values.pop()


def page(
    columns: Sequence[str], rows: Sequence[Sequence[str]], about: str, files: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return a table, a caption, and the commands that wrote the files; NOTHING if there are no rows."""
    if not rows:
        return NOTHING
    parts = [table(columns, rows), f"*{about}*"]
    if files:
        lines = "\n".join(dict.fromkeys(file["command"] for file in files))
        parts.append(fold(f"Commands, at {commits(files)}", f"```\n{lines}\n```"))
    return "\n\n".join(parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a bar within a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def fold(summary: str, content: str) -> str:
    """Return content that a click unfolds."""
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


def over_seeds(values: Sequence[float], digits: str = ".2f") -> str:
    """Return the mean over seeds, with its standard error if there are several; – if there are none."""
    if not values:
        return "–"
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):{digits.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{digits}}{error}"


def machine(files: Iterable[Mapping[str, Any]]) -> str:
    return " ".join(dict.fromkeys(f"{file['processor']}, torch {file['torch']}." for file in files))


def commits(files: Iterable[Mapping[str, Any]]) -> str:
    found = sorted({str(file.get("commit"))[:7] for file in files})
    return f"commit{'s' * (len(found) > 1)} {', '.join(found)}"


def either(values: Iterable[Any]) -> str:
    """Join the sorted different values by "or"."""
    return " or ".join(f"{value:,}" if isinstance(value, int) else value for value in sorted(set(values)))
