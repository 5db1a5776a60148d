"""The tables in the READMEs are those that benchmarks/tables.py makes from results/."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from helpers import ROOT, assert_ended, assert_refused, run

NAMES = (
    "summary",
    "mnist",
    "binarymnist",
    "celeba19",
    "vision",
    "speed",
    "memory",
    "loglike",
    "loglike_full",
    "threads",
    "peer",
    "gpu",
    "batch_norm",
    "weak_mnist",
    "ablation",
    "reconstruct",
)
PLOTTED = ("curves", "accuracy", "weak")
TRAINED = {"validation_loss": 200.0, "training_seconds": 1500.0}
IMAGE, BOTH, LABEL = "q(z | image)", "q(z | image, text)", "accuracy of the label predicted from the image"


def tables(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("benchmarks/tables.py", "--root", root, *arguments, cwd=root)


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def estimate(quantity: str, proposal: str, mean: float) -> dict[str, Any]:
    return {"quantity": quantity, "proposal": proposal, "mean": mean, "standard_error": 0.25}


def loglike(experiment: str, seed: int, rows: list[dict[str, Any]], measures: Mapping[str, float]) -> dict[str, Any]:
    """What loglike.py --json writes."""
    settings = {"command": f"python {experiment}/train.py --seed {seed}", "commit": "a" * 40, "seed": seed}
    settings |= {"cuda": False, "threads": 1}
    return {
        "command": f"python {experiment}/loglike.py MODEL --json FILE",
        "commit": "b" * 40,
        "n_examples": 10000,
        "n_samples": 1000,
        "seed": 0,
        "training": {"settings": {**settings, "epochs": 50}, "epoch": 48, **TRAINED},
        "log_likelihood": rows,
        "measures": {name: {"mean": mean, "standard_error": 0.001} for name, mean in measures.items()},
    }


def mnist(seed: int, mean: float) -> dict[str, Any]:
    rows = [estimate("log p(image)", IMAGE, mean), estimate("log p(image)", BOTH, mean - 2)]
    rows += [estimate("log p(image, text)", IMAGE, mean - 0.125), estimate("log p(text | image)", IMAGE, -0.125)]
    return loglike("mnist", seed, rows, {LABEL: 0.9875})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with results of every kind, and a README whose tables are made of them."""
    results = tmp_path / "results"
    write(results / "mnist-fast-0.json", mnist(0, -90.5))
    write(results / "mnist-fast-1.json", mnist(1, -90.75))
    write(results / "mnist-paper-0.json", mnist(0, -92.0))
    write(results / "binarymnist-fast-0.json", mnist(0, -86.5))
    coherence = {name: {"mean": 0.75, "standard_error": 0.01} for name in ("coherence, label to image",)}
    also = {
        "n_pictures_per_label": 200,
        "n_prior": 2000,
        "classifier": {"mean": 0.99},
        "training": TRAINED,
        "measures": coherence,
    }
    for seed in (0, 1):
        command = f"python benchmarks/coherence.py mnist --seed {seed}"
        write(results / f"coherence-mnist-fast-{seed}.json", {"command": command, **also})
    joint = "image, Bald, ..., Wearing_Hat"
    rows = [estimate(f"log p({joint})", f"q(z | {joint})", -6350.0)]
    rows.append(estimate("log p(Bald, Bangs, ..., Wearing_Hat | image)", IMAGE, -6.0))
    names = ["accuracy of an attribute predicted from the image", "balanced accuracy of an attribute"]
    faces = dict.fromkeys([*names, "accuracy of Male", "balanced accuracy of Male"], 0.875)
    write(results / "celeba19-fast-0.json", loglike("celeba19", 0, rows, faces))
    six = [estimate("log p(image, gray, ..., watermark)", IMAGE, -19300.0)]
    write(results / "vision-fast-0.json", loglike("vision", 0, six, {}))
    step = {"experiment": "mnist", "batch_size": 100, "device": "cpu", "threads": 1, "precision": "fp32"}
    times = {"plain_ms": [79, 80, 81], "ours_ms": [39, 40, 41], "plain / ours": [1.9, 2.0, 2.1]}
    timed = {**step, **times, "compiled": False, "given only / ours": [1.8, 1.9, 2.0], "data_share": 0.005}
    memory: dict[str, Any] = {"experiment": "mnist", "device": "cpu", "precision": "fp32"}
    memory |= {kind: {"peak_mib": 800.0, "before_mib": 700.0} for kind in ("plain", "ours")}
    machine = {"command": "python benchmarks/step.py", "processor": "Xeon", "gpu": None, "torch": "2.14"}
    waited = {"experiment": "mnist", "device": "cpu", "threads": 1, "minutes": [2.25, 2.5, 2.75]}
    write(results / "step-mnist.json", {**machine, "steps": [timed], "memory": [memory], "loglike": [waited]})
    ways = ("each by itself", "predictions apart", "larger chunks", "each logarithm")
    ratios = {"ours": [1.0, 1.0, 1.0], **{way: [2.0, 2.25, 2.5] for way in ways}}
    shared = {"command": "python benchmarks/loglike.py mnist", "experiment": "mnist", "ratios": ratios}
    write(results / "loglike-mnist.json", shared)
    write(results / "full" / "mnist-bf16.json", {**mnist(0, -91.25), "precision": "bf16", "jobs": 2, "seconds": 270})
    waits = [{"experiment": "mnist", "busy": 1, "way": way, "rate": [0.5, rate, 1.5]} for way, rate in
             (("1 thread", 1.0), ("2 threads", 1.25))]  # fmt: skip
    write(results / "threads.json", {**machine, "rows": waits})
    write(
        results / "peer.json", {**machine, "multivae": "1.0.3", "ratios": {"a step": {"MultiVae": [1.25, 1.5, 1.75]}}}
    )
    captured = {"experiment": "mnist", "precision": "fp32", "eager_ms": 3.0, "captured_ms": 2.0, "eager_busy": 0.5}
    captured |= {"captured_busy": 0.75, "products_floor_ms": 0.5, "weights_floor_ms": 0.25}
    write(results / "gpu.json", {**machine, "gpu": "H100", "steps": {"rows": [captured]}})
    for seed, (joint_loss, term_loss) in enumerate([(100.0, 110.0), (101.0, 113.0)]):
        for statistics, loss in (("joint", joint_loss), ("term", term_loss)):
            found = {"seed": seed, "experiment": "celeba", "reconstruct": "attrs", "statistics": statistics}
            found |= {"n_train": 5000, "n_validation": 1000, "epochs": 3, "commit": "c" * 40}
            losses = {"validation_loss": {"evaluation": loss, "training": 99.0}}
            write(results / "batch_norm" / f"celeba-attrs-{statistics}-{seed}.json", {**found, **losses})
    for seed, (ours, theirs) in enumerate([(0.75, 0.5), (0.8125, 0.5), (0.875, 0.625)]):
        for method, mean in (("weak", ours), ("m1", theirs)):
            one = {"method": method, "n": 100, "seed": seed, "commit": "d" * 40, "n_examples": 10000}
            found = {"accuracy": {"mean": mean, "standard_error": 0.01}}
            write(results / "weak" / f"mnist-{method}-100-{seed}.json", {**one, "measures": found})
    names = [f'"log p(image), {IMAGE}"', f'"log p(image, text), {IMAGE}"']
    for seed, (base, other) in enumerate(
        [((-90, -92), (-89, -92)), ((-91, -93), (-89, -92)), ((-90, -92), (-88, -91))]
    ):
        for recipe, values in (("base", base), ("iw-2", other)):
            lines = [",".join(["example", *names]), *(f"{i},{value},{value - 1}" for i, value in enumerate(values))]
            write(results / "ablation" / f"mnist-{recipe}-{seed}.json", loglike("mnist", seed, [], {}))
            (results / "ablation" / f"mnist-{recipe}-{seed}.csv").write_text("\n".join(lines))
    for seed, shares in enumerate([(0.5, 0.6), (0.52, 0.66)]):
        for recipe, share in zip(("text", "all"), shares, strict=True):
            lines = [",".join(names), "-90,-91", "-92,-93"]
            name = f"mnist-{recipe}-{seed}"
            write(results / "reconstruct" / f"{name}.json", loglike("mnist", seed, [], {}))
            (results / "reconstruct" / f"{name}.csv").write_text("\n".join(lines))
            measured = {"measures": {"coherence, label to image": {"mean": share, "standard_error": 0.01}}}
            write(results / "reconstruct" / f"coherence-{name}.json", measured)
    markers = "".join(f"## {name}\n\n<!-- table: {name} -->\n<!-- end of table -->\n\n" for name in NAMES)
    (tmp_path / "README.md").write_text(markers)
    assert tables(tmp_path).returncode == 0
    return tmp_path


