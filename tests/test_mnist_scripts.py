"""The scripts of MNIST and FashionMNIST as a user runs them: train, sample, estimate; what they write and print."""

import csv
import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import fashionmnist.datasets as fashion
from mnist.datasets import Source, examples
from mnist.model import build_model
from mvae import Quantity, evaluate
from mvae.estimators import Estimate
from mvae.run import checkpoint, device
from mvae.run.evaluate import Evaluation
from mvae.tools.report import Loglike, report, write_per_example
from synthetic import __main__ as synthetic

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import (
    ROOT,
    Trained,
    assert_ended,
    assert_refused,
    run_two,
    run_warm,
    small_data,
    small_model,
    stats,
)

TERMS = {"joint": ("image", "text"), "image": ("image",), "text": ("text",)}


# train.py


def test_train_writes_its_files_from_any_folder_and_without_a_cuda_device(trained: Trained) -> None:
    assert_refused(trained.process, 0, "--cuda: no CUDA device is available to torch; using the CPU")
    files = {"checkpoint.pth.tar", "model_best.pth.tar", "stats.jsonl", "tensorboard"}
    assert {path.name for path in trained.out_dir.iterdir()} - {".lock"} == files
    settings = checkpoint.load(trained.out_dir / checkpoint.BEST, "mnist")["settings"]
    expected = {"lambda_text": 10, "n_val": 200, "binarize": False, "out_dir": "trained"}
    assert expected.items() <= settings.items()


def test_stats_have_each_epochs_numbers(trained: Trained) -> None:
    records = stats(trained.out_dir)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["beta"] for record in records] == [1 / 20, 2 / 20, 3 / 20]
    losses = [record["validation/loss"] for record in records]
    assert losses == sorted(losses, reverse=True)
    numbers = {f"{term}/{number}" for term in TERMS for number in ("elbo", "kl")} | {"loss"}
    numbers |= {f"{term}/log_prob/{name}" for term, names in TERMS.items() for name in names}
    names = {f"{part}/{name}" for part in ("train", "validation") for name in numbers}
    names |= {"epoch", "beta", "lr", "seconds", "examples_per_second", "validation/label_accuracy"}
    for record in records:
        assert set(record) == names
        assert record["seconds"] * record["examples_per_second"] == pytest.approx(1000)
        # The validation loss has the weights, and β = 1.
        validation = {name: value for name, value in record.items() if name.startswith("validation/")}
        kl, image, text = (
            sum(value for name, value in validation.items() if name.endswith(end)) for end in ("/kl", "/image", "/text")
        )
        assert record["validation/loss"] == pytest.approx(kl - image - 10 * text, rel=1e-5)
        elbos = sum(value for name, value in validation.items() if name.endswith("/elbo"))
        assert elbos == pytest.approx(image + text - kl, rel=1e-5)


def test_tensorboard_has_pictures_of_each_epoch(trained: Trained) -> None:
    events = EventAccumulator(str(trained.out_dir / "tensorboard")).Reload()
    for name, rows in (("reconstruction/image", 4), ("given_text/image", 10)):
        found = [(picture.step, picture.width, picture.height) for picture in events.Images(name)]
        assert found == [(epoch, 8 * 30 + 2, rows * 30 + 2) for epoch in (1, 2, 3)]
    assert [picture.step for picture in events.Images("latents/image")] == [1, 2, 3]


def test_train_on_real_mnist(mnist_dir: Path, tmp_path: Path) -> None:
    flags = ["--out-dir", tmp_path, "--limit", "300", "--n-val", "100", "--epochs", "1", "--annealing-epochs", "1"]
    flags += ["--reconstruct", "text", "--lambda-text", "50."]
    assert_ended(run_warm("mnist/train.py", "--data-dir", mnist_dir, *flags, cwd=tmp_path))
    (record,) = stats(tmp_path)
    assert record["seconds"] * record["examples_per_second"] == pytest.approx(300)
    assert -784 * 0.6931 < record["validation/image/log_prob/image"] < -60  # nats: 784 ln 2
    assert record["validation/image/log_prob/text"] < 0


def test_threads_are_those_of_the_flag_or_the_variable_or_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(threads: int | None) -> int:
        assert device.Machine(threads=threads).device().type == "cpu"
        return torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        assert [taken(7), taken(2)] == [7, 2]
        torch.set_num_threads(7)
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert taken(None) == 7
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert taken(None) == 4
    finally:
        torch.set_num_threads(before)


