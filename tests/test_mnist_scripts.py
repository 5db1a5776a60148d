"""The MNIST scripts as a user runs them: train, sample, estimate; what they write, print and refuse."""

import argparse
import csv
import itertools
import json
import math
import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist.datasets import examples
from mnist.datasets import test_data as mnist_test_data
from mnist.model import build_model
from mvae import OPENMP, checkpoint
from mvae.errors import UsageError
from mvae.estimators import Estimate, Evaluation, Quantity, evaluate
from mvae.scripts import flags, machine, training
from mvae.scripts.report import report, write_per_example
from mvae.scripts.training import reconstruct

from helpers import (
    ROOT,
    SHORT,
    Trained,
    assert_ended,
    assert_refused,
    assert_same_run,
    command,
    environment,
    run,
    run_warm,
    small_data,
    small_model,
    stats,
)

# train.py


def test_train_runs_from_another_folder(trained: Trained) -> None:
    assert trained.process.returncode == 0
    assert {path.name for path in trained.out_dir.iterdir()} - {".lock"} == {
        "checkpoint.pth.tar",
        "model_best.pth.tar",
        "stats.jsonl",
        "tensorboard",
    }


def test_cuda_without_a_device_warns_in_one_line_and_goes_on(trained: Trained) -> None:
    assert_refused(trained.process, 0, "--cuda", "no CUDA device", "going on with the CPU")


def test_train_runs_from_its_own_folder_and_gives_the_same_run(
    trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    flags = ["--out-dir", tmp_path, "--epochs", "3", *SHORT]
    env = environment(MVAE_DATA_DIR=str(digits_dir))
    assert_ended(run("mnist/train.py", *flags, cwd=ROOT / "mnist", env=env))
    assert_same_run(tmp_path, trained.out_dir)


def test_train_prints_plain_lines_where_there_is_no_terminal(trained: Trained) -> None:
    lines = trained.process.stdout.splitlines()
    steps = [line.split("  mean loss")[0] for line in lines if "  step " in line]
    assert steps == [f"epoch {epoch}  step {step}/20" for epoch in (1, 2, 3) for step in (5, 10, 15, 20)]
    epochs = [line for line in lines if "validation loss" in line]
    assert [line.split()[1] for line in epochs] == ["1", "2", "3"]
    assert all("ELBO(joint)" in line and "examples/s" in line for line in epochs)
    losses = [record["validation/loss"] for record in stats(trained.out_dir)]
    least = itertools.accumulate(losses, min)
    assert [line.endswith("(best)") for line in epochs] == [*map(operator.eq, losses, least)]


def test_stats_have_one_object_an_epoch(trained: Trained) -> None:
    records = stats(trained.out_dir)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    scored = {"joint": ("image", "text"), "image": ("image",), "text": ("text",)}
    numbers = {f"{term}/{number}" for term in scored for number in ("elbo", "kl")}
    numbers |= {f"{term}/log_prob/{name}" for term, names in scored.items() for name in names} | {"loss"}
    for record in records:
        assert set(record) == {
            *("epoch", "beta", "lr", "seconds", "examples_per_second", "validation/label_accuracy"),
            *(f"{part}/{name}" for part in ("train", "validation") for name in numbers),
        }
        assert all(isinstance(value, int | float) for value in record.values())


def test_stats_tell_the_annealing_that_an_epoch_reached(trained: Trained) -> None:
    assert [record["beta"] for record in stats(trained.out_dir)] == [1 / 20, 2 / 20, 3 / 20]


def test_stats_elbo_is_the_log_probabilities_less_kl(trained: Trained) -> None:
    for record in stats(trained.out_dir):
        for term in [f"{part}/{name}" for part in ("train", "validation") for name in ("joint", "image", "text")]:
            log_probs = [value for name, value in record.items() if name.startswith(f"{term}/log_prob/")]
            assert record[f"{term}/elbo"] == pytest.approx(sum(log_probs) - record[f"{term}/kl"], rel=1e-6)


def test_validation_loss_is_the_weighted_objective_without_annealing(trained: Trained) -> None:
    for record in stats(trained.out_dir):
        kl = sum(value for name, value in record.items() if name.startswith("validation/") and name.endswith("/kl"))
        image, text = (
            sum(value for name, value in record.items() if name.startswith("validation/") and name.endswith(scored))
            for scored in ("/log_prob/image", "/log_prob/text")
        )
        assert record["validation/loss"] == pytest.approx(kl - image - 10 * text, rel=1e-5)


def test_stats_count_the_examples_of_an_epoch(trained: Trained) -> None:
    for record in stats(trained.out_dir):
        assert record["seconds"] * record["examples_per_second"] == pytest.approx(1000)


def test_training_lowers_the_loss(trained: Trained) -> None:
    losses = [record["validation/loss"] for record in stats(trained.out_dir)]
    assert losses == sorted(losses, reverse=True)


def test_tensorboard_has_scalars_and_pictures_of_every_epoch(trained: Trained) -> None:
    events = EventAccumulator(str(trained.out_dir / "tensorboard")).Reload()
    records = stats(trained.out_dir)
    for tag, values in {
        "validation/loss": [record["validation/loss"] for record in records],
        "train/image/kl": [record["train/image/kl"] for record in records],
        "beta": [1 / 20, 2 / 20, 3 / 20],
    }.items():
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-6)
    pictures = events.Images("reconstruction/image")
    assert [(picture.step, picture.width, picture.height) for picture in pictures] == [
        (epoch, 8 * 30 + 2, 4 * 30 + 2) for epoch in (1, 2, 3)
    ]
    given = events.Images("given_text/image")
    assert [(picture.step, picture.width, picture.height) for picture in given] == [
        (epoch, 8 * 30 + 2, 10 * 30 + 2) for epoch in (1, 2, 3)
    ]
    assert [picture.step for picture in events.Images("latents/image")] == [1, 2, 3]


