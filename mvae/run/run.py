"""Where a run stands: the state that its checkpoint holds, how that is taken up again, and what must fit for it."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from . import checkpoint
from .errors import UsageError, UserError
from .files import locked
from .objective import Objective
from .processes import Processes
from .schedules import Schedule
from .stats import JOINT, SUBSET, Totals

Selection = Literal["loss", "joint"]
"""What makes an epoch's model the best: see `mvae.training.Options`."""

MAY_CHANGE = {
    *("epochs", "cuda", "threads", "workers", "log_interval", "save_every", "resume", "command", "commit", "changes")
}
"""Settings that may differ when a run is resumed, as may folders (..._dir)."""

FROM_AN_EPOCH_ON = ("lr", "batch_size")
"""Settings that may differ from the start of an epoch on. Any other change makes another run."""

NO_CHANGE = {"lr", "initial_lr", "params", "fused", "foreach", "capturable", "differentiable"}
"""What the optimiser's groups have, and is compared elsewhere or doesn't matter."""

STATE = ("epoch", "step", "seconds", "beta", "lr", "best", "history", "sums")
"""The fields of a Run that its checkpoint holds, beside the model's and the optimiser's state."""

RECORD = {"epoch": int, "beta": float, "lr": float, "train/loss": float, "validation/loss": float, "seconds": float}
"""What every epoch's record has. Its other fields are floats, too, but for `changed`: pairs by setting."""


