"""Run: the plumbing around a training loop of your own.

    with Run("mnist", objective, optimizer, config) as run:
        for _ in run.epochs(config.epochs):
            for batch, present in run.batches(train, config.batch_size):
                run.set(lr=config.lr * rate(run.t), beta=beta(run.t))
                loss, parts = run.objective(batch, run.beta, present=present)
                run.backward(loss, parts)
                run.step()
            run.validate(validation, metrics)

Shuffles, noise and subsets are seeded by (seed, epoch, step, rank). Nothing random is stored, so a resumed run is, bit
for bit on a CPU, the run that never stopped.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import cli
from ..data.dataset import Data, consecutive_rows, seed_of
from ..data.supervision import complete_examples, composed_rows
from ..errors import UsageError, UserError
from ..files import write_atomically
from ..model import Batch, autocast
from ..objective import JOINT, Objective, Totals, random_subsets
from . import checkpoint
from .config import Training
from .device import resolve
from .distributed import Processes, parallel, together
from .metrics import Metric
from .reports import Reports, line, progress
from .resume import DIVERGED, facts_of, only_writer, saved_state
from .signals import Caught, catching
from .validation import check_good, check_means, explained, measured

log = logging.getLogger(__name__)

STATE = ("epoch", "done", "t", "lr", "beta_now", "seconds", "start", "best", "history", "sums", "terms")
"""The attributes of a Run that its checkpoint holds."""


class Stopped(UserError):
    """A signal asked the run to stop, and its state is saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


