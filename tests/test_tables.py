"""The tables of the pages are made from results/ by benchmarks/tables.py."""

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvae.errors import UserError

import pytest
from PIL import Image, ImageChops

from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import tables

TRAINED = {"epoch": 25, "validation_loss": 200.0, "training_seconds": 1500.0}
IMAGE, BOTH, LABEL = "q(z | image)", "q(z | image, text)", "accuracy of the label predicted from the image"


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def measured(**means: float) -> dict[str, Any]:
    return {"measures": {name: {"mean": mean, "standard_error": 0.001} for name, mean in means.items()}}


def loglike(experiment: str, seed: int, means: Mapping[tuple[str, str], float], **measures: float) -> dict[str, Any]:
    """What loglike.py --json writes."""
    settings = {"command": f"python {experiment}/train.py --seed {seed}", "commit": "a" * 40, "seed": seed}
    settings |= {"precision": "fp32", "reconstruct": ["text"], "iw_samples": 1}
    return {
        "command": f"python {experiment}/loglike.py MODEL --json FILE",
        "commit": "b" * 40,
        "n_examples": 10000,
        "split": "test",
        "n_samples": 1000,
        "training": {"settings": {**settings, "cuda": False, "threads": 1, "epochs": 50}, "epoch": 48, **TRAINED},
        "log_likelihood": [
            {
                **{"quantity": quantity, "proposal": proposal, "mean": mean, "standard_error": 0.25},
                "log_weight_variance": 12.0 if proposal == IMAGE else 14.0,
            }
            for (quantity, proposal), mean in means.items()
        ],
        **measured(**measures),
    }


def mnist(seed: int, mean: float) -> dict[str, Any]:
    joint, text = ("log p(image, text)", IMAGE), ("log p(text | image)", IMAGE)
    means = {("log p(image)", IMAGE): mean, ("log p(image)", BOTH): mean - 2, joint: mean - 0.125, text: -0.125}
    return loglike("mnist", seed, means, **{LABEL: 0.9875})


