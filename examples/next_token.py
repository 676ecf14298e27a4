"""Next-token prediction, trained from the same start with stock PyTorch, with its chunked operator and with regfast.

The text is on every machine: the Python standard library's own source, cut into tokens by `tokenize`. A small network
guesses each token from the ones before it, among 32,768. What is compared is the head, a linear classifier with its
cross-entropy: the one that stores all logits, the one of PyTorch that does not (where torch has it; it is so slow on a
CPU that it gets a few steps only), and regfast's. Prints loss, time and memory, saves a picture of them and exits with
an error if the losses differ by more than rounding.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import math
import multiprocessing
import re
import statistics
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import FIGURES, LOSS_LIMIT, TABLE_ROWS, parser, step
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import regfast

UNKNOWN = "<unknown>"
# A line's end is one token however it is written, and so is an indentation however deep.
NAMED = {tokenize.NEWLINE: "<newline>", tokenize.INDENT: "<indent>", tokenize.DEDENT: "<dedent>"}
LEFT_OUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
FOLDERS_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
HIDDEN = 256


class StoredLogits(nn.Module):
    """What one writes in PyTorch: F.linear, then F.cross_entropy of all logits."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.linear(x), target)


def chunked(features: int, classes: int) -> nn.Module:
    return nn.LinearCrossEntropyLoss(features, classes, options=nn.LinearCrossEntropyOptions())


# Name -> the class of the hidden layers, and the head. All heads keep their weight in .linear.weight.
VARIANTS: dict[str, tuple[type[nn.Linear], Callable[[int, int], nn.Module]]] = {
    "PyTorch": (nn.Linear, StoredLogits),
    "PyTorch chunked": (nn.Linear, chunked),
    "regfast": (regfast.Linear, regfast.LinearCrossEntropyLoss),
}
if not hasattr(nn, "LinearCrossEntropyOptions"):  # torch before 2.13
    del VARIANTS["PyTorch chunked"]


