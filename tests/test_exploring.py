"""mvae.tools.explore: what a model infers, the page that shows it, and the page in a browser."""

import base64
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvae import MVAE, UsageError, experts
from mvae.run import checkpoint
from mvae.tools.beliefs import bounds, probabilities, shares, strongest
from mvae.tools.controls import Attributes, Label, Picture, Vector

import pytest
import torch
from PIL import Image
from torch import Tensor, distributions

from helpers import ROOT, Trained, environment, small_data, small_model

CONTROLS = {
    "image": Picture("L", 6, dark=True, pen=1),
    "attrs": Attributes(["Big", "Old", "Red", "Wet"]),
    "label": Label(["ant", "bee", "cat"]),
}
EXPERIMENTS = ["mnist", "fashionmnist", "multimnist", "celeba", "celeba19", "vision"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def model() -> MVAE:
    return small_model().eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return dict(small_data(1, seed=4).tensors)


# Beliefs


def test_shares_are_those_of_the_product_of_experts(model: MVAE, batch: dict[str, Tensor]) -> None:
    found, deviations = shares(model, batch)
    assert list(found) == ["prior", "image", "attrs", "label"]
    torch.testing.assert_close(sum(found.values(), torch.zeros(2)), torch.ones(2))
    with torch.no_grad():
        mu, logvar = model.posterior(batch)
        expert_mu, expert_logvar = model.encode(batch, model.presence(batch))
    torch.testing.assert_close(found["prior"], logvar[0].exp())  # the prior's precision is 1
    weighted = sum((found[name] * expert_mu[i, 0] for i, name in enumerate(model.modalities)), torch.zeros(2))
    torch.testing.assert_close(weighted, mu[0])
    assert deviations["label"] == pytest.approx((expert_logvar[2] / 2).mean().exp().item(), rel=1e-5)
    assert deviations["all"] == pytest.approx((logvar / 2).mean().exp().item(), rel=1e-5)
    assert shares(model, {})[1] == {"all": 1}


def test_bounds_hold_and_importance_samples_tighten_the_elbo(model: MVAE, batch: dict[str, Tensor]) -> None:
    elbo, found = bounds(model, batch)
    grid = torch.linspace(-6, 6, 241)
    z = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        log_joint = model.log_prob(z.unsqueeze(1), batch, [model.modalities] * len(z)).sum(dim=(1, 2))
    log_p = (log_joint + experts.log_standard_normal(z)).logsumexp(dim=0) + 2 * torch.log(grid[1] - grid[0])
    assert elbo < found
    assert found == pytest.approx(log_p.item(), abs=0.4)


def test_probabilities_are_those_of_names_or_of_frequent_values() -> None:
    mean = torch.tensor([[0.5, 0.25, 0.25], [0, 0, 1]])
    assert probabilities(CONTROLS["label"], mean) == [("ant", 0.25), ("bee", 0.125), ("cat", 0.625)]
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    assert probabilities(Vector(2), rows)[0] == ("1,2", 2 / 3)


def test_strongest_latent_changes_the_picture_most(model: MVAE) -> None:
    weight = model.likelihood("image").decoder[0].weight  # type: ignore[index, union-attr]
    order = strongest(model, CONTROLS, 2)
    assert sorted(order) == [0, 1]
    assert weight[:, order[0]].abs().mean() > weight[:, order[1]].abs().mean()


# The page, which needs Dash


@pytest.fixture(scope="module")
def explore() -> Any:
    pytest.importorskip("dash", reason="the page needs Dash: pip install dash")
    return importlib.import_module("mvae.tools.explore")


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return "data:image/any;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_modality_can_be_set(explore: Any, experiment: str) -> None:
    controls = importlib.import_module(f"{experiment}.datasets").CONTROLS
    model = importlib.import_module(f"{experiment}.model").build_model(5)
    assert {one for name, kind in controls.items() for one in kind.modalities(name)} == set(model.modalities)
    layout = str(explore.page(model.eval(), controls, "made").layout)
    assert all(f"id='{name}-value'" in layout for name in controls)


NAMES = ["Big", "Old", "Red"]


@pytest.mark.parametrize(
    ("kind", "value", "batch"),
    [
        (Label(NAMES), None, {}),
        (Label(NAMES), "Red", {"x": [2]}),
        (Attributes(NAMES), ["Big", "-Red"], {"x": [[1, 0, 0]]}),
        (Attributes(NAMES, separate=True), ["Big", "-Red"], {"Big": [1], "Red": [0]}),
        (Attributes(NAMES), [], {}),
        (Vector(3), {"given": ["given"], "text": "1,2,-3"}, {"x": [[1, 2, -3]]}),
        (Vector(3), {"given": [], "text": "1,2,-3"}, {}),
    ],
)
def test_widgets_give_the_values_of_the_flags(explore: Any, kind: Any, value: Any, batch: Any) -> None:
    assert {name: x.tolist() for name, x in explore.given("x", kind, value).items()} == batch


def test_page_reads_no_file_that_a_visitor_names(explore: Any) -> None:
    with pytest.raises(UsageError, match="must be numbers"):
        explore.given("x", Vector(3), {"given": ["given"], "text": __file__})


def update(app: Any, **given: Any) -> str:
    """What the page shows of its results, with these inputs set."""
    client = app.server.test_client()
    inputs = {one["output"]: one["inputs"] for one in client.get("/_dash-dependencies").get_json()}["found.children"]
    values = [{**one, "value": given.get(one["id"])} for one in inputs]
    body = {"output": "found.children", "outputs": {"id": "found", "property": "children"}, "inputs": values}
    return client.post("/_dash-update-component", json={**body, "changedPropIds": []}).get_data(as_text=True)


def test_page_shows_samples_probabilities_experts_and_bounds(explore: Any, model: MVAE) -> None:
    app = explore.page(model, CONTROLS, "made")
    rest: Any = {"z0": 0, "z1": 0, "seed": 0, "temperature": 1}
    prior = update(app, **rest)
    assert "nothing is given" in prior
    found = update(app, **{"label-value": "bee", "image-value": data_url(Image.new("L", (6, 6)))}, **rest)
    for words in ("log p(image, label)", "image-samples", "p(attrs | given)", "bee", "z1"):
        assert words in found
    assert "unknown class" in update(app, **{"label-value": "elk"}, **rest)
    for change in ({"z1": 2}, {"temperature": 0.1}, {"seed": 1}):  # the samples alone depend on the first two
        changed = update(app, **rest | change)
        assert changed != prior
        same = changed.split("p(attrs | given)")[1] == prior.split("p(attrs | given)")[1]
        assert same == ("seed" not in change)


def test_the_fitted_prior_is_drawn_from_when_it_is_switched_on(explore: Any, model: MVAE) -> None:
    far = distributions.Independent(distributions.Normal(torch.full((2,), 9.0), torch.ones(2)), 1)
    app = explore.page(model, CONTROLS, "made", far)
    normal, fitted = (update(app, z0=0, z1=0, seed=0, temperature=1, prior=one) for one in ("N(0, I)", explore.FITTED))
    assert normal == update(explore.page(model, CONTROLS, "made"), z0=0, z1=0, seed=0, temperature=1)
    assert fitted != normal
    assert fitted.split("p(attrs | given)")[1] == normal.split("p(attrs | given)")[1]  # only the samples differ


def test_upload_is_decoded_as_a_picture_and_nothing_else(explore: Any) -> None:
    kind = Picture("L", 6, dark=True)
    assert explore.decoded(data_url(Image.new("RGB", (30, 20), (255, 255, 255)), "JPEG"), kind).shape == (1, 1, 6, 6)
    large = data_url(Image.new("1", (10_000, 10_000)))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch pwned) (w) file\n"
    bomb = data_url(Image.new("1", (20_000, 20_000)))
    for url in ("", "no url", "data:;base64,####", "data:;base64," + base64.b64encode(script).decode()):
        with pytest.raises(ValueError, match="the file is damaged or not a picture"):
            explore.decoded(url, kind)
    for url in (large, bomb):
        with pytest.raises(ValueError, match="the file is larger than 50,000,000 pixels"):
            explore.decoded(url, kind)


