"""Sampling: values, conditions, noise, temperature and the ways to save; and the tools in a seventh experiment."""

import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from mvae import MVAE, UsageError, UserError
from mvae.run import checkpoint
from mvae.run.grids import Sheet, given_labels, reconstructions
from mvae.tools import controls, explore, sampling
from mvae.tools.controls import Attributes, HeldOut, Label, Picture, Vector
from mvae.tools.sampling import BLOCK, Condition, Sampling

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import helpers
from helpers import ROOT, Trained, assert_ended, assert_refused, environment, run_warm, small_data, small_model

CONTROLS = {
    "image": Picture("L", 6, dark=True),
    "attrs": Attributes(["Big", "Old", "Red", "Wet"]),
    "label": Label(["ant", "bee", "cat"]),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> MVAE:
    return small_model().eval()


def rows_of(given: dict[str, list[Any]], ends: Any = None) -> list[Condition]:
    return sampling.conditions(given, ends, CONTROLS, lambda: small_data(30, seed=1))


def drawn(model: MVAE, rows: list[Condition], n: int = 5, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """All samples' values, (rows * n, *event)."""
    blocks = list(sampling.draw(model, rows, CONTROLS, n=n, seed=seed, device=CPU, **options))
    return {name: torch.cat([block.values[name] for block in blocks]) for name in CONTROLS}


# Values


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        (CONTROLS["label"], "1, CAT", [1, 2]),
        (CONTROLS["label"], "dog", "expected one of 0 ant, 1 bee, 2 cat"),
        (CONTROLS["attrs"], "big,-Wet", [{"Big": True, "Wet": False}]),
        (CONTROLS["attrs"], "Bog", "did you mean Big"),
        (CONTROLS["attrs"], "Big,-Big", "both present and absent"),
        (CONTROLS["image"], "absent.png", "no such file: 'absent.png'"),
        (Vector(3), "1,-2.5,3e-1", [[1, -2.5, 0.3]]),
        (Vector(3), "1,two,3", "must be a file, or numbers"),
        (Vector(3), "1,2", "must be 3 finite numbers, got 2"),
        (Vector(3), "1,2,nan", "must be 3 finite numbers"),
    ],
)
def test_values_are_parsed_or_refused(kind: controls.Kind, words: str, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            kind.values(words)
    else:
        assert kind.values(words) == expected


def test_vectors_are_read_from_files(tmp_path: Path) -> None:
    rows = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    np.save(tmp_path / "a.npy", rows)
    np.savetxt(tmp_path / "a.csv", rows, delimiter=",")
    np.savetxt(tmp_path / "column.csv", rows[0])
    (tmp_path / "bad.csv").write_text("a,b,c\n")
    kinds = {"curve": Vector(3)}
    assert controls.parse(kinds, "curve", str(tmp_path / "a.npy")) == rows.tolist()
    assert controls.parse(kinds, "curve", str(tmp_path / "a.csv")) == rows.tolist()
    assert controls.parse(kinds, "curve", str(tmp_path / "column.csv")) == rows[:1].tolist()
    with pytest.raises(UserError, match="numbers separated by commas"):
        controls.parse(kinds, "curve", str(tmp_path / "bad.csv"))


def test_curve_is_drawn_between_its_bounds() -> None:
    drawing = Vector(3, low=0, high=1).pictures(torch.tensor([[0.0, 0.5, 1.0], [7.0, 7.0, 7.0]]))
    assert drawing.shape == (2, 1, 64, 64)
    rows = torch.arange(64.0).view(64, 1)
    heights = (drawing[:, 0] * rows).sum(dim=1) / drawing[:, 0].sum(dim=1)
    torch.testing.assert_close(heights[0], torch.linspace(63, 0, 64), atol=1, rtol=0)
    assert (heights[1] == 0).all()


# Conditions


def test_no_condition_is_one_row() -> None:
    assert rows_of({}) == [Condition("", {})]


def test_each_value_is_a_row_and_values_of_two_controls_are_combined() -> None:
    rows = rows_of({"attrs": [{"Old": True, "Wet": False}, {}], "label": [2, 0]})
    assert [row.said for row in rows] == [
        f"attrs {attrs}, label {label}" for attrs in ("Old, -Wet", "none of them") for label in ("cat", "ant")
    ]
    assert rows[1].batch["attrs"].tolist() == [[0, 1, 0, 0]]
    assert rows[1].batch["label"].tolist() == [0]


def test_held_out_picture_has_the_label() -> None:
    data = small_data(30, seed=1)
    (row,) = rows_of({"image": [HeldOut("label", 1)]})
    (found,) = (data.tensors["image"] == row.batch["image"]).flatten(1).all(dim=1).nonzero()
    assert data.tensors["label"][found] == 1
    assert row.said == "image of label bee"


def test_ends_of_an_interpolation_are_the_conditions_themselves(model: MVAE) -> None:
    rows = rows_of({}, [("label", 0), ("label", 2)])
    alone = rows_of({"label": [0, 2]})
    for row, end in ((rows[0], alone[0]), (rows[-1], alone[1])):
        torch.testing.assert_close(row.posterior(model, CPU), end.posterior(model, CPU))
    means = torch.cat([row.posterior(model, CPU)[0] for row in rows])
    torch.testing.assert_close(means.diff(dim=0), (means[-1] - means[0]).expand(len(rows) - 1, -1) / (len(rows) - 1))


def test_interpolation_keeps_other_conditions_and_refuses_its_own() -> None:
    ends = [("label", 0), ("label", 2)]
    assert all(row.batch["attrs"].any() for row in rows_of({"attrs": [{"Old": True}]}, ends))
    with pytest.raises(UsageError, match="label"):
        rows_of({"label": [1]}, ends)


@pytest.mark.parametrize(
    ("words", "meaning"), [("cat", ("label", 2)), ("label=1", ("label", 1)), ("attrs=-Old", ("attrs", {"Old": False}))]
)
def test_end_is_named_or_describes_a_picture(words: str, meaning: tuple[str, Any]) -> None:
    ordered = {name: CONTROLS[name] for name in ("image", "label", "attrs")}
    assert controls.endpoint(ordered, words) == meaning
    with pytest.raises(UsageError, match="must be one condition, got 2"):
        controls.endpoint(CONTROLS, "label=1,2")


# Samples


def test_rows_have_the_same_noise_whatever_other_rows_there_are(model: MVAE) -> None:
    rows = rows_of({"label": [0, 1, 0]})
    together = drawn(model, rows)["image"].view(3, 5, -1)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(drawn(model, rows[1:2])["image"].view(5, -1), together[1])
    assert not torch.equal(drawn(model, rows[1:2], seed=1)["image"].view(5, -1), together[1])


def test_samples_are_the_means_given_draws_of_the_posterior(model: MVAE) -> None:
    (row,) = rows_of({"label": [1]})
    torch.manual_seed(7)
    z = model.draw(row.batch, 5, CPU)
    torch.testing.assert_close(drawn(model, [row], seed=7)["image"], model.likelihood("image").mean(z))


def test_blocks_are_bounded(model: MVAE) -> None:
    blocks = sampling.draw(model, rows_of({}), CONTROLS, n=2 * BLOCK + 1, seed=0, device=CPU)
    sizes = [(block.start, len(block.values["image"])) for block in blocks]
    assert sizes == [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 1)]