def test_checkpoint_records_the_flags(trained: Trained) -> None:
    settings = checkpoint.load(trained.out_dir / checkpoint.BEST, "mnist")["settings"]
    wanted = {"lambda_text": 10.0, "n_latents": 64, "n_val": 200, "binarize": False, "reconstruct": ["given"]}
    assert wanted.items() <= settings.items()


def test_train_help_shows_every_flag_and_its_default(tmp_path: Path) -> None:
    done = run_warm("mnist/train.py", "-h", cwd=tmp_path)
    assert_ended(done)
    text = " ".join(done.stdout.split())
    defaults = {
        "--n-latents": "64",
        "--batch-size": "100",
        "--epochs": "500",
        "--annealing-epochs": "200",
        "--lr": "0.001",
        "--log-interval": "100",
        "--lambda-image": "1.0",
        "--lambda-text": "10.0",
        "--out-dir": "trained_models",
        "--seed": "0",
        "--precision": "fp32",
        "--n-val": "5000",
        "--preset": "paper",
        "--lr-schedule": "constant",
        "--warmup-epochs": "0.0",
    }
    for flag, default in defaults.items():
        described = text.split(f" {flag} ")[-1]
        assert described.split("(default: ")[1].startswith(f"{default})"), flag
    for flag in ("--cuda", "--data-dir", "--resume", "--compile", "--binarize", "--limit", "--reconstruct"):
        assert f" {flag} " in text