def rows_of(root: Path, name: str) -> list[list[str]]:
    """The cells of a table of the README, its header first."""
    text = (root / "README.md").read_text().split(f"<!-- table: {name} -->")[1].split("<!-- end of table -->")[0]
    lines = [line.replace("\\|", "¦") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("¦", "|") for cell in line.strip("|").split("|")] for line in lines]


def test_the_repositorys_tables_are_those_of_its_results() -> None:
    assert_ended(run("benchmarks/tables.py", "--check", cwd=ROOT))


def test_tables_that_were_made_pass_the_check(root: Path) -> None:
    assert_ended(tables(root, "--check"))


def test_a_changed_digit_is_found(root: Path) -> None:
    readme = root / "README.md"
    start, mnist_table = readme.read_text().split("<!-- table: mnist -->")
    readme.write_text(start + "<!-- table: mnist -->" + mnist_table.replace("90.62", "90.63", 1))
    assert_refused(tables(root, "--check"), 1, "README.md", "table mnist")


@pytest.mark.parametrize(
    ("file", "old", "new", "name"),
    [
        ("mnist-fast-1.json", "-90.75", "-90.85", "summary"),
        ("celeba19-fast-0.json", "accuracy of Male", "accuracy of Bald", "celeba19"),
        ("loglike-mnist.json", "[2.0, 2.25, 2.5]", "[2.0, 2.35, 2.5]", "loglike"),
        ("full/mnist-bf16.json", "270", "277", "loglike_full"),
        ("threads.json", "1.25", "1.35", "threads"),
        ("peer.json", "1.5", "1.6", "peer"),
        ("gpu.json", "3.0", "4.0", "gpu"),
        ("step-mnist.json", "[1.9, 2.0, 2.1]", "[1.9, 2.05, 2.1]", "speed"),
        ("batch_norm/celeba-attrs-term-1.json", "113.0", "114.0", "batch_norm"),
        ("ablation/mnist-iw-2-1.csv", "-89", "-88", "ablation"),
        ("reconstruct/coherence-mnist-all-1.json", "0.66", "0.67", "reconstruct"),
        ("weak/mnist-m1-100-1.json", "0.5", "0.51", "weak_mnist"),
    ],
)
def test_a_changed_results_file_is_found(root: Path, file: str, old: str, new: str, name: str) -> None:
    path = root / "results" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert_refused(tables(root, "--check"), 1, "README.md", f"table {name}")


