"""Losses of a vocabulary that is divided among 1, 2 and 4 processes of gloo: time of a step, bytes sent, peak memory.

    python bench/vocab_parallel.py                       # starts the processes itself; a minute or two
    python bench/vocab_parallel.py --ranks 2 --rows 512 --classes 131072 --json out.json
    python bench/vocab_parallel.py --overlap             # how much of its collectives the linear classifier hides

Beside ours: torch's loss_parallel, and Megatron-LM's formula as its vocab_parallel_cross_entropy has it. All take the
logits of a rank's classes in float32 and give the loss and their gradient. For the linear classifier the others
multiply with F.linear, and the sum of dX over the ranks is part of the step. Steps of all are taken in turn; the
slowest rank's time counts, of which medians are shown. The ranks of one machine share its cores, so that more of them
are no faster: bytes, memory and the ratios are what can be read off.

--overlap takes one process with half of the classes, whose collectives take a known time each: the time that one of two
ranks would wait for them is what is left of it after the products that run meanwhile. Time is that of the process's one
thread, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel

from regfast.distributed import chunks, groups, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy


class Megatron(torch.autograd.Function):
    """Megatron-LM's vocab_parallel_cross_entropy (Shoeybi et al., 2019): softmax in the logits' place, kept for
    backward; three collectives."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, begin: int) -> Tensor:
        largest = logits.max(-1)[0]
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        logits = logits - largest[:, None]
        outside = (target < begin) | (target >= begin + logits.shape[1])
        local = (target - begin).masked_fill(outside, 0)
        predicted = logits[torch.arange(len(logits)), local].masked_fill(outside, 0.0)
        exps = logits.exp_()
        sums = exps.sum(-1)
        dist.all_reduce(predicted)
        dist.all_reduce(sums)
        exps.div_(sums[:, None])
        ctx.save_for_backward(exps, outside, local)
        return sums.log() - predicted

    @staticmethod
    def backward(ctx, grad: Tensor):
        softmax, outside, local = ctx.saved_tensors
        softmax[torch.arange(len(softmax)), local] -= 1.0 - outside.float()
        return softmax.mul_(grad[:, None]), None, None


class SumOfGradients(torch.autograd.Function):
    """Megatron-LM's copy to the tensor-parallel region: backward adds up the ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        dist.all_reduce(grad := grad.contiguous())
        return grad


def resident(key: str) -> float:
    """MiB of this process: VmRSS or VmHWM."""
    return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


@contextlib.contextmanager
def counted():
    """Bytes that this rank gives to collectives."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    with patch.object(dist, "all_reduce", counting):
        yield sent


@contextlib.contextmanager
def products_timed():
    """Seconds that ours spends in products; the rest of a linear classifier's step is losses, messages and waiting."""
    spent: list[float] = []

    def timed(product):
        def call(*args):
            start = time.perf_counter()
            result = product(*args)
            spent.append(time.perf_counter() - start)
            return result

        return call

    names = ("_product", "_add_product")
    with patch.multiple(chunks, **{name: timed(getattr(chunks, name)) for name in names}):
        yield spent


