"""A step and a run of steps: what is trained and what is reported is the same, in one process and in several."""

import copy
import itertools
import os
import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mvae import checkpoint
from mvae.data import Data, permuted_rows, seed_of
from mvae.errors import UsageError, UserError
from mvae.model import MVAE, Batch
from mvae.objective import Objective, Term
from mvae.processes import Processes
from mvae.schedules import Schedule, constant, cosine, late, linear
from mvae.training import Options, Stopped, fit, train_step, validate

from helpers import (
    FORKED,
    SmallEncoder,
    assert_same_run,
    fit_small,
    same,
    small_data,
    small_model,
    stats,
    without_times,
)

N_STEPS = 4
"""Of an epoch of `fit_small`."""


def small_batch() -> dict[str, Tensor]:
    return small_data(6, seed=0).batch(torch.arange(6))[0]


# One step.


def test_step_moves_the_weights_by_the_rate_times_the_gradient_of_the_loss() -> None:
    objective, batch = Objective(small_model()), small_batch()
    expected = copy.deepcopy(objective)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    torch.manual_seed(0)
    totals = train_step(objective, optimizer, batch, beta=0.3, subsets=[("image", "label")])

    torch.manual_seed(0)
    loss, _ = expected(batch, 0.3, [("image", "label")])
    loss.backward()
    for found, weight in zip(objective.parameters(), expected.parameters(), strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(found, weight - 0.1 * weight.grad)
    assert (totals.loss / totals.n).item() == pytest.approx(loss.item())


def test_step_leaves_no_gradient_to_the_next() -> None:
    objective = Objective(small_model())
    train_step(objective, torch.optim.SGD(objective.parameters(), lr=0.1), small_batch())
    assert not any(weight.grad is not None and weight.grad.any() for weight in objective.parameters())


def test_step_counts_the_examples_that_are_present() -> None:
    objective = Objective(small_model())
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    totals = train_step(objective, optimizer, small_batch(), {"label": torch.arange(6) < 2})
    assert dict(zip(totals.terms, totals.n_kl.tolist(), strict=True)) == {
        "joint": 6,
        "image": 6,
        "attrs": 6,
        "label": 2,
    }


def test_loss_that_is_not_finite_leaves_the_weights_as_they_were() -> None:
    objective, batch = Objective(small_model()), small_batch()
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    batch["image"][2] = torch.nan
    totals = train_step(objective, optimizer, batch)
    assert totals.loss.isnan()
    assert same(objective.model.state_dict(), small_model().state_dict())
    train_step(objective, optimizer, small_batch())  # nor does it spoil the next step
    assert all(weight.isfinite().all() for weight in objective.parameters())


# What fit trains with is what it reports.


def fit_watched(out_dir: Path, beta: Schedule, lr: Schedule) -> tuple[list[float], list[list[float]], list[Any]]:
    """Three epochs. Gives each step's β and rates, as the objective and the optimiser meet them; and the records."""
    objective = Objective(small_model())
    optimizer = torch.optim.Adam(
        [
            {"params": objective.model.encoders.parameters(), "lr": 1e-2},
            {"params": objective.model.decoders.parameters(), "lr": 2e-3},
        ]
    )
    betas: list[float] = []
    rates: list[list[float]] = []

    def on_loss(module: Objective, arguments: tuple[Any, ...]) -> None:
        if module.training:
            betas.append(float(arguments[1]))

    def on_step(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        rates.append([group["lr"] for group in optimizer.param_groups])

    objective.register_forward_pre_hook(on_loss)
    optimizer.register_step_pre_hook(on_step)
    options = Options(epochs=3, batch_size=6, out_dir=out_dir)
    records = fit(objective, optimizer, small_data(24, seed=0), small_data(10, seed=1), options, beta=beta, lr=lr)
    return betas, rates, records


def test_beta_of_every_step_is_the_schedules_and_the_reported_one(tmp_path: Path) -> None:
    betas, _, records = fit_watched(tmp_path, linear(3), constant())
    assert betas == pytest.approx([(step + 1) / 12 for step in range(12)])
    assert [record["beta"] for record in records] == pytest.approx(betas[N_STEPS - 1 :: N_STEPS])


def test_rate_of_every_step_is_the_schedules_and_the_reported_one(tmp_path: Path) -> None:
    _, rates, records = fit_watched(tmp_path, constant(), late(3))
    factors = [1.0] * 6 + [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert rates == [pytest.approx([1e-2 * factor, 2e-3 * factor]) for factor in factors]
    assert [record["lr"] for record in records] == [rate for rate, _ in rates[N_STEPS - 1 :: N_STEPS]]


@pytest.mark.parametrize("changed", [{"beta": linear(1)}, {"schedule": late(2)}, {"lr": 2e-2}])
def test_another_course_of_beta_or_of_the_rate_gives_other_weights(changed: dict[str, Any], tmp_path: Path) -> None:
    fit_small(tmp_path / "one", epochs=3, beta=linear(3))
    fit_small(tmp_path / "same", epochs=3, beta=lambda t: min(1.0, t / 3))
    fit_small(tmp_path / "other", epochs=3, **{"beta": linear(3), **changed})
    one, again, other = (
        checkpoint.load(tmp_path / name / checkpoint.LATEST, "small") for name in ("one", "same", "other")
    )
    assert same(one["model"], again["model"])
    assert not same(one["model"], other["model"])


def test_resumed_run_goes_on_along_its_schedules(tmp_path: Path) -> None:
    course: dict[str, Any] = {"beta": linear(2), "schedule": cosine(2)}
    fit_small(tmp_path / "straight", **course)
    fit_small(tmp_path / "run", epochs=1, **course)
    fit_small(tmp_path / "run", resume=True, **course)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


class WatchedEncoder(SmallEncoder):
    """An encoder that remembers in which mode it ran."""

    def __init__(self, n_inputs: int):
        super().__init__(n_inputs)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.modes.append(self.training)
        return super().forward(x)


def test_networks_train_in_training_mode_and_are_validated_in_evaluation_mode(tmp_path: Path) -> None:
    model = small_model()
    model.encoders["label"] = encoder = WatchedEncoder(1)
    fit_small(tmp_path, model=model, batch_size=12)
    runs = [mode for mode, after in zip(encoder.modes, [*encoder.modes[1:], None], strict=True) if mode != after]
    assert runs == [False, True, False, True, False]
    assert sum(encoder.modes) == 2 * 2


def test_validation_draws_other_noise_for_another_batch_and_seed(tmp_path: Path) -> None:
    """Of two batches of the same examples."""
    six = torch.arange(6)
    twice = small_data(6, seed=1)[torch.cat([six, six])]
    assert validation_loss(twice[:6]) == validation_loss(twice[:6])
    assert len({validation_loss(twice[:6]), validation_loss(twice), validation_loss(twice[:6], seed=1)}) == 3


def test_validation_is_of_what_is_present() -> None:
    whole, here = small_data(6, seed=1), torch.arange(6) < 4
    other = {**whole.tensors, "label": torch.where(here, whole.tensors["label"], 0)}
    assert not torch.equal(other["label"], whole.tensors["label"])
    losses = [validation_loss(Data(tensors=some, present={"label": here})) for some in (whole.tensors, other)]
    assert losses[0] == losses[1] != validation_loss(whole)


def validation_loss(data: Data, seed: int = 0) -> float:
    """Of the small model as it begins, in batches of six."""
    options = Options(epochs=1, batch_size=6, seed=seed)
    return validate(Objective(small_model()), data, options, {}, Processes(0, 1), lambda: None)["loss"]


# Metrics.


def label_value(model: MVAE, batch: Batch) -> Tensor:
    return batch["label"].float()


def test_metrics_are_means_over_the_validation_examples(tmp_path: Path) -> None:
    validation = small_data(10, seed=1)
    records = fit_small(tmp_path, validation=validation, metrics={"label_value": label_value})
    expected = validation.tensors["label"].double().mean().item()
    assert [record["validation/label_value"] for record in records] == [pytest.approx(expected)] * 2
    assert [record["validation/label_value"] for record in stats(tmp_path)] == [pytest.approx(expected)] * 2
    assert "train/label_value" not in records[0]


def test_metrics_are_means_over_the_examples_that_have_all_modalities(tmp_path: Path) -> None:
    image, attrs = torch.arange(10) != 3, torch.arange(10) < 7
    validation = small_data(10, seed=1, present={"image": image, "attrs": attrs})
    records = fit_small(tmp_path, validation=validation, metrics={"label_value": label_value})
    whole = [0, 1, 2, 4, 5, 6]
    expected = validation.tensors["label"][whole].double().mean().item()
    assert records[0]["validation/label_value"] == pytest.approx(expected)


def test_model_is_ready_for_use_after_a_run(tmp_path: Path) -> None:
    model = small_model()
    fit_small(tmp_path, model=model)
    assert not any(module.training for module in model.modules())


def test_metric_of_no_example_is_left_out(tmp_path: Path) -> None:
    validation = small_data(10, seed=1, present={"image": torch.zeros(10, dtype=torch.bool)})
    records = fit_small(tmp_path, validation=validation, metrics={"label_value": label_value})
    assert "validation/label_value" not in records[0]


def test_metrics_leave_the_training_as_it_is(tmp_path: Path) -> None:
    def noisy(model: MVAE, batch: Batch) -> Tensor:
        return torch.randn(len(batch["label"]))

    fit_small(tmp_path / "plain")
    fit_small(tmp_path / "measured", metrics={"noisy": noisy})
    plain, measured = (checkpoint.load(tmp_path / name / checkpoint.LATEST, "small") for name in ("plain", "measured"))
    assert same(plain["model"], measured["model"])


# Several processes.


class NormedEncoder(SmallEncoder):
    """An encoder with batch norm, whose running statistics the weights don't tell."""

    def __init__(self, n_inputs: int):
        super().__init__(n_inputs)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.norm(self.linear(x.float().reshape(len(x), -1))).chunk(2, dim=1)
        return mu, logvar


def normed_model() -> MVAE:
    """The small model, with batch norm."""
    model = small_model()
    model.encoders["attrs"] = NormedEncoder(4)
    return model


def fit_as(
    rank: int,
    world: int,
    port: int,
    folder: Path,
    stop: tuple[int, int] | None,
    n: int,
    normed: bool,
    present: dict[str, Tensor] | None,
    seeds: tuple[int, int],
    stages: int,
    options: dict[str, Any],
) -> None:
    """Fits the small model to n examples as one of `world` processes; saves what this one has seen, drawn and made.

    `stop`: the rank of a process that gets a signal, and the step. Each process has a disk, and the first one writes.
    """
    if world > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(where, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    seen: list[Tensor] = []
    drawn: list[float] = []
    scored: list[int] = []
    stopped_at, refused = None, ""

    def transform(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(rows["number"])
        drawn.append(torch.rand((), generator=torch.Generator().manual_seed(torch.initial_seed())).item())
        if stop == (rank, len(seen) - 1):  # the first call is for the check of the data
            signal.raise_signal(signal.SIGTERM)
        return {name: tensor for name, tensor in rows.items() if name != "number"}

    numbered = {**small_data(n, seed=0).tensors, "number": torch.arange(n)}
    model, records = normed_model() if normed else small_model(), []
    model.likelihood("image").decoder.register_forward_hook(
        lambda module, inputs, output: scored.append(len(output)) if module.training else None
    )
    for stage in range(1, stages):
        fit_small(folder / f"stage {stage}" / str(rank), batch_size=4, epochs=1)
    try:
        records = fit_small(
            folder / ("run" if rank == 0 else f"disk {rank}"),
            train=Data(tensors=numbered, transform=transform, present=present),
            model=model,
            metrics={"label_value": label_value},
            **{"batch_size": 4, "seed": seeds[rank], **options},
        )
    except Stopped:
        saved = checkpoint.load(folder / "run" / checkpoint.LATEST, "small")
        stopped_at = saved["epoch"], saved["step"]
    except UserError as error:
        refused = str(error)
    found = {
        "seen": seen[1:],
        "drawn": drawn[1:],
        "scored": scored,
        "records": without_times(records),
        "model": model.state_dict(),
        "stopped_at": stopped_at,
        "refused": refused,
    }
    torch.save(found, folder / f"{rank}.pt")


def fit_in(
    n_processes: int,
    folder: Path,
    *,
    stop: tuple[int, int] | None = None,
    n: int = 24,
    normed: bool = False,
    present: dict[str, Tensor] | None = None,
    seeds: tuple[int, int] = (0, 0),
    stages: int = 1,
    **options: Any,
) -> list[dict[str, Any]]:
    """What processes that fit the small model together have seen, drawn and made."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = range(n_processes)
    arguments = (n_processes, port, folder, stop, n, normed, present, seeds, stages, options)
    processes = [FORKED.Process(target=fit_as, args=(rank, *arguments)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        process.kill()  # one that hasn't ended
    assert [process.exitcode for process in processes] == [0] * n_processes
    assert not list(folder.glob("disk*"))
    return [torch.load(folder / f"{rank}.pt") for rank in ranks]


class Two(NamedTuple):
    """A run of two processes: where it wrote, and what each has seen, drawn and made."""

    folder: Path
    first: dict[str, Any]
    second: dict[str, Any]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    return Two(folder, *fit_in(2, folder, approx_m=1))


def test_each_of_two_processes_takes_its_half_of_every_batch(two: Two) -> None:
    numbers = Data(tensors={"number": torch.arange(24)})
    batches = [rows for epoch in (1, 2) for rows in permuted_rows(numbers, 4, seed_of(0, epoch))]
    assert len(batches) == len(two.first["seen"]) == len(two.second["seen"])
    for rows, one, other in zip(batches, two.first["seen"], two.second["seen"], strict=True):
        assert len(one) == len(other) == 2
        assert sorted([*one.tolist(), *other.tolist()]) == sorted(rows.tolist())
    assert same(two.first["model"], two.second["model"])


def test_two_processes_validate_as_one(tmp_path: Path) -> None:
    """Their weights are the same, as they don't move; of the three batches of validation one process takes two."""
    (alone,) = fit_in(1, tmp_path / "one", lr=1e-30)
    for process in fit_in(2, tmp_path / "two", lr=1e-30):
        for record, expected in zip(process["records"], alone["records"], strict=True):
            validation = {name: value for name, value in expected.items() if name.startswith("validation/")}
            assert {name: record[name] for name in validation} == pytest.approx(validation)
            assert "validation/label_value" in validation


def test_two_processes_train_as_one_does_whatever_their_number_before(tmp_path: Path) -> None:
    """To rounding, as a sum of halves is rounded in another way; here the second epoch has another number of them."""
    (alone,) = fit_in(1, tmp_path / "one")
    fit_in(2, tmp_path / "two", epochs=1)
    (resumed,) = fit_in(1, tmp_path / "two", resume=True)
    (first, _) = fit_in(2, tmp_path / "both")
    for found in (resumed, first):
        torch.testing.assert_close(found["model"], alone["model"], rtol=1e-4, atol=1e-5)
        for record, expected in zip(found["records"], alone["records"], strict=True):
            assert record == pytest.approx(expected, rel=1e-4)


def test_two_processes_share_the_statistics_of_batch_norm_if_asked_to(tmp_path: Path) -> None:
    """They then train as one does, to rounding. It shows with SGD: Adam makes steps of a gradient that is none, too."""
    how: dict[str, Any] = {"normed": True, "optimizer": torch.optim.SGD, "epochs": 1, "lr": 1e-3}
    (alone,) = fit_in(1, tmp_path / "one", **how)
    (first, second) = fit_in(2, tmp_path / "two", **how, sync_batchnorm=True)
    (apart, _) = fit_in(2, tmp_path / "apart", **how)
    assert same(first["model"], second["model"])
    torch.testing.assert_close(first["model"], alone["model"], rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(apart["model"], alone["model"], rtol=1e-4, atol=1e-5)


def test_shared_batch_norm_takes_complete_examples_and_no_compiler(tmp_path: Path) -> None:
    present = {"image": torch.arange(24) % 2 == 0}
    found = fit_in(2, tmp_path, normed=True, sync_batchnorm=True, present=present)
    assert all("`sync_batchnorm` takes complete examples" in process["refused"] for process in found)
    with pytest.raises(UsageError, match="`compile` takes no step that processes share"):
        Options(epochs=1, batch_size=4, compile=True, sync_batchnorm=True)


def test_two_processes_report_the_steps_of_both(two: Two) -> None:
    assert two.first["records"] == two.second["records"]
    assert without_times(stats(two.folder / "run")) == two.first["records"]


def test_two_processes_draw_noise_unlike_each_others_and_unlike_any_steps(two: Two) -> None:
    drawn = {*two.first["drawn"], *two.second["drawn"]}
    assert len(drawn) == 2 * 12
    for epoch, step in itertools.product((1, 2), range(6)):  # nor like z's noise, which the processes share
        seeded = torch.Generator().manual_seed(seed_of(0, epoch, step, 0))
        assert torch.rand((), generator=seeded).item() not in drawn


def test_two_processes_draw_the_same_subsets_and_others_at_other_steps(two: Two) -> None:
    """Two terms score the picture, and a random subset where it has it."""
    assert two.first["scored"] == two.second["scored"]
    assert set(two.first["scored"]) == {2 * 2, 3 * 2}


def test_two_processes_that_a_signal_stopped_go_on_to_be_the_straight_run(two: Two, tmp_path: Path) -> None:
    """The second process alone gets the signal, and reports are rare. Only the first one's disk has the checkpoint."""
    for process in fit_in(2, tmp_path, stop=(1, 8), approx_m=1):
        assert len(process["seen"]) == 8  # both stop at the same step
        assert process["stopped_at"] == (2, 2)  # and neither before it is saved
    first, second = fit_in(2, tmp_path, resume=True, approx_m=1)
    assert len(first["seen"]) == len(second["seen"]) == 4
    assert same(first["model"], second["model"])
    assert_same_run(tmp_path / "run", two.folder / "run", "small")


def test_two_processes_split_a_set_that_is_smaller_than_a_batch(tmp_path: Path) -> None:
    first, second = fit_in(2, tmp_path, n=5, batch_size=8, normed=True)
    assert [len(rows) for rows in first["seen"]] == [3, 3]
    for one, other in zip(first["seen"], second["seen"], strict=True):
        assert sorted([*one.tolist(), *other.tolist()]) == [0, 1, 2, 3, 4]
    # What is validated is the model that is saved, and not each process's running statistics.
    objective, validation = Objective(normed_model()), small_data(10, seed=1)
    objective.model.load_state_dict(checkpoint.load(tmp_path / "run" / checkpoint.LATEST, "small")["model"])
    options = Options(epochs=2, batch_size=8)
    found = validate(objective, validation, options, {"label_value": label_value}, Processes(0, 1), lambda: None)
    for record in (first["records"][-1], second["records"][-1]):
        assert {f"validation/{name}": value for name, value in found.items()} == pytest.approx(
            {name: value for name, value in record.items() if name.startswith("validation/")}
        )


def test_two_processes_train_on_examples_that_lack_modalities(tmp_path: Path) -> None:
    """Half of the batches leave a process without any label."""
    first, second = fit_in(2, tmp_path, present={"label": torch.arange(24) % 3 == 0}, epochs=1)
    assert same(first["model"], second["model"])
    assert first["records"][0]["train/label/elbo"] < 0


def test_two_processes_train_on_terms_that_leave_modalities_out(tmp_path: Path) -> None:
    first, second = fit_in(2, tmp_path, terms=[Term(("image",), ("image", "label"))], epochs=1)
    assert same(first["model"], second["model"])
    assert first["records"][0]["train/image/elbo"] < 0


def test_two_processes_need_an_example_each(tmp_path: Path) -> None:
    for process in fit_in(2, tmp_path, batch_size=1):
        assert "`batch_size` is to give each process 1 examples or more" in process["refused"]


def test_two_processes_may_make_one_run_after_the_other(two: Two, tmp_path: Path) -> None:
    fit_in(2, tmp_path, stages=2, approx_m=1)
    assert_same_run(tmp_path / "run", two.folder / "run", "small")


def test_two_processes_that_are_asked_for_different_runs_are_refused(tmp_path: Path) -> None:
    first, second = fit_in(2, tmp_path, seeds=(0, 1))
    assert "the processes of a run need the same settings" in second["refused"]
    assert "seed was 0, now 1" in second["refused"]
    assert "another process of this run is gone" in first["refused"]


def test_process_whose_torchrun_is_gone_is_asked_to_stop() -> None:
    parent = os.getppid()
    asked = [Processes(0, 2, launcher).abandoned() for launcher in (None, parent, parent + 1)]
    assert asked == [0, 0, signal.SIGTERM]


def test_gradient_of_shares_of_a_batch_averages_to_that_of_the_batch() -> None:
    """Of 6 examples, one process has 4 and another 2; without noise, as a variance of 0 has none."""
    batch = small_batch()
    gradients = []
    for rows, share in [(slice(0, 6), 1), (slice(0, 4), 4 / 3), (slice(4, 6), 2 / 3)]:
        objective = Objective(small_model())
        for name, weight in objective.model.encoders.named_parameters():
            weight.data[2:] = -100 if name.endswith("bias") else 0  # the log-variances
        before = [weight.detach().clone() for weight in objective.parameters()]
        optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
        train_step(objective, optimizer, {name: x[rows] for name, x in batch.items()}, beta=0.0, share=share)
        gradients.append([old - new.detach() for old, new in zip(before, objective.parameters(), strict=True)])
    for whole, one, other in zip(*gradients, strict=True):
        torch.testing.assert_close((one + other) / 2, whole)
