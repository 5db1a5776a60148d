"""train_step, one step of gradient descent; and fit, a whole run of them: resumable, with its files.

Nothing random is stored: shuffles, subsets and noise are seeded by (seed, epoch, step, rank), so that a resumed run is
the run, bit for bit on a CPU.
"""

import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .data import Data, consecutive_rows, seed_of
from .errors import UsageError, UserError, is_out_of_memory
from .estimators import listed
from .metrics import Metric
from .model import Batch, Precision, check_precision, has_fixed_shapes, running_in
from .objective import Objective, random_subsets
from .processes import Processes, SharedBatchNorm, signals
from .reports import Reports, line
from .run import Run, Selection
from .schedules import Schedule, constant
from .stats import JOINT, Totals
from .supervision import complete_examples, composed_rows
from .watch import Watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a run goes. `batch_size` is the whole step's, over all processes; `approx_m` is the number of random subsets.

    pairs_per_batch: see `mvae.supervision.composed_rows`; 0 for batches of no fixed composition.
    select: the best model is that of the epoch whose validation has the least "loss", λ and all; or the greatest ELBO
        of the "joint" term, which has no λ.
    precision: "bf16" runs the networks in bfloat16; see `train_step`.
    compile: whether the step is compiled (torch.compile), and on CUDA captured as a graph.
    sync_batchnorm: under torchrun, batch norm takes its statistics over all processes' examples, not over each one's.
    resume: whether to go on from the latest state in `out_dir`, if there is one.
    log_interval: steps between two looks at the loss, for the bar; on a GPU also for values that aren't finite.

    `out_dir` and `device` may be given as strings. The latest state is saved at the end of each epoch, when a signal
    asks the run to stop, and every `save_every` minutes.

    Raises UsageError for a value that can't be, and if `compile` meets a CPU without a C++ compiler.
    """

    epochs: int
    batch_size: int
    approx_m: int = 0
    pairs_per_batch: int = 0
    seed: int = 0
    select: Selection = "loss"
    precision: Precision = "fp32"
    compile: bool = False
    sync_batchnorm: bool = False
    resume: bool = False
    log_interval: int = 100
    save_every: float = 10.0
    out_dir: Path = Path("trained_models")
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("approx_m", 0), ("seed", 0), ("log_interval", 1)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise UsageError(f"`{name}` is {value!r}, and a whole number, {least} or more, is wanted")
            object.__setattr__(self, name, int(value))
        if not self.save_every > 0:
            raise UsageError(f"`save_every` is {self.save_every!r}, and a number of minutes above 0 is wanted")
        if self.select not in get_args(Selection):
            raise UsageError(f"`select` is {self.select!r}, and {' or '.join(get_args(Selection))} is wanted")
        check_precision(self.precision)
        for name, kind, wanted in (("out_dir", Path, "a folder"), ("device", torch.device, "one such as cpu or cuda")):
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except (RuntimeError, TypeError):
                raise UsageError(f"`{name}` is {getattr(self, name)!r}, and {wanted} is wanted") from None
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"`device` is {self.device}, and there is no CUDA device that torch can use")
        if self.compile and self.sync_batchnorm:
            raise UsageError("`compile` takes no step that processes share within: go without it or `sync_batchnorm`")
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if self.compile and self.device.type == "cpu" and not shutil.which(compiler):
            remedy = "install one, name yours in the variable CXX, or go without `compile`"
            raise UsageError(f"`compile` needs a C++ compiler, and there is no {compiler}: {remedy}")


class Stopped(UserError):
    """The run was asked to stop by a signal, and has saved its state."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


def train_step(
    objective: Callable[..., tuple[Tensor, Totals]],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    present: Mapping[str, Tensor] | None = None,
    *,
    beta: Tensor | float = 1.0,
    subsets: Sequence[Sequence[str]] | Tensor = (),
    noise: Tensor | None = None,
    precision: Precision = "fp32",
    share: float = 1.0,
) -> Totals:
    """One step of gradient descent on the negative sum of the ELBO terms; returns the sums of its parts.

    On a CPU the weights stay as they were where the loss isn't finite.

    Args:
        objective: an Objective, or one that is wrapped or compiled.
        optimizer: of its parameters, with zero gradients (as this function leaves them).
        batch, present, beta, subsets, noise: as `Objective.forward` takes them.
        precision: "bf16" runs the networks in bfloat16, and all log-probabilities and sums in float32.
        share: of several processes, this one's examples divided by the mean number of all processes'.
    """
    # Encode each modality once, fuse the experts of every term, draw one z for each, decode what each term scores.
    with running_in(precision, _device_of(batch)):
        loss, totals = objective(batch, beta, subsets, present, noise)
    # The gradient of the batch's mean. DistributedDataParallel averages it over the processes meanwhile.
    (loss * share).backward()
    # A loss that isn't finite must not reach the weights. On a GPU nobody looks: the look would make every step wait.
    if loss.device.type != "cpu" or loss.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return totals