def contestants(args: argparse.Namespace, linear: bool) -> tuple[list[Tensor], dict[str, Callable[[], Tensor]]]:
    """The leaves, and what gives the loss and their gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    target = torch.randint(args.classes, (args.rows,))
    begin, end = args.classes * rank // ranks, args.classes * (rank + 1) // ranks
    if linear:
        x = torch.randn(args.rows, args.features, requires_grad=True)
        torch.manual_seed(1 + rank)
        w = (torch.randn(end - begin, args.features) * args.features**-0.5 * 3).requires_grad_()
        leaves = [x, w]

        def logits() -> Tensor:
            return F.linear(SumOfGradients.apply(x), w)
    else:
        torch.manual_seed(1 + rank)
        leaves = [(3 * torch.randn(args.rows, end - begin)).requires_grad_()]

        def logits() -> Tensor:
            return leaves[0]

    mesh = init_device_mesh("cpu", (ranks,))

    def ours() -> Tensor:
        if linear:
            loss = vocab_parallel_linear_cross_entropy(*leaves, target, memory_budget=args.budget)
        else:
            loss = vocab_parallel_cross_entropy(leaves[0], target)
        loss.backward()
        return loss

    def megatron() -> Tensor:
        loss = Megatron.apply(logits(), target, begin).mean()
        loss.backward()
        return loss

    def torchs() -> Tensor:
        whole = DTensor.from_local(logits(), mesh, [Shard(1)], run_check=False)
        classes = DTensor.from_local(target, mesh, [Replicate()], run_check=False)
        with loss_parallel():
            loss = F.cross_entropy(whole, classes)
            loss.backward()
        return loss.full_tensor()

    return leaves, {"regfast": ours, "Megatron-LM": megatron, "loss_parallel": torchs}


def measure(args: argparse.Namespace, linear: bool) -> dict[str, dict[str, float]]:
    leaves, calls = contestants(args, linear)
    found: dict[str, dict[str, float]] = {name: {} for name in calls}
    times: dict[str, list[float]] = {name: [] for name in calls}
    losses, gradients, outside = {}, {}, []
    for turn in range(args.rounds + 1):
        names = list(calls)
        for name in names if turn % 2 else names[::-1]:
            with contextlib.suppress(OSError):  # some containers forbid it
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
            before = resident("VmRSS")
            dist.barrier()
            start = time.perf_counter()
            with counted() as sent, products_timed() as products:
                loss = calls[name]()
            seconds = torch.tensor(time.perf_counter() - start)
            if turn and name == "regfast" and linear:
                outside.append(seconds.item() - sum(products))
            found[name]["peak"] = max(found[name].get("peak", 0), resident("VmHWM") - before)
            losses[name], gradients[name] = loss.item(), [leaf.grad.flatten()[:64].clone() for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if turn:
                times[name].append(seconds.item())
            if name != "loss_parallel":  # whose collectives are not torch.distributed's functions
                found[name]["bytes_per_row"] = sum(sent) / args.rows
    if linear:
        found["regfast"]["outside"] = statistics.median(outside)
    for name in calls:
        torch.testing.assert_close(losses[name], losses["regfast"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradients[name], gradients["regfast"], rtol=1e-3, atol=1e-5)
        found[name]["seconds"] = statistics.median(times[name])
        ratios = [other / own for other, own in zip(times[name], times["regfast"], strict=True)]
        found[name]["ratio"] = statistics.median(ratios)
    return found


@contextlib.contextmanager
def delayed(seconds: float):
    """Collectives whose results come so long after their start, and what is waited for each, in seconds; nobody sleeps,
    but the clock goes on as if."""
    waited: list[float] = []
    start = groups.Group._start

    def now() -> float:
        return time.thread_time() + sum(waited)

    def started(self, what, run):
        wait, due = start(self, what, run), now() + seconds

        def delayed_wait():
            waited.append(max(0.0, due - now()))
            return wait()

        return delayed_wait

    with patch.object(groups.Group, "_start", started):
        yield waited


def overlap(args: argparse.Namespace) -> None:
    """Of a step's collectives, the part that products hide, by their time and by the number of chunks."""
    store = dist.TCPStore("localhost", 0, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.set_num_threads(1)
    args.classes //= 2
    table = Table("budget (MiB)", "chunks", "of each collective (ms)", "of all (ms)", "waited (ms)", "hidden",
                  title=f"{args.rows} rows, {args.features} features, {args.classes} classes of each rank")  # fmt: skip
    for budget in (args.budget * 8, args.budget, args.budget // 4):
        args.budget = budget
        leaves, calls = contestants(args, True)
        for milliseconds in (1, 5, 20, 80):
            for _ in range(2):
                with delayed(milliseconds / 1e3) as waited:
                    calls["regfast"]()
                for leaf in leaves:
                    leaf.grad = None
            every = milliseconds * len(waited)
            left = 1e3 * sum(waited)
            of_chunks = (len(waited) - 1) // 3  # maxima, sums and dX of each, and the sizes once
            table.add_row(f"{budget >> 20}", f"{of_chunks}", f"{milliseconds}", f"{every}", f"{left:.0f}",
                          f"{1 - left / every:.0%}")  # fmt: skip
    Console(width=120).print(table)
    dist.destroy_process_group()


def worker(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    found = {"cross_entropy": measure(args, False), "linear_cross_entropy": measure(args, True)}
    if dist.get_rank() == 0:
        args.json.write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--rows", type=int, default=512)
    options.add_argument("--classes", type=int, default=131_072)
    options.add_argument("--features", type=int, default=128)
    options.add_argument("--budget", type=int, default=64 << 20, help="bytes for chunks; default: %(default)s")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--overlap", action="store_true", help="how much of its collectives products hide")
    options.add_argument("--json", type=Path, help="where the figures go as well")
    args = options.parse_args()
    if any(args.classes % ranks for ranks in args.ranks):
        options.error(f"--classes: expected a multiple of each number of ranks, got {args.classes} and {args.ranks}")
    if "RANK" in os.environ:
        worker(args)
        return
    if args.overlap:
        overlap(args)
        return
    table = Table("ranks", "op", "", "step (ms)", "not in products", "times ours", "bytes sent a row", "peak (MiB)",
                  title=f"{args.rows} rows, {args.features} features, {args.classes} classes, float32")  # fmt: skip
    results = {}
    for ranks in args.ranks:
        path = Path(f"{args.json or 'vocab_parallel'}.{ranks}.tmp").absolute()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        subprocess.run([*launch, *sys.argv, "--json", str(path)], check=True)
        results[ranks] = json.loads(path.read_text())
        path.unlink()
        for op, found in results[ranks].items():
            for name, figures in found.items():
                sent = f"{figures['bytes_per_row']:.0f}" if "bytes_per_row" in figures else ""
                outside = f"{1e3 * figures['outside']:.0f}" if "outside" in figures else ""
                seconds, ratio = f"{1e3 * figures['seconds']:.0f}", f"{figures['ratio']:.2f}x"
                table.add_row(str(ranks), op, name, seconds, outside, ratio, sent, f"{figures['peak']:.0f}")
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