class Run:
    """Where a run stands: everything that a checkpoint holds. `epoch` counts from 1; `step` steps of it are done."""

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        out_dir: Path,
        experiment: str,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
    ):
        """`settings` are the caller's to record; `facts` are what `fit` itself knows; their `lr` is a list."""
        self.objective, self.optimizer = objective, optimizer
        self.out_dir, self.experiment = out_dir, experiment
        rates = facts["lr"]
        self.asked = {**settings, **facts, "lr": rates[0] if len(rates) == 1 else rates}
        try:  # better known before the first step than when the state is saved
            checkpoint.check_plain("`settings`", self.asked)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.settings, self.facts = dict(self.asked), frozenset(facts)
        self.epoch, self.step, self.seconds = 1, 0, 0.0
        self.beta = self.lr = math.nan  # of the latest step
        self.best = math.inf
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(0).double()  # of this epoch's steps, as Totals.vector; empty before the first
        self.saved_at = time.monotonic()

    @contextmanager
    def locked(self, rank: int) -> Iterator[None]:
        """Keeps other processes from writing a run into `out_dir`.

        Of several processes the first holds the lock. Raises UsageError if another run does.
        """
        with ExitStack() as stack:
            try:
                if rank == 0:
                    stack.enter_context(locked(self.out_dir / ".lock"))
            except BlockingIOError:
                raise UsageError(f"another process is writing into {self.out_dir}: name another `out_dir`") from None
            except OSError as error:
                raise UserError(f"can't write {self.out_dir}: {error.strerror or error}") from None
            yield

    def start(self, resume: bool, processes: Processes) -> None:
        """Takes up the state of the checkpoint in `out_dir` if `resume` is set and there is one.

        Of several processes the first reads it, and all take up what it has read. Raises UsageError if there is one and
        `resume` isn't set, or if it was made with other settings; UserError if it can't be gone on from.
        """
        path = self.out_dir / checkpoint.LATEST
        saved, asked = processes.from_first((self._read(resume) if processes.rank == 0 else None, self.asked))
        self._check_settings("the processes of a run need the same settings, and the first's differ", asked)
        self.asked, self.settings = asked, dict(asked)
        if saved is None:
            return
        try:
            self._check(saved, path)
        except ValueError as error:
            raise UserError(f"{path} doesn't hold a run of this network to go on from: {error}") from None
        self.objective.model.load_state_dict(saved["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # they may differ in the rate alone, which each step sets
        self.optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
        for name in STATE:
            setattr(self, name, saved[name])
        self.sums = self.sums.to(next(self.objective.parameters()).device)
        kept = [name for name in (*FROM_AN_EPOCH_ON, "changes") if name in saved["settings"]]
        self.settings.update({name: saved["settings"][name] for name in kept})
        if processes.rank == 0 and (changes := self._changes()):
            what = ", ".join(f"{name} {new} in place of {old}" for name, (old, new) in changes.items())
            print(f"from the start of epoch {self.epoch + (self.step > 0)} on: {what}", flush=True)
        if processes.rank > 0:
            self.sums = torch.zeros_like(self.sums)  # a checkpoint's sums are those of all processes

    def _read(self, resume: bool) -> dict[str, Any] | None:
        """The content of the checkpoint to go on from; None for a new run."""
        latest, best = self.out_dir / checkpoint.LATEST, self.out_dir / checkpoint.BEST
        if latest.exists():
            if not resume:
                raise UsageError(f"{self.out_dir} holds a run: go on with `resume`, or name another `out_dir`")
            return checkpoint.load(latest, self.experiment)
        # A kill may have come between the first epoch's two files: to start again makes the same model.
        if best.exists() and not (resume and checkpoint.load(best, self.experiment).get("epoch") == 1):
            raise UsageError(f"{best} would be written over: name another `out_dir`")
        if resume:
            print(f"there is no {latest} yet: starting from the beginning", flush=True)
        return None

    def _check(self, saved: Mapping[str, Any], path: Path) -> None:
        """Raises ValueError, naming the part, unless `saved` is whole and of this network; UsageError as `start`."""
        made_otherwise = f"`resume`: {path} was made with other settings"
        checkpoint.check_plain("settings", saved.get("settings"))
        self._check_settings(made_otherwise, {"select": "loss", **saved["settings"]})  # older versions had that alone
        checkpoint.check_weights(saved.get("model"), self.objective.model)
        checkpoint.check_optimizer(saved.get("optimizer"), self.optimizer)
        differ = [
            f"the optimiser's {name} was {old[name]}, now {new[name]}"
            for old, new in zip(
                saved["optimizer"]["param_groups"], self.optimizer.state_dict()["param_groups"], strict=True
            )
            for name in sorted((old.keys() & new.keys()) - NO_CHANGE)
            if checkpoint.digest(old[name]) != checkpoint.digest(new[name])
        ]
        if differ:
            raise UsageError(f"{made_otherwise}: {'; '.join(differ)}")

        settings = {"changes": [], **saved["settings"]}
        change: dict[Any, Any] = {"epoch": int, ...: list}
        taken_up = {"lr": self.asked["lr"], "batch_size": int, "changes": [change, ...]}
        checkpoint.check("settings", settings, {**taken_up, ...: object})
        fresh = {name: getattr(self, name) for name in STATE} | {"history": [dict, ...], "n_latents": int}
        sums = self._zeros.vector() if saved.get("step") else fresh["sums"]
        checkpoint.check("it", saved, {**fresh, "sums": sums, ...: object})
        for record in saved["history"]:
            whole: dict[Any, Any] = {**RECORD, "changed": {...: list}, ...: float}
            checkpoint.check_plain("a record of its history", record)
            checkpoint.check("a record of its history", {"changed": {}, **record}, whole)
        n_steps = max(1, self.asked["n_train"] // max(1, settings["batch_size"]))
        epochs = [record["epoch"] for record in saved["history"]]
        numbers = [value for record in saved["history"] for value in record.values() if isinstance(value, float)]
        fits = {
            "n_latents": saved["n_latents"] == self.objective.model.n_latents,
            "history": all(map(math.isfinite, numbers)),
            "lr": all(rate >= 0 for rate in _listed(settings["lr"])),
            "batch_size": settings["batch_size"] > 0,
            "epoch": [*epochs, saved["epoch"]] == list(range(1, len(epochs) + 2)),
            "step": 0 <= saved["step"] <= n_steps,
            "seconds": 0 <= saved["seconds"] < math.inf,
            "best": saved["best"] == min(map(self._score, saved["history"]), default=math.inf),
            "sums": bool(saved["sums"].isfinite().all()),
        }
        if wrong := [name for name, does in fits.items() if not does]:
            raise ValueError(f"its {wrong[0]} doesn't fit the rest")

    def _check_settings(self, what: str, others: Mapping[str, Any]) -> None:
        """Raises UsageError if `others` differ. An older version may not have known all the facts."""
        names = sorted(
            name
            for name in (others.keys() | self.asked.keys()) - MAY_CHANGE - {*FROM_AN_EPOCH_ON}
            if not name.endswith("_dir") and (name in others or name not in self.facts)
        )
        pairs = [(name, others.get(name), self.asked.get(name)) for name in names]
        differ = {name: f"{name} was {old}, now {new}" for name, old, new in pairs if old != new}
        if differ:  # a checksum says little where something else says it in plain words
            plain = [words for name, words in differ.items() if not name.endswith("_crc32")]
            raise UsageError(f"{what}: {'; '.join(plain or differ.values())}")

    def _changes(self) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from the next start of an epoch on: what they were, and what they are then."""
        pairs = {name: (self.settings[name], self.asked[name]) for name in FROM_AN_EPOCH_ON}
        return {name: (old, new) for name, (old, new) in pairs.items() if old != new}

    def begin_epoch(self) -> tuple[list[float], int]:
        """The rates and the batch size of this epoch. At its start, settings that were asked for are taken up."""
        if self.step == 0 and (changes := self._changes()):
            record = {"epoch": self.epoch, **{name: list(pair) for name, pair in changes.items()}}
            self.settings = {**self.asked, "changes": [*self.settings.get("changes", []), record]}
        return self._rates(), self.settings["batch_size"]

    def _rates(self) -> list[float]:
        """The optimiser's rates in this epoch, before their schedule."""
        return _listed(self.settings["lr"])

    def check_course(self, beta: Schedule, lr: Schedule) -> None:
        """Raises UsageError if the schedules aren't those that the epochs so far had."""
        courses = {"beta": beta}
        if "changes" not in self.settings:
            courses["lr"] = lambda t: self._rates()[0] * lr(t)
        for record in self.history:
            for name, course in courses.items():
                if (now := course(float(record["epoch"]))) != record[name]:
                    before = f"`{name}` at the end of epoch {record['epoch']} was {record[name]}, now {now}"
                    raise UsageError(f"`resume`: {self.out_dir} holds a run of other schedules: {before}")

    def is_due(self, minutes: float) -> bool:
        """Whether the state was saved that long ago."""
        return time.monotonic() - self.saved_at > 60 * minutes

    def add(self, sums: torch.Tensor) -> None:
        """Adds a step's sums to the epoch's."""
        self.sums = self.sums + sums if len(self.sums) else sums

    def totals(self, sums: torch.Tensor) -> Totals:
        """A vector of sums by names; terms beyond the objective's own are those of random subsets."""
        return Totals.of(sums.cpu(), self._zeros.terms, self._zeros.modalities)

    @property
    def _zeros(self) -> Totals:
        """The sums over no steps."""
        names = self.objective.names + (SUBSET,) * self.asked["approx_m"]
        return Totals.zeros(names, self.objective.model.modalities)

    def mean_loss(self) -> float:
        """The mean loss of the epoch so far, in nats per example."""
        totals = self.totals(self.sums)
        return (totals.loss / totals.n).item()

    def _score(self, record: Mapping[str, Any]) -> float:
        """What is least in the epoch of the best model, by the fact `select`."""
        joint = self.asked["select"] == JOINT
        return -record.get(f"validation/{JOINT}/elbo", math.nan) if joint else record["validation/loss"]

    def end_epoch(self, train: torch.Tensor, validation: Mapping[str, float]) -> bool:
        """Records the epoch, whose steps' sums are `train`, and begins the next.

        Returns True if its model is the best yet.
        """
        totals = self.totals(train)
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "beta": self.beta,
            "lr": self.lr,
            "seconds": self.seconds,
            "examples_per_second": totals.n.item() / self.seconds,
            **{f"train/{name}": value for name, value in totals.means().items()},
            **{f"validation/{name}": value for name, value in validation.items()},
        }
        for changes in self.settings.get("changes", []):
            if changes["epoch"] == self.epoch:
                record["changed"] = {name: pair for name, pair in changes.items() if name != "epoch"}
        score = self._score(record)
        improved, self.best = score < self.best, min(self.best, score)
        self.history.append(record)
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, torch.zeros(0).double()
        return improved

    def save(self, *, best: bool = False) -> None:
        """Writes the latest state, and before it the best model if this is it. Raises UserError if that fails."""
        model = self.objective.model
        content = {"model": model.state_dict(), "n_latents": model.n_latents, "settings": self.settings}
        if best:
            seconds = sum(record["seconds"] for record in self.history)
            loss = self.history[-1]["validation/loss"]
            found = {"epoch": self.epoch - 1, "validation_loss": loss, "training_seconds": seconds}
            checkpoint.save(self.out_dir / checkpoint.BEST, self.experiment, content | found)
        content |= {name: getattr(self, name) for name in STATE}
        content["optimizer"] = self.optimizer.state_dict()
        checkpoint.save(self.out_dir / checkpoint.LATEST, self.experiment, content)
        self.saved_at = time.monotonic()


def _listed(rates: float | list[float]) -> list[float]:
    return rates if isinstance(rates, list) else [rates]
