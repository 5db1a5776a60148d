"""fit: optimises an objective over a data set, resumably, and leaves checkpoints, stats.jsonl and TensorBoard files.

Nothing random is stored: shuffles, subsets and noise are seeded by (seed, epoch, step, rank), so that a resumed run is
the run, bit for bit on a CPU.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from . import checkpoint, pictures
from .data import Data, consecutive_rows, permuted_rows, seed_of
from .errors import UsageError, UserError
from .objective import Objective, Totals, random_subsets

MAY_CHANGE = {"epochs", "cuda", "compile", "data_dir", "out_dir", "log_interval", "resume"}
"""The settings that a resumed run may be given anew; any other would make it another run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to fit. `batch_size` is the whole step's, over all processes; `approx_m` is the number of random subsets."""

    epochs: int
    annealing_epochs: int
    batch_size: int
    lr: float
    approx_m: int = 0
    seed: int = 0
    precision: str = "fp32"
    compile: bool = False
    resume: bool = False
    log_interval: int = 100
    out_dir: Path = Path("trained_models")
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))


class Stopped(UserError):
    """The run was asked to stop by a signal, and has saved its state."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


def annealing(epoch: int, step: int, steps: int, annealing_epochs: int) -> float:
    """β: rises linearly per step to 1 at the end of epoch `annealing_epochs`, then stays. Epochs count from 1."""
    return min(1.0, ((epoch - 1) * steps + step + 1) / (annealing_epochs * steps)) if annealing_epochs else 1.0


def fit(
    objective: Objective,
    train: Data,
    validation: Data,
    options: Options,
    *,
    experiment: str = "mvae",
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Trains `objective` by Adam; after each epoch validates at β = 1, and keeps the best model and the latest state.

    Under torchrun each process takes its share of every batch, and the first one writes.

    Args:
        experiment: the name written into the checkpoints, which refuse to be loaded as another's.
        settings: plain values to record; `options.resume` asks that they be those of the checkpoint.

    Returns:
        The epochs' records, as in stats.jsonl.

    Raises:
        UsageError: settings that differ from the checkpoint's, or a run in `out_dir` that would be overwritten.
        UserError: a loss or gradient that isn't finite (no file is overwritten), or a file that can't be written.
        Stopped: SIGINT or SIGTERM, after saving; resuming goes on from that very step.
    """
    rank, world = _join(options)
    settings = {**(settings or {}), "n_train": len(train)}
    train, validation = train.to(options.device), validation.to(options.device)
    objective.to(options.device).train()
    optimizer = torch.optim.Adam(objective.parameters(), lr=options.lr, fused=True)
    run = _Run(objective, optimizer, experiment, settings, options)
    if options.resume:
        run.restore()
    elif (options.out_dir / checkpoint.LATEST).exists():
        raise UsageError(f"{options.out_dir} holds a run: go on with --resume, or name another --out-dir")

    step_module: Callable[..., tuple[Tensor, Totals]] = objective
    if world > 1:
        step_module = DistributedDataParallel(objective, find_unused_parameters=train.present is not None)
    if options.compile:
        step_module = torch.compile(step_module, mode="reduce-overhead" if options.device.type == "cuda" else None)
    watch = _Watch(objective)
    with _signals() as caught:
        while run.epoch <= options.epochs:
            batches = permuted_rows(train, options.batch_size, seed_of(options.seed, run.epoch))
            started = time.perf_counter() - run.seconds
            beta = torch.zeros((), device=options.device)
            for rows in _bar(batches[run.step :], run, len(batches), options, rank):
                torch.manual_seed(seed_of(options.seed, run.epoch, run.step, rank))
                subset_rng = np.random.default_rng(seed_of(options.seed, run.epoch, run.step))
                subsets = random_subsets(objective.model.modalities, options.approx_m, subset_rng)
                beta.fill_(annealing(run.epoch, run.step, len(batches), options.annealing_epochs))
                batch, present = train.batch(rows[rank::world])
                with _precision(options):
                    loss, totals = step_module(batch, beta, subsets, present)
                loss.backward()
                run.step += 1
                asked = run.step % options.log_interval == 0 or run.step == len(batches)
                stop = _agreed(caught, asked, world, options.device)
                watch.look(loss, totals, raise_now=asked or stop or options.device.type == "cpu", run=run)
                optimizer.step()
                optimizer.zero_grad()
                run.add(loss, totals, len(rows[rank::world]))
                run.seconds = time.perf_counter() - started
                if stop:
                    watch.check_weights(run)
                    if rank == 0:
                        run.save()
                    where = f"epoch {run.epoch}, step {run.step} of {len(batches)}"
                    raise Stopped(f"stopped at {where}; the state is saved: --resume goes on from it", caught[0])
            watch.check_weights(run)
            train_sums = _sum_over_processes(run.sums, world)
            validation_sums = _sum_over_processes(_validate(objective, validation, options, rank, world), world)
            run.close_epoch(train_sums, validation_sums, len(batches), validation, writes=rank == 0)
    run.close()
    return run.history


