"""What sweep.py measures: random calls of each op, of the kinds that users have, each from its number alone."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from bench_phm_linear import composed
from harness import Work
from torch import Tensor

import regfast

CASES = 1_000_000  # numbers to a seed
LARGEST = 32 << 20  # bytes of the largest tensor
FLOPS = 1e9  # of a product, so that three of them take one core a few hundredths of a second
HALF_FLOPS = 1e8  # PyTorch may have no instructions for these
DTYPES = {"float32": 50, "float64": 15, "bfloat16": 20, "float16": 15}
MATRIX_LAYOUTS = {"contiguous": 60, "transposed": 14, "sliced": 14, "strided": 12}
IMAGE_LAYOUTS = {"contiguous": 40, "channels_last": 30, "transposed": 10, "sliced": 10, "strided": 10}
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
EXPANDED = "of a sum"  # the upstream gradient of what is no scalar
DIMS = {"columns": 0, "segmentation": 1}  # of the softmax family by kind; else the last


@dataclass(frozen=True)
class Drawn:
    number: int
    op: str
    kind: str
    shape: tuple[int, ...]  # of the input; of products rows, inputs, outputs (and n of phm_linear)
    dtype: str
    layout: str  # of the input, and of a mse_loss's target
    options: tuple[str, ...]  # what else distinguishes the call

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        elements = math.prod(self.shape)
        if self.op in PRODUCTS:
            *rows, d, v = self.shape[:-1] if self.op == "phm_linear" else self.shape
            elements = max(math.prod(rows) * max(d, v), d * v)
        return elements * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Draw(random.Random):
    """The choices of one case. Its largest tensor is drawn first, log-uniformly; the rows are what then is left."""

    def __init__(self, number: int):
        super().__init__(number)
        self.dtype = self.pick(DTYPES)
        self.room = self.size(4, LARGEST // getattr(torch, self.dtype).itemsize)
        self.flops = HALF_FLOPS if self.dtype in ("bfloat16", "float16") else FLOPS

    def pick(self, weights: dict[str, int]) -> str:
        return self.choices(list(weights), list(weights.values()))[0]

    def chance(self, share: float) -> bool:
        return self.random() < share

    def size(self, least: int, most: int) -> int:
        """Log-uniform, one in three a power of two or beside one."""
        most = max(least, most)
        return self.ragged(int(math.exp(self.uniform(math.log(least), math.log(most + 1)))), least, most)

    def ragged(self, n: int, least: int, most: int) -> int:
        if self.chance(1 / 3):
            n = 2 ** round(math.log2(max(n, 1))) + self.choice((-1, 0, 1))
        return min(max(n, least), most)

    def make_room(self, least: int) -> None:
        """For so many elements at least, so that a kind of larger shapes is not mostly its smallest."""
        self.room = max(self.room, self.size(least, 64 * least))

    def matrix(self, least: int, most: int, batch: int = 1) -> tuple[int, int]:
        """Rows of so many columns."""
        self.make_room(least * batch)
        room = self.room // batch
        columns = self.size(least, min(most, room))
        return self.ragged(room // columns, 1, room // columns), columns

    def attention(self) -> tuple[int, ...]:
        """(batch, heads, rows, columns)."""
        batch, heads = self.size(1, 8), self.size(1, 16)
        return batch, heads, *self.matrix(8, 512, batch * heads)

    def image(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        self.make_room(256)
        batch, channels = self.size(1, 16), self.size(2, 64)
        area = max(1, self.room // (batch * channels))
        height = self.ragged(max(1, round(math.sqrt(area) * self.uniform(0.6, 1.4))), 1, area)
        return batch, channels, height, max(1, area // height)

    def product(self, inputs: tuple[int, int], outputs: tuple[int, int], most_rows: int | None = None):
        """Rows, inputs and outputs of a linear layer, within the room and the operations."""
        self.make_room(inputs[0] * outputs[0])
        d = self.size(inputs[0], min(inputs[1], self.room))
        v = self.size(outputs[0], min(outputs[1], self.room // d))
        rows = max(1, min(self.room // max(d, v), int(self.flops) // (2 * d * v)))
        return (self.size(1, min(rows, most_rows)) if most_rows else self.ragged(rows, 1, rows)), d, v


Shapes = dict[str, tuple[int, Callable[[Draw], tuple[int, ...]]]]  # of each kind its share, and its shape


ROWS: Shapes = {
    "tiny": (10, lambda draw: (draw.size(1, 32), draw.size(2, 32))),
    "few classes": (25, lambda draw: draw.matrix(2, 32)),
    "classes": (20, lambda draw: draw.matrix(33, 2000)),
    "vocabulary": (10, lambda draw: draw.matrix(2000, 100_000)),
    "few rows": (10, lambda draw: (draw.size(1, 8), min(draw.room, draw.size(2, 100_000)))),
    "segmentation": (25, Draw.image),
}
FAMILY: Shapes = ROWS | {
    "columns": (15, lambda draw: draw.matrix(1, 4096)),
    "attention": (15, Draw.attention),
}
ELEMENTS: Shapes = {
    "tiny": (10, lambda draw: (draw.size(1, 32), draw.size(1, 4))),
    "vector": (20, lambda draw: (draw.room,)),
    "regression": (30, lambda draw: draw.matrix(1, 16)),
    "matrix": (20, lambda draw: draw.matrix(17, 4096)),
    "images": (30, Draw.image),
}
LAYERS: Shapes = {
    "tiny": (10, lambda draw: draw.product((1, 32), (1, 32), 32)),
    "regression": (25, lambda draw: draw.product((1, 16), (1, 4))),
    "few outputs": (20, lambda draw: draw.product((17, 2000), (1, 16))),
    "few inputs": (10, lambda draw: draw.product((1, 16), (5, 2000))),
    "small batch": (15, lambda draw: draw.product((16, 4096), (16, 4096), 32)),
    "layer": (20, lambda draw: draw.product((17, 4096), (17, 4096))),
}
HEADS: Shapes = {
    "tiny": (10, lambda draw: draw.product((1, 32), (2, 16), 32)),
    "few classes": (30, lambda draw: draw.product((1, 2000), (2, 32))),
    "classes": (30, lambda draw: draw.product((8, 2000), (33, 2000))),
    "vocabulary": (15, lambda draw: draw.product((8, 512), (2000, 100_000))),
    "small batch": (15, lambda draw: draw.product((16, 2000), (2, 2000), 32)),
}
REGRESSIONS: Shapes = {
    "tiny": (10, lambda draw: draw.product((1, 16), (1, 4), 32)),
    "regression": (45, lambda draw: draw.product((1, 16), (1, 4))),
    "few outputs": (25, lambda draw: draw.product((17, 2000), (1, 16))),
    "many outputs": (20, lambda draw: draw.product((1, 1000), (17, 2000))),
}


def kronecker(draw: Draw, least: int, most_rows: int | None = None) -> tuple[int, ...]:
    n = draw.choice((2, 3, 4, 8))
    rows, d, v = draw.product((least, 4096), (least, 4096), most_rows)
    return rows, d // n * n, v // n * n, n


KRONECKER: Shapes = {
    "tiny": (20, lambda draw: kronecker(draw, 8, 32)),
    "small batch": (30, lambda draw: kronecker(draw, 64, 8)),
    "layer": (50, lambda draw: kronecker(draw, 64)),
}
SHAPES: dict[str, Shapes] = {
    "linear": LAYERS,
    "softmax": FAMILY,
    "log_softmax": FAMILY,
    "logsumexp": FAMILY,
    "mse_loss": ELEMENTS,
    "cross_entropy": ROWS,
    "linear_cross_entropy": HEADS,
    "linear_nll": REGRESSIONS,
    "linear_mse_loss": REGRESSIONS,
    "phm_linear": KRONECKER,
}
TENSORS = ("linear", "phm_linear", "softmax", "log_softmax", "logsumexp")  # their results, never scalars
PRODUCTS = ("linear", "linear_cross_entropy", "linear_nll", "linear_mse_loss", "phm_linear")


def draw_options(draw: Draw, op: str) -> tuple[str, ...]:
    reduction = draw.pick({"": 80, "reduction sum": 10, "reduction none": 10})
    found = []
    if op in PRODUCTS:
        found += ["bias"] * draw.chance(0.7) + ["constant input"] * draw.chance(0.4)
    if op in ("linear", "phm_linear"):
        found += [draw.choice(list(ACTIVATIONS))] * draw.chance(0.2)
    elif op == "cross_entropy":
        plain = {"": 55, "smoothing": 10, "class weights": 10, "ignored": 10, "probabilities": 10, "normalizer": 5}
        found.append(draw.pick(plain))
        found.append("" if "normalizer" in found else reduction)
    elif op == "linear_nll":
        found += [draw.choice(("gaussian", "bernoulli", "poisson")), reduction]
    elif op.endswith(("_loss", "_entropy")):
        found.append("normalizer" if op == "linear_cross_entropy" and draw.chance(0.05) else reduction)
    return tuple(filter(None, found))


def draw_case(number: int) -> Drawn:
    """The case of a number. Consecutive ones are of all ops in turn."""
    draw = Draw(number)
    op = list(SHAPES)[number % len(SHAPES)]
    kind = draw.pick({name: share for name, (share, _) in SHAPES[op].items()})
    shape = SHAPES[op][kind][1](draw)
    layout = draw.pick(IMAGE_LAYOUTS if len(shape) == 4 and op not in PRODUCTS else MATRIX_LAYOUTS)
    if len(shape) == 1 and layout == "transposed":
        layout = "contiguous"
    options = draw_options(draw, op)
    if op in TENSORS or "reduction none" in options:
        options += (EXPANDED,) * draw.chance(1 / 3)
    return Drawn(number, op, kind, shape, draw.dtype, layout, options)


@functools.cache
def noise(dtype: torch.dtype) -> Tensor:
    return torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(0)).to(dtype)


def values(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal values, from a stock of a million: drawing them anew would take most of the time."""
    count, stock = math.prod(shape), noise(dtype)
    return stock.repeat(-(-count // len(stock)))[:count].view(shape) * scale


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # columns of a wider tensor
        return F.pad(x, (1, 2))[..., 1:-2]
    if layout == "strided":  # every other column
        return x.repeat_interleave(2, -1)[..., ::2]
    return x


def parameters(case: Drawn) -> list[Tensor]:
    """A linear layer's input, weight, and bias where it has one."""
    *rows, d, v = case.shape
    dtype = case.torch_dtype
    x = lay_out(values(*rows, d, dtype=dtype), case.layout).requires_grad_("constant input" not in case.options)
    w = values(v, d, dtype=dtype, scale=d**-0.5).requires_grad_()
    return [x, w, *([values(v, dtype=dtype).requires_grad_()] if "bias" in case.options else [])]


def reduction(case: Drawn) -> str:
    return next((option.split()[1] for option in case.options if option.startswith("reduction")), "mean")


def normalized(case: Drawn, loss: Callable, ours: Callable) -> tuple[Callable, Callable]:
    """The two losses, or, where the case has a normalizer, the sum divided by a number, which regfast takes as one."""
    if "normalizer" not in case.options:
        return partial(loss, reduction=reduction(case)), partial(ours, reduction=reduction(case))
    return lambda *args, **kwargs: loss(*args, **kwargs, reduction="sum") / 100, partial(ours, normalizer=100)


def activated(case: Drawn, theirs: Callable, ours: Callable) -> tuple[Callable, Callable]:
    """The two with the case's activation, if it has one."""
    name = next((option for option in case.options if option in ACTIVATIONS), None)
    if name is None:
        return theirs, ours
    activation = ACTIVATIONS[name]
    return lambda *inputs: activation(theirs(*inputs)), partial(ours, activation=name)


def build_linear(case: Drawn) -> Work:
    return Work(parameters(case), *activated(case, F.linear, regfast.linear))


def build_phm_linear(case: Drawn) -> Work:
    """Parameters as PHMLinear passes them."""
    rows, d, v, n = case.shape
    x, _, *bias = parameters(dataclasses.replace(case, shape=(rows, d, v)))
    a = values(n, n, n, dtype=case.torch_dtype, scale=1 / n).requires_grad_()
    s = values(v // n, n, d // n, dtype=case.torch_dtype, scale=(d // n) ** -0.5).transpose(0, 1).requires_grad_()
    theirs = composed if bias else partial(composed, b=None)
    return Work([x, a, s, *bias], *activated(case, theirs, regfast.phm_linear))


def build_softmax(case: Drawn) -> Work:
    x = lay_out(values(*case.shape, dtype=case.torch_dtype, scale=3), case.layout).requires_grad_()
    theirs, ours = getattr(torch, case.op), getattr(regfast, case.op)
    return Work([x], *(partial(fn, dim=DIMS.get(case.kind, -1)) for fn in (theirs, ours)))


def build_mse_loss(case: Drawn) -> Work:
    x, target = (lay_out(values(*case.shape, dtype=case.torch_dtype, scale=s), case.layout) for s in (1, 0.7))
    fns = (partial(fn, target=target, reduction=reduction(case)) for fn in (F.mse_loss, regfast.mse_loss))
    return Work([x.requires_grad_()], *fns)


def build_cross_entropy(case: Drawn) -> Work:
    n, classes, *positions = case.shape
    x = lay_out(values(*case.shape, dtype=case.torch_dtype, scale=3), case.layout).requires_grad_()
    target = torch.randint(classes, (n, *positions))
    more = {"target": target}
    if "probabilities" in case.options:
        more["target"] = x.detach().contiguous().softmax(1)
    elif "smoothing" in case.options:
        more["label_smoothing"] = 0.1
    elif "class weights" in case.options:
        more["weight"] = torch.rand(classes).to(x.dtype) + 0.5
    elif "ignored" in case.options:
        others = target.view(-1)[1:]  # if all were ignored, the mean would be NaN
        others[torch.rand(others.shape) < 0.3] = -100
    return Work([x], *(partial(fn, **more) for fn in normalized(case, F.cross_entropy, regfast.cross_entropy)))


def build_linear_cross_entropy(case: Drawn) -> Work:
    n, _, classes = case.shape
    target = torch.randint(classes, (n,))
    loss, ours = normalized(case, F.cross_entropy, regfast.linear_cross_entropy)
    return Work(
        parameters(case),
        lambda *layer: loss(F.linear(*layer), target),
        lambda x, w, b=None: ours(x, w, target, linear_bias=b),
    )


LOSSES = {
    "squared": F.mse_loss,
    "gaussian": partial(F.gaussian_nll_loss, var=1.0, full=True),
    "bernoulli": F.binary_cross_entropy_with_logits,
    "poisson": F.poisson_nll_loss,
}


def build_likelihood(case: Drawn) -> Work:
    n, _, outputs = case.shape
    family = next((name for name in LOSSES if name in case.options), "squared")
    draw = {
        "bernoulli": lambda: torch.randint(2, (n, outputs)).to(case.torch_dtype),
        "poisson": lambda: torch.randint(7, (n, outputs)).to(case.torch_dtype),
    }
    target = draw.get(family, lambda: values(n, outputs, dtype=case.torch_dtype))()
    loss, kept = LOSSES[family], reduction(case)
    ours = regfast.linear_mse_loss if family == "squared" else partial(regfast.linear_nll, family=family)
    return Work(
        parameters(case),
        lambda *layer: loss(F.linear(*layer), target=target, reduction=kept),
        lambda x, w, b=None: ours(x, w, target, b, reduction=kept),
    )


BUILDERS: dict[str, Callable[[Drawn], Work]] = {
    "linear": build_linear,
    "softmax": build_softmax,
    "log_softmax": build_softmax,
    "logsumexp": build_softmax,
    "mse_loss": build_mse_loss,
    "cross_entropy": build_cross_entropy,
    "linear_cross_entropy": build_linear_cross_entropy,
    "linear_nll": build_likelihood,
    "linear_mse_loss": build_likelihood,
    "phm_linear": build_phm_linear,
}


def build(case: Drawn) -> Work:
    torch.manual_seed(case.number)
    return BUILDERS[case.op](case)