def test_drawing_is_rasterised(explore: Any) -> None:
    side, kind = explore.BOARD, Picture("L", 28, dark=True, pen=2)
    found = explore.rasterised([{"path": f"M{side / 2},0L{side / 2},{side}"}], kind)
    assert found.shape == (1, 1, 28, 28)
    torch.testing.assert_close(found[0, 0, 5], torch.tensor([0.0] * 13 + [1, 1] + [0] * 13), atol=0.2, rtol=0)
    same = explore.rasterised([{"path": "M1.4e2,0e5L.14E+3,2.8e2"}], kind)
    torch.testing.assert_close(same, found)


def test_large_requests_are_refused(explore: Any, model: MVAE) -> None:
    client = explore.page(model, CONTROLS, "made").server.test_client()
    body = b"{" + b" " * (explore.UPLOAD * 3 // 2) + b"}"
    assert client.post("/_dash-update-component", data=body, content_type="application/json").status_code == 413


@pytest.mark.parametrize("body", [None, {}, {"output": "found.children", "inputs": None}])
def test_malformed_request_is_refused(explore: Any, model: MVAE, body: Any) -> None:
    client = explore.page(model, CONTROLS, "made").server.test_client()
    found = client.post("/_dash-update-component", data=json.dumps(body), content_type="application/json")
    assert found.status_code == 400


@pytest.fixture(scope="module")
def address(explore: Any, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `python -m mvae.tools.explore` serves the model of synthetic digits. Ctrl-C ends it; it writes no file."""
    folder = tmp_path_factory.mktemp("mnist")
    for name in ("datasets.py", "model.py"):
        shutil.copy(ROOT / "mnist" / name, folder)
    command = [sys.executable, "-m", "mvae.tools.explore", str(trained.out_dir / checkpoint.BEST), "--port", "0"]
    env = environment(TMPDIR=str(folder), PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(ROOT))
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=env, **options) as process:
        assert process.stdout
        found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found, process.communicate()
        yield found[0]
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["datasets.py", "model.py"]


def test_page_is_served_to_this_machine_only(address: str) -> None:
    with urllib.request.urlopen(address) as page:
        assert "MVAE: mnist, epoch 3" in page.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "elsewhere.example"}))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_page_in_a_browser(address: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    image = Image.new("L", (60, 60), 255)
    image.paste(0, (25, 8, 35, 52))
    image.save(tmp_path / "own.png")
    asked: list[str] = []
    wrong: list[str] = []
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))

        def wait(element: str, words: str) -> None:
            script = "([element, words]) => document.querySelector(element)?.innerText.includes(words)"
            page.wait_for_function(script, arg=[element, words])

        page.goto(address)
        wait("#bounds", "nothing is given")
        prior = page.get_attribute("#image-samples", "src")
        page.fill("#seed", "1")
        page.wait_for_function("prior => document.querySelector('#image-samples').src != prior", arg=prior)
        box = page.locator("#image-board .nsewdrag").bounding_box()
        page.mouse.move(box["x"] + 140, box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + 140, box["y"] + 230, steps=5)
        page.mouse.up()
        wait("#bounds", "log p(image)")
        page.click("#image-clear")
        wait("#bounds", "nothing is given")
        page.set_input_files("#image-file input", str(tmp_path / "own.png"))
        wait("#image-said", "inverted")
        page.click("#text-value")
        page.get_by_role("option", name="7").click()
        wait("#bounds", "log p(image, text)")
        page.wait_for_function("() => document.querySelectorAll('#expected .ytick').length == 10")
        page.set_input_files("#image-file input", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
        wait("#image-said", "not a picture")
    assert wrong == []
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
