"""What the tables are written with: files of results, Markdown, and means over seeds."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mvae.errors import UserError

NOTHING = "*There are no results for this table yet.*"


def read(path: Path) -> dict[str, Any]:
    """A JSON file. Raises UserError, naming it, if it is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {error}") from None


def agreed(files: Iterable[dict[str, Any]], name: str, whose: str) -> Any:
    """What all files say of `name`. Raises UserError, which says whose they are, if they differ."""
    values = {file[name] for file in files}
    if len(values) > 1:
        raise UserError(f"{whose} differ in {name}: {sorted(values)}")
    return values.pop()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def over_seeds(values: Sequence[float], digits: str = ".2f") -> str:
    """The mean over seeds, and its standard error if there are several."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):{digits.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{digits}}{error}"
