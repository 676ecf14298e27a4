"""A training step of unmodified models of transformers: stock PyTorch, and regfast in three ways.

    python bench/models.py                               # the table on the terminal; ten minutes
    python bench/models.py --into docs/accelerate.md     # and into that page, then bench/first_picture.py
    python bench/models.py --layers 4 --width 512 --classes 32000 --length 256 --rounds 2 --only Llama  # larger ones

One thread, medians of its CPU time, the four ways in turn. All libraries are held to AVX2, which stands for a CPU
without instructions for half types; --native leaves them alone. All start from the same weights and see the same batch,
and their losses have to agree.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from runner import ENVIRONMENTS

HELD = ENVIRONMENTS["avx2"]
WAYS = ("stock", "accelerate()", "products=True", "replace(model)")
SIZES = {"batch": 4, "length": 128, "width": 256, "layers": 2, "classes": 8192, "rounds": 5}
# Of the losses of all ways after the same steps, relative.
AGREE = {"bfloat16": 3e-2, "autocast": 3e-2, "float32": 1e-4}
BEGIN, END = "<!-- models:begin -->\n", "<!-- models:end -->"


def models(args: argparse.Namespace) -> dict[str, Callable]:
    """Of each name what makes the model and its batch."""
    import torch
    import transformers as hf

    hf.logging.set_verbosity_error()  # on ids of special tokens beyond the vocabulary, which nobody uses here

    def ids(*shape: int, most: int = args.classes) -> torch.Tensor:
        return torch.randint(most, shape)

    def language(make: Callable) -> Callable:
        def made():
            tokens = ids(args.batch, args.length)
            return make(), {"input_ids": tokens, "labels": tokens}

        return made

    sizes = {
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
        "intermediate_size": 4 * args.width,
    }
    words = {**sizes, "vocab_size": args.classes}
    t5 = {"d_model": args.width, "d_kv": args.width // 4, "d_ff": 4 * args.width}
    t5 |= {"num_heads": 4, "num_layers": args.layers}
    gpt2 = {"n_embd": args.width, "n_layer": args.layers, "n_head": 4, "n_positions": args.length}

    def bert():
        model = hf.BertForSequenceClassification(hf.BertConfig(**words, num_labels=10))
        return model, {"input_ids": ids(args.batch, args.length), "labels": ids(args.batch, most=10)}

    def vit():
        model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=176, patch_size=16, num_labels=10))
        return model, {"pixel_values": torch.randn(args.batch, 3, 176, 176), "labels": ids(args.batch, most=10)}

    return {
        "GPT-2": language(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2, vocab_size=args.classes))),
        "Llama": language(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**words, num_key_value_heads=2))),
        "T5": language(
            lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5, vocab_size=args.classes, decoder_start_token_id=0))
        ),
        "BERT": bert,
        "ViT": vit,
    }


def measured(make: Callable, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, by way."""
    import torch

    import regfast

    torch.manual_seed(0)
    model, batch = make()
    kind = torch.float32 if dtype == "autocast" else getattr(torch, dtype)
    batch = {name: t.to(kind) if t.is_floating_point() else t for name, t in batch.items()}
    # In eval mode there is no dropout, which would not draw the same numbers in every way.
    runs = {way: copy.deepcopy(model).to(kind).eval() for way in WAYS}
    regfast.replace(runs["replace(model)"])
    forwards: dict[str, Callable] = dict(runs)
    if args.compile:
        for way, run in runs.items():
            run.loss_type = getattr(run, "loss_type", None) or "ForCausalLM"  # or GPT-2 logs, which Dynamo refuses
            forwards[way] = torch.compile(run, fullgraph=True)
    optimizers = {way: torch.optim.AdamW(run.parameters(), 1e-4) for way, run in runs.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(args.rounds + 1):
        losses = {}
        # Each begins a round in its turn, and none follows itself: its weights would still be in the caches.
        for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            ours = way != "stock"
            with regfast.accelerate(products=way != "accelerate()") if ours else contextlib.nullcontext():
                begin = time.thread_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
                    loss = forwards[way](**batch).loss
                optimizers[way].zero_grad()
                loss.backward()
                optimizers[way].step()
                took = time.thread_time() - begin
            losses[way] = loss.item()
            if turn:  # the first is for what a first step sets up
                seconds[way].append(took)
            print(".", end="", file=sys.stderr, flush=True)
        stock = losses["stock"]
        for way, loss in losses.items():
            if not abs(loss - stock) <= AGREE[dtype] * abs(stock):
                raise SystemExit(f"models.py: {way}: expected the stock loss {stock}, got {loss}")
    return {way: statistics.median(of_way) for way, of_way in seconds.items()}


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value >= 2 else f"{value:.2f}"


def table(results: dict[tuple[str, str], dict[str, float]], *, native: bool) -> str:
    """Of a page: a line for each model and dtype, and where and when that was measured."""
    import torch

    from regfast.cli.info import processor

    lines = ["| | stock step | `accelerate()` | `products=True` | and `replace(model)` |", "|---|---|---|---|---|"]
    for (name, dtype), seconds in results.items():
        stock = seconds["stock"]
        shown = f"{stock:.2g} s" if stock >= 0.1 else f"{1e3 * stock:.0f} ms"
        ratios = " | ".join(f"{digits(stock / seconds[way])}x" for way in WAYS[1:])
        lines.append(f"| {name}, {dtype} | {shown} | {ratios} |")
    held = "its own instructions" if native else "all libraries held to AVX2"
    where = f"{processor()}, {held}, torch {torch.__version__}, {datetime.date.today()}"
    return "\n".join([*lines, "", f"Medians of one thread's CPU time; {where}, by `bench/models.py`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", action="store_true", help="with all instructions that the CPU has")
    parser.add_argument("--into", type=Path, help="a page with the marks of the table")
    parser.add_argument("--only", nargs="*", default=[], metavar="MODEL")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"], choices=AGREE)
    parser.add_argument("--compile", action="store_true", help="under torch.compile(fullgraph=True)")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    # Read when libraries start: this process begins again with them.
    wanted = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **({} if args.native else HELD)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    makers = models(args)
    if unknown := set(args.only) - makers.keys():
        parser.error(f"--only: expected some of {', '.join(makers)}, got {', '.join(unknown)}")
    results = {}
    for dtype in args.dtypes:
        for name in args.only or makers:
            print(f"\n{name}, {dtype} ", end="", file=sys.stderr, flush=True)
            results[name, dtype] = measured(makers[name], dtype, args)
    text = table(results, native=args.native)
    print(f"\n{text}")
    if args.into:
        page = args.into.read_text()
        new, count = re.subn(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}{text}{END}", page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"models.py: --into: expected a page with {BEGIN.strip()} and {END}, got {args.into}")
        args.into.write_text(new)


if __name__ == "__main__":
    main()
