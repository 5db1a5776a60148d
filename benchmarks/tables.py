"""Make the tables in the READMEs and docs/ from results/ (rows.py, table2.py).

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; this command rewrites it. NAME is one of
TABLES. The files:

    results/EXPERIMENT-RECIPE-SEED.json             by loglike.py --json; several seeds of a recipe are averaged
    results/quality-EXPERIMENT-RECIPE-SEED.json     by quality.py --json
    results/{ablation,precision,reconstruct}/*      by recipes.py
    results/baselines/MODEL-EXPERIMENT-SEED.json    by baselines/run.py
    results/weak/*.json                             by weak_supervision.py
    results/{step-*,processes,peer}.json            by step.py, processes.py and peer.py, with --json
    results/{launches,kills,gpu}.json               by launches.py, kills.py and gpu.py
    benchmarks/paper.json                           the paper's numbers
"""

import re
from dataclasses import dataclass
from pathlib import Path

from mvae import cli
from mvae.errors import UserError
from mvae.files import write_atomically

from common import ROOT
from rows import TABLES as ROWS
from table2 import TABLES as TABLE2

TABLES = ROWS | TABLE2
START, END = "<!-- table: ", "<!-- end of table -->"
TABLE = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end of table -->", re.DOTALL)


@dataclass(kw_only=True)
class Config:
    check: bool = False  # write nothing; exit with 1 if a table differs from its files
    root: Path = ROOT  # folder of results/ and the READMEs


def main() -> None:
    config = cli.parse(__doc__, Config)
    if not (config.root / "README.md").is_file():
        raise UserError(f"{config.root} has no README.md: name the folder of results/ and the READMEs")
    pages = [path for pattern in ("README.md", "*/README.md", "docs/*.md") for path in config.root.glob(pattern)]
    for document in sorted(page for page in pages if not page.relative_to(config.root).parts[0].startswith(".")):
        old = document.read_text()
        new = rewritten(old, document, config.root, check=config.check)
        if new != old:
            write_atomically(document, new.encode())
            print(f"wrote the tables of {document.relative_to(config.root)}")


def rewritten(text: str, document: Path, root: Path, check: bool = False) -> str:
    """Return the text with its tables made anew. With `check`, raises UserError for the first that would change."""
    where = document.relative_to(root)
    if not text.count(START) == text.count(END) == len(TABLE.findall(text)):
        raise UserError(f"{where}: each line `{START}NAME -->` needs an `{END}` after it")

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise UserError(f"{where}: no table is called {name}, only {', '.join(TABLES)}")
        table = f"{START}{name} -->\n\n{TABLES[name](root)}\n\n{END}"
        if check and table != match[0]:
            raise UserError(f"{where}: table {name} differs from results/: run python benchmarks/tables.py")
        return table

    return TABLE.sub(made, text)


if __name__ == "__main__":
    cli.run(main)
