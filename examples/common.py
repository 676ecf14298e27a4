"""What the two trainings share: the training loop, run once per backend, then the table and the picture."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import regfast

matplotlib.use("Agg")  # pictures go to files; no display is needed
import matplotlib.pyplot as plt

# Both offer Linear, MSELoss and CrossEntropyLoss: a model is built from one or the other and nothing else changes.
BACKENDS: dict[str, ModuleType] = {"PyTorch": nn, "regfast": regfast}
FIGURES = Path(__file__).parent / "figures"
LOSS_LIMIT = 1e-4  # relative; the losses after training may differ by the rounding of float32 and no more
TABLE_ROWS = 10

History = dict[str, list[float]]  # name of a figure -> its value after each epoch


@dataclass
class Run:
    """One backend's training: the model, its figures after each epoch, and where the time went."""

    name: str
    model: nn.Module
    loss: nn.Module | None  # none where the model itself takes the targets
    batches: DataLoader
    optimizer: torch.optim.Optimizer
    history: History = field(default_factory=dict)
    seconds: float = 0.0  # epochs as a whole: loading of data, steps, progress bar; without the evaluation
    step_seconds: list[float] = field(default_factory=list)  # each step: forward, loss, backward and update

    def epoch(self, progress: tqdm) -> float:
        """One pass over the training data; returns the mean loss of its batches."""
        total = rows = 0
        epoch_start = time.perf_counter()
        for inputs, targets in self.batches:
            step_start = time.perf_counter()
            value = step(self.model, self.loss, self.optimizer, inputs, targets)
            self.step_seconds.append(time.perf_counter() - step_start)
            total += value.item() * len(targets)
            rows += len(targets)
            progress.update()
        self.seconds += time.perf_counter() - epoch_start
        return total / rows


def loss_of(model: nn.Module, loss: nn.Module | None, inputs, targets) -> torch.Tensor:
    """The loss of a batch; a model without one has it inside, fused with its last layer."""
    return model(inputs, targets) if loss is None else loss(model(inputs), targets)


def step(model: nn.Module, loss: nn.Module | None, optimizer: torch.optim.Optimizer, inputs, targets) -> torch.Tensor:
    """The notes' step: loss, zero_grad, backward, step."""
    value = loss_of(model, loss, inputs, targets)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.detach()


def parser(description: str, *, batch_size: int) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--batch-size", type=int, default=batch_size, help="default: %(default)s")
    options.add_argument("--seed", type=int, default=0, help="of weights and batches; default: %(default)s")
    options.add_argument("--figure", type=Path, help="where the picture goes; otherwise examples/figures/")
    return options