class _Run:
    """Where a run stands: everything a checkpoint holds, and the files that report it."""

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, experiment: str, settings, options: Options
    ):
        self.objective, self.optimizer, self.options = objective, optimizer, options
        self.experiment, self.settings = experiment, settings
        self.epoch, self.step, self.seconds = 1, 0, 0.0
        self.best = math.inf
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(0)
        self.writer: SummaryWriter | None = None

    def restore(self) -> None:
        path = self.options.out_dir / checkpoint.LATEST
        if not path.exists():
            print(f"there is no {path} yet: starting from the beginning", flush=True)
            return
        saved = checkpoint.load(path, self.experiment)
        names = sorted((saved["settings"].keys() | self.settings.keys()) - MAY_CHANGE)
        pairs = [(name, saved["settings"].get(name), self.settings.get(name)) for name in names]
        differ = [f"{name} was {old}, now {new}" for name, old, new in pairs if old != new]
        if differ:
            raise UsageError(f"--resume: {path} was made with other settings: {'; '.join(differ)}")
        self.objective.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in ("epoch", "step", "seconds", "best", "history"):
            setattr(self, name, saved[name])
        self.sums = saved["sums"].to(self.options.device)

    def save(self, *, best: bool = False) -> None:
        model = self.objective.model
        what = {"model": model.state_dict(), "n_latents": model.n_latents, "settings": self.settings}
        if best:
            epoch = {"epoch": self.epoch - 1, "validation_loss": self.best}
            checkpoint.save(self.options.out_dir / checkpoint.BEST, self.experiment, what | epoch)
        what |= {name: getattr(self, name) for name in ("epoch", "step", "seconds", "best", "history", "sums")}
        what["optimizer"] = self.optimizer.state_dict()
        checkpoint.save(self.options.out_dir / checkpoint.LATEST, self.experiment, what)

    def add(self, loss: Tensor, totals: Totals, n: int) -> None:
        part = torch.cat(
            [torch.stack([loss.detach() * n, loss.new_tensor(n)]), *(t.flatten() for t in totals)]
        ).double()
        self.sums = self.sums + part if len(self.sums) else part

    def close_epoch(self, train: Tensor, validation: Tensor, steps: int, data: Data, *, writes: bool) -> None:
        beta = annealing(self.epoch, steps - 1, steps, self.options.annealing_epochs)
        speed = train[1].item() / self.seconds
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "beta": beta,
            "seconds": self.seconds,
            "examples_per_second": speed,
            "train": summary(self.objective, train),
            "validation": summary(self.objective, validation),
        }
        self.history.append(record)
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, torch.zeros(0)
        improved = record["validation"]["loss"] < self.best
        self.best = min(self.best, record["validation"]["loss"])
        if not writes:
            return
        self.save(best=improved)
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        checkpoint.write_atomically(self.options.out_dir / "stats.jsonl", lines.encode())
        self._tensorboard(record, data)
        terms = record["validation"]["terms"].items()
        elbos = "  ".join(
            f"ELBO({name}) {term['elbo']:.2f}" for name, term in terms if len(record["validation"]["terms"]) < 8
        )
        print(
            f"epoch {record['epoch']:3d}/{self.options.epochs}  beta {beta:.3f}  loss {record['train']['loss']:.2f}  "
            f"validation loss {record['validation']['loss']:.2f}{' (best)' if improved else ''}  {elbos}  "
            f"{speed:.0f} examples/s",
            flush=True,
        )

    def _tensorboard(self, record: dict[str, Any], data: Data) -> None:
        epoch = record["epoch"]
        try:
            self.writer = self.writer or SummaryWriter(str(self.options.out_dir / "tensorboard"), purge_step=epoch)
            for part in ("train", "validation"):
                for name, value in _flat(record[part], part):
                    self.writer.add_scalar(name, value, epoch)
            self.writer.add_scalar("beta", record["beta"], epoch)
            self.writer.add_scalar("examples per second", record["examples_per_second"], epoch)
            torch.manual_seed(seed_of(self.options.seed))
            some, present = data.batch(torch.arange(min(8, len(data)), device=data.device))
            if present is None:
                for name, grid in pictures.reconstructions(self.objective.model, some).items():
                    self.writer.add_image(f"reconstruction/{name}", grid, epoch)
            self.writer.flush()
        except OSError as error:
            raise UserError(f"can't write {self.options.out_dir / 'tensorboard'}: {error.strerror or error}") from None

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def summary(objective: Objective, sums: Tensor) -> dict[str, Any]:
    """A record of summed totals, in nats per example: the loss (λ, and β in training), and each term's parts.

    "elbo", "kl" and "reconstruction" (log p of each scored modality) have neither λ nor β. Each is a mean over the
    examples that have it, None where none has. Random subsets are summed up as the one term "subset".
    """
    m = len(objective.model.modalities)
    loss, n, *parts = sums.tolist()
    t = len(parts) // (2 * m + 2)
    values = np.array(parts)
    log_prob, n_log_prob = values[: 2 * t * m].reshape(2, t, m)
    kl, n_kl = values[2 * t * m :].reshape(2, t)
    fixed = len(objective.terms)
    rows = [(term.name, [i]) for i, term in enumerate(objective.terms)]
    rows += [("subset", list(range(fixed, t)))] if t > fixed else []
    terms = {}
    for name, which in rows:
        counts, n_given = n_log_prob[which].sum(0), n_kl[which].sum()
        terms[name] = {
            "elbo": (log_prob[which].sum() - kl[which].sum()) / n_given if n_given else None,
            "kl": kl[which].sum() / n_given if n_given else None,
            "reconstruction": {
                modality: log_prob[which, i].sum() / counts[i]
                for i, modality in enumerate(objective.model.modalities)
                if counts[i]
            },
        }
    return {"loss": loss / n, "terms": terms}


