"""fit: optimises an objective over a data set, resumably, and leaves checkpoints, stats.jsonl and TensorBoard files.

Nothing random is stored: shuffles, subsets and noise are seeded by (seed, epoch, step, rank), so that a resumed run is
the run, bit for bit on a CPU.
"""

import dataclasses
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
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .data import Data, consecutive_rows, permuted_rows, seed_of
from .errors import UsageError, UserError
from .objective import Objective, Totals, random_subsets
from .run import Run, sums_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to fit. `batch_size` is the whole step's, over all processes; `approx_m` is the number of random subsets.

    Raises UsageError where `compile` meets random subsets: it needs the same terms at every step.
    """

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

    def __post_init__(self) -> None:
        if self.compile and self.approx_m:
            raise UsageError("--compile needs the same terms at every step: it goes with --approx-m 0")


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
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in objective.modules())
    if has_batch_norm and min(options.batch_size, len(train)) < 2 * world:
        raise UsageError("these networks have batch norm: --batch-size is to give each process 2 examples or more")
    settings = {**(settings or {}), "n_train": len(train)}
    train, validation = train.to(options.device), validation.to(options.device)
    objective.to(options.device).train()
    optimizer = torch.optim.Adam(objective.parameters(), lr=options.lr, fused=True)
    run = Run(objective, optimizer, out_dir=options.out_dir, experiment=experiment, settings=settings)
    run.start(options.resume)
    if rank == 0:
        run.write_stats()  # a folder that can't be written is better known before the first step
    else:
        run.sums = torch.zeros_like(run.sums)  # a checkpoint's sums are those of all processes
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
                run.add(sums_of(loss, totals, len(rows) // world))
                run.seconds = time.perf_counter() - started
                if stop:
                    watch.check_weights(run)
                    run.sums = _sum_over_processes(run.sums, world)
                    if rank == 0:
                        run.save()
                    where = f"epoch {run.epoch}, step {run.step} of {len(batches)}"
                    raise Stopped(f"stopped at {where}; the state is saved: --resume goes on from it", caught[0])
            watch.check_weights(run)
            run.seconds = time.perf_counter() - started
            train_sums = _sum_over_processes(run.sums, world)
            validation_sums = _sum_over_processes(_validate(objective, validation, options, rank, world), world)
            watch.check_validation(run, validation_sums)
            beta_reached = annealing(run.epoch, len(batches) - 1, len(batches), options.annealing_epochs)
            best = run.end_epoch(train_sums, validation_sums, beta_reached)
            if rank == 0:
                run.save(best=best)
                run.report(validation, best=best)
    run.close()
    if world > 1:
        distributed.destroy_process_group()
    return run.history


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
            part = sums_of(loss, totals, len(rows))
            sums = part if sums is None else sums + part
    objective.train()
    size = 2 + 2 * len(objective.terms) * (len(objective.model.modalities) + 1)
    return torch.zeros(size, dtype=torch.float64, device=options.device) if sums is None else sums


class _Watch:
    """Notices the first step that isn't finite, without waiting for the device at every step."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self.first = torch.zeros(0)

    def look(self, loss: Tensor, totals: Totals, *, raise_now: bool, run: Run) -> None:
        """Remembers this step's parts unless an earlier step's were bad; those raise UserError if `raise_now`."""
        parts = torch.cat([totals.log_prob.flatten(), totals.kl, loss.detach().unsqueeze(0)])
        if len(self.first) != len(parts):
            self.first = parts
        self.first = torch.where(self.first.isfinite().all(), parts, self.first)
        if raise_now and not self.first.isfinite().all():
            self.check_weights(run)
            self._stop(run, self._bad(self.first, len(totals.kl)))

    def check_validation(self, run: Run, sums: Tensor) -> None:
        """Raises UserError if the validation data's `sums_of` aren't finite."""
        if not sums.isfinite().all():
            n_terms = len(self.objective.terms)
            n_scores = n_terms * len(self.objective.model.modalities)
            loss, _, log_prob, _, kl, _ = sums.split([1, 1, n_scores, n_scores, n_terms, n_terms])
            self._stop(run, [f"validation's {name}" for name in self._bad(torch.cat([log_prob, kl, loss]), n_terms)])

    def check_weights(self, run: Run) -> None:
        """Raises UserError if a weight isn't finite, as after a finite loss whose gradient was not."""
        weights = self.objective.model.named_parameters()
        bad = {".".join(name.split(".")[:2]) for name, weight in weights if not weight.isfinite().all()}
        if bad:
            self._stop(run, [f"the gradient of {name}" for name in sorted(bad)])

    def _stop(self, run: Run, what: list[str]) -> None:
        where = f"epoch {run.epoch}, step {run.step}"
        more = " and more" if len(what) > 4 else ""
        remedy = "the last good checkpoint is kept; try a smaller --lr, or --precision fp32"
        raise UserError(f"not finite by {where}: {', '.join(what[:4])}{more}; {remedy}")

    def _bad(self, parts: Tensor, n_terms: int) -> list[str]:
        """The names of those parts (log p by term and modality, KL by term, the loss) that aren't finite.

        Terms that are given less come first: where one modality is bad, only its own single term's scores are.
        """
        modalities = self.objective.model.modalities
        terms = [(len(term.given), f"term {term.name}") for term in self.objective.terms]
        terms += [(len(modalities), "a random subset's term")] * (n_terms - len(terms))
        names = [(size, f"log p of {modality} in {term}") for size, term in terms for modality in modalities]
        names += [*((size, f"KL in {term}") for size, term in terms), (len(modalities), "the loss")]
        bad = [name for name, part in zip(names, parts.tolist(), strict=True) if not math.isfinite(part)]
        return [name for _, name in sorted(bad, key=lambda name: name[0])]


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
    """Collects SIGINT and SIGTERM instead of dying of them; one that comes a second after its first kills as usual.

    Sooner ones are the same request: `timeout`, for one, sends its signal to the process and then to its group.
    """
    caught: list[int] = []
    first: dict[int, float] = {}

    def catch(number: int, frame: Any) -> None:
        if time.monotonic() - first.setdefault(number, time.monotonic()) > 1:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        caught.append(number)

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _bar(batches: list[Tensor], run: Run, n: int, options: Options, rank: int) -> Iterator[Tensor]:
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
