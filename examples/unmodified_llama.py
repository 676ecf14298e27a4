"""A small Llama of transformers, unmodified, trained from the same start with stock PyTorch and three times on regfast.

The four ways add up: stock; `regfast.accelerate()`, which gives torch's functions our kernels where they are faster;
with `products=True`, which does the same for torch's own matrix products; and with `regfast.replace(model)`, after
which no step stores the logits of its vocabulary. In float32 and in bfloat16, on the Python standard library's own
source. Prints loss, time and memory, saves a picture of them and exits with an error if the losses of float32 differ
by more than rounding.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import FIGURES, LOSS_LIMIT, parser
from next_token import corpus, resident
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import regfast

# Whether functions, whether products and whether the model are regfast's.
WAYS = {
    "PyTorch": (False, False, False),
    "accelerate()": (True, False, False),
    "products=True": (True, True, False),
    "replace(model)": (True, True, True),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    way: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, tokens: Tensor) -> None:
        with accelerated(self.way):
            start = time.perf_counter()
            loss = self.model(input_ids=tokens, labels=tokens).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
            self.seconds.append(time.perf_counter() - start)


def accelerated(way: str) -> contextlib.AbstractContextManager:
    functions, products, _ = WAYS[way]
    return regfast.accelerate(products=products) if functions else contextlib.nullcontext()


def build(args: argparse.Namespace, way: str, dtype: torch.dtype, classes: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=classes,
        hidden_size=args.features,
        intermediate_size=3 * args.features,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config).to(dtype)
    if WAYS[way][2]:
        regfast.replace(model)
    return model.train()


def measure_memory(args: argparse.Namespace, way: str, dtype: torch.dtype) -> float:
    """MiB that a step takes at most over weights and gradients. To be run in a process of its own."""
    model = build(args, way, dtype, args.vocabulary)
    tokens = torch.randint(args.vocabulary, (args.batch_size, args.length))
    with accelerated(way):
        model(input_ids=tokens[:1, :2], labels=tokens[:1, :2]).loss.backward()  # loads what is loaded at a first call
        with contextlib.suppress(OSError):  # some containers forbid it
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        before = resident("VmRSS")
        model(input_ids=tokens, labels=tokens).loss.backward()
    return resident("VmHWM") - before


def memory_of_each(args: argparse.Namespace) -> dict[tuple[str, str], float]:
    """To be called before torch has computed anything: a fork does not inherit the threads that it then starts."""
    found = {}
    pairs = [(name, way) for name in DTYPES for way in WAYS]
    for name, way in tqdm(pairs, "memory", unit="variant", disable=None):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as fresh:
            found[name, way] = fresh.submit(measure_memory, args, way, DTYPES[name]).result()
    return found


def train(args: argparse.Namespace, tokens: Tensor, classes: int) -> dict[tuple[str, str], Run]:
    """All take a step on each batch, in an order that is reversed every time, so that none is timed on a busier machine
    than the others."""
    runs = {}
    for name, dtype in DTYPES.items():
        for way in WAYS:
            model = build(args, way, dtype, classes)
            runs[name, way] = Run(model, torch.optim.AdamW(model.parameters(), args.lr), way)
    size = args.batch_size * args.length
    for i in (progress := tqdm(range(args.steps), unit="batch", disable=None)):
        start = i * size % (len(tokens) - size)
        batch = tokens[start : start + size].reshape(args.batch_size, args.length)
        for run in reversed(runs.values()) if i % 2 else runs.values():
            run.step(batch)
        progress.set_postfix({"loss": f"{runs['float32', 'replace(model)'].losses[-1]:.4g}"})
    return runs


def report(runs: dict[tuple[str, str], Run], memory: dict[tuple[str, str], float]) -> bool:
    """Prints the ways side by side; returns whether the losses of float32 agree with PyTorch's within LOSS_LIMIT."""
    table = Table(
        "", "", "seconds a\nstep, median", "times\nfaster", "MiB of a step\nat its peak", "loss after\ntraining"
    )
    agree = True
    for (name, way), run in runs.items():
        stock = runs[name, "PyTorch"]
        median, base = (statistics.median(r.seconds) for r in (run, stock))
        cells = (f"{median:.4f}", f"{base / median:.2f}x", f"{memory[name, way]:.0f}", f"{run.losses[-1]:.6g}")
        table.add_row(name if way == "PyTorch" else "", way, *cells, end_section=way == list(WAYS)[-1])
        difference = max(abs(a - b) / abs(b) for a, b in zip(run.losses, stock.losses, strict=True))
        if name == "float32" and way != "PyTorch":
            agree &= difference < LOSS_LIMIT
            print(f"{way}, relative difference of loss after training: {difference:.2e}")
    for column in table.columns[2:]:
        column.justify = "right"
    Console().print(table)
    return agree


def draw(path: Path, runs: dict[tuple[str, str], Run], memory: dict[tuple[str, str], float]) -> None:
    """For each dtype a bar for each way: seconds per step, peak memory."""
    picture, panels = plt.subplots(1, 4, figsize=(15, 3.5))
    for i, name in enumerate(DTYPES):
        seconds = [statistics.median(runs[name, way].seconds) for way in WAYS]
        for panel, values, title in (
            (panels[2 * i], seconds, f"{name}: seconds per step, median"),
            (panels[2 * i + 1], [memory[name, way] for way in WAYS], f"{name}: MiB of a step at its peak"),
        ):
            panel.bar_label(panel.bar(list(WAYS), values, color=[f"C{c}" for c in range(len(WAYS))]), fmt="%.3g")
            panel.set_title(title, fontsize=10)
            panel.tick_params("x", rotation=20, labelsize=8)
            panel.margins(y=0.15)
    picture.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)
    plt.close(picture)
    print(f"picture: {path}")


def main() -> None:
    options = parser(__doc__.partition("\n")[0], batch_size=4)
    for name, default, meaning in (
        ("tokens", 100_000, "tokens of the standard library that are read"),
        ("vocabulary", 16_384, "tokens that are told apart, the most frequent ones"),
        ("length", 128, "tokens of a row"),
        ("features", 128, "numbers that stand for a token"),
        ("layers", 2, "layers of the model"),
        ("steps", 10, "batches"),
    ):
        options.add_argument(f"--{name}", type=int, default=default, help=f"{meaning}; default: %(default)s")
    options.add_argument("--lr", type=float, default=0.001, help="learning rate of AdamW; default: %(default)s")
    args = options.parse_args()

    memory = memory_of_each(args)
    tokens, words = corpus(args.tokens, args.vocabulary)
    runs = train(args, tokens, len(words))
    agree = report(runs, memory)
    draw(args.figure or FIGURES / "unmodified_llama.png", runs, memory)
    if not agree:
        raise SystemExit("the losses of PyTorch and regfast differ by more than rounding")


if __name__ == "__main__":
    main()