@torch.no_grad()
def _validate(objective: Objective, data: Data, options: Options, rank: int, world: int) -> Tensor:
    """The sums of the validation data at β = 1, with sampled z of a fixed seed, the same for every epoch."""
    objective.eval()
    sums: Tensor | None = None
    for i, rows in enumerate(consecutive_rows(data, options.batch_size)):
        if i % world == rank:
            torch.manual_seed(seed_of(options.seed, 0, i))
            batch, present = data.batch(rows)
            with _precision(options):
                loss, totals = objective(batch, 1.0, (), present)
            part = torch.cat(
                [torch.stack([loss * len(rows), loss.new_tensor(len(rows))]), *(t.flatten() for t in totals)]
            )
            sums = part.double() if sums is None else sums + part.double()
    objective.train()
    size = 2 + 2 * len(objective.terms) * (len(objective.model.modalities) + 1)
    return torch.zeros(size, dtype=torch.float64, device=options.device) if sums is None else sums


class _Watch:
    """Notices the first step that isn't finite, without waiting for the device at every step."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self.first = torch.zeros(0)

    def look(self, loss: Tensor, totals: Totals, *, raise_now: bool, run: _Run) -> None:
        """Remembers this step's parts unless an earlier step's were bad; those raise UserError if `raise_now`."""
        parts = torch.cat([totals.log_prob.flatten(), totals.kl, loss.detach().unsqueeze(0)])
        if len(self.first) != len(parts):
            self.first = parts
        self.first = torch.where(self.first.isfinite().all(), parts, self.first)
        if raise_now and not self.first.isfinite().all():
            self.check_weights(run)
            names = self._names(len(totals.kl))
            self._stop(
                run, [name for name, part in zip(names, self.first.tolist(), strict=True) if not math.isfinite(part)]
            )

    def check_weights(self, run: _Run) -> None:
        """Raises UserError if a weight isn't finite, as after a finite loss whose gradient was not."""
        weights = self.objective.model.named_parameters()
        bad = {".".join(name.split(".")[:2]) for name, weight in weights if not weight.isfinite().all()}
        if bad:
            self._stop(run, [f"the gradient of {name}" for name in sorted(bad)])

    def _stop(self, run: _Run, what: list[str]) -> None:
        where = f"epoch {run.epoch}, step {run.step}"
        more = " and more" if len(what) > 4 else ""
        remedy = "the last good checkpoint is kept; try a smaller --lr, or --precision fp32"
        raise UserError(f"not finite by {where}: {', '.join(what[:4])}{more}; {remedy}")

    def _names(self, n_terms: int) -> Iterator[str]:
        terms = [f"term {term.name}" for term in self.objective.terms]
        terms += ["a random subset's term"] * (n_terms - len(terms))
        yield from (f"log p of {modality} in {term}" for term in terms for modality in self.objective.model.modalities)
        yield from (f"KL in {term}" for term in terms)
        yield "the loss"