def test_precision_auto_depends_on_the_processor(caplog: pytest.LogCaptureFixture) -> None:
    known = {name for name, there in torch.cpu.get_capabilities().items() if there}
    expected = "bf16" if known & {"amx_bf16", "avx512_bf16", "bf16"} else "fp32"
    with caplog.at_level("INFO"):
        assert device.resolve("auto", torch.device("cpu")) == expected
    assert f"precision auto: {expected} (" in caplog.text
    assert device.resolve("bf16", torch.device("cpu")) == "bf16"


# sample.py


def test_sample_writes_a_grid_and_labels_conditioned_on_what_is_given(
    trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    def sample(*flags: object) -> tuple[bytes, list[str]]:
        words = [trained.out_dir / checkpoint.BEST, "--data-dir", digits_dir, "--out-dir", "out", *flags]
        assert_ended(run_warm("mnist/sample.py", *words, cwd=tmp_path))
        out = tmp_path / "out"
        return (out / "sample_image.png").read_bytes(), (out / "sample_text.txt").read_text().splitlines()

    picture, labels = sample()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sample_image.png", "sample_text.txt"}
    side = 8 * (4 * 28 + 2) + 2  # about 900 pixels
    assert Image.open(tmp_path / "out" / "sample_image.png").size == (side, side)
    assert len(labels) == 64
    assert set(labels) <= set("0123456789")
    zero, labels = sample("--condition-on-text", 0, "--n-samples", 10)
    assert labels.count("0") >= 9  # each is decoded from a draw of z
    both, labels = sample("--condition-on-image", 0, "--condition-on-text", 7)
    assert labels.count("7") > 48
    assert len({picture, zero, both}) == 3


# loglike.py

FEW = ["--n-samples", "20", "--limit", "60"]
Numbers = tuple[dict[str, Any], subprocess.CompletedProcess[str]]


def estimate(path: Path, digits_dir: Path, folder: Path, *more: object) -> Numbers:
    """Run loglike.py; return what it wrote as JSON, and the process."""
    file = folder / "numbers.json"
    done = run_warm("mnist/loglike.py", path, "--data-dir", digits_dir, "--json", file, *FEW, *more, cwd=folder)
    assert_ended(done)
    return json.loads(file.read_text()), done


@pytest.fixture(scope="module")
def estimated(trained: Trained, digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """Run loglike.py on the first 60 test examples; return its JSON and the process."""
    return estimate(trained.out_dir / checkpoint.BEST, digits_dir, tmp_path_factory.mktemp("estimated"))


def means(numbers: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["quantity"], row["proposal"]): row["mean"] for row in numbers["log_likelihood"]}


def test_loglike_writes_and_prints_every_quantity_with_every_proposal(estimated: Numbers, trained: Trained) -> None:
    numbers, done = estimated
    assert (numbers["n_examples"], numbers["n_samples"]) == (60, 20)
    both = [(f"log p({name})", "q(z | image)") for name in ("image", "image, text", "image | text", "text | image")]
    both += [(name, "q(z | image, text)") for name, _ in both]
    assert set(means(numbers)) == {*both, ("log p(text)", "p(z)"), ("log p(text)", "q(z | text)")}
    for row in numbers["log_likelihood"]:
        assert set(row) == {"quantity", "proposal", "n_examples", "mean", "standard_error", "log_weight_variance"}
        assert row["n_examples"] == 60
        assert row["mean"] < 0 < row["standard_error"]
        assert row["log_weight_variance"] > 0
        printed = f"^{re.escape(row['quantity'])} .*{re.escape(row['proposal'])} .*"
        assert re.search(f"{printed}{row['mean']:.3f} ± {row['standard_error']:.3f}", done.stdout, re.MULTILINE)
    (accuracy,) = numbers["measures"].values()
    assert 0 <= accuracy["mean"] <= 1
    assert "Test log-likelihood in nats: mean ± standard error over 60 examples, 20 importance" in done.stdout
    for proposal in ("q(z | image)", "q(z | image, text)"):
        difference = means(numbers)["log p(image, text)", proposal] - means(numbers)["log p(image | text)", proposal]
        assert difference == pytest.approx(means(numbers)["log p(text)", "p(z)"], abs=1e-6)

    path = trained.out_dir / checkpoint.BEST
    best = checkpoint.load(path, "mnist")
    assert numbers["checkpoint"] == str(path)
    assert numbers["command"].startswith(f"python mnist/loglike.py {path} --data-dir")
    assert (numbers["seed"], numbers["device"], numbers["threads"]) == (0, "cpu", 1)
    for name in ("epoch", "validation_loss", "training_seconds"):
        assert numbers["training"][name] == best[name]
    assert numbers["training"]["settings"]["lambda_text"] == 10.0
    assert not [name for name in numbers["training"]["settings"] if name.endswith("_dir")]


def test_two_processes_of_torchrun_find_the_same_numbers(
    trained: Trained, digits_dir: Path, tmp_path: Path, estimated: Numbers
) -> None:
    words = [trained.out_dir / checkpoint.BEST, "--data-dir", digits_dir, "--json", "numbers.json", *FEW]
    said = run_two("mnist/loglike.py", *words, cwd=tmp_path)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["processes"] == 2
    assert numbers["log_likelihood"] == estimated[0]["log_likelihood"]
    assert numbers["measures"] == estimated[0]["measures"]
    assert [out.count("log-likelihood in nats") for out in said] == [1, 0]


def test_per_example_file_has_each_ones_estimates(tmp_path: Path) -> None:
    """The second example lacks the label, and the fourth has nothing."""
    log_p = torch.tensor([-1.5, -2.25, -4], dtype=torch.float64)
    keys = (Quantity(("image",)), ("image",)), (Quantity(("text",), given=("image",)), ())
    estimates = dict(zip(keys, (Estimate(log_p, -log_p), Estimate(log_p[:2] - 1, log_p[:2] + 9)), strict=True))
    numbers = dict(zip(keys, (torch.tensor([0, 1, 2]), torch.tensor([0, 2])), strict=True))
    for name in ("each.csv", "each.npz"):
        write_per_example(Evaluation(estimates, {}, {}, numbers, 10), tmp_path / name)
    header, *rows = csv.reader((tmp_path / "each.csv").read_text().splitlines())
    assert header == ["example", "log p(image), q(z | image)", "log p(text | image), p(z)"]
    assert rows == [["0", "-1.5", "-2.5"], ["1", "-2.25", ""], ["2", "-4.0", "-3.25"]]
    found = np.load(tmp_path / "each.npz")
    np.testing.assert_array_equal(found["log_p"], [[-1.5, -2.5], [-2.25, math.nan], [-4, -3.25]])
    np.testing.assert_array_equal(found["log_weight_variance"], [[1.5, 7.5], [2.25, math.nan], [4, 6.75]])
    assert found["example"].tolist() == [0, 1, 2]
    assert found["quantity"].tolist() == ["log p(image)", "log p(text | image)"]
    assert found["proposal"].tolist() == ["q(z | image)", "p(z)"]


def test_loglike_reads_the_split_examples_draws_and_seed_asked_for(
    trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    words = ["--split", "validation", "--limit", 30, "--n-samples", 5, "--seed", 7, "--per-example", "each.npz"]
    _, done = estimate(trained.out_dir / checkpoint.BEST, digits_dir, tmp_path, *words)
    assert "Validation log-likelihood" in done.stdout
    found = np.load(tmp_path / "each.npz")
    assert found["log_p"].shape == (30, len(found["quantity"]))
    assert f"{found['log_p'][:, 0].mean():.3f} ±" in done.stdout
    held_out = examples("validation", Source(data_dir=digits_dir), {"n_val": 200, "binarize": False})[:30]
    model, _ = checkpoint.load_model(trained.out_dir / checkpoint.BEST, "mnist", build_model, torch.device("cpu"))
    key = Quantity(("image",)), ("image",)
    expected = evaluate(model, held_out, quantities={key[0]: [key[1]]}, n_samples=5, seed=7).estimates[key]
    np.testing.assert_allclose(found["log_p"][:, 0], expected.log_p, rtol=1e-5)
    np.testing.assert_allclose(found["log_weight_variance"][:, 0], expected.log_weight_variance, rtol=1e-3)


def test_one_example_has_no_standard_error(trained: Trained, digits_dir: Path, tmp_path: Path) -> None:
    numbers, done = estimate(trained.out_dir / checkpoint.BEST, digits_dir, tmp_path, "--limit", 1)
    rows = [*numbers["log_likelihood"], *numbers["measures"].values()]
    assert {row["standard_error"] for row in rows} == {None}
    assert done.stdout.count(" ± –") == len(rows)
    done = run_warm("mnist/loglike.py", trained.out_dir / checkpoint.BEST, "--limit", 0, cwd=tmp_path)
    assert_refused(done, 2, "limit must be an integer >= 1")


def test_loglike_says_how_many_examples_a_number_is_of_if_they_lack_modalities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(10, seed=0, present={"label": torch.arange(10) < 4})
    quantities = {Quantity(("image",)): [("image",)], Quantity(("label",)): [("image",)]}
    found = evaluate(small_model(), data, quantities=quantities, n_samples=2)
    config = Loglike(model_path=Path("model"), json=tmp_path / "numbers.json")
    report(found, {"a measure": torch.ones(4)}, config, {"settings": {}})
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["n_examples"], numbers["measures"]["a measure"]["n_examples"]) == (10, 4)
    assert [row["n_examples"] for row in numbers["log_likelihood"]] == [10, 4]
    head, _, columns, image, label, measure = capsys.readouterr().out.splitlines()
    assert "those of 10 examples that have its modalities" in head
    assert [line.split()[-1] for line in (columns, image, label)] == ["examples", "10", "4"]
    assert measure == "a measure: 1.0000 ± 0.0000, over 4 examples"


def test_a_model_of_binary_pictures_is_scored_on_binary_pixels(
    trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    content, path = checkpoint.load(trained.out_dir / checkpoint.BEST, "mnist"), tmp_path / checkpoint.BEST
    content["settings"]["binarize"] = True
    checkpoint.save(path, "mnist", content)
    found = means(estimate(path, digits_dir, tmp_path)[0])
    model, _ = checkpoint.load_model(path, "mnist", build_model, torch.device("cpu"))
    key, settings = (Quantity(("image",)), ("image",)), {"n_val": 200, "binarize": True}
    binary = examples("test", Source(data_dir=digits_dir), settings)[:60]
    assert set(binary.batch(torch.arange(60))[0]["image"].unique().tolist()) == {0, 1}
    score = evaluate(model, binary, quantities={key[0]: [key[1]]}, n_samples=20).estimates[key]
    assert found["log p(image)", "q(z | image)"] == pytest.approx(score.log_p.mean().item(), rel=1e-6)


PEAKS = """
import contextlib, io, resource, runpy, sys, mvae, torch
torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)  # as loading a large set does: from now on glibc keeps freed blocks
script, *words = sys.argv[1:]
sys.path.insert(0, script.removesuffix("loglike.py"))
for limit in ("8", "32"):
    sys.argv = [script, *words, "--limit", limit]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_of_loglike_does_not_grow_with_the_examples(trained: Trained, digits_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "peaks.py").write_text(PEAKS)
    words = [ROOT / "mnist/loglike.py", trained.out_dir / checkpoint.BEST, "--data-dir", digits_dir]
    done = run_warm(str(tmp_path / "peaks.py"), *words)
    assert_ended(done)
    first, second = map(int, done.stdout.split())
    assert second < first + 24  # MiB: less than one for each further example, which is a batch


# FashionMNIST


def test_fashionmnist_is_trained_resumed_sampled_by_name_and_estimated(tmp_path: Path) -> None:
    synthetic.main(["fashion", str(tmp_path / "data"), "--train", "250", "--test", "50"])

    def done(script: str, *words: object) -> None:
        assert_ended(run_warm(f"fashionmnist/{script}", *words, "--data-dir", "data", cwd=tmp_path))

    short = ["--n-val", 50, "--batch-size", 50, "--annealing-epochs", 4]
    done("train.py", *short, "--epochs", 1)
    done("train.py", *short, "--epochs", 2, "--resume")
    first, second = stats(tmp_path / "trained_models")
    assert second["validation/loss"] < first["validation/loss"]
    path = tmp_path / "trained_models" / checkpoint.BEST
    done("sample.py", path, "--n-samples", 16, "--condition-on-image", 0, "--condition-on-text", "ankle boot")
    width, height = Image.open(tmp_path / "sample_image.png").size
    assert height == 2 * 114 + 2
    assert width > 9 * 114 + 2  # what is given, in words and as a picture, and eight columns
    names = (tmp_path / "sample_text.txt").read_text().splitlines()
    assert len(names) == 16
    assert set(names) <= set(fashion.CLASSES)
    done("loglike.py", path, "--n-samples", 10, "--limit", 20, "--json", "numbers.json")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {name for name, _ in means(numbers)} == {
        f"log p({name})" for name in ("image", "image, text", "image | text", "text | image", "text")
    }


def test_real_fashionmnist_is_read() -> None:
    folder = Path(os.environ.get("MVAE_DATA_DIR", ROOT / "data"))
    if not (folder / "FashionMNIST").is_dir():
        pytest.skip(f"real FashionMNIST is not in {folder}: MVAE_DATA_DIR names the folder that holds it")
    test = fashion.examples("test", fashion.Source(data_dir=folder), {"binarize": False})
    assert test.tensors["text"].bincount().tolist() == [1000] * 10
    assert fashion.CLASSES[test.tensors["text"][0]] == "Ankle boot"
