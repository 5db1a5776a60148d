"""Sampling under conditions: rows and their noise, temperature, draws and means, and the ways to save them."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mvae import MVAE, UsageError, UserError, checkpoint, pictures
from mvae.scripts import kinds, sampling
from mvae.scripts.kinds import Attributes, HeldOut, Label, Picture
from mvae.scripts.sampling import BLOCK, Condition

from helpers import Trained, assert_ended, assert_refused, run_warm, small_data, small_model

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


# Conditions


def test_nothing_given_is_one_row() -> None:
    (row,) = rows_of({})
    assert row == Condition("", {})


def test_each_value_is_a_row_and_those_of_two_controls_are_combined() -> None:
    rows = rows_of({"attrs": [{"Old": True, "Wet": False}, {}], "label": [2, 0]})
    assert [row.said for row in rows] == [
        f"attrs {attrs}, label {label}" for attrs in ("Old, -Wet", "none of them") for label in ("cat", "ant")
    ]
    assert rows[1].batch["attrs"].tolist() == [[0, 1, 0, 0]]
    assert rows[1].batch["label"].tolist() == [0]


def test_held_out_picture_shows_what_is_wanted() -> None:
    data = small_data(30, seed=1)
    (row,) = rows_of({"image": [HeldOut("label", 1)]})
    (found,) = (data.tensors["image"] == row.batch["image"]).flatten(1).all(dim=1).nonzero()
    assert data.tensors["label"][found] == 1
    assert row.said == "image of label bee"


def test_ends_of_a_way_are_the_conditions_themselves(model: MVAE) -> None:
    rows = rows_of({}, [("label", 0), ("label", 2)])
    alone = rows_of({"label": [0, 2]})
    for row, end in ((rows[0], alone[0]), (rows[-1], alone[1])):
        torch.testing.assert_close(row.posterior(model, CPU), end.posterior(model, CPU))
    means = torch.cat([row.posterior(model, CPU)[0] for row in rows])
    torch.testing.assert_close(means.diff(dim=0), (means[-1] - means[0]).expand(len(rows) - 1, -1) / (len(rows) - 1))


def test_way_keeps_what_is_given_beside_it_and_refuses_what_it_gives_itself() -> None:
    ends = [("label", 0), ("label", 2)]
    assert all(row.batch["attrs"].any() for row in rows_of({"attrs": [{"Old": True}]}, ends))
    with pytest.raises(UsageError, match="label"):
        rows_of({"label": [1]}, ends)


@pytest.mark.parametrize(
    ("words", "meaning"), [("cat", ("label", 2)), ("label=1", ("label", 1)), ("attrs=-Old", ("attrs", {"Old": False}))]
)
def test_end_is_named_or_what_a_picture_shows(words: str, meaning: tuple[str, Any]) -> None:
    controls = {"image": CONTROLS["image"], "label": CONTROLS["label"], "attrs": CONTROLS["attrs"]}
    assert kinds.endpoint(controls, words) == meaning


def test_end_is_one_condition() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="2 conditions"):
        kinds.endpoint(CONTROLS, "label=1,2")


# Samples


def test_rows_have_the_same_noise_and_stand_alone_as_beside_others(model: MVAE) -> None:
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


def test_no_block_is_larger_than_the_bound(model: MVAE) -> None:
    blocks = sampling.draw(model, rows_of({}), CONTROLS, n=2 * BLOCK + 1, seed=0, device=CPU)
    assert [(block.start, len(block.values["image"])) for block in blocks] == [
        (0, BLOCK),
        (BLOCK, BLOCK),
        (2 * BLOCK, 1),
    ]


def test_temperature_multiplies_the_variance_of_z(model: MVAE) -> None:
    (row,) = rows_of({"label": [1]})
    mu, _ = row.posterior(model, CPU)
    cold, cool, usual = (drawn(model, [row], temperature=t)["image"].logit() for t in (1e-12, 0.25, 1.0))
    torch.testing.assert_close(cold, model.likelihood("image").mean(mu).logit().expand_as(cold), atol=1e-4, rtol=0)
    torch.testing.assert_close(cool - cold, (usual - cold) / 2, atol=1e-3, rtol=0)  # the decoder is linear


@pytest.mark.parametrize("name", CONTROLS)
def test_cold_draws_are_the_most_probable_values(model: MVAE, name: str) -> None:
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    mean = model.likelihood(name).mean(z)
    draws = model.likelihood(name).sample(z, 1e-6)
    assert torch.equal(draws, mean.argmax(dim=1) if name == "label" else (mean > 0.5).float())


def test_draws_are_values_of_the_modality(model: MVAE) -> None:
    found = drawn(model, rows_of({}), n=50, draw_x=True)
    assert set(found["image"].unique().tolist()) == {0, 1}
    assert set(found["label"].tolist()) == {0, 1, 2}


# Pictures of one's own


def picture(path: Path, ground: int, ink: int, mode: str = "L") -> Path:
    image = Image.new("L", (60, 60), ground)
    image.paste(ink, (25, 5, 35, 55))
    image.convert(mode).save(path)
    return path


def test_picture_on_a_light_ground_is_inverted_where_the_datas_are_dark(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mvae")
    dark, light = picture(tmp_path / "dark.png", 0, 255), picture(tmp_path / "light.bmp", 255, 0, "RGB")
    kind = Picture("L", 28, dark=True)
    torch.testing.assert_close(kind.tensor(dark), kind.tensor(light))
    assert [record.getMessage().split()[0] for record in caplog.records] == [str(light)]
    assert not torch.equal(Picture("L", 28).tensor(dark), Picture("L", 28).tensor(light))


def test_what_is_transparent_is_white_and_a_camera_says_what_is_up(tmp_path: Path) -> None:
    ink = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (0, 0, 8, 4))
    ink.save(tmp_path / "transparent.png")
    upright = Picture("L", 8).tensor(tmp_path / "transparent.png")
    assert (upright[0, 0, :4] == 0).all()
    assert (upright[0, 0, 4:] == 1).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    Image.fromarray((upright[0, 0].flip(0) * 255).byte().numpy()).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(Picture("L", 8).tensor(tmp_path / "turned.png"), upright)


# What is written


def test_grid_too_large_to_be_looked_at_is_refused() -> None:
    with pytest.raises(UsageError, match="too large to look at"):
        pictures.Sheet(20_000, 200, 28)


def test_text_beside_a_row_is_no_higher_than_the_row() -> None:
    sheet = pictures.Sheet(2, 3, 28, beside={0: ("a long text of many words that must be broken", 1), 1: ("b", 1)})
    words = sheet.pixels[:, : sheet.left]
    assert sheet.pixels.shape == (2 * 30 + 2, sheet.left + 3 * 30 + 2, 3)
    assert words[:30].any()
    assert words[32:45].any()
    assert not words[45:].any()


def sample(trained: Trained, digits_dir: Path, out_dir: Path, *flags: object) -> Any:
    words = [trained.out_dir / checkpoint.BEST, "--data-dir", digits_dir, "--out-dir", out_dir, *flags]
    return run_warm("mnist/sample.py", *words, cwd=out_dir.parent)


@pytest.fixture(scope="module")
def saved(trained: Trained, digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of four drawn samples, saved in each way."""
    folder = tmp_path_factory.mktemp("saved") / "new"
    flags = ["--condition-on-text", "3,7", "--condition-on-text", "0", "--n-samples", 4, "--draw"]
    assert_ended(sample(trained, digits_dir, folder, *flags, "--save=grid", "--save=images", "--save=npy"))
    return folder


