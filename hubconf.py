"""Trained models through torch.hub, from a clone or a repository:

torch.hub.load("path/to/the/clone", "mvae", experiment="mnist", checkpoint="model_best.pth.tar", source="local")
"""

import hashlib
import importlib
from pathlib import Path

from mvae import MVAE, load_model

import torch

dependencies = ["torch", "numpy", "sklearn", "scipy", "filelock", "matplotlib", "tensorboard", "tqdm", "PIL"]


def mvae(experiment: str, checkpoint: str, device: str = "cpu") -> MVAE:
    """Return a trained model in evaluation mode.

    Args:
        experiment: one of mnist, fashionmnist, multimnist, celeba, celeba19, vision.
        checkpoint: path or URL of its model_best.pth.tar. A download is kept in torch.hub.get_dir(). The digest is
            checked, and no code in it is run.
    """
    path = Path(checkpoint)
    if "://" in checkpoint:
        name = f"mvae-{hashlib.sha256(checkpoint.encode()).hexdigest()[:16]}.pth.tar"
        path = Path(torch.hub.get_dir(), "checkpoints", name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(checkpoint, str(path))
    build_model = importlib.import_module(f"{experiment}.model").build_model
    return load_model(path, experiment, build_model, device)[0]