def _flat(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}/{name}")
        elif value is not None:
            yield f"{prefix}/{name}", value


def _precision(options: Options) -> torch.autocast:
    return torch.autocast(options.device.type, torch.bfloat16, enabled=options.precision == "bf16")


def _join(options: Options) -> tuple[int, int]:
    """This process's rank and their number, as torchrun gives them; joins the group if there are several."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    if options.batch_size % world:
        raise UsageError(f"--batch-size {options.batch_size} can't be shared evenly by {world} processes")
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    distributed.init_process_group("nccl" if options.device.type == "cuda" else "gloo")
    return distributed.get_rank(), world


def _sum_over_processes(sums: Tensor, world: int) -> Tensor:
    if world > 1:
        sums = sums.clone()
        distributed.all_reduce(sums)
    return sums


def _agreed(caught: list[int], asked: bool, world: int, device: torch.device) -> bool:
    """Whether to stop here: at once with one process; with several, when they ask each other, all at the same step."""
    if world == 1:
        return bool(caught)
    if not asked:
        return False
    flag = torch.tensor(float(caught[0] if caught else 0), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    if flag and not caught:
        caught.append(int(flag))
    return bool(caught)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one of the same kind kills as usual."""
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _bar(batches: list[Tensor], run: _Run, n: int, options: Options, rank: int) -> Iterator[Tensor]:
    """The batches, with a progress bar on a terminal and plain lines elsewhere."""
    terminal = sys.stderr.isatty()
    bar = tqdm(batches, f"epoch {run.epoch}", n, initial=run.step, leave=False, disable=rank > 0 or not terminal)
    for rows in bar:
        yield rows
        if rank == 0 and run.step % options.log_interval == 0:
            loss = run.sums[0].item() / run.sums[1].item()
            bar.set_postfix_str(f"loss {loss:.2f}")
            if not terminal:
                speed = run.step * len(rows) / run.seconds
                print(
                    f"epoch {run.epoch}  step {run.step}/{n}  mean loss {loss:.2f}  {speed:.0f} examples/s", flush=True
                )