def mnist_parser() -> Any:
    lambdas = {"image": 1.0, "text": 10.0}
    numbers: dict[str, Any] = {"n_latents": 4, "batch_size": 5, "epochs": 6, "annealing_epochs": 7, "n_val": 8}
    return training.parser("", modalities=("image", "text"), lambdas=lambdas, lr=1e-3, **numbers)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "0"),
        ("--epochs", "2.5"),
        ("--annealing-epochs", "-1"),
        ("--batch-size", "-5"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lambda-text", "inf"),
        ("--n-val", "many"),
        ("--seed", "-1"),
        ("--precision", "fp8"),
        ("--reconstruct", "sound"),
        ("--preset", "slow"),
        ("--lr-schedule", "steep"),
        ("--warmup-epochs", "-0.5"),
    ],
)
def test_wrong_value_is_refused_with_status_2(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        mnist_parser().parse_args([f"{flag}={value}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert flag in said
    assert repr(value) in said


@pytest.mark.parametrize(
    ("words", "meaning"),
    [([], "given"), (["all"], "all"), (["text"], ["text"]), (["text", "image"], ["text", "image"])],
)
def test_reconstruct_takes_given_all_or_names(words: list[str], meaning: str | list[str]) -> None:
    args = mnist_parser().parse_args(["--reconstruct", *words] if words else [])
    assert reconstruct(args) == meaning


def test_reconstruct_takes_no_name_beside_all() -> None:
    with pytest.raises(UsageError, match="`reconstruct` takes given, all, or names of modalities, not all text"):
        reconstruct(mnist_parser().parse_args(["--reconstruct", "all", "text"]))


def test_train_on_real_mnist(mnist_dir: Path, tmp_path: Path) -> None:
    flags = ["--out-dir", tmp_path, "--limit", "2000", "--n-val", "500", "--epochs", "1", "--annealing-epochs", "1"]
    flags += ["--reconstruct", "text", "--lambda-text", "50", "--precision", "bf16"]
    assert_ended(run_warm("mnist/train.py", "--data-dir", mnist_dir, *flags, cwd=tmp_path))
    (record,) = stats(tmp_path)
    assert record["seconds"] * record["examples_per_second"] == pytest.approx(2000)
    assert -784 * 0.6931 < record["validation/image/log_prob/image"] < -60  # nats: 784 ln 2
    assert record["validation/image/log_prob/text"] < 0


# sample.py


def sample(trained: Trained, digits_dir: Path, out_dir: Path, *flags: object) -> tuple[bytes, list[str]]:
    """Runs sample.py; gives the bytes of its picture, and its labels."""
    arguments = [trained.out_dir / checkpoint.BEST, "--data-dir", digits_dir, "--out-dir", out_dir, *flags]
    assert_ended(run_warm("mnist/sample.py", *arguments, cwd=out_dir.parent))
    return (out_dir / "sample_image.png").read_bytes(), (out_dir / "sample_text.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def sampled(trained: Trained, digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """What sample.py writes without conditions: the folder, and the bytes of the picture."""
    folder = tmp_path_factory.mktemp("sampled")
    return folder, sample(trained, digits_dir, folder)[0]


def test_sample_writes_a_grid_of_64_and_their_labels(sampled: tuple[Path, bytes]) -> None:
    folder, _ = sampled
    assert {path.name for path in folder.iterdir()} == {"sample_image.png", "sample_text.txt"}
    assert Image.open(folder / "sample_image.png").size == (8 * 30 + 2, 8 * 30 + 2)
    labels = (folder / "sample_text.txt").read_text().splitlines()
    assert len(labels) == 64
    assert set(labels) <= set("0123456789")


def test_same_seed_gives_the_same_bytes(
    trained: Trained, digits_dir: Path, tmp_path: Path, sampled: tuple[Path, bytes]
) -> None:
    assert sample(trained, digits_dir, tmp_path / "again", "--seed", 0)[0] == sampled[1]


def test_label_0_is_a_condition(
    trained: Trained, digits_dir: Path, tmp_path: Path, sampled: tuple[Path, bytes]
) -> None:
    picture, labels = sample(trained, digits_dir, tmp_path / "new", "--condition-on-text", 0, "--n-samples", 10)
    assert labels.count("0") >= 9  # each is decoded from a draw of z
    assert picture != sampled[1]
    with Image.open(tmp_path / "new" / "sample_image.png") as grid:
        assert grid.height == 2 * 30 + 2


def test_picture_is_a_condition_alone_and_beside_a_label(
    trained: Trained, digits_dir: Path, tmp_path: Path, sampled: tuple[Path, bytes]
) -> None:
    image, _ = sample(trained, digits_dir, tmp_path / "image", "--condition-on-image", 0)
    both, labels = sample(trained, digits_dir, tmp_path / "both", "--condition-on-image", 0, "--condition-on-text", 7)
    assert len({sampled[1], image, both}) == 3
    assert labels.count("7") > 48


def test_wrong_label_is_refused_and_the_right_ones_are_named(trained: Trained, tmp_path: Path) -> None:
    done = run_warm("mnist/sample.py", trained.out_dir / checkpoint.BEST, "--condition-on-text", "10", cwd=tmp_path)
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert all(words in said for words in ("--condition-on-text", "'10'", *"0123456789"))
    assert list(tmp_path.iterdir()) == []


# loglike.py

FEW = ["--n-samples", "20", "--limit", "60"]


def estimate(
    path: Path, digits_dir: Path, folder: Path, *more: object
) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """Runs loglike.py; gives what it wrote as JSON, and the process."""
    file = folder / "numbers.json"
    done = run_warm("mnist/loglike.py", path, "--data-dir", digits_dir, "--json", file, *FEW, *more, cwd=folder)
    assert_ended(done)
    return json.loads(file.read_text()), done


@pytest.fixture(scope="module")
def estimated(
    trained: Trained, digits_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """loglike.py on the first 60 test examples: its JSON and the process."""
    return estimate(trained.out_dir / checkpoint.BEST, digits_dir, tmp_path_factory.mktemp("estimated"))


def means(numbers: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["quantity"], row["proposal"]): row["mean"] for row in numbers["log_likelihood"]}


def test_loglike_writes_every_quantity_under_every_proposal(
    estimated: tuple[dict[str, Any], subprocess.CompletedProcess[str]],
) -> None:
    numbers, _ = estimated
    assert (numbers["n_examples"], numbers["n_samples"]) == (60, 20)
    found = set(means(numbers))
    for quantity in ("log p(image)", "log p(image, text)", "log p(image | text)"):
        assert {(quantity, "q(z | image)"), (quantity, "q(z | image, text)")} <= found
    assert ("log p(text)", "p(z)") in found
    for row in numbers["log_likelihood"]:
        assert set(row) == {"quantity", "proposal", "n_examples", "mean", "standard_error", "log_weight_variance"}
        assert row["n_examples"] == 60
        assert row["mean"] < 0 < row["standard_error"]
        assert row["log_weight_variance"] > 0
    (accuracy,) = numbers["measures"].values()
    assert 0 <= accuracy["mean"] <= 1


def test_loglike_prints_what_it_writes(estimated: tuple[dict[str, Any], subprocess.CompletedProcess[str]]) -> None:
    numbers, done = estimated
    for row in numbers["log_likelihood"]:
        (line,) = (
            line
            for line in done.stdout.splitlines()
            if line.startswith(f"{row['quantity']} ") and f" {row['proposal']} " in line
        )
        assert f"{row['mean']:.3f} ± {row['standard_error']:.3f}" in line
    assert "60 examples, 20 importance samples" in done.stdout
    assert "nats" in done.stdout


@pytest.mark.parametrize("ending", ["csv", "npz"])
def test_per_example_has_each_ones_estimates(ending: str, tmp_path: Path) -> None:
    """The second example lacks the label, and the fourth has nothing."""
    log_p = torch.tensor([-1.5, -2.25, -4], dtype=torch.float64)
    keys = (Quantity(("image",)), ("image",)), (Quantity(("text",), given=("image",)), ())
    estimates = dict(zip(keys, (Estimate(log_p, -log_p), Estimate(log_p[:2] - 1, log_p[:2] + 9)), strict=True))
    examples = dict(zip(keys, (torch.tensor([0, 1, 2]), torch.tensor([0, 2])), strict=True))
    path = tmp_path / f"each.{ending}"
    write_per_example(Evaluation(estimates, {}, {}, examples), path)
    names = ["log p(image)", "log p(text | image)"], ["q(z | image)", "p(z)"]
    if ending == "csv":
        with open(path, newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["example", *(f"{quantity}, {under}" for quantity, under in zip(*names, strict=True))]
        assert rows == [["0", "-1.5", "-2.5"], ["1", "-2.25", ""], ["2", "-4.0", "-3.25"]]
    else:
        found = np.load(path)
        np.testing.assert_array_equal(found["log_p"], [[-1.5, -2.5], [-2.25, math.nan], [-4, -3.25]])
        np.testing.assert_array_equal(found["log_weight_variance"], [[1.5, 7.5], [2.25, math.nan], [4, 6.75]])
        assert found["example"].tolist() == [0, 1, 2]
        assert (found["quantity"].tolist(), found["proposal"].tolist()) == names


def test_per_example_of_the_validation_split_has_the_printed_mean(
    trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    words = [trained.out_dir / checkpoint.BEST, "--data-dir", digits_dir, "--split", "validation", *FEW]
    done = run_warm("mnist/loglike.py", *words, "--per-example", "each.npz", cwd=tmp_path)
    assert_ended(done)
    assert done.stdout.startswith("Validation log-likelihood")
    found = np.load(tmp_path / "each.npz")
    assert found["log_p"].shape == (60, len(found["quantity"]))
    assert f"{found['log_p'][:, 0].mean():.3f} ±" in done.stdout
    held_out = examples("validation", argparse.Namespace(data_dir=digits_dir), {"n_val": 200, "binarize": False})[:60]
    model, _ = checkpoint.load_model(trained.out_dir / checkpoint.BEST, "mnist", build_model, torch.device("cpu"))
    quantity, proposal = Quantity(("image",)), ("image",)
    expected = evaluate(model, held_out, quantities={quantity: [proposal]}, n_samples=20).estimates[quantity, proposal]
    np.testing.assert_allclose(found["log_p"][:, 0], expected.log_p, rtol=1e-5)


def test_loglike_says_how_many_examples_a_number_is_of_where_they_lack_modalities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(10, seed=0, present={"label": torch.arange(10) < 4})
    quantities = {Quantity(("image",)): [("image",)], Quantity(("label",)): [("image",)]}
    found = evaluate(small_model(), data, quantities=quantities, n_samples=2)
    words = ["model", "--json", str(tmp_path / "numbers.json"), "--precision", "fp32"]
    report(found, {"a measure": torch.ones(4)}, flags.loglike_parser(None).parse_args(words), {"settings": {}})
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["n_examples"], numbers["measures"]["a measure"]["n_examples"]) == (10, 4)
    assert [row["n_examples"] for row in numbers["log_likelihood"]] == [10, 4]
    head, _, columns, image, label, measure = capsys.readouterr().out.splitlines()
    assert "those of 10 examples that have what it takes" in head
    assert [line.split()[-1] for line in (columns, image, label)] == ["examples", "10", "4"]
    assert measure == "a measure: 1.0000 ± 0.0000, over 4 examples"


def test_loglike_ends_quietly_where_the_reader_of_its_output_has_left(
    trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [trained.out_dir / checkpoint.BEST, "--data-dir", digits_dir, *FEW]
    done = subprocess.run(
        command("mnist/loglike.py", *arguments),
        cwd=tmp_path,
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_log_p_of_the_joint_less_the_conditional_is_that_of_the_label(
    estimated: tuple[dict[str, Any], subprocess.CompletedProcess[str]],
) -> None:
    found = means(estimated[0])
    for proposal in ("q(z | image)", "q(z | image, text)"):
        difference = found["log p(image, text)", proposal] - found["log p(image | text)", proposal]
        assert difference == pytest.approx(found["log p(text)", "p(z)"], abs=1e-6)


@pytest.mark.parametrize("jobs", [1, 2])
def test_same_seed_gives_the_same_numbers_in_any_number_of_processes(
    jobs: int,
    trained: Trained,
    digits_dir: Path,
    tmp_path: Path,
    estimated: tuple[dict[str, Any], subprocess.CompletedProcess[str]],
) -> None:
    again = estimate(trained.out_dir / checkpoint.BEST, digits_dir, tmp_path, "--jobs", jobs)[0]
    assert again["jobs"] == jobs
    for part in ("log_likelihood", "measures"):
        assert again[part] == estimated[0][part]


def test_loglike_writes_what_the_numbers_are_of(
    trained: Trained, estimated: tuple[dict[str, Any], subprocess.CompletedProcess[str]]
) -> None:
    numbers, best = estimated[0], checkpoint.load(trained.out_dir / checkpoint.BEST, "mnist")
    assert numbers["checkpoint"] == str(trained.out_dir / checkpoint.BEST)
    assert numbers["command"].startswith(f"python mnist/loglike.py {trained.out_dir / checkpoint.BEST} --data-dir")
    assert (numbers["seed"], numbers["device"], numbers["threads"]) == (0, "cpu", 1)
    for name in ("epoch", "validation_loss", "training_seconds"):
        assert numbers["training"][name] == best[name]
    assert numbers["training"]["settings"]["lambda_text"] == 10.0
    assert not [name for name in numbers["training"]["settings"] if name.endswith("_dir")]


def test_model_of_binary_pictures_is_scored_on_binary_pixels(
    trained: Trained,
    digits_dir: Path,
    tmp_path: Path,
    estimated: tuple[dict[str, Any], subprocess.CompletedProcess[str]],
) -> None:
    path = tmp_path / "binary.pth.tar"
    content = checkpoint.load(trained.out_dir / checkpoint.BEST, "mnist")
    content["settings"]["binarize"] = True
    checkpoint.save(path, "mnist", content)
    found = means(estimate(path, digits_dir, tmp_path)[0])

    model, _ = checkpoint.load_model(path, "mnist", build_model, torch.device("cpu"))
    test = mnist_test_data(digits_dir, binarize=True)[:60]
    quantity, proposal = Quantity(("image",)), ("image",)
    expected = evaluate(model, test, quantities={quantity: [proposal]}, n_samples=20).estimates[quantity, proposal]
    assert found["log p(image)", "q(z | image)"] == pytest.approx(expected.log_p.mean().item(), rel=1e-6)
    assert abs(found["log p(image)", "q(z | image)"] - means(estimated[0])["log p(image)", "q(z | image)"]) > 0.1


def test_train_on_binary_pictures(digits_dir: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", digits_dir, "--out-dir", tmp_path, "--epochs", "1", "--binarize", *SHORT]
    assert_ended(run_warm("mnist/train.py", *flags, cwd=tmp_path))
    assert checkpoint.load(tmp_path / checkpoint.BEST, "mnist")["settings"]["binarize"] is True


@pytest.mark.parametrize(
    ("chosen", "policy", "spins"),
    [({}, "PASSIVE", "300"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", ""), ({"GOMP_SPINCOUNT": "7"}, "", "7")],
)
def test_threads_wait_a_moment_and_then_sleep_unless_the_user_has_it_otherwise(
    chosen: dict[str, str], policy: str, spins: str, tmp_path: Path
) -> None:
    env = {key: value for key, value in environment(OMP_DISPLAY_ENV="verbose").items() if key not in OPENMP}
    said = run("mnist/sample.py", "absent.pth.tar", cwd=tmp_path, env=env | chosen).stderr
    assert f"OMP_WAIT_POLICY = '{policy}" in said
    assert f"GOMP_SPINCOUNT = '{spins}" in said


def test_threads_are_those_asked_for_and_else_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*words: str) -> int:
        args = flags.parser(None).parse_args(words)
        assert machine.device(args).type == "cpu"
        assert args.threads == torch.get_num_threads()
        return args.threads

    before = torch.get_num_threads()
    try:
        assert [taken("--threads", "7"), taken("--threads", "2")] == [7, 2]
        torch.set_num_threads(7)
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert taken() == 7
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert taken() == 4
    finally:
        torch.set_num_threads(before)


def test_precision_auto_looks_at_the_processor_says_what_it_took_and_records_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes: dict[str, Any] = {"n_latents": 2, "batch_size": 2, "epochs": 1, "annealing_epochs": 1, "lr": 1.0}
    parser = training.parser(None, modalities=("image", "text"), lambdas={}, **sizes)
    args = parser.parse_args(["--precision", "auto"])
    options = training.options(args)
    known = {name for name, there in torch.cpu.get_capabilities().items() if there}
    expected = "bf16" if known & {"amx_bf16", "avx512_bf16", "bf16"} else "fp32"
    assert options.precision == training.settings(args)["precision"] == expected
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"--precision auto: {expected}, as this processor has")


def test_threads_are_in_the_checkpoint(trained: Trained) -> None:
    assert checkpoint.load(trained.out_dir / checkpoint.BEST, "mnist")["settings"]["threads"] == 1


PEAK = """
import contextlib, io, resource, runpy, sys, torch
torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)  # as loading a large set does: from now on glibc keeps freed blocks
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_of_loglike_does_not_grow_with_the_examples(trained: Trained, digits_dir: Path) -> None:
    def peak(limit: int) -> float:
        """The most memory in MiB that `loglike.py --limit LIMIT` holds."""
        words = [str(trained.out_dir / checkpoint.BEST), "--data-dir", str(digits_dir), "--limit", str(limit)]
        program = f"import sys; sys.argv = {[str(ROOT / 'mnist' / 'loglike.py'), *words]!r}; "
        program += f"sys.path.insert(0, {str(ROOT / 'mnist')!r}){PEAK}"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
        assert (done.returncode, done.stderr) == (0, "")
        return int(done.stdout) / 1024

    assert peak(40) < peak(8) + 40  # an example is a batch; each left some 3 MiB behind