def test_methods_are_compared_with_the_same_pairs(root: Path) -> None:
    header, _, ours, m1, difference = rows_of(root, "weak_mnist")
    assert header == ["accuracy, %", "100 pairs"]
    assert (ours[1], m1[1]) == ("81.2 ± 3.6", "54.2 ± 4.2")
    assert difference[1] == "+27.1 ± 2.1"


def test_recipes_are_compared_by_seed_and_example(root: Path) -> None:
    header, _, better, base = rows_of(root, "ablation")
    assert header[3:5] == ["log p(image)", "less `base`"]
    assert base[:5] == ["`base`", "3", "25.0", "-91.33", ""]
    assert better[:5] == ["`iw-2`", "3", "25.0", "-90.17", "+1.17 ± 0.50 (0.33)"]
    assert better[5:] == ["-91.17", "+1.17 ± 0.50 (0.33)"]


def test_recipes_are_compared_by_coherence_where_it_was_measured(root: Path) -> None:
    header, _, *rows = rows_of(root, "reconstruct")
    assert "coherence" not in "".join(rows_of(root, "ablation")[0])
    assert header[-2:] == ["coherence, label to image, %", "less `text`"]
    found = {row[0]: row[-2:] for row in rows}
    assert found == {"`text`": ["51.00", ""], "`all`": ["63.00", "+12.00 (2.00)"]}


