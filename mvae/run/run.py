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
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import cli
from ..data.dataset import Data, consecutive_rows, seed_of
from ..data.supervision import complete_examples, composed_rows
from ..errors import UsageError, UserError, is_out_of_memory
from ..files import locked, write_atomically
from ..model import Batch, autocast, evaluating, has_fixed_shapes
from ..objective import JOINT, Objective, Totals, random_subsets
from . import checkpoint
from .config import Training
from .device import resolve
from .distributed import Processes, is_first
from .evaluate import listed
from .metrics import Metric
from .reports import Reports, line
from .resume import DIVERGED, saved_state
from .signals import Caught, catching

log = logging.getLogger(__name__)

LIMIT = 100
"""A run diverges if its loss is this many times that of its first step (or 100 nats, if that is less)."""

STATE = ("epoch", "done", "t", "beta_now", "lr", "seconds", "start", "best", "history", "sums", "terms")
"""The attributes of a Run that its checkpoint holds."""


class Stopped(UserError):
    """A signal asked the run to stop, and its state is saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


class Run:
    """A training run: its place in the loop, its files, and the processes that share it.

    epoch: counts from 1. done: steps done in it, of n_steps. t: epochs done when this step ends. lr, beta: as set.
    history: the epochs' records, as in stats.jsonl. rank: this process's number under torchrun, else 0.

    Args:
        name: experiment, which a checkpoint records; another experiment's is refused.
        objective: is moved to the device. Modules in evaluation mode stay there, unless the whole model is.
        optimizer: of the objective's parameters.
        shared: several runs may use the folder, one after the other: wait for the lock instead of refusing.
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
        shared: bool = False,
        facts: Mapping[str, Any] | None = None,
    ):
        owned = {id(weight) for weight in objective.parameters()}
        if not owned.issuperset(id(weight) for group in optimizer.param_groups for weight in group["params"]):
            raise UsageError("build the optimizer from objective.parameters()")
        if config.select == JOINT and JOINT not in objective.names:
            raise UsageError("select joint needs a term whose inputs are all modalities")
        self.device = config.device()
        _check_compiler(config.compile, self.device)
        self.config = replace(config, precision=resolve(config.precision, self.device))
        self.precision = self.config.precision
        self.name, self.out_dir, self.shared = name, config.out_dir, shared
        self.model, self.optimizer = objective.model, optimizer
        self.bare = objective.to(self.device)
        if not self.model.training:
            self.bare.train()
        self.settings = cli.plain(self.config)
        self.facts = {**(facts or {}), **checkpoint.origin(), **_facts(objective, optimizer)}
        self.epoch, self.done, self.n_steps, self.n_epochs = 1, 0, 0, 0
        self.t, self.beta_now, self.lr, self.seconds = 0.0, 1.0, optimizer.param_groups[0]["lr"], 0.0
        self.beta = torch.ones((), device=self.device)  # a compiled step would take each new number for a new program
        self.start, self.best = math.inf, math.inf
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(0).double()  # of this epoch's steps, as Totals.vector
        self.terms: tuple[str, ...] = ()  # of those sums
        self.last: Tensor | None = None  # the last step's sums, or those of the first bad step
        self.pending = False  # gradients that no step has used
        self.saved: dict[str, Any] | None = None
        self.kept: dict[str, Any] = {}
        self.saved_at = time.monotonic()
        self._data: dict[int, tuple[Data, Data]] = {}
        self._forward: Callable[..., tuple[Tensor, Totals]] | None = None
        self._subsets: tuple[tuple[int, int], Tensor] | None = None

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            stack.enter_context(self._locked())
            self.processes = Processes.join(self.device)
            self.rank = self.processes.rank
            stack.enter_context(self.processes.together())
            # Under torchrun a second signal comes from torchrun itself.
            self.caught: Caught = stack.enter_context(catching(held=self.processes.world > 1))
            self._resume()
            if self.rank == 0:  # a folder that can't be written is better known before the first step
                self.reports = stack.enter_context(closing(Reports(self.model, self.out_dir, self.history)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock, in the first process, before it joins the others."""
        with ExitStack() as stack:
            if is_first():
                waiting = f"waiting for another run, which is training in {self.out_dir}"
                try:
                    stack.enter_context(
                        locked(self.out_dir / ".lock", (lambda: log.info(waiting)) if self.shared else None)
                    )
                except BlockingIOError:
                    raise UsageError(f"another run is writing to {self.out_dir}: use another out_dir") from None
                except OSError as error:
                    raise UserError(f"can't write {self.out_dir}: {error.strerror or error}") from None
            yield

    def _resume(self) -> None:
        """Restore the state of the checkpoint in `out_dir`, which the first process reads."""
        saved, settings = self.processes.from_first(
            (saved_state(self.config, self.name, shared=self.shared) if self.rank == 0 else None, self.settings)
        )
        if differ := [name for name, value in settings.items() if self.settings[name] != value]:
            raise UsageError(f"the processes of a run need the same settings; {', '.join(differ)} differ")
        if saved is None:
            if self.rank == 0:
                (self.out_dir / DIVERGED).unlink(missing_ok=True)
                if self.config.resume and not self.shared:
                    self.caught.say(f"no checkpoint in {self.out_dir} yet: starting from the beginning")
            return
        path = self.out_dir / checkpoint.LATEST
        self._compare(saved, "objective_crc32", "terms, weights or importance samples")
        self._compare(saved, "optimizer", "optimizer options")
        checkpoint.set_weights(self.model, saved, path)
        checkpoint.check_optimizer(saved["optimizer"], self.optimizer, path)
        self.optimizer.load_state_dict(saved["optimizer"])
        for field in STATE:
            setattr(self, field, saved[field])
        self.sums = self.sums.to(self.device) if self.rank == 0 else torch.zeros_like(self.sums, device=self.device)
        self.saved = {"facts": saved["facts"], "kept": saved["kept"]}

    def _compare(self, saved: Mapping[str, Any], fact: str, what: str) -> None:
        if saved["facts"][fact] != self.facts[fact]:
            raise UsageError(f"the run in {self.out_dir} has other {what}: use another out_dir")

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

    def epochs(self, n: int) -> Iterator[int]:
        """Yield the numbers of the epochs that are left of n. Each must end in `validate`."""
        if self.saved and (lost := sorted(self.saved["kept"].keys() - self.kept.keys())):
            raise UsageError(f"the checkpoint in {self.out_dir} holds {', '.join(lost)}: pass them to keep()")
        self.n_epochs = n
        if self.epoch > n and self.rank == 0:
            self.caught.say(f"nothing left to do: {self.out_dir} holds a run of {self.epoch - 1} epochs")
        while self.epoch <= n:
            epoch = self.epoch
            yield epoch
            if self.epoch == epoch:
                raise UsageError("each epoch must end in run.validate(...)")

    def batches(
        self, data: Data, batch_size: int, pairs: int = 0
    ) -> Iterator[tuple[Batch, Mapping[str, Tensor] | None]]:
        """Yield the batches of this epoch that are not done yet, with the presence masks; of each, this process's share.

        Between two steps it saves the state when that is due, and stops if a signal has asked for it. pairs: see
        `mvae.data.supervision.composed_rows`.
        """
        rank, world, seed = self.rank, self.processes.world, self.config.seed
        data = self._prepared(data, batch_size, training=True)
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
                self._save_or_stop()

    def set(self, *, lr: float | None = None, beta: float | None = None) -> None:
        """Set the learning rate of all parameter groups, or β, for the next step."""
        if beta is not None:
            self.beta_now = float(beta)
            self.beta.fill_(self.beta_now)
        for group in self.optimizer.param_groups if lr is not None else []:
            group["lr"] = lr
        self.lr = float(self.optimizer.param_groups[0]["lr"])

    def random_subsets(self, k: int) -> Tensor:
        """Return this step's k random subsets of modalities, bool (k, modalities), on the device."""
        if self._subsets is None or self._subsets[0] != (self.epoch, k):  # an epoch's at once: no step copies
            generators = [
                np.random.default_rng(seed_of(self.config.seed, self.epoch, step)) for step in range(self.n_steps)
            ]
            masks = torch.stack([random_subsets(len(self.model.modalities), k, rng) for rng in generators])
            self._subsets = (self.epoch, k), masks.to(self.device)
        return self._subsets[1][self.done - 1]

    def objective(
        self,
        batch: Batch,
        beta: Tensor | float = 1.0,
        subsets: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Totals]:
        """Return the loss, the negative sum of the ELBO terms, and its parts: `Objective.forward`, compiled and shared
        between processes as the Config asks."""
        assert self._forward
        noise, world = None, self.processes.world
        if world > 1:  # each process takes its examples' share of the noise that one alone would draw
            generator = torch.Generator(self.device).manual_seed(
                seed_of(self.config.seed, self.epoch, self.done - 1, 0)
            )
            n_subsets = 0 if subsets is None else len(subsets)
            noise = self.bare.noise(self.n_rows, n_subsets, generator)[..., self.rank :: world, :]
        graphs = self.config.compile and self.device.type == "cuda"
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(self.precision, self.device), self._explained(batch, present):
            loss, parts = self._forward(batch, beta, subsets, present, noise)
        if graphs:  # the next replay overwrites them
            loss, parts = (
                loss.clone(),
                parts._replace(**{name: getattr(parts, name).clone() for name in parts._fields[2:]}),
            )
        return loss, parts

    def backward(self, loss: Tensor, parts: Totals) -> None:
        """Add the gradient of the loss, and the parts to the epoch's sums. Raises UserError on a CPU if a part isn't
        finite; on a GPU that is noticed later, since looking would make every step wait."""
        # The gradient of the whole batch's mean: DistributedDataParallel averages over the processes.
        (loss * self.share).backward()
        sums = parts.vector()
        self.terms = parts.terms
        if self.start == math.inf:
            self.start = float(sums[0] / sums[1])
        self.last = sums if self.last is None else torch.where(self.last.isfinite().all(), sums, self.last)
        if self.device.type == "cpu" and not self.last.isfinite().all():
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
        is the best so far.

        metrics: by name, what else to measure; see `mvae.run.metrics`.
        """
        metrics = metrics or {}
        if self.pending or not len(self.sums):
            raise UsageError("an epoch needs run.backward(...) and, after the last one, run.step() before run.validate")
        if wrong := [name for name in metrics if name == "loss" or "/" in name]:
            raise UsageError(f"a metric must not be named 'loss' or contain '/', got {', '.join(wrong)}")
        self._check_good()
        self.processes.share_buffers(self.bare)  # otherwise each would validate its own running statistics
        try:
            data = self._prepared(data, self.config.batch_size)
            found = self._measured(data, metrics)
        except (KeyboardInterrupt, UsageError):  # a second signal, or bad validation data: the epoch's steps are kept
            self.save()
            raise
        bad = [name for name, value in found.items() if not math.isfinite(value) and name not in metrics]
        if bad:
            self._end("validation is not finite", sorted(bad, key=lambda name: "/" not in name))
        if found["loss"] > LIMIT * max(abs(self.start), 100.0):
            self._end("the run diverges", [f"validation loss {found['loss']:.3g}, after {self.start:.3g} at its start"])
        record = self._record(self.processes.sum(self.sums), found, metrics)
        score = self._score(record)
        best, self.best = score < self.best, min(self.best, score)
        self.history.append(record)
        self.epoch, self.done, self.seconds, self.sums = self.epoch + 1, 0, 0.0, torch.zeros(0).double()
        with self.caught.hold():
            self.save(best=best)
            if self.rank == 0:
                self.reports.write(record, data)
                self.caught.say(line(record, self.n_epochs, self.bare.names, best=best))

    def save(self, *, best: bool = False) -> None:
        """Save the state, and before it the best model if this is it. Raises UserError if the state isn't good: a part
        or weight that isn't finite, or a loss that diverges."""
        self._check_good()
        self.sums = self.processes.sum_in_first(self.sums)
        with self.caught.hold():
            if self.rank == 0:
                content = {"settings": self.settings, "facts": self.facts}
                content |= {"model": self.model.state_dict(), "n_latents": self.model.n_latents}
                if best:
                    last = self.history[-1]
                    trained = {
                        "epoch": last["epoch"],
                        "validation_loss": last["validation/loss"],
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

    def _prepared(self, data: Data, batch_size: int, *, training: bool = False) -> Data:
        """Return the data on the device. At first sight, check that the model takes them."""
        if id(data) not in self._data:
            if training:
                self._begin(data, batch_size)
            moved = data.to(self.device)
            extremes = moved.extremes()
            rows = torch.cat([consecutive_rows(moved, batch_size)[0], extremes]).unique()
            try:
                self.model.check(*moved.batch(rows))
            except UsageError as error:
                which = listed(["the first batch", *map(str, extremes.tolist())])
                what = "training" if training else "validation"
                raise UsageError(f"{what} examples ({which}): {error}") from error.__cause__
            joint = self.config.select == JOINT and not training
            if joint and data.present and not complete_examples(data.present).any():
                raise UsageError("select joint needs validation examples with every modality")
            self._data[id(data)] = data, moved
        return self._data[id(data)][1]

    def _begin(self, data: Data, batch_size: int) -> None:
        """Check the training data against the networks and the checkpoint, print the header, and prepare the step."""
        world = self.processes.world
        has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.bare.modules())
        least = 2 if has_batch_norm else 1
        if min(batch_size, len(data)) < least * world:
            why = " (these networks have batch norm)" if has_batch_norm else ""
            raise UsageError(
                f"need at least {least} examples per process in a batch{why}, got {batch_size}, {len(data)}"
            )
        crc = self.processes.from_first(data.checksum() if self.rank == 0 else "")
        self.facts |= {"n_train": len(data), "data_crc32": crc}
        if self.saved:
            self._compare(self.saved, "data_crc32", "training data")
        if self.rank == 0:
            n = sum(weight.numel() for weight in self.bare.parameters())
            machine = f"{self.device}, {torch.get_num_threads()} threads" if self.device.type == "cpu" else self.device
            if world > 1:
                machine = f"{world} processes, {machine} each"
            self.caught.say(
                f"{self.name}: {len(data)} training examples, {n / 1e6:.2f}M parameters, {machine}, {self.precision}, "
                f"writing to {self.out_dir}"
            )
        self._forward = self.bare
        fixed = self.config.compile or has_fixed_shapes(self.device)
        if world > 1:
            # A network has no gradient if a process's examples lack its modality, or no term uses it.
            lacking = data.present is not None and not fixed
            used = [set().union(*names) for names in list(zip(*self.bare.terms, strict=True))[:2]]
            unused = any(set(self.model.modalities) - names for names in used)
            self._forward = DistributedDataParallel(self.bare, find_unused_parameters=lacking or unused)
        if self.config.compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self._forward = torch.compile(self._forward, mode=mode)

    def _progress(self, order: list[Tensor]) -> Iterator[Tensor]:
        """Yield the rows of the steps that are left, with a progress bar on a terminal and plain lines elsewhere."""
        n, first, began = len(order), self.done, time.perf_counter()
        terminal = sys.stderr.isatty()
        title = f"epoch {self.epoch}/{self.n_epochs}"
        bar = tqdm(order[first:], title, n, initial=first, leave=False, disable=self.rank > 0 or not terminal)
        for rows in bar:
            yield rows
            if self.rank == 0 and self.done % self.config.log_interval == 0 and len(self.sums):
                loss = (self.sums[0] / self.sums[1]).item()
                pace = (time.perf_counter() - began) / (self.done - first)
                left = pace * ((self.n_epochs - self.epoch + 1) * n - self.done)
                bar.set_postfix_str(f"loss {loss:.2f}, {_duration(left)} left")
                if not terminal:
                    speed = f"{len(rows) / pace:.0f} examples/s"
                    self.caught.say(f"{title}  step {self.done}/{n}  loss {loss:.2f}  {speed}  {_duration(left)} left")

    def _save_or_stop(self) -> None:
        """Save the state if it is time, or if a signal asks to stop; then stop. The processes agree on it."""
        number, due = self.processes.agree(
            self.caught.number or self.processes.abandoned(),
            time.monotonic() - self.saved_at > 60 * self.config.save_every,
        )
        if number or due:
            self.save()
        if number:
            where = f"epoch {self.epoch}, step {self.done} of {self.n_steps}"
            raise Stopped(f"stopped in {where}; the state is saved: continue with --resume", int(number))

    @torch.no_grad()
    def _measured(self, data: Data, metrics: Mapping[str, Metric]) -> dict[str, float]:
        """Return the means over `data` at β = 1, of the objective's parts and of the metrics.

        z is drawn with the same seed each time. A metric's mean is over the examples that have all modalities.
        """
        n = len(self.bare.terms) * (len(self.model.modalities) + 1)
        sums = torch.zeros(2 + 2 * n, dtype=torch.float64, device=self.device)
        measured = torch.zeros(len(metrics), 2, dtype=torch.float64, device=self.device)
        world = self.processes.world
        with evaluating(self.bare):
            for i, rows in enumerate(consecutive_rows(data, self.config.batch_size)):
                if i % world == self.rank:
                    torch.manual_seed(seed_of(self.config.seed, 0, i))
                    batch, present = data.batch(rows)
                    with autocast(self.precision, self.device), self._explained(batch, present):
                        sums += self.bare(batch, 1.0, None, present)[1].vector()
                    whole = torch.ones(len(rows), dtype=torch.bool, device=self.device)
                    for here in (present or {}).values():
                        whole = whole & here
                    for j, metric in enumerate(metrics.values()):
                        values = metric(self.model, batch)
                        measured[j] += torch.stack([torch.where(whole, values, 0).sum(), whole.sum()])
                if i % world == world - 1:
                    self._save_or_stop()
        sums, measured = self.processes.sum(sums), self.processes.sum(measured)
        found = Totals.of(sums.cpu(), self.bare.names, self.model.modalities).means()
        return found | {name: total / n for name, (total, n) in zip(metrics, measured.tolist(), strict=True) if n}

    def _record(self, sums: Tensor, found: Mapping[str, float], metrics: Mapping[str, Metric]) -> dict[str, Any]:
        train = Totals.of(sums.cpu(), self.terms, self.model.modalities)
        bad = [name for name in metrics if not math.isfinite(found.get(name, 0.0))]
        if bad:
            log.warning("not finite in epoch %d, recorded as null: %s", self.epoch, ", ".join(bad))
        return {
            "epoch": self.epoch,
            "beta": self.beta_now,
            "lr": self.lr,
            "seconds": self.seconds,
            "examples_per_second": train.n.item() / self.seconds,
            **{f"train/{name}": value for name, value in train.means().items()},
            **{f"validation/{name}": None if name in bad else value for name, value in found.items()},
        }

    def _score(self, record: Mapping[str, Any]) -> float:
        """Return what is least in the epoch of the best model."""
        joint = self.config.select == JOINT
        return -record[f"validation/{JOINT}/elbo"] if joint else record["validation/loss"]

    @contextmanager
    def _explained(self, batch: Batch, present: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Turn torch's error on a bad batch, such as a label out of range, into one that says what is wrong."""
        try:
            yield
        except (IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            self.model.check(batch, present)
            if "TorchDynamoException" in [kind.__name__ for kind in type(error).__mro__]:
                reason = str(error).splitlines()[0]
                raise UserError(f"torch can't compile the step on this machine: omit --compile ({reason})") from error
            raise

    def _check_good(self) -> None:
        """End the run if a step so far or a weight isn't finite, or the loss diverges: such a state isn't saved."""
        if self.last is not None and not self.last.isfinite().all():
            bad = Totals.of(self.last.cpu(), self.terms, self.model.modalities).not_finite()
            self._end("not finite", self._bad_weights() or bad)
        if bad := self._bad_weights():
            self._end("not finite", bad)
        if self.last is not None and (loss := (self.last[0] / self.last[1]).item()) > LIMIT * max(abs(self.start), 100):
            self._end("the run diverges", [f"loss {loss:.3g}, after {self.start:.3g} at its start"])

    def _bad_weights(self) -> list[str]:
        """Return the networks with weights that aren't finite, as after a finite loss with a gradient that wasn't."""
        weights = self.model.named_parameters()
        bad = {".".join(name.split(".")[:2]) for name, weight in weights if not weight.isfinite().all()}
        return [f"the gradient of {name}" for name in sorted(bad)]

    def _end(self, what: str, parts: list[str]) -> None:
        """Raise UserError, and leave a note in the folder for whoever resumes the run."""
        more = " and more" if len(parts) > 4 else ""
        message = f"{what} in epoch {self.epoch}, step {self.done}: {', '.join(parts[:4])}{more}"
        if (self.out_dir / checkpoint.LATEST).exists():
            write_atomically(self.out_dir / DIVERGED, f"{message}\n".encode())
        raise UserError(f"{message}; the last good state is kept; try a smaller --lr, or --precision fp32")


def _facts(objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Return what a resumed run must have in common with its checkpoint, in addition to the Config and the data."""
    varying = {"params", "lr", "initial_lr", "fused", "foreach", "capturable", "differentiable"}
    groups = [{name: value for name, value in group.items() if name not in varying} for group in optimizer.param_groups]
    return {"objective_crc32": objective.checksum(), "optimizer": f"{type(optimizer).__name__} {groups}"}


def _check_compiler(compile_: bool, device: torch.device) -> None:
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if compile_ and device.type == "cpu" and not shutil.which(compiler):
        raise UsageError(f"compile needs a C++ compiler ({compiler}): install one, set CXX, or omit --compile")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"