def test_every_way_to_save_holds_the_same_samples(saved: Path) -> None:
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


def test_files_say_what_they_were_given(saved: Path) -> None:
    about = json.loads((saved / "sample_given.json").read_text())
    assert about["given"] == ["text 3", "text 7", "text 0"]
    assert (about["experiment"], about["seed"], about["drawn"], about["samples of each"]) == ("mnist", 0, True, 4)
    with Image.open(saved / "sample_image.png") as grid:
        assert json.loads(grid.info["mvae"]) == about
    with Image.open(saved / "sample_image" / "00007.png") as single:
        assert json.loads(single.info["mvae"])["given"] == "text 7"


def test_folder_of_other_pictures_is_not_written_into(trained: Trained, digits_dir: Path, saved: Path) -> None:
    before = (saved / "sample_text.txt").read_bytes()
    assert_refused(sample(trained, digits_dir, saved, "--save", "images"), 1, saved / "sample_image", "--out-dir")
    assert (saved / "sample_text.txt").read_bytes() == before


def test_own_digit_is_a_condition_and_so_is_a_way_between_two(
    trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    own = picture(tmp_path / "own.jpg", 250, 10, "RGB")
    done = sample(trained, digits_dir, tmp_path / "new", "--condition-on-image", own, "--interpolate", 3, 8)
    assert_ended(done)
    assert f"{own} has a light ground" in done.stdout
    with Image.open(tmp_path / "new" / "sample_image.png") as grid:
        given = json.loads(grid.info["mvae"])["given"]
        assert grid.height == 8 * 30 + 2
        shown = np.asarray(grid.convert("L"))[2:30, -(9 * 30) : -(8 * 30 + 2)]
    assert given[0] == "image own.jpg, text 3 to text 8, 0/7"
    assert (shown == (255 * Picture("L", 28, dark=True).tensor(own)[0, 0]).round().numpy()).all()


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="it is none, or damaged"):
        Picture("L", 28).tensor(tmp_path / "own.png")
