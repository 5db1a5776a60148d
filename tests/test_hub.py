"""What other programs load: models through torch.hub, and the notebook."""

from pathlib import Path

from mvae.run import checkpoint

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from helpers import ROOT, Trained, environment


@pytest.mark.parametrize("by_url", [False, True], ids=["path", "URL"])
def test_torch_hub_loads_a_model(
    by_url: bool, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = trained.out_dir.resolve() / checkpoint.BEST
    where = path.as_uri() if by_url else str(path)
    model = torch.hub.load(str(ROOT), "mvae", experiment="mnist", checkpoint=where, source="local")
    weights = checkpoint.load(path, "mnist")["model"]
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert not model.training
    assert bool(list(tmp_path.rglob("*.pth.tar"))) == by_url


def test_the_notebook_runs(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "trained_models").symlink_to(trained.out_dir.resolve())
    for name, value in environment(PYTHONPATH=str(ROOT), JUPYTER_PLATFORM_DIRS="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "notebooks" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "poses" / checkpoint.BEST).exists()
