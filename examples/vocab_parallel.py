"""Next-token prediction with the head's classes divided among processes, beside one process that has them all.

    python examples/vocab_parallel.py                            # starts two processes itself
    torchrun --nproc-per-node 4 examples/vocab_parallel.py       # or as many as it is started with

Every process has the network up to the head, which is small, and computes it on all rows; of the head, 32,768 classes,
each has its part. The gradient that the head gives is the same on all of them in bits, so nothing else is exchanged and
the networks stay equal. Prints losses, seconds and peak memory of each process, saves a picture and exits with an error
if the losses differ from one process's by more than rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from common import FIGURES, LOSS_LIMIT, TABLE_ROWS, parser
from next_token import HIDDEN, batches, corpus, resident
from torch import nn

import regfast
from regfast.distributed import VocabParallelLinearCrossEntropyLoss


@dataclass
class Run:
    """A training: what each step gave, and the most memory that the first one took over weights and text."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0  # MiB


def build(args: argparse.Namespace, parallel: bool) -> nn.ModuleDict:
    """The network and its head, of which a process has its part; the seed alone decides about the weights."""
    torch.manual_seed(args.seed)
    body = nn.Sequential(
        nn.Embedding(args.vocabulary, args.features),
        nn.Flatten(),
        regfast.Linear(args.context * args.features, HIDDEN, activation="gelu"),
        regfast.Linear(HIDDEN, HIDDEN),
    )
    whole = regfast.LinearCrossEntropyLoss(HIDDEN, args.vocabulary, memory_budget=args.budget)
    if not parallel:
        return nn.ModuleDict({"body": body, "head": whole})
    head = VocabParallelLinearCrossEntropyLoss(HIDDEN, args.vocabulary, memory_budget=args.budget)
    # In the order of the ranks, as the classes are numbered.
    sizes = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, head.linear.out_features)
    with torch.no_grad():
        head.linear.weight.copy_(whole.linear.weight.split(sizes)[dist.get_rank()])
    return nn.ModuleDict({"body": body, "head": head})


def train(args: argparse.Namespace, tokens: torch.Tensor, parallel: bool) -> Run:
    run = Run()
    model = build(args, parallel)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    data = batches(tokens, args.context, args.batch_size, args.seed)
    for i in range(args.steps):
        contexts, targets = next(data)
        if i == 0:  # the first step counts for the memory, whose buffers the others find
            with contextlib.suppress(OSError):  # some containers forbid it
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
            before = resident("VmRSS")
        start = time.perf_counter()
        loss = model["head"](model["body"](contexts), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(loss.item())
    run.peak = resident("VmHWM") - before
    return run


def report(args: argparse.Namespace, parallel: list[Run], alone: Run) -> bool:
    """Prints and draws the trainings side by side; returns whether their losses agree."""
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.table import Table

    title = f"{args.vocabulary} classes on {len(parallel)} processes, {args.batch_size} rows"
    table = Table("step", "loss\none process", f"loss\n{len(parallel)} processes", title=title, title_justify="left")
    for i in sorted({round(i * (args.steps - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)}):
        table.add_row(str(i + 1), f"{alone.losses[i]:.6g}", f"{parallel[0].losses[i]:.6g}")
    names = ["one process", *(f"rank {rank}" for rank in range(len(parallel)))]
    runs = [alone, *parallel]
    costs = Table("", *names)
    medians = [statistics.median(run.seconds) for run in runs]
    costs.add_row("one step, median (s)", *(f"{seconds:.3f}" for seconds in medians))
    costs.add_row("gradients, optimizer and chunks at their peak (MiB)", *(f"{run.peak:.0f}" for run in runs))
    console = Console()
    console.print(table, costs)

    picture, (losses, seconds, memory) = plt.subplots(1, 3, figsize=(13.5, 3.5))
    steps = range(1, args.steps + 1)
    losses.plot(steps, alone.losses, label="one process", lw=5, alpha=0.4)
    losses.plot(steps, parallel[0].losses, label=f"{len(parallel)} processes", ls="--")
    losses.set(xlabel="step", ylabel="training loss")
    losses.legend()
    for panel, values, label in ((seconds, medians, "seconds of a step"), (memory, [r.peak for r in runs], "peak MiB")):
        panel.bar(names, values)
        panel.set(ylabel=label)
    path = args.figure or FIGURES / "vocab_parallel.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.tight_layout()
    picture.savefig(path, dpi=120)
    print(f"picture: {path}")

    pairs = zip(parallel[0].losses, alone.losses, strict=True)
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    verdict = "below" if difference < LOSS_LIMIT else "NOT below"
    print(f"relative difference of loss after training: {difference:.2e} ({verdict} {LOSS_LIMIT:.0e})")
    return difference < LOSS_LIMIT


def arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0], batch_size=512)
    options.add_argument("--processes", type=int, default=2, help="without torchrun; default: %(default)s")
    options.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    options.add_argument("--tokens", type=int, default=200_000, help="of the text; default: %(default)s")
    options.add_argument("--vocabulary", type=int, default=32_768, help="default: %(default)s")
    options.add_argument("--context", type=int, default=8, help="tokens that are seen; default: %(default)s")
    options.add_argument("--features", type=int, default=64, help="default: %(default)s")
    options.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    options.add_argument("--budget", type=int, default=16 << 20, help="bytes for chunks; default: %(default)s")
    options.add_argument("--alone", type=Path, help=argparse.SUPPRESS)  # where one process's training is saved
    return options.parse_args()


def main() -> None:
    args = arguments()
    if "RANK" not in os.environ and not args.alone:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
        os.execv(sys.executable, [sys.executable, *launch, *sys.argv])
    tokens, _ = corpus(args.tokens, args.vocabulary)
    if args.alone:
        torch.save(vars(train(args, tokens, parallel=False)), args.alone)
        return
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    runs: list[Run] = [Run()] * ranks
    dist.all_gather_object(runs, train(args, tokens, parallel=True))
    agree = report(args, runs, train_alone()) if rank == 0 else True
    dist.barrier()  # the others have waited: what is timed has the machine for itself
    dist.destroy_process_group()
    if not agree:
        raise SystemExit("the losses differ by more than rounding")


def train_alone() -> Run:
    """With the same options in a process of its own, whose memory nobody has used before."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        subprocess.run([sys.executable, *sys.argv, "--alone", str(path)], check=True)
        return Run(**torch.load(path))


if __name__ == "__main__":
    main()
