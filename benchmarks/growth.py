"""Measure how the time and memory of a step grow with modalities, latents, batch and random subsets.

One of the four grows, the others stay; every modality has small networks, so that what is ours shows beside them. A
slope is that of a line through the logarithms of the larger half of the values: with slope 1, twice as many take twice
as long. The arithmetic's slopes stand beside them: for the time, the multiplications of the networks as torch counts
them; for the memory, the numbers that the step has to make, which are in `numbers`. Times are of the process on one
thread, and the sizes take turns.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mvae import MVAE, Gaussian, Objective, random_subsets, train_step
from mvae.files import write_atomically
from mvae.scripts import running, types

N_INPUTS, HIDDEN = 32, 64
EXCESS = 0.1  # how much steeper than the arithmetic's a slope may be


class Size(NamedTuple):
    """Of a step: what grows, and what it is beside what grows."""

    modalities: int = 8
    latents: int = 64
    batch: int = 100
    approx_m: int = 0


GROWING = {
    "modalities": [2, 4, 8, 16, 32, 64],
    "latents": [16, 32, 64, 128, 256, 512],
    "batch": [25, 50, 100, 200, 400, 800],
    "approx_m": [1, 2, 4, 8, 16, 32, 64],
}


class Encoder(nn.Module):
    def __init__(self, n_latents: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(N_INPUTS, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 2 * n_latents))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.net(x).chunk(2, dim=1)


def step_of(size: Size) -> Callable[[], None]:
    """A training step of this size, which draws its random subsets anew each time."""
    names = [f"modality{i}" for i in range(size.modalities)]
    decoders = {
        name: nn.Sequential(nn.Linear(size.latents, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, N_INPUTS)) for name in names
    }
    model = MVAE(
        encoders={name: Encoder(size.latents) for name in names},
        likelihoods={name: Gaussian(decoder) for name, decoder in decoders.items()},
        n_latents=size.latents,
    )
    objective = Objective(model)
    optimizer = torch.optim.Adam(objective.parameters(), fused=True)
    batch = {name: torch.randn(size.batch, N_INPUTS) for name in names}
    rng = np.random.default_rng(0)

    def step() -> None:
        train_step(objective, optimizer, batch, subsets=random_subsets(names, size.approx_m, rng))

    return step


def numbers(size: Size) -> int:
    """What a step has to make: hidden values and experts of each modality; of each term, an expert's mean and
    log-variance for each that it is given, the posterior's and z; and hidden values and outputs of all it scores."""
    subset = (2 + size.modalities - 1) / 2  # modalities, in the mean
    given = 2 * size.modalities + size.approx_m * subset
    terms = 1 + size.modalities + size.approx_m
    encoded = size.modalities * (2 * HIDDEN + 2 * size.latents)
    fused = given * 2 * size.latents + terms * 3 * size.latents
    return round(size.batch * (encoded + fused + given * (2 * HIDDEN + N_INPUTS)))


def held(step: Callable[[], None]) -> int:
    """The bytes of all tensors that the step keeps for its backward pass."""
    found: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        step()
    return sum(found.values())


def flops(step: Callable[[], None], n: int = 8) -> float:
    """The floating-point operations of a step's matrix products, a mean over n steps."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(n):
            step()
    return counter.get_total_flops() / n


def measure(name: str, values: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """A row for each value of what grows; each value is measured for `seconds`, in five turns."""
    sizes = [Size()._replace(**({"modalities": 16} if name == "approx_m" else {}), **{name: n}) for n in values]
    steps = [step_of(size) for size in sizes]
    best = [float("inf")] * len(steps)
    for _ in range(5):
        for i, step in enumerate(steps):
            step()
            n, started = 0, time.process_time()
            while n == 0 or time.process_time() - started < seconds / 5:
                step()
                n += 1
            best[i] = min(best[i], (time.process_time() - started) / n)
    return [
        {"value": value, "ms": 1e3 * took, "held_bytes": held(step), "flops": flops(step), "numbers": numbers(size)}
        for value, took, step, size in zip(values, best, steps, sizes, strict=True)
    ]


def slope(rows: Sequence[dict[str, Any]], column: str) -> float:
    """d log column / d log value, by least squares over the larger half of the values."""
    upper = rows[len(rows) // 2 :] if len(rows) > 3 else rows
    x, y = (np.log([row[name] for row in upper]) for name in ("value", column))
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seconds", type=types.positive_float, default=1.0, help="of the processor, for each size")
    parser.add_argument("--quick", action="store_true", help="three small sizes of each, to try it out")
    parser.add_argument("--json", type=types.output, metavar="FILE", help="write the numbers to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    content: dict[str, Any] = {**running.origin(), "processor": platform.processor() or platform.machine()}
    content |= {"torch": torch.__version__, "excess": EXCESS, "growth": {}}
    for name, values in GROWING.items():
        rows = measure(name, values[:3] if args.quick else values, args.seconds)
        slopes = {column: slope(rows, column) for column in ("ms", "flops", "held_bytes", "numbers")}
        content["growth"][name] = {"rows": rows, "slopes": slopes}
        print(f"\n{name:>10}  ms a step  MiB held   million flops")
        for row in rows:
            print(f"{row['value']:10}{row['ms']:11.2f}{row['held_bytes'] / 2**20:10.2f}{row['flops'] / 1e6:16.1f}")
        print("     slope", *(f"{column} {found:.2f}" for column, found in slopes.items()), sep="  ", flush=True)
    steep = [
        f"{what} of {name}"
        for name, found in content["growth"].items()
        for what, arithmetic in (("ms", "flops"), ("held_bytes", "numbers"))
        if found["slopes"][what] > found["slopes"][arithmetic] + EXCESS
    ]
    print(f"\nsteeper than the arithmetic by more than {EXCESS}: {', '.join(steep) or 'none'}")
    if args.json:
        write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())


if __name__ == "__main__":
    running.run(main)