def test_temperature_multiplies_the_variance_of_z(model: MVAE) -> None:
    (row,) = rows_of({"label": [1]})
    mu, _ = row.posterior(model, CPU)
    cold, cool, usual = (drawn(model, [row], temperature=t)["image"].logit() for t in (1e-12, 0.25, 1.0))
    torch.testing.assert_close(cold, model.likelihood("image").mean(mu).logit().expand_as(cold), atol=1e-4, rtol=0)
    torch.testing.assert_close(cool - cold, (usual - cold) / 2, atol=1e-3, rtol=0)  # the decoder is linear


def test_draws_are_values_and_cold_ones_the_most_probable(model: MVAE) -> None:
    found = drawn(model, rows_of({}), n=50, draw_x=True)
    assert set(found["image"].unique().tolist()) == {0, 1}
    assert set(found["label"].tolist()) == {0, 1, 2}
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    for name, kind in CONTROLS.items():
        likelihood = model.likelihood(name)
        likeliest = (likelihood.mean(z) > 0.5).float() if name == "image" else kind.likeliest(likelihood.mean(z))
        assert torch.equal(likelihood.sample(z, 1e-6), likeliest)


# Pictures


def picture(path: Path, ground: int, ink: int, mode: str = "L") -> Path:
    image = Image.new("L", (60, 60), ground)
    image.paste(ink, (25, 5, 35, 55))
    image.convert(mode).save(path)
    return path