@dataclass
class Run:
    """One variant's training: the network up to the head, the head, and what each step gave."""

    model: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # forward, loss, backward and update

    def step(self, contexts: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        value = step(self.model, self.loss, self.optimizer, contexts, targets)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(value.item())


def source_tokens(root: Path) -> Iterator[str]:
    """The tokens of every module below root, tests and installed packages left out, in an order that never changes."""
    for path in sorted(root.rglob("*.py")):
        if FOLDERS_LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            with tokenize.open(path) as file:
                for token in tokenize.generate_tokens(file.readline):
                    if token.type not in LEFT_OUT:
                        yield NAMED.get(token.type, token.string)


def corpus(limit: int, vocabulary: int) -> tuple[Tensor, list[str]]:
    """The first `limit` tokens of the standard library as numbers, and what the numbers stand for."""
    tokens = list(itertools.islice(source_tokens(Path(sysconfig.get_path("stdlib"))), limit))
    words = [UNKNOWN, *(word for word, _ in Counter(tokens).most_common(vocabulary - 1))]
    number = {word: i for i, word in enumerate(words)}
    return torch.tensor([number.get(token, 0) for token in tokens]), words


def batches(tokens: Tensor, context: int, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Contexts and the token after each, in an order that depends on the seed alone, again and again."""
    windows = tokens.unfold(0, context + 1, 1)
    random = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(windows), generator=random).split(rows):
            yield windows[chosen, :-1], windows[chosen, -1]


def build(name: str, args: argparse.Namespace, classes: int) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """The variant's network, its head with the loss, and the weights of both; the seed alone decides about them."""
    torch.manual_seed(args.seed)
    linear, head = VARIANTS[name]
    embedding = nn.Embedding(classes, args.features)
    layers = [linear(args.context * args.features, HIDDEN), nn.GELU(), linear(HIDDEN, args.features)]
    loss = head(args.features, classes)
    if args.tied:
        nn.init.normal_(embedding.weight, std=args.features**-0.5)
        loss.linear.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Flatten(), *layers)
    return model, loss, list(dict.fromkeys([*model.parameters(), *loss.parameters()]))  # a tied weight once


def train(args: argparse.Namespace, tokens: Tensor, classes: int) -> dict[str, Run]:
    """All variants take a step on each batch, in an order that is reversed every time so that none is timed on a busier
    machine than the others; the chunked one stops after its few steps."""
    runs = {}
    for name in VARIANTS:
        model, loss, weights = build(name, args, classes)
        runs[name] = Run(model, loss, torch.optim.Adam(weights, args.lr, fused=True))
    limits = {name: args.chunked_steps if name == "PyTorch chunked" else args.steps for name in runs}
    data = batches(tokens, args.context, args.batch_size, args.seed)
    for i in (progress := tqdm(range(args.steps), unit="batch", disable=None)):
        batch = next(data)
        turns = [run for name, run in runs.items() if i < limits[name]]
        for run in reversed(turns) if i % 2 else turns:
            run.step(*batch)
        progress.set_postfix({"loss": f"{runs['regfast'].losses[-1]:.4g}"})
    return runs


def resident(key: str) -> float:
    """MiB that this process occupies (VmRSS) or has occupied at most (VmHWM)."""
    return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def measure_memory(name: str, args: argparse.Namespace) -> float:
    """MiB that a step takes at most over weights and optimizer. To be run in a process of its own."""
    _, head = VARIANTS[name]
    head(4, 4)(torch.zeros(2, 4), torch.tensor([0, 1])).backward()  # loads what is loaded at a first call
    model, loss, weights = build(name, args, args.vocabulary)
    contexts = torch.randint(args.vocabulary, (args.batch_size, args.context))
    targets = torch.randint(args.vocabulary, (args.batch_size,))
    # Two for each weight, as Adam has them. The update, which takes no more memory, is left out.
    state = [torch.empty_like(weight).zero_() for weight in weights for _ in range(2)]
    with contextlib.suppress(OSError):  # some containers forbid it
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = resident("VmRSS")
    loss(model(contexts), targets).backward()
    del state
    return resident("VmHWM") - before


def memory_of_each(args: argparse.Namespace) -> dict[str, float]:
    """To be called before torch has computed anything: a fork does not inherit the threads that it then starts."""
    found = {}
    for name in tqdm(VARIANTS, "memory", unit="variant", disable=None):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as fresh:
            found[name] = fresh.submit(measure_memory, name, args).result()
    return found


def differences(runs: dict[str, Run], name: str) -> list[float]:
    """The relative difference of the variant's losses from PyTorch's, step by step."""
    pairs = zip(runs[name].losses, runs["PyTorch"].losses, strict=False)  # the chunked one has taken fewer
    found = [abs(a - b) / abs(b) for a, b in pairs]
    return [d if math.isfinite(d) else math.inf for d in found]  # max() could drop one that is not a number


def report(title: str, runs: dict[str, Run], memory: dict[str, float]) -> bool:
    """Prints the variants side by side; returns whether all losses agree with PyTorch's within LOSS_LIMIT."""
    steps = len(runs["PyTorch"].losses)
    few = {len(run.losses) for run in runs.values()}
    table = Table("step", *(f"loss\n{name}" for name in runs), title=title, title_justify="left")
    for i in sorted({round(i * (steps - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)} | {n - 1 for n in few if n}):
        losses = [f"{run.losses[i]:.6g}" if i < len(run.losses) else "" for run in runs.values()]
        table.add_row(str(i + 1), *losses)

    costs = Table("", *runs)
    medians = [statistics.median(run.seconds) if run.seconds else math.nan for run in runs.values()]
    costs.add_row("one step, median (s)", *(f"{seconds:.3f}" for seconds in medians))
    costs.add_row("... times regfast's", *(f"{seconds / medians[-1]:.2f}x" for seconds in medians))
    costs.add_row("steps taken", *(str(len(run.losses)) for run in runs.values()))
    costs.add_row("memory of a step at its peak (MiB)", *(f"{peak:.0f}" for peak in memory.values()))
    for column in (*table.columns, *costs.columns[1:]):
        column.justify = "right"

    console = Console()
    console.print(table, costs)
    agree = True
    for name in list(runs)[1:]:
        found = differences(runs, name)
        if found:
            fine = max(found) < LOSS_LIMIT
            agree &= fine
            console.print(
                f"{name}, relative difference of loss after training: {found[-1]:.2e} (at most {max(found):.2e} at "
                f"any of {len(found)} steps, {'below' if fine else 'NOT below'} {LOSS_LIMIT:.0e})",
                soft_wrap=True,
            )
    return agree


def draw(path: Path, title: str, runs: dict[str, Run], memory: dict[str, float]) -> None:
    """The curves of all variants; then a bar for each: seconds per step, peak memory."""
    picture, (curves, times, peaks) = plt.subplots(1, 3, figsize=(13.5, 3.5))
    # The curves coincide: the first is wide, and the others are dashed on top of it, so that all can be seen.
    styles = {"PyTorch": {"lw": 5, "alpha": 0.4}, "PyTorch chunked": {"marker": "o"}, "regfast": {"ls": "--"}}
    for i, (name, run) in enumerate(runs.items()):
        curves.plot(range(1, len(run.losses) + 1), run.losses, color=f"C{i}", label=name, **styles[name])
    curves.set(title=title, xlabel="step", ylabel="training loss")
    curves.legend()
    colors = [f"C{i}" for i in range(len(runs))]
    medians = [statistics.median(run.seconds) if run.seconds else 0 for run in runs.values()]
    times.bar_label(times.bar(list(runs), medians, color=colors), fmt="%.3g")
    times.set(title="seconds per step, median")
    peaks.bar_label(peaks.bar(list(memory), list(memory.values()), color=colors), fmt="%.0f")
    peaks.set(title="memory of a step at its peak, MiB")
    for panel in (times, peaks):
        panel.margins(y=0.15)
    picture.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)
    plt.close(picture)
    print(f"picture: {path}")


def main() -> None:
    options = parser(__doc__.partition("\n")[0], batch_size=1024)
    for name, default, meaning in (
        ("tokens", 800_000, "tokens of the standard library that are read"),
        ("vocabulary", 32_768, "tokens that are told apart, the most frequent ones"),
        ("context", 8, "tokens from which the next one is guessed"),
        ("features", 64, "numbers that stand for a token, and inputs of the head"),
        ("steps", 60, "batches that PyTorch and regfast are trained on"),
        ("chunked-steps", 2, "those that PyTorch's chunked operator is trained on"),
    ):
        options.add_argument(f"--{name}", type=int, default=default, help=f"{meaning}; default: %(default)s")
    options.add_argument("--lr", type=float, default=0.003, help="learning rate of Adam; default: %(default)s")
    options.add_argument("--tied", action="store_true", help="the head's weight is the embedding's")
    args = options.parse_args()

    memory = memory_of_each(args)
    start = time.perf_counter()
    tokens, words = corpus(args.tokens, args.vocabulary)
    unknown = (tokens == 0).float().mean().item()
    print(
        f"{len(tokens):,} tokens of {Path(sysconfig.get_path('stdlib'))} in {time.perf_counter() - start:.1f} s; "
        f"{len(words):,} are told apart, {unknown:.1%} of the text is none of them"
    )
    runs = train(args, tokens, len(words))
    form = "tied" if args.tied else "free"
    title = f"next token, {form} head"
    agree = report(title, runs, memory)
    draw(args.figure or FIGURES / f"next_token_{form}.png", title, runs, memory)
    if not agree:
        raise SystemExit("the losses of PyTorch and regfast differ by more than rounding")


if __name__ == "__main__":
    main()