def test_seeds_are_averaged_with_their_deviation_and_the_paper_stands_below(root: Path) -> None:
    row = rows_of(root, "summary")[2]
    names = ["[mnist](mnist/README.md)", "a digit, its label", "`fast`"]
    assert row[:4] == [*names, "-90.62 ± 0.25 (seeds 0.18)<br>*-90.62*"]
    assert row[6:] == ["98.8 ± 0.1 (seeds 0.0) %", "48 of 50<br>*500*", "25", "10,000"]


def test_an_experiments_table_has_a_column_for_each_recipe(root: Path) -> None:
    rows = rows_of(root, "mnist")
    assert rows[0] == ["", "under", "`fast`", "`paper`", "the paper"]
    assert rows[2] == ["log p(image)", IMAGE, "-90.62 ± 0.25 (seeds 0.18)", "-92.00 ± 0.25", "*-90.62*"]
    assert rows[3] == ["log p(image)", BOTH, "-92.62 ± 0.25 (seeds 0.18)", "-94.00 ± 0.25", ""]
    assert ["coherence, label to image", "", "75.0 ± 1.0 (seeds 0.0) %", "–", ""] in rows


def test_summary_shows_the_selected_model_and_not_the_same_runs_last_epoch(root: Path) -> None:
    last = mnist(0, -90.0)
    last["training"]["epoch"] = 50
    write(root / "results" / "mnist-fast-last-0.json", last)
    assert_ended(tables(root))
    assert rows_of(root, "summary")[2][2] == "`fast`"


def test_binary_digits_are_compared_with_the_papers_binary_digits(root: Path) -> None:
    assert rows_of(root, "binarymnist")[2] == ["log p(image)", IMAGE, "-86.50 ± 0.25", "*-86.03*"]
    assert next(row for row in rows_of(root, "summary") if "[binarymnist](mnist/README.md)" in row)


def test_an_experiments_table_ends_in_the_commands_that_made_it(root: Path) -> None:
    text = (root / "README.md").read_text()
    for command in ("mnist/train.py --seed 1", "mnist/loglike.py MODEL", "benchmarks/coherence.py mnist --seed 1"):
        assert f"\npython {command}" in text
    assert "10,000 test examples with 1,000 importance samples each" in text


def test_celeba19s_attributes_have_one_name_and_a_table(root: Path) -> None:
    rows = rows_of(root, "celeba19")
    assert ["log p(image, attrs)", "q(z | image, attrs)", "-6350.00 ± 0.25", ""] in rows
    assert ["Male", "87.5 ± 0.1 %", "87.5 ± 0.1 %"] in rows


def test_ratios_and_slopes_are_those_of_their_files(root: Path) -> None:
    assert rows_of(root, "loglike")[2] == ["mnist", *["2.25 (2.00 to 2.50)"] * 4]
    full = ["bf16", "2", "4.5", "-91.250 ± 0.250", "-91.375 ± 0.250"]
    assert rows_of(root, "loglike_full")[2] == full
    assert rows_of(root, "threads")[2] == ["mnist", "1", "1.00", "1.25"]
    assert rows_of(root, "peer")[2] == ["a step", "1.50 (1.25 to 1.75)", "–"]
    assert rows_of(root, "gpu")[2][2:] == ["3.00", "2.00", "1.50", "50 %", "75 %", "25 %", "12 %"]