class Run:
    """A training run: its place in the loop, its files, and the processes that share it.

    epoch: counts from 1. done: the step's number in it, of n_steps. t: fractional epochs, including this step.
    beta: a tensor; lr: a float. history: the epochs' records, as in stats.jsonl. rank: of this process.

    Args:
        name: experiment's name; resuming another experiment's checkpoint is refused.
        objective: is moved to the device. Modules in evaluation mode stay there, unless the whole model is.
        optimizer: of the objective's parameters.
        facts: plain values to record in addition to the Config.

    Raises:
        UsageError: an optimizer, data or settings that don't fit; a folder that holds another run.
        UserError: a loss or gradient that isn't finite, or a loss that diverges (the last good state is kept); a file
            that can't be written.
        Stopped: after a signal; resuming continues from that step.
    """

    def __init__(
        self,
        name: str,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        config: Training,
        *,
        facts: Mapping[str, Any] | None = None,
    ):
        owned = {id(weight) for weight in objective.parameters()}
        if not owned.issuperset(id(weight) for group in optimizer.param_groups for weight in group["params"]):
            raise UsageError("build the optimizer from objective.parameters()")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UsageError("LBFGS computes the loss several times a step, which a Run can't: use another optimizer")
        if config.select == JOINT and JOINT not in objective.names:
            raise UsageError("select joint needs a term whose inputs are all modalities")
        self.device = config.device()
        self.config, self.precision = config, resolve(config.precision, self.device)
        self.name, self.out_dir = name, config.out_dir
        self.settings, self.facts = cli.plain(self.config), {**(facts or {}), **facts_of(objective, optimizer)}
        self.bare, self.model, self.optimizer = objective.to(self.device), objective.model, optimizer
        if not self.model.training:
            self.model.train()
        self.epoch, self.done, self.n_steps, self.n_epochs = 1, 0, 0, 0
        self.t, self.lr, self.beta_now, self.seconds = 0.0, optimizer.param_groups[0]["lr"], 1.0, 0.0
        self.beta = torch.ones((), device=self.device)  # a new float at each step would recompile
        self.start = self.best = math.inf  # the loss of the first step, and the best epoch's score
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(0).double()  # of this epoch's steps, as Totals.vector
        self.terms: tuple[str, ...] = ()  # of those sums
        self.last: Tensor | None = None  # the last step's sums, or those of the first bad step
        self.pending = False  # gradients since the last step
        self.saved: dict[str, Any] | None = None  # the checkpoint's facts, kept states and optimizer
        self.kept: dict[str, Any] = {}
        self.saved_at = time.monotonic()
        self._data: dict[str, tuple[Data, Data]] = {}  # for training and validation: as given, and on the device
        self._subsets: tuple[tuple[int, int], Tensor] | None = None

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            stack.enter_context(only_writer(self.out_dir, wait=self.config.wait))
            self.processes = Processes.join(self.device)
            self.rank = self.processes.rank
            stack.enter_context(together())
            # Under torchrun a second signal comes from torchrun itself.
            self.caught: Caught = stack.enter_context(catching(held=self.processes.world > 1))
            self._resume()
            if self.rank == 0:  # fails before the first step if the folder can't be written
                self.reports = stack.enter_context(closing(Reports(self.model, self.out_dir, self.history)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def keep(self, **objects: Any) -> None:
        """Save and restore further objects that have a state_dict, such as a scheduler or averaged weights.

        Call it before `epochs`. Raises UsageError if the run that is resumed didn't keep them.
        """
        for name, value in objects.items():
            if self.saved:
                if name not in self.saved["kept"]:
                    raise UsageError(f"the checkpoint in {self.out_dir} doesn't hold {name}, which keep() names")
                value.load_state_dict(self.saved["kept"][name])
            self.kept[name] = value
        if self.saved:  # a new scheduler has set the rate
            self.optimizer.load_state_dict(self.saved["optimizer"])

    def epochs(self, n: int) -> Iterator[int]:
        """Yield the numbers of the epochs that are left of n. Each must end in `validate`."""
        if self.saved and (lost := sorted(self.saved["kept"].keys() - self.kept.keys())):
            raise UsageError(f"the checkpoint in {self.out_dir} holds {', '.join(lost)}: pass them to keep()")
        self.n_epochs = n
        if self.epoch > n:
            self._say(f"nothing left to do: {self.out_dir} holds a run of {self.epoch - 1} epochs")
        while self.epoch <= n:
            epoch = self.epoch
            yield epoch
            if self.epoch == epoch:
                raise UsageError("each epoch must end in run.validate(...)")

    def batches(
        self, data: Data, batch_size: int, pairs: int = 0
    ) -> Iterator[tuple[dict[str, Tensor], Mapping[str, Tensor] | None]]:
        """Yield this epoch's batches that are not done yet, with the presence masks; this process's share of each.

        An incomplete last batch is dropped: of 99 examples in batches of 50, each epoch leaves out another 49.
        Between two steps it saves the state when that is due, and stops if a signal has asked for it; several processes
        do so after the same step. pairs: see `mvae.data.supervision.composed_rows`.
        """
        rank, world, seed = self.rank, self.processes.world, self.config.seed
        data = self._on_device(data, batch_size, "training")
        order = composed_rows(data, batch_size, pairs, seed_of(seed, self.epoch))
        self.n_steps = len(order)
        started = time.perf_counter() - self.seconds
        for rows in self._progress(order):
            torch.manual_seed(seed_of(seed, self.epoch, self.done, 0 if world == 1 else 1 + rank))
            mine, self.n_rows = rows[rank::world], len(rows)
            self.share = len(mine) * world / len(rows)
            batch, present = data.batch(mine)
            self.done += 1
            self.t = self.epoch - 1 + self.done / len(order)
            yield batch, present
            self.seconds = time.perf_counter() - started
            if not self.pending:
                self._save_or_stop(between_steps=True)

    def set(self, *, lr: float | None = None, beta: float | None = None) -> None:
        """Set the learning rate of all parameter groups, or β, for the next step."""
        if beta is not None:
            self.beta_now = float(beta)
            self.beta.fill_(self.beta_now)
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = float(lr)
        self.lr = float(self.optimizer.param_groups[0]["lr"])

    def random_subsets(self, k: int) -> Tensor:
        """Return this step's k random subsets of modalities, bool (k, modalities), on the device."""
        if self._subsets is None or self._subsets[0] != (self.epoch, k):  # an epoch's at once, so that no step copies
            rngs = [np.random.default_rng(seed_of(self.config.seed, self.epoch, step)) for step in range(self.n_steps)]
            masks = torch.stack([random_subsets(len(self.model.modalities), k, rng) for rng in rngs])
            self._subsets = (self.epoch, k), masks.to(self.device)
        return self._subsets[1][self.done - 1]

    def objective(
        self,
        batch: Batch,
        beta: Tensor | float = 1.0,
        subsets: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Totals]:
        """Return the loss, the negative sum of the ELBO terms, and its parts; see `Objective.forward`.

        With autocast, torch.compile and DistributedDataParallel as the Config says. A captured CUDA graph overwrites
        both at the next call.
        """
        noise, world = None, self.processes.world
        if world > 1:  # each process takes its examples' share of the noise that one alone would draw
            seed = seed_of(self.config.seed, self.epoch, self.done - 1, 0)
            generator = torch.Generator(self.device).manual_seed(seed)
            noise = self.bare.noise(self.n_rows, 0 if subsets is None else len(subsets), generator)
            noise = noise[..., self.rank :: world, :]
        if self.config.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(self.precision, self.device), explained(self.model, batch, present):
            return self._forward(batch, beta, subsets, present, noise)

    def backward(self, loss: Tensor, parts: Totals) -> None:
        """Add the gradient of the loss, and the parts to the epoch's sums.

        On a CPU it raises UserError if a part isn't finite. On a GPU that is checked before a save only, to avoid a
        synchronisation in each step.
        """
        # The gradient of the whole batch's mean: DistributedDataParallel averages over the processes.
        loss.backward(torch.full_like(loss, self.share))
        sums = parts.vector()
        self.terms = parts.terms
        if self.start == math.inf:
            self.start = float(sums[0] / sums[1])
        if self.last is None:
            self.last = sums
        else:  # in three kernels
            self.last = torch.where(torch.linalg.vector_norm(self.last, math.inf) < math.inf, sums, self.last)
        if self.device.type == "cpu" and not sums.isfinite().all():
            self._check_good()
        self.sums = self.sums + sums if len(self.sums) else sums
        self.pending = True

    def step(self) -> None:
        """Take a step of the optimizer with the gradients so far, and zero them."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pending = False

    def validate(self, data: Data, metrics: Mapping[str, Metric] | None = None) -> None:
        """End the epoch: measure `data` at β = 1, record and report the epoch, and save the state, and the model if it
        is the best so far. metrics: by name, what else to measure; see `mvae.run.metrics`.
        """
        metrics = metrics or {}
        if self.pending or not len(self.sums):
            raise UsageError("run.validate needs run.backward(...), then run.step(), in each epoch")
        if wrong := [name for name in metrics if name == "loss" or "/" in name]:
            raise UsageError(f"a metric must not be named 'loss' or contain '/', got {', '.join(wrong)}")
        self._check_good()
        self.processes.share_buffers(self.bare)  # otherwise each would validate its own running statistics
        config = self.config
        # On a GPU, launches dominate small batches. Without gradients four times a step's examples fit.
        size = config.batch_size * (1 if self.device.type == "cpu" else 4)
        try:
            data = self._on_device(data, size, "validation")
            found = measured(
                self.bare, data, metrics, batch_size=size, seed=config.seed, precision=self.precision,
                processes=self.processes, between=self._save_or_stop,
            )  # fmt: skip
        except (KeyboardInterrupt, UsageError, torch.OutOfMemoryError):  # such as a second signal: the steps are kept
            self.save()
            raise
        parts = {name: value for name, value in found.items() if name not in metrics}
        self._ending(lambda: check_means(parts, self.start, "validation"))
        if bad := [name for name in metrics if not math.isfinite(found.get(name, 0.0))]:
            log.warning("not finite in epoch %d, recorded as null: %s", self.epoch, ", ".join(bad))
        train = Totals.of(self.processes.sum(self.sums).cpu(), self.terms, self.model.modalities)
        record = {
            "epoch": self.epoch, "beta": self.beta_now, "lr": self.lr, "seconds": self.seconds,
            "examples_per_second": train.n.item() / self.seconds,
            **{f"train/{name}": value for name, value in train.means().items()},
            **{f"validation/{name}": None if name in bad else value for name, value in found.items()},
        }  # fmt: skip
        score = self._score(record)
        best, self.best = score < self.best, min(self.best, score)
        self.history.append(record)
        self.epoch, self.done, self.seconds, self.sums = self.epoch + 1, 0, 0.0, torch.zeros(0).double()
        with self.caught.hold():
            self.save(best=best)
            if self.rank == 0:
                self.reports.write(record, data)
        self._say(line(record, self.n_epochs, self.bare.names, best=best))
        if record["beta"] < 1 and len(self.history) == 1:
            self._say("the validation loss is at β = 1: it is higher than the training loss while β rises")

    def save(self, *, best: bool = False) -> None:
        """Save the state; if it is the best, save the model first. Raises UserError if the state isn't good."""
        self._check_good()
        self.sums = self.processes.sum_in_first(self.sums)
        with self.caught.hold():
            if self.rank == 0:
                content = {"settings": self.settings, "facts": self.facts, "n_latents": self.model.n_latents}
                content["model"] = self.model.state_dict()
                if best:
                    trained = {
                        "epoch": self.history[-1]["epoch"],
                        "validation_loss": self.history[-1]["validation/loss"],
                        "training_seconds": sum(record["seconds"] for record in self.history),
                    }
                    checkpoint.save(self.out_dir / checkpoint.BEST, self.name, content | trained)
                content |= {field: getattr(self, field) for field in STATE}
                content["kept"] = {name: value.state_dict() for name, value in self.kept.items()}
                content["optimizer"] = self.optimizer.state_dict()
                checkpoint.save(self.out_dir / checkpoint.LATEST, self.name, content)
            self.processes.agree()  # nobody ends before the state is saved
        self.saved_at = time.monotonic()

    @property
    def best_epoch(self) -> int:
        """The epoch of the best model; 0 before the first."""
        return min(self.history, key=self._score)["epoch"] if self.history else 0

    # Helpers of the methods above.

    def _resume(self) -> None:
        """Restore the state of the checkpoint in `out_dir`, which the first process reads."""
        saved = saved_state(self.config, self.name) if self.rank == 0 else None
        saved, settings = self.processes.from_first((saved, self.settings))
        if differ := [name for name, value in settings.items() if self.settings[name] != value]:
            raise UsageError(f"the processes of a run need the same settings; {', '.join(differ)} differ")
        if saved is None:
            if self.rank == 0:
                (self.out_dir / DIVERGED).unlink(missing_ok=True)
            if self.config.resume and not self.config.wait:
                self._say(f"no checkpoint in {self.out_dir} yet: starting from the beginning")
            return
        self.saved = saved
        self._check_fact("objective_crc32", "terms, weights or importance samples")
        self._check_fact("optimizer", "optimizer options")
        path = self.out_dir / checkpoint.LATEST
        checkpoint.set_weights(self.model, saved, path)
        checkpoint.check_optimizer(saved["optimizer"], self.optimizer, path)
        self.optimizer.load_state_dict(saved["optimizer"])
        for field in STATE:
            setattr(self, field, saved[field])
        self.sums = self.sums.to(self.device) if self.rank == 0 else torch.zeros_like(self.sums, device=self.device)
        self.saved = {"facts": saved["facts"], "kept": saved["kept"], "optimizer": self.optimizer.state_dict()}

    def _check_fact(self, name: str, what: str) -> None:
        if self.saved and self.saved["facts"][name] != self.facts[name]:
            raise UsageError(f"the run in {self.out_dir} was started with other {what}: use another out_dir")

    def _on_device(self, data: Data, batch_size: int, use: str) -> Data:
        """Return the data for "training" or "validation" on the device. On first use, check that everything fits."""
        if use not in self._data or self._data[use][0] is not data:
            if use == "training":
                self._begin(data, batch_size)
            elif self.config.select == JOINT and data.present and not complete_examples(data.present).any():
                raise UsageError("select joint needs validation examples with every modality")
            moved = data.to(self.device)
            first, extremes = consecutive_rows(moved, batch_size)[0], moved.extremes()
            try:
                self.model.check(*moved.batch(torch.cat([first, extremes]).unique()))
            except UsageError:
                self._refuse(moved, use, {**{f"example {row}": row for row in extremes}, "the first batch": first})
            self._data[use] = data, moved
        return self._data[use][1]

    def _refuse(self, data: Data, use: str, parts: Mapping[str, Tensor]) -> None:
        """Raise UsageError with the first of these parts of the data that doesn't fit the model."""
        for which, rows in parts.items():
            try:
                self.model.check(*data.batch(rows.view(-1)))
            except UsageError as error:
                raise UsageError(f"{use} data, {which}: {error}") from error.__cause__

    def _begin(self, data: Data, batch_size: int) -> None:
        """Prepare to train on the data, and print what is trained, where and how."""
        world = self.processes.world
        has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.bare.modules())
        least = 2 if has_batch_norm else 1
        if min(batch_size, len(data)) < least * world:
            why = " (these networks have batch norm)" if has_batch_norm else ""
            raise UsageError(f"a batch needs at least {least} examples per process{why}, got {batch_size}, {len(data)}")
        crc = self.processes.from_first(data.checksum() if self.rank == 0 else "")
        self.facts |= {"n_train": len(data), "data_crc32": crc}
        self._check_fact("data_crc32", "training data")
        self._forward = parallel(self.bare, data.present, world, self.config.compile)
        n = sum(weight.numel() for weight in self.bare.parameters())
        n_threads = torch.get_num_threads()
        threads = f" ({n_threads} thread{'s' * (n_threads > 1)})" * (self.device.type == "cpu")
        machine = f"{world} x " * (world > 1) + f"{self.device}{threads}, {self.precision}"
        size = f"{self.n_epochs} epochs of {len(data):,} examples, {n / 1e6:.2f}M parameters"
        self._say(f"{self.name}: {size}, {machine}, writing to {self.out_dir}")

    def _progress(self, order: list[Tensor]) -> Iterator[Tensor]:
        """Yield the rows of the steps that are left, with progress reports from the first process."""
        if self.rank > 0:
            return iter(order[self.done :])
        return progress(
            order,
            f"epoch {self.epoch}/{self.n_epochs}",
            done=self.done,
            more=(self.n_epochs - self.epoch) * len(order),
            every=self.config.log_interval,
            loss=lambda: (self.sums[0] / self.sums[1]).item(),
            say=self._say,
        )

    def _say(self, text: str) -> None:
        if self.rank == 0:
            self.caught.say(text)

    def _save_or_stop(self, between_steps: bool = False) -> None:
        """Save the state if it is time, or if a signal asks to stop; then stop. The processes agree on it."""
        # Agreeing makes all processes wait for the slowest.
        every = 10 if self.processes.world > 1 and self.device.type == "cuda" else 1
        if between_steps and self.done % every and self.done < self.n_steps:
            return
        number, due = self.processes.agree(
            self.caught.number or self.processes.abandoned(),
            time.monotonic() - self.saved_at > 60 * self.config.save_every,
        )
        if number or due:
            self.save()
        if number:
            where = f"epoch {self.epoch}, step {self.done} of {self.n_steps}"
            raise Stopped(f"stopped in {where}; the state is saved: continue with --resume", int(number))

    def _score(self, record: Mapping[str, Any]) -> float:
        """Return the score that selects the best model; lower is better."""
        joint = self.config.select == JOINT
        return -record[f"validation/{JOINT}/elbo"] if joint else record["validation/loss"]

    def _check_good(self) -> None:
        last = None if self.last is None else Totals.of(self.last.cpu(), self.terms, self.model.modalities)
        self._ending(lambda: check_good(self.model, last, self.start))

    def _ending(self, check: Any) -> None:
        """Run a check. If it fails, leave a note in the folder for whoever resumes, and say where it failed."""
        try:
            check()
        except UserError as error:
            message = f"epoch {self.epoch}, step {self.done}: {error}"
            if (self.out_dir / checkpoint.LATEST).exists():
                write_atomically(self.out_dir / DIVERGED, f"{message}\n".encode())
            advice = "the last good state is kept; try a smaller --lr, or --precision fp32"
            raise UserError(f"{message}; {advice}") from None