def loader(dataset: Dataset, batch_size: int, *, seed: int = 0, shuffle: bool = False, workers: int = 0) -> DataLoader:
    """Batches in an order that depends on the seed alone, so that both backends see the same ones."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )


def train_both(
    build: Callable[[ModuleType], tuple[nn.Module, nn.Module | None]],
    batches: Callable[[], DataLoader],
    evaluate: Callable[[nn.Module, nn.Module | None], dict[str, float]],
    *,
    epochs: int,
    lr: float,
    seed: int,
) -> dict[str, Run]:
    """Trains once per backend from the same seed.

    The backends take turns, an epoch each and the order reversed every time, so that neither is timed on a colder or
    busier machine than the other.

    build: makes (model, loss) out of a backend's layers; batches: a fresh loader of the training data, always with
    the same batches; evaluate: the figures of (model, loss) after an epoch.
    """
    runs = []
    for name, layers in BACKENDS.items():
        torch.manual_seed(seed)
        model, loss = build(layers)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, mean=0.0, std=0.01)
                nn.init.zeros_(layer.bias)
        runs.append(Run(name, model, loss, batches(), torch.optim.SGD(model.parameters(), lr)))
        # A step on a copy and an evaluation first: threads, loader processes and other set-up are in nobody's time.
        rehearsal = copy.deepcopy(model)
        step(rehearsal, loss, torch.optim.SGD(rehearsal.parameters(), lr), *next(iter(batches())))
        evaluate(rehearsal, loss)

    bars = [
        tqdm(total=epochs * len(run.batches), desc=f"{run.name:>7}", unit="batch", position=i, disable=None)
        for i, run in enumerate(runs)
    ]
    turns = list(zip(runs, bars, strict=True))
    for _ in range(epochs):
        for run, bar in turns:
            figures = {"training loss": run.epoch(bar)}
            with torch.no_grad():
                figures |= evaluate(run.model, run.loss)
            for figure, value in figures.items():
                run.history.setdefault(figure, []).append(value)
            bar.set_postfix({figure: f"{value:.4g}" for figure, value in figures.items()})
        turns.reverse()
    for bar in bars:
        bar.close()
    return {run.name: run for run in runs}


def report(title: str, runs: dict[str, Run]) -> bool:
    """Prints both runs side by side; returns whether their losses after training agree within LOSS_LIMIT."""
    stock, ours = runs.values()
    table = Table(title=title, title_justify="left")
    table.add_column("epoch", justify="right")
    for figure in stock.history:
        for name in runs:
            table.add_column(f"{figure}\n{name}", justify="right")
    epochs = len(stock.history["training loss"])
    shown = sorted({round(1 + i * (epochs - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)})
    for epoch in shown:
        values = [run.history[figure][epoch - 1] for figure in stock.history for run in runs.values()]
        table.add_row(str(epoch), *(f"{value:.6g}" for value in values))

    times = Table()
    times.add_column("time")
    for name in (*runs, "ratio"):
        times.add_column(name, justify="right")
    steps = [1e6 * statistics.median(run.step_seconds) for run in runs.values()]
    for label, digits, a, b in (
        ("all epochs, loading of data included (s)", 3, stock.seconds, ours.seconds),
        ("one step, median (µs)", 1, *steps),
    ):
        times.add_row(label, f"{a:.{digits}f}", f"{b:.{digits}f}", f"{a / b:.2f}x")

    console = Console()
    console.print(table, times)
    difference = loss_difference(runs)
    agree = difference < LOSS_LIMIT
    verdict = "below" if agree else "NOT below"
    console.print(f"relative difference of loss after training: {difference:.2e} ({verdict} {LOSS_LIMIT:.0e})\n")
    return agree


def loss_difference(runs: dict[str, Run]) -> float:
    """The largest relative difference between the backends' losses after the last epoch."""
    stock, ours = (run.history for run in runs.values())
    differences = [abs(stock[f][-1] - ours[f][-1]) / abs(stock[f][-1]) for f in stock if "loss" in f]
    # A loss that is not a number compares as False with everything and max() could drop it: it must fail the limit.
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def plot(path: Path, trainings: dict[str, dict[str, Run]]) -> None:
    """Saves one row of curves per training, one panel per figure, both backends in each."""
    columns = max(len(next(iter(runs.values())).history) for runs in trainings.values())
    shape = (len(trainings), columns)
    picture, axes = plt.subplots(*shape, squeeze=False, figsize=(4.5 * columns, 3.5 * len(trainings)))
    for row, (title, runs) in zip(axes, trainings.items(), strict=True):
        for panel, figure in zip(row, next(iter(runs.values())).history, strict=False):
            # The curves coincide: the first is drawn wide and the second dashed on top, so that both can be seen.
            for (name, run), style in zip(runs.items(), ({"lw": 5, "alpha": 0.4}, {"ls": "--"}), strict=True):
                values = run.history[figure]
                panel.plot(range(1, len(values) + 1), values, label=name, **style)
            panel.set(title=title, xlabel="epoch", ylabel=figure)
            panel.xaxis.get_major_locator().set_params(integer=True)
            if "loss" in figure and max(values) > 10 * min(values) > 0:
                panel.set_yscale("log")
            panel.legend()
        for panel in row[len(runs["regfast"].history) :]:
            panel.set_axis_off()
    picture.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)
    plt.close(picture)
    print(f"picture: {path}")