def test_batch_norms_difference_is_paired(root: Path) -> None:
    cells = ["100.50 ± 0.50", "111.50 ± 1.50", "-11.00 ± 1.00", "1.50 ± 0.50", "12.50 ± 1.50"]
    assert rows_of(root, "batch_norm")[2] == ["celeba", "`attrs`", *cells]


def test_coherence_of_another_model_is_refused(root: Path) -> None:
    path = root / "results" / "coherence-mnist-fast-0.json"
    path.write_text(path.read_text().replace("200.0", "201.0"))
    assert_refused(tables(root), 1, "coherence-mnist-fast-0.json", "different models")


@pytest.mark.parametrize(
    ("file", "whose"),
    [("mnist-fast-1.json", "the seeds of mnist-fast"), ("ablation/mnist-iw-2-1.json", "the runs of ablation")],
)
def test_runs_with_unlike_numbers_of_draws_are_not_put_together(root: Path, file: str, whose: str) -> None:
    path = root / "results" / file
    write(path, {**json.loads(path.read_text()), "n_samples": 200})
    assert_refused(tables(root), 1, f"{whose} differ in n_samples: [200, 1000]")


def test_what_has_no_results_has_dashes_in_the_summary(root: Path) -> None:
    for path in root.glob("results/*mnist-*.json"):
        path.unlink()
    assert_refused(tables(root, "--check"), 1, "table summary")
    tables(root)
    rows = {row[0].split("]")[0].removeprefix("["): row[2:] for row in rows_of(root, "summary")[2:]}
    assert len(rows) == 7
    assert {name for name, cells in rows.items() if set(cells) != {"–"}} == {"celeba19", "vision"}
    assert "There are no results for this table yet" in (root / "README.md").read_text()
    assert_ended(tables(root, "--check"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: mnits -->\n<!-- end of table -->\n", "no table mnits"),
        ("<!-- table: mnist -->\n", "end of table"),
    ],
)
def test_a_marker_that_is_wrong_is_named(root: Path, text: str, said: str) -> None:
    (root / "docs").mkdir()
    (root / "docs" / "speed.md").write_text(text)
    assert_refused(tables(root), 1, "docs/speed.md", said)


def test_a_folder_without_pages_is_refused(tmp_path: Path) -> None:
    assert_refused(tables(tmp_path, "--check"), 1, f"{tmp_path} has no README.md")


def test_plots_are_drawn_of_what_has_results(root: Path) -> None:
    record = {"seconds": 60.0, "validation/loss": 200.0, "validation/joint/elbo": -95.0}
    lines = [json.dumps({"epoch": epoch, **record, "validation/label_accuracy": 0.9}) for epoch in (1, 2, 3)]
    (root / "results" / "curves-mnist-fast-0.jsonl").write_text("\n".join(lines))
    also = json.loads((root / "results" / "weak" / "mnist-weak-100-0.json").read_text())
    write(root / "results" / "weak" / "mnist-weak-500-0.json", {**also, "n": 500})
    for path in root.glob("results/step-*.json"):
        path.unlink()
    (root / "static").mkdir()
    done = run("benchmarks/plots.py", "--root", root, cwd=root)
    assert_ended(done)
    assert "no results to draw speed from" in done.stdout
    assert {path.name for path in (root / "static").iterdir()} == {f"plot_{name}.png" for name in PLOTTED}
    for name in PLOTTED:
        with Image.open(root / "static" / f"plot_{name}.png") as picture:
            red, _, blue = picture.convert("RGB").split()
            assert sum(ImageChops.difference(red, blue).histogram()[60:]) > 200  # coloured pixels, not axes alone


def test_a_curve_that_cannot_be_read_is_named(root: Path) -> None:
    (root / "results" / "curves-mnist-fast-0.jsonl").write_text("{")
    (root / "static").mkdir()
    assert_refused(run("benchmarks/plots.py", "--root", root, cwd=root), 1, "curves-mnist-fast-0.jsonl")
