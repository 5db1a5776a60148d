"""Make the tables in the READMEs and docs/ from results/*.json.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; this command rewrites it. NAME is summary, an
experiment (mnist, binarymnist, fashionmnist, multimnist, celeba, celeba19, vision), speed, memory, loglike,
loglike_full, growth, threads, peer, gpu, batch_norm, ablation, precision, reconstruct, or weak_ and an experiment. The
files:

    results/EXPERIMENT-RECIPE-SEED.json             what loglike.py --json wrote; several seeds of a recipe are averaged
    results/coherence-EXPERIMENT-RECIPE-SEED.json   what benchmarks/coherence.py --json wrote of the same model
    results/step-*.json                             what benchmarks/step.py --json wrote
    results/loglike-*.json                          what benchmarks/loglike.py --json wrote
    results/full/*.json                             what loglike.py --json wrote of a whole test split
    results/growth.json                             what benchmarks/growth.py --json wrote
    results/threads.json                            what benchmarks/threads.py --json wrote
    results/peer.json                               what benchmarks/peer.py --json wrote
    results/gpu.json                                what benchmarks/gpu.py wrote
    results/batch_norm/*.json                       what benchmarks/batch_norm.py wrote
    results/{ablation,precision,reconstruct}/*      what benchmarks/recipes.py left
    results/weak/*.json                             what benchmarks/weak_supervision.py wrote
    benchmarks/paper.json                           the paper's numbers

What has no results is left out; the summary shows dashes there.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from experiment_tables import EXPERIMENTS, of_experiment, summary
from paired_tables import batch_norm, paired
from speed_tables import gpu, growth, loglike, loglike_full, memory, peer, speed, threads
from weak_tables import weak

from mvae.errors import UserError
from mvae.files import write_atomically
from mvae.scripts import running

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- table: ", "<!-- end of table -->"
TABLE = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end of table -->", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table differs from its files")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of results/ and the READMEs")
    args = parser.parse_args()
    if not (args.root / "README.md").is_file():
        raise UserError(f"{args.root} has no README.md: name the folder of results/ and the READMEs")
    for document in documents(args.root):
        old = document.read_text()
        new = rewritten(old, document, args.root, check=args.check)
        if new != old:
            write_atomically(document, new.encode())
            print(f"wrote the tables of {document.relative_to(args.root)}")


def documents(root: Path) -> list[Path]:
    """The texts that may hold tables."""
    found = [path for pattern in ("README.md", "*/README.md", "docs/*.md") for path in root.glob(pattern)]
    return sorted(path for path in found if not path.relative_to(root).parts[0].startswith("."))


def rewritten(text: str, document: Path, root: Path, check: bool = False) -> str:
    """The text with its tables made anew. With `check`, raises UserError for the first table that would change."""
    where = document.relative_to(root)
    if not text.count(START) == text.count(END) == len(TABLE.findall(text)):
        raise UserError(f"{where}: each `{START}NAME -->` on a line is to have an `{END}` after it")

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise UserError(f"{where}: there is no table {name}; there are {', '.join(TABLES)}")
        table = f"{START}{name} -->\n\n{TABLES[name](root, document)}\n\n{END}"
        if check and table != match[0]:
            raise UserError(f"{where}: table {name} is not what results/ gives; python benchmarks/tables.py makes it")
        return table

    return TABLE.sub(made, text)


TABLES: dict[str, Callable[[Path, Path], str]] = {
    "summary": summary,
    **{name: of_experiment(name) for name in EXPERIMENTS},
    "speed": speed,
    "memory": memory,
    "loglike": loglike,
    "loglike_full": loglike_full,
    "growth": growth,
    "threads": threads,
    "peer": peer,
    "gpu": gpu,
    "batch_norm": batch_norm,
    "ablation": paired("ablation"),
    "precision": paired("precision"),
    "reconstruct": paired("reconstruct"),
    **{f"weak_{name}": weak(name) for name in ("mnist", "fashionmnist", "multimnist", "celeba")},
}

if __name__ == "__main__":
    running.run(main)