def fit(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    train: Data,
    validation: Data,
    options: Options,
    *,
    beta: Schedule,
    lr: Schedule = constant(),  # noqa: B008 (a schedule has no state)
    metrics: Mapping[str, Metric] | None = None,
    experiment: str = "mvae",
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Trains `objective`; after each epoch validates at β = 1, and keeps the best model and the latest state.

    It leaves the objective and its model in evaluation mode, with the weights of the last step.
    Under torchrun each process takes its share of every batch, and the first one writes.

    Args:
        optimizer: of the objective's parameters, and of nothing else.
        beta: β as a function of the epochs done, which each step itself adds to; see `mvae.schedules`.
        lr: a factor of the optimiser's own rates, as a function of the same.
        metrics: by name, what to measure on validation examples; see `mvae.metrics`.
        experiment: the name written into the checkpoints, which refuse to be loaded as another's.
        settings: plain values to record; `options.resume` asks that they be those of the checkpoint.

    Returns:
        The epochs' records, as in stats.jsonl.

    Raises:
        UsageError: settings, optimiser or schedules that don't fit the objective, the data or the checkpoint; a run in
            `out_dir` that would be overwritten; or data whose first batch, or whose smallest or largest stored values,
            the model doesn't take.
        UserError: a loss or gradient that isn't finite, or a loss that says that the run diverges (no file is
            overwritten), or a file that can't be written.
        Stopped: SIGINT, SIGTERM or SIGHUP, after saving; resuming goes on from that very step.
    """
    owned = {id(weight) for weight in objective.parameters()}
    if not owned.issuperset(id(weight) for group in optimizer.param_groups for weight in group["params"]):
        raise UsageError("`optimizer` holds weights that aren't `objective`'s: it is to be made of its parameters()")
    modalities = set(objective.model.modalities)
    if options.select == JOINT and JOINT not in objective.names:
        raise UsageError("`select` is joint, and `objective` has no term that is given every modality")
    if options.select == JOINT and validation.present and not complete_examples(validation.present).any():
        raise UsageError("`select` is joint, and no validation example has every modality")
    if wrong := [name for name in metrics or {} if name == "loss" or "/" in name]:
        raise UsageError(f"{', '.join(wrong)} in `metrics`: a name is not to be loss, nor to have a / in it")
    processes = Processes.join(options.device)
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in objective.modules())
    least = 2 if has_batch_norm else 1
    if min(options.batch_size, len(train)) < least * processes.world:
        why = "these networks have batch norm: " if has_batch_norm else ""
        raise UsageError(f"{why}`batch_size` is to give each process {least} examples or more, and so is the data set")
    facts = {
        "n_train": len(train),
        "data_crc32": train.checksum(),
        "objective_crc32": objective.checksum(),
        "optimizer": type(optimizer).__name__,
        "lr": [float(group["lr"]) for group in optimizer.param_groups],
        **{
            name: getattr(options, name)
            for name in ("batch_size", "approx_m", "pairs_per_batch", "seed", "select", "precision", "compile")
        },
    }
    if options.sync_batchnorm and processes.world > 1:
        if train.present is not None:
            raise UsageError("`sync_batchnorm` takes complete examples: a process may have none that has a modality")
        SharedBatchNorm.become(objective)
    train, validation = train.to(options.device), validation.to(options.device)
    objective.to(options.device).train()
    for data, what in ((train, "training"), (validation, "validation")):
        extremes = data.extremes()
        try:
            rows = torch.cat([consecutive_rows(data, options.batch_size)[0], extremes]).unique()
            objective.model.check(*data.batch(rows))
        except UsageError as error:
            which = listed(["the first batch", *map(str, extremes.tolist())])
            raise UsageError(f"{what} examples ({which}): {error}") from error.__cause__
    run = Run(
        objective, optimizer, out_dir=options.out_dir, experiment=experiment, settings=settings or {}, facts=facts
    )
    watch = Watch(run)
    with (
        processes.together(),
        run.locked(processes.rank),
        closing(Reports(objective.model, options.out_dir)) as reports,
        signals(held=processes.world > 1) as caught,  # under torchrun a second signal comes from torchrun itself
    ):
        run.start(options.resume, processes)
        if processes.rank == 0:
            run.check_course(beta, lr)
            # A folder that can't be written is better known before the first step.
            reports.write(run.history, None if run.step else validation)
            if run.epoch > options.epochs:
                done = f"{run.epoch - 1} epoch{'s' * (run.epoch > 2)}"
                print(f"nothing is left to do: {options.out_dir} holds a run of {done}", flush=True)
        step_module: Callable[..., tuple[Tensor, Totals]] = objective
        fixed = options.compile or has_fixed_shapes(options.device)
        if processes.world > 1:
            # A network has no gradient if a process's examples lack its modality, or no term is given or scores it.
            lacking = train.present is not None and not fixed
            idle = any(modalities.difference(*names) for names in zip(*objective.terms, strict=True))
            step_module = DistributedDataParallel(objective, find_unused_parameters=lacking or idle)
        if options.compile:
            step_module = torch.compile(step_module, mode="reduce-overhead" if options.device.type == "cuda" else None)
        beta_now = torch.zeros((), device=options.device)

        def save_or_stop() -> None:
            """Saves the state if it is time to, or if a signal asks any of the processes to stop; that raises Stopped.

            All processes call this at the same places, after the same steps.
            """
            number, due = processes.agree(caught.number or processes.abandoned(), run.is_due(options.save_every))
            if number or due:
                watch.check()
                run.sums = processes.sum_in_first(run.sums)
                with caught.hold():
                    if processes.rank == 0:
                        run.save()
                    processes.agree()  # nobody ends before the state is saved
            if number:
                where = f"epoch {run.epoch}, step {run.step} of {len(batches)}"
                raise Stopped(f"stopped at {where}; the state is saved: `resume` goes on from it", int(number))

        while run.epoch <= options.epochs:
            rates, batch_size = run.begin_epoch()
            options = dataclasses.replace(options, batch_size=batch_size)
            batches = composed_rows(train, batch_size, options.pairs_per_batch, seed_of(options.seed, run.epoch))
            subsets = [_subsets(objective, options, run.epoch, step) for step in range(len(batches))]
            # As masks they have the same shapes at every step, and are on the device before the first.
            masks = torch.stack([*map(objective.mask, subsets)]).to(options.device) if fixed and subsets[0] else None
            started = time.perf_counter() - run.seconds
            for rows in _bar(batches[run.step :], run, len(batches), options, processes.rank, caught.say):
                # Of several processes each takes its examples' share of the noise that one alone would draw. What else
                # a step draws, pixels and dropout, is each one's own, by a seed that isn't the noise's.
                noise, own = None, 0
                if processes.world > 1:
                    torch.manual_seed(seed_of(options.seed, run.epoch, run.step, 0))
                    noise = objective.noise(len(rows), len(subsets[run.step]))
                    noise, own = noise[..., processes.rank :: processes.world, :], 1 + processes.rank
                torch.manual_seed(seed_of(options.seed, run.epoch, run.step, own))
                more = subsets[run.step] if masks is None else masks[run.step]
                mine = rows[processes.rank :: processes.world]
                batch, present = train.batch(mine)
                run.step += 1
                t = run.epoch - 1 + run.step / len(batches)
                run.beta, run.lr = float(beta(t)), float(rates[0] * lr(t))  # plain, as checkpoints have it
                beta_now.fill_(run.beta)  # a tensor: a compiled step would take each new number for a new program
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = float(rate * lr(t))
                with _explained(objective, batch, present):
                    totals = train_step(
                        step_module, optimizer, batch, present,
                        beta=beta_now, subsets=more, noise=noise, precision=options.precision,
                        share=len(mine) * processes.world / len(rows),
                    )  # fmt: skip
                sums = totals.vector()
                asked = run.step % options.log_interval == 0 or run.step == len(batches)
                watch.look(sums, raise_now=asked or options.device.type == "cpu")
                run.add(sums)
                run.seconds = time.perf_counter() - started
                save_or_stop()
            watch.check()
            run.sums = processes.sum_in_first(run.sums)
            processes.share_buffers(objective)  # else each process would validate its own running statistics
            try:
                found = validate(objective, validation, options, metrics or {}, processes, save_or_stop)
            except KeyboardInterrupt:  # a signal came a second time: what the epoch's steps made is not lost
                with caught.hold():
                    run.save()
                raise
            if not all(map(math.isfinite, found.values())):
                bad = [name for name, value in found.items() if not math.isfinite(value)]
                watch.stop([f"validation's {name}" for name in sorted(bad, key=lambda name: "/" not in name)])
            watch.check_course(found["loss"])
            best = run.end_epoch(processes.sum(run.sums), found)
            with caught.hold():
                if processes.rank == 0:
                    run.save(best=best)
                    reports.write(run.history, validation)
                    caught.say(line(run.history[-1], objective.names, best=best))
    objective.eval()
    return run.history


@torch.no_grad()
def validate(
    objective: Objective,
    data: Data,
    options: Options,
    metrics: Mapping[str, Metric],
    processes: Processes,
    between: Callable[[], None],
) -> dict[str, float]:
    """The means of `Totals.means` and of the metrics over `data`, at β = 1, with z drawn by the same seed each time.

    A metric is a mean over the examples that have all modalities. Each process takes its share of the batches, and all
    call `between` after each round of them.
    """
    objective.eval()
    size = len(Totals.zeros(objective.names, objective.model.modalities).vector())
    sums = torch.zeros(size + 2 * len(metrics), dtype=torch.float64, device=options.device)
    for i, rows in enumerate(consecutive_rows(data, options.batch_size)):
        if i % processes.world == processes.rank:
            torch.manual_seed(seed_of(options.seed, 0, i))
            batch, present = data.batch(rows)
            with running_in(options.precision, options.device), _explained(objective, batch, present):
                _, totals = objective(batch, 1.0, (), present)
            sums[:size] += totals.vector()
            whole = torch.ones(len(rows), dtype=torch.bool, device=options.device)
            for here in (present or {}).values():
                whole = whole & here
            for j, metric in enumerate(metrics.values()):
                values = metric(objective.model, batch)
                sums[size + 2 * j] += torch.where(whole, values, 0).sum()
                sums[size + 2 * j + 1] += whole.sum()
        if i % processes.world == processes.world - 1:
            between()
    objective.train()
    sums = processes.sum(sums)
    found = Totals.of(sums[:size], objective.names, objective.model.modalities).means()
    measured = dict(zip(metrics, sums[size:].view(-1, 2).tolist(), strict=True))
    return found | {name: total / n for name, (total, n) in measured.items() if n}


@contextmanager
def _explained(objective: Objective, batch: Batch, present: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Where torch fails on a batch, such as on a label that is no class, has the model say what is wrong with it.

    Raises UserError where the step can't be compiled.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        objective.model.check(batch, present)
        if "TorchDynamoException" in [kind.__name__ for kind in type(error).__mro__]:
            reason = str(error).splitlines()[0]
            raise UserError(f"torch can't compile the step on this machine: go without `compile` ({reason})") from error
        raise


def _subsets(objective: Objective, options: Options, epoch: int, step: int) -> list[tuple[str, ...]]:
    """The random subsets of a step."""
    rng = np.random.default_rng(seed_of(options.seed, epoch, step))
    return random_subsets(objective.model.modalities, options.approx_m, rng)


def _device_of(batch: Batch) -> torch.device:
    return next(iter(batch.values())).device


def _bar(
    batches: list[Tensor], run: Run, n: int, options: Options, rank: int, say: Callable[[str], object]
) -> Iterator[Tensor]:
    """The batches, with a progress bar on a terminal and plain lines elsewhere."""
    terminal = sys.stderr.isatty()
    bar = tqdm(batches, f"epoch {run.epoch}", n, initial=run.step, leave=False, disable=rank > 0 or not terminal)
    for rows in bar:
        yield rows
        if rank == 0 and run.step % options.log_interval == 0:
            loss = run.mean_loss()
            bar.set_postfix_str(f"loss {loss:.2f}")
            if not terminal:
                speed = run.step * len(rows) / run.seconds
                say(f"epoch {run.epoch}  step {run.step}/{n}  mean loss {loss:.2f}  {speed:.0f} examples/s")