def write_compared(results: Path) -> None:
    for seed, means in enumerate([(0.75, 0.5), (0.8125, 0.5), (0.875, 0.625)]):
        for method, mean in zip(("weak", "dropout"), means, strict=True):
            one = {"method": method, "n": 100, "seed": seed, "commit": "d" * 40, "n_examples": 10000}
            write(results / "weak" / f"mnist-{method}-100-{seed}.json", {**one, **measured(accuracy=mean)})
    header = f'example,"log p(image), {IMAGE}","log p(image, text), {IMAGE}"'
    for seed, values in enumerate([(-90, -92, -89, -92), (-91, -93, -89, -92), (-90, -92, -88, -91)]):
        for recipe, some in (("base", values[:2]), ("iw-2", values[2:])):
            write(results / "ablation" / f"mnist-{recipe}-{seed}.json", loglike("mnist", seed, {}))
            lines = [header, *(f"{i},{value},{value - 1}" for i, value in enumerate(some))]
            (results / "ablation" / f"mnist-{recipe}-{seed}.csv").write_text("\n".join(lines))
    for seed, shares in enumerate([(0.5, 0.6), (0.52, 0.66)]):
        for recipe, share in zip(("text", "all"), shares, strict=True):
            name = f"mnist-{recipe}-{seed}"
            write(results / "reconstruct" / f"{name}.json", loglike("mnist", seed, {}))
            (results / "reconstruct" / f"{name}.csv").write_text(f"{header}\n0,-90,-91\n1,-92,-93")
            write(results / "reconstruct" / f"quality-{name}.json", {"drawn": {"q(z | label)": {"mean": share}}})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with results of every kind, and a README with a table of each."""
    results = tmp_path / "results"
    write_compared(results)
    captured = {"eager_ms": 3.0, "captured_ms": 2.0, "products_floor_ms": 0.5, "weights_floor_ms": 0.25}
    row = {"experiment": "mnist", "precision": "fp32", **captured, "eager_busy": 0.5, "captured_busy": 0.75}
    gpu = {"command": "python benchmarks/gpu.py", "gpu": "H100", "torch": "2.14"}
    write(results / "gpu.json", {**gpu, "steps": {"mnist, fp32": row}})
    means = {"mnist-fast-0": -90.5, "mnist-fast-1": -90.75, "mnist-paper-0": -92, "binarymnist-fast-0": -86.5}
    for name, mean in means.items():
        write(results / f"{name}.json", mnist(int(name[-1]), mean))
    for seed in (0, 1):
        row = {"mean": 0.5 + 0.1 * seed, "standard_error": 0.01, "frechet": 10 + seed, "variance": 40 + seed}
        log_p = {
            name: {"mean": mean, "standard_error": 0.25} for name, mean in (("fitted prior", -85.5), ("gain", 1.5))
        }
        drawn = {"N(0, I)": row, "fitted prior": row}
        write(
            results / f"quality-mnist-fast-{seed}.json",
            {
                "command": f"python benchmarks/quality.py mnist --seed {seed}",
                "commit": "e" * 40,
                "training": TRAINED,
                "drawn": drawn,
                **({"log_p": log_p, "n_samples": 1000} if seed else {}),
            },
        )
    all_19 = "Bald, Bangs, ..., Wearing_Hat"
    joint = ("log p(image, Bald, ..., Wearing_Hat)", "q(z | image, Bald, ..., Wearing_Hat)")
    names = ("accuracy of an attribute predicted from the image", "balanced accuracy of an attribute")
    faces = dict.fromkeys([*names, "accuracy of Male", "balanced accuracy of Male"], 0.875)
    of_faces = {joint: -6350.0, (f"log p({all_19} | image)", IMAGE): -6.0}
    write(results / "celeba19-fast-0.json", loglike("celeba19", 0, of_faces, **faces))
    six = {("log p(image, gray, ..., watermark)", IMAGE): -19300.0}
    write(results / "vision-fast-0.json", loglike("vision", 0, six))
    pages = "".join(f"<!-- table: {name} -->\n<!-- end of table -->\n\n" for name in tables.TABLES)
    (tmp_path / "README.md").write_text(pages)
    return tmp_path


def rows_of(root: Path, name: str) -> list[list[str]]:
    """The cells of a table, its header first."""
    text = tables.TABLES[name](root)
    lines = [line.replace("\\|", "¦") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("¦", "|") for cell in line.strip("|").split("|")] for line in lines]


def test_the_repositorys_tables_are_those_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables.main()


def test_a_table_that_differs_from_its_results_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = root / "README.md"
    monkeypatch.setattr(sys, "argv", ["tables.py", "--root", str(root)])
    tables.main()
    readme.write_text(readme.read_text().replace("-90.62 /", "-90.63 /", 1))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--check"])
    with pytest.raises(UserError, match=r"README.md: table compared differs"):
        tables.main()


SAME, AGREEMENT = "+0.00 ± 0.00 (0.00)", "55.0 ± 1.0 (seeds 7.1) %"
ROWS = {
    "experiments": [
        ["[mnist](mnist/README.md)", "a digit, its label", "25"],
        ["[multimnist](multimnist/README.md)", "up to four digits, their string", "–"],
    ],
    "compared": [["mnist", "-90.62 / -90.62", "-90.75 / -90.86", "98.8 %"]],
    "short_mnist": [
        ["", "`fast`", "the paper"],
        ["log p(text | image)", "-0.12 ± 0.25", "-0.24"],
        ["epochs", "50", "500"],
    ],
    "mnist": [
        ["", "proposal distribution", "`fast`", "`paper`", "the paper"],
        ["log p(image)", IMAGE, "-90.62 ± 0.25 (seeds 0.18)", "-92.00 ± 0.25", "*-90.62*"],
        ["log p(image)", BOTH, "-92.62 ± 0.25 (seeds 0.18)*", "-94.00 ± 0.25*", ""],
        ["training minutes", "", "25", "25", ""],
        ["the paper's terms", "", "no", "no", "*yes*"],
    ],
    "binarymnist": [["log p(image)", IMAGE, "-86.50 ± 0.25", "*-86.03*"]],
    "celeba19": [
        ["log p(image, attrs)", "q(z | image, attrs)", "-6350.00 ± 0.25*", ""],
        ["Male", "87.5 ± 0.1 %", "87.5 ± 0.1 %"],
    ],
    "ablation": [
        ["`base`", "3", "25", "-91.33", "", "-92.33", ""],
        ["`iw-2`", "3", "25", "-90.17", "+1.17 ± 0.50 (0.33)", "-91.17", "+1.17 ± 0.50 (0.33)"],
    ],
    "reconstruct": [
        ["`text`", "2", "25", "-91.00", "", "-92.00", "", "51.00", ""],
        ["`all`", "2", "25", "-91.00", SAME, "-92.00", SAME, "63.00", "+12.00 (2.00)"],
    ],
    "quality": [
        ["mnist-fast<br>best epoch 25, 2 seeds", "N(0, I)", AGREEMENT, "10.5 ± 0.5", "40.5 ± 0.5", ""],
        ["", "fitted prior", AGREEMENT, "10.5 ± 0.5", "40.5 ± 0.5", "-85.50 ± 0.25<br>gain 1.50 ± 0.25"],
    ],
    "weak_mnist": [
        ["accuracy, %", "100 labels"],
        ["`--preset weak`", "81.2 ± 3.6"],
        ["*Δ: preset weak − supervised, with dropout*", "+27.1 ± 2.1"],
    ],
    "gpu": [["mnist", "fp32", "3.00", "2.00", "0.50", "0.25", "50 %", "75 %"]],
}
"""By table, some of its rows."""


def test_tables_have_the_rows(root: Path) -> None:
    for name, rows in ROWS.items():
        found = rows_of(root, name)
        assert [row for row in rows if row not in found] == [], name


def test_an_experiments_table_ends_in_the_commands_that_made_it(root: Path) -> None:
    text = tables.TABLES["mnist"](root)
    for command in ("mnist/train.py --seed 1", "mnist/loglike.py MODEL"):
        assert f"\npython {command}" in text
    assert "10,000 test examples with 1,000 importance samples each" in text


def test_a_model_without_accuracies_has_no_rows_for_them(root: Path) -> None:
    write(root / "results" / "fashionmnist-fast-0.json", loglike("fashionmnist", 0, {("log p(image)", IMAGE): -232.5}))
    names = [row[0] for row in rows_of(root, "short_fashionmnist")[2:]]
    assert names == ["log p(image)", "epochs", "training minutes"]


def test_a_caption_explains_the_stars_of_its_table(root: Path) -> None:
    """Estimates with a variance of log weights above 2 ln 1000 = 13.8."""
    captions = {name: tables.TABLES[name](root) for name in ("mnist", "short_mnist")}
    assert "\\*: a few samples dominate" in captions["mnist"]
    assert "*: a few samples dominate" not in captions["short_mnist"]


def test_an_experiment_without_results_has_dashes(root: Path) -> None:
    for path in root.glob("results/*mnist-*.json"):
        path.unlink()
    rows = {row[0].split("]")[0].removeprefix("["): row[2:] for row in rows_of(root, "experiments")[2:]}
    assert {name for name, cells in rows.items() if cells == ["25"]} == {"celeba19", "vision"}
    assert len(rows) == 7
    assert ["mnist", "– / -90.62", "– / -90.86", "–"] in rows_of(root, "compared")
    for name in ("mnist", "short_mnist", "speed", "weak_celeba", "peer"):
        assert tables.TABLES[name](root) == "*There are no results for this table yet.*"


@pytest.mark.parametrize(
    ("file", "old", "new", "table", "said"),
    [
        ("mnist-fast-1.json", "1000,", "200,", "mnist", r"the seeds of mnist-fast differ in n_samples: \[200, 1000\]"),
        ("ablation/mnist-iw-2-1.json", "1000,", "200,", "ablation", r"the runs of ablation differ in n_samples: "),
        ("ablation/mnist-iw-2-1.csv", "-89", "x", "ablation", "can't read .*mnist-iw-2-1.csv"),
        ("gpu.json", "{", "", "gpu", "can't read .*gpu.json"),
    ],
)
def test_results_that_do_not_fit_are_refused(root: Path, file: str, old: str, new: str, table: str, said: str) -> None:
    path = root / "results" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=said):
        tables.TABLES[table](root)


@pytest.mark.parametrize(
    ("text", "said"),
    [("<!-- table: mnits -->\n<!-- end of table -->\n", "mnits"), ("<!-- table: mnist -->\n", "end of table")],
)
def test_a_wrong_marker_is_refused(root: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=f"docs/speed.md: .*{said}"):
        tables.rewritten(text, root / "docs" / "speed.md", root)


def test_plots_are_drawn_from_the_results(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"seconds": 60.0, "validation/loss": 200.0, "validation/joint/elbo": -95.0}
    lines = [json.dumps({"epoch": epoch, **record, "validation/label_accuracy": 0.9}) for epoch in (1, 2, 3)]
    (root / "results" / "curves-mnist-fast-0.jsonl").write_text("\n".join(lines))
    also = json.loads((root / "results" / "weak" / "mnist-weak-100-0.json").read_text())
    write(root / "results" / "weak" / "mnist-weak-500-0.json", {**also, "n": 500})
    monkeypatch.setattr(sys, "argv", ["plots.py", "--root", str(root)])
    importlib.import_module("plots").main()
    for name in ("curves", "weak"):
        with Image.open(root / "static" / f"plot_{name}.png") as picture:
            red, _, blue = picture.convert("RGB").split()
            assert sum(ImageChops.difference(red, blue).histogram()[60:]) > 200  # coloured pixels, not only axes