def test_picture_on_a_light_background_is_inverted_if_the_data_are_dark(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mvae")
    dark, light = picture(tmp_path / "dark.png", 0, 255), picture(tmp_path / "light.bmp", 255, 0, "RGB")
    kind = Picture("L", 28, dark=True)
    torch.testing.assert_close(kind.tensor(dark), kind.tensor(light))
    assert [record.getMessage().split()[0] for record in caplog.records] == [str(light)]
    assert not torch.equal(Picture("L", 28).tensor(dark), Picture("L", 28).tensor(light))


def test_file_that_is_not_a_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="not a picture, or damaged"):
        Picture("L", 28).tensor(tmp_path / "own.png")


# Grids


def test_grid_too_large_to_view_is_refused() -> None:
    with pytest.raises(UsageError, match="too large to view"):
        Sheet(20_000, 200, 28)


def test_text_at_the_left_of_a_row_is_no_higher_than_the_row() -> None:
    sheet = Sheet(2, 3, 28, captions={0: ("a long text of many words that must be broken", 1), 1: ("b", 1)})
    words = sheet.pixels[:, : sheet.left]
    assert sheet.pixels.shape == (2 * 30 + 2, sheet.left + 3 * 30 + 2, 3)
    assert words[:30].any()
    assert words[32:45].any()
    assert not words[45:].any()


def test_grids_skip_what_can_not_be_drawn(model: MVAE) -> None:
    batch = dict(small_data(4, seed=2).tensors)
    assert set(reconstructions(model, batch)) == {"image"}
    assert set(given_labels(model, batch)) == {("attrs", "image"), ("label", "image")}
    five = torch.nn.Sequential(torch.nn.Linear(2, 45), torch.nn.Unflatten(1, (5, 3, 3)))
    other = small_model()
    other.decoders["image"].decoder = five
    other.encoders["image"] = other.encoders["attrs"].__class__(45)
    batch["image"] = torch.rand(4, 5, 3, 3)
    assert reconstructions(other, batch) == given_labels(other, batch) == {}


# sample.py


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"n_samples": 0}, "n_samples"), ({"temperature": 0.0}, "temperature must be > 0"), ({"seed": -1}, "seed")],
)
def test_wrong_flag_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(model_path=Path("model"), **flags)


def sample(trained: Trained, digits_dir: Path, out_dir: Path, *flags: object) -> Any:
    words = [trained.out_dir / checkpoint.BEST, "--data-dir", digits_dir, "--out-dir", out_dir, *flags]
    return run_warm("mnist/sample.py", *words, cwd=out_dir.parent)


