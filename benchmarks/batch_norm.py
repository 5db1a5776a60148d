"""Batch norm of decoders in training: statistics of each ELBO term alone against those of all terms together.

A run trains one experiment for a short budget, then scores validation examples twice: with the running statistics, as
every evaluation does, and with the batches' own, as training did. What lies between the two is the gap. Each run leaves
one JSON file; those that are there aren't run again.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mvae import cli
from mvae.checkpoint import write_atomically
from mvae.data import Data, consecutive_rows
from mvae.objective import Objective
from mvae.training import Options, fit

ROOT = Path(__file__).resolve().parent.parent
SECOND = {"multimnist": "text", "celeba": "attrs", "celeba19": "attrs"}
LIMIT = {"multimnist": 8000, "celeba": 5000, "celeba19": 5000}
EPOCHS, VALIDATION = 3, 1000


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--experiments", nargs="+", choices=SECOND, default=list(SECOND))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out-dir", type=Path, default=ROOT / "results" / "batch_norm")
    parser.add_argument("--cache-dir", type=Path, default=Path("data/cache"))
    parser.add_argument("--child", help="one run: EXPERIMENT SCORES STATISTICS SEED")
    args = parser.parse_args()
    if args.child:
        return child(args)
    for seed in args.seeds:
        for experiment in args.experiments:
            for scores in ("named", "given"):
                for statistics in ("joint", "term"):
                    name = f"{experiment}-{scores}-{statistics}-{seed}"
                    if not (args.out_dir / f"{name}.json").exists():
                        words = [*sys.argv, "--child", name.replace("-", " ")]
                        subprocess.run([sys.executable, *words], check=True)


def child(args: Any) -> None:
    experiment, scores, statistics, seed = args.child.split()
    sys.path.insert(0, str(ROOT / experiment))
    import datasets
    from model import build_model

    if experiment == "multimnist":
        canvas_dir = args.cache_dir / "MultiMNIST"
        datasets.prepare(args.data_dir, canvas_dir)
        train, validation = datasets.training_data(canvas_dir, n_val=5000, limit=LIMIT[experiment])
    else:
        train, validation = datasets.training_data(
            args.data_dir, args.cache_dir, limit=LIMIT[experiment], allow_missing=True, workers=1
        )
    validation = validation[:VALIDATION]
    torch.manual_seed(int(seed))
    model = build_model(100)
    for name in model.modalities:
        likelihood = model.likelihood(name)
        has_norm = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in likelihood.modules())
        likelihood.norm_by_term = has_norm and statistics == "term"
    second = SECOND[experiment]
    named = [name for name in model.modalities if name != "image"]
    objective = Objective(
        model,
        weights=dict.fromkeys(named, 10.0),
        reconstruct=named if scores == "named" else "given",
    )
    started, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            epochs=EPOCHS, annealing_epochs=1, batch_size=100, lr=1e-3, seed=int(seed),
            approx_m=int(experiment == "celeba19"), out_dir=Path(folder),
        )  # fmt: skip
        history = fit(objective, train, validation, options, experiment=experiment)
    losses = {
        "evaluation": losses_of(objective, validation, own=False),
        "training": losses_of(objective, validation, own=True),
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    content = {
        "command": f"benchmarks/batch_norm.py --child '{args.child}'", "commit": commit, "seed": int(seed),
        "device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__,
        "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu,
        "experiment": experiment, "reconstruct": second if scores == "named" else "given", "statistics": statistics,
        "n_train": len(train), "n_validation": len(validation), "epochs": EPOCHS,
        "validation_loss": losses, "last_epoch": history[-1],
    }  # fmt: skip
    write_atomically(args.out_dir / ("-".join(args.child.split()) + ".json"), json.dumps(content, indent=2).encode())


@torch.no_grad()
def losses_of(objective: Objective, data: Data, *, own: bool) -> float:
    """The mean loss at β = 1; with `own`, batch norm takes each batch's statistics, and keeps its running ones."""
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.eval()
    if own:
        for module in objective.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.train()
        for name in objective.model.modalities:  # a likelihood decodes term by term in training mode alone
            objective.model.likelihood(name).training = True
    total = 0.0
    for i, rows in enumerate(consecutive_rows(data, 100)):
        torch.manual_seed(i)
        batch, present = data.batch(rows)
        total += objective(batch, 1.0, (), present)[0].item() * len(rows)
    objective.load_state_dict(state)
    return total / len(data)


if __name__ == "__main__":
    cli.run(main)