@pytest.fixture(scope="module")
def saved(trained: Trained, digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of four drawn samples, saved in each way."""
    folder = tmp_path_factory.mktemp("saved") / "new"
    flags = ["--condition-on-text", "3,7", "--condition-on-text", "0", "--n-samples", 4, "--draw"]
    assert_ended(sample(trained, digits_dir, folder, *flags, "--save", "grid", "images", "--save", "npy"))
    return folder


def test_every_way_to_save_has_the_same_samples(saved: Path) -> None:
    array = np.load(saved / "sample_image.npy")
    assert (array.shape, array.dtype) == ((12, 1, 28, 28), np.float32)
    with Image.open(saved / "sample_image.png") as opened:
        grid = np.asarray(opened.convert("L"))
    assert grid.shape[0] == 3 * 30 + 2
    grid = grid[:, -(4 * 30 + 2) :]
    files = sorted((saved / "sample_image").iterdir())
    assert [path.name for path in files] == [f"{i:05}.png" for i in range(12)]
    for i, path in enumerate(files):
        single = np.asarray(Image.open(path))
        assert (single == array[i, 0] * 255).all()
        top, left = 2 + i // 4 * 30, 2 + i % 4 * 30
        assert (single == grid[top : top + 28, left : left + 28]).all()
    labels = np.load(saved / "sample_text.npy").astype(int).tolist()
    assert (saved / "sample_text.txt").read_text().split() == list(map(str, labels))


def test_files_say_what_was_given(saved: Path) -> None:
    about = json.loads((saved / "sample_given.json").read_text())
    assert about["given"] == ["text 3", "text 7", "text 0"]
    assert (about["experiment"], about["seed"], about["drawn"], about["samples of each"]) == ("mnist", 0, True, 4)
    with Image.open(saved / "sample_image.png") as grid:
        assert json.loads(grid.info["mvae"]) == about
    with Image.open(saved / "sample_image" / "00007.png") as single:
        assert json.loads(single.info["mvae"])["given"] == "text 7"


def test_folder_of_other_pictures_is_kept(trained: Trained, digits_dir: Path, saved: Path) -> None:
    before = (saved / "sample_text.txt").read_bytes()
    assert_refused(sample(trained, digits_dir, saved, "--save", "images"), 1, saved / "sample_image", "--out-dir")
    assert (saved / "sample_text.txt").read_bytes() == before


def test_own_digit_and_an_interpolation_are_conditions(trained: Trained, digits_dir: Path, tmp_path: Path) -> None:
    own = picture(tmp_path / "own.jpg", 250, 10, "RGB")
    done = sample(trained, digits_dir, tmp_path / "new", "--condition-on-image", own, "--interpolate", 3, 8)
    assert_ended(done)
    assert f"{own} has a light background" in done.stdout
    with Image.open(tmp_path / "new" / "sample_image.png") as grid:
        given = json.loads(grid.info["mvae"])["given"]
        assert grid.height == 8 * 30 + 2
        shown = np.asarray(grid.convert("L"))[2:30, -(9 * 30) : -(8 * 30 + 2)]
    assert given[0] == "image own.jpg, text 3 to text 8, 0/7"
    assert (shown == (255 * Picture("L", 28, dark=True).tensor(own)[0, 0]).round().numpy()).all()


# A seventh experiment: a curve and a label

SEVENTH = {
    "datasets.py": """
        from dataclasses import dataclass
        from mvae import Data
        from mvae.tools.controls import Label, Vector
        import torch

        NAME = "seventh"
        CONTROLS = {"curve": Vector(5), "label": Label(["flat", "steep"])}

        @dataclass(kw_only=True)
        class Source:
            n: int = 40  # number of examples

        def examples(split, config, settings):
            label = torch.arange(config.n) % 2
            return Data(tensors={"curve": label[:, None] * torch.linspace(-1, 1, 5), "label": label})
    """,
    "model.py": """
        from mvae import MVAE, Categorical, Gaussian
        from helpers import SmallEncoder
        from torch import nn

        def build_model(n_latents):
            encoders = {"curve": SmallEncoder(5, n_latents), "label": SmallEncoder(1, n_latents)}
            likelihoods = {"curve": Gaussian(nn.Linear(n_latents, 5)), "label": Categorical(nn.Linear(n_latents, 2))}
            return MVAE(encoders=encoders, likelihoods=likelihoods, n_latents=n_latents)
    """,
    "sample.py": """
        from dataclasses import dataclass
        from mvae import cli
        from mvae.tools.sampling import Sampling, sample
        from datasets import CONTROLS, NAME, Source, examples
        from model import build_model

        @dataclass(kw_only=True)
        class Config(Sampling, Source):
            condition_on_curve: tuple[str, ...] = ()  # numbers
            condition_on_label: tuple[str, ...] = ()  # labels

        cli.run(lambda: sample(cli.parse(__doc__, Config), NAME, build_model, CONTROLS, examples))
    """,
}


def test_seventh_experiment_has_the_tools(tmp_path: Path) -> None:
    for name, source in SEVENTH.items():
        (tmp_path / name).write_text(textwrap.dedent(source))
    build = runpy.run_path(str(tmp_path / "model.py"))["build_model"]
    content = {"settings": {}, "n_latents": 3, "model": build(3).state_dict(), "epoch": 1}
    checkpoint.save(tmp_path / "model.pt", "seventh", content)

    def run(*words: str) -> None:
        env = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{Path(helpers.__file__).parent}")
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert_ended(done)

    run("sample.py", "model.pt", "--condition-on-curve", "-1,0,1,0,-1", "--n-samples", "3", "--save", "grid", "npy")
    lines = (tmp_path / "sample_curve.txt").read_text().splitlines()
    curves = np.load(tmp_path / "sample_curve.npy")
    np.testing.assert_allclose([[float(x) for x in line.split(",")] for line in lines], curves, rtol=1e-5)
    with Image.open(tmp_path / "sample_curve.png") as grid:
        assert np.asarray(grid)[:, :, 0].any()
        assert json.loads(grid.info["mvae"])["given"] == ["curve -1, 0, 1, ..."]

    run("-m", "mvae.tools.embed", "model.pt", "--given", "label", "--n", "30", "--plot", "map.png")
    with np.load(tmp_path / "latents.npz") as found:
        assert found["mu"].shape == (30, 3)
        assert found["label"].tolist() == [0, 1] * 15
    assert (tmp_path / "map.png").exists()

    pytest.importorskip("dash", reason="the page needs Dash: pip install -r requirements-explore.txt")
    page = explore.page(build(3).eval(), runpy.run_path(str(tmp_path / "datasets.py"))["CONTROLS"], "seventh")
    assert "curve-value" in str(page.layout)
