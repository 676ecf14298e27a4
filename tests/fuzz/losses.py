"""The losses with classes, as ops.py has the layers."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

import regfast
from regfast import reference

from . import terms
from .compare import accumulator
from .draw import DTYPES
from .ops import REDUCTIONS, Op, dtype_of, register
from .terms import Terms

FURTHER = ("z_loss", "softcap", "logit_scale", "outputs", "inplace_backward", "loss_dtype", "normalizer")
NORMALIZERS = (1, 7, 12.5, -3, 0, 1e-6, 1e6, math.inf, -math.inf)


def draw_options(r, probabilities: bool, c: int) -> dict:
    """What both cross-entropies take."""
    options: dict = {"reduction": r.choice(REDUCTIONS)}
    if r.chance(0.3):
        options["label_smoothing"] = r.choice((0.0, 0.1, 0.5, 1.0, r.random()))
    if not probabilities and r.chance(0.2):
        options["ignore_index"] = r.choice((-100, 0, max(0, c - 1), -1, 5))
    if r.chance(0.2):
        options["z_loss"] = r.choice((1e-4, 0.1, 1.0))
    if r.chance(0.2):
        options["softcap"] = r.choice((0.5, 5.0, 30.0, 1e4))
    if r.chance(0.2):
        options["logit_scale"] = r.choice((0.25, 1.0, 2.0, -1.0, 0.0))
    if r.chance(0.3):
        names = r.sample(reference.OUTPUTS, r.randint(1, 5))
        options["outputs"] = names
    if r.chance(0.1):
        options["loss_dtype"] = r.choice(DTYPES)
    if options["reduction"] == "mean" and r.chance(0.2):
        number = r.choice(NORMALIZERS)
        options["normalizer"] = [number, r.choice(DTYPES)] if r.chance(0.4) else number  # a list: a tensor, its dtype
    if r.chance(0.02) and not {"outputs", "normalizer"} & set(options):
        options |= r.choice(({"label_smoothing": 1.5}, {"label_smoothing": -0.1}, {"reduction": "max"}))
    return options


def call_options(options: dict) -> dict:
    """As functions take them: a dtype for its name, tuples for lists."""
    result = dict(options)
    if "loss_dtype" in result:
        result["loss_dtype"] = dtype_of(result["loss_dtype"])
    if "outputs" in result:
        result["outputs"] = tuple(result["outputs"])
    if isinstance(number := result.get("normalizer"), list):
        result["normalizer"] = torch.tensor(number[0], dtype=dtype_of(number[1]))
    return result


def exact_options(options: dict) -> dict:
    """Of the call in float64, whose results are not rounded to another dtype."""
    return {k: v for k, v in call_options(options).items() if k not in ("loss_dtype", "memory_budget", "filter_eps")}


def plain(options: dict) -> bool:
    """Whether torch has all these options."""
    return not set(options) & set(FURTHER)


def counterpart(function, composite, options: dict):
    """Of a case's options, torch's function if it has them, where a normalizer is a division; the composite if not."""
    options = call_options(options)
    if not plain({k: v for k, v in options.items() if k != "normalizer"}):
        return partial(composite, **options)
    if "normalizer" not in options:
        return partial(function, **options)
    number = options.pop("normalizer")

    def divided(input, *args, **kwargs):
        kwargs |= options | {"reduction": "sum"}
        total = function(input, *args, **kwargs)
        return (total / number).to(total.dtype)

    return divided


def draw_target(r, probabilities: bool, c: int, options: dict) -> dict:
    if probabilities:
        drawn = r.tensor(r.choice(("probabilities", "probabilities", "probabilities", "normal")), grad=0.3)
        drawn.pop("hostile", None)
        if r.chance(0.1):
            drawn["dtype"] = r.choice(DTYPES)
        return drawn
    drawn = r.tensor("classes", grad=0.0)
    drawn.pop("hostile", None)
    drawn["ignored"] = r.choice((0.0, 0.0, 0.3, 1.0))
    drawn["dtype"] = r.choices(("int64", "uint8", "int32"), (90, 8, 2))[0]
    if drawn["dtype"] == "uint8":
        drawn |= {"dtype": "uint8" if c < 256 else "int64", "ignored": 0.0}
    if r.chance(0.02) and "outputs" not in options:  # the composite looks at classes only where it needs them
        drawn["out_of_range"] = r.choice((c, -1, 1 << 40, -(1 << 40), c + 1))
    return drawn


class CrossEntropy(Op):
    name = "cross_entropy"

    def draw(self, r):
        positions = r.choice((0, 0, 0, 0, 1, 1, 2))
        n, c, *more = r.sizes(2 + positions, least=0 if r.chance(0.03) else 1)
        single = not more and r.chance(0.05)
        probabilities = r.chance(0.3)
        options = draw_options(r, probabilities, c)
        tensors = {"input": r.tensor(grad=0.85), "target": draw_target(r, probabilities, c, options)}
        if r.chance(0.3):
            tensors["weight"] = r.tensor(r.choice(("uniform", "few_zero")), grad=0.02)
        if r.chance(0.1):
            options["inplace_backward"] = True
        sizes = {"n": n, "c": c, "positions": more, "single": single}
        return {
            "sizes": sizes,
            "probabilities": probabilities,
            "options": options,
            "tensors": tensors,
            "module": r.chance(0.05) and "normalizer" not in options,
        }

    def outputs(self, case):
        return tuple(case["options"].get("outputs", ("loss",)))

    def shapes(self, case):
        s = case["sizes"]
        x = (s["c"],) if s["single"] else (s["n"], s["c"], *s["positions"])
        rows = () if s["single"] else (s["n"], *s["positions"])
        return {"input": x, "target": x if case["probabilities"] else rows, "weight": (s["c"],)}

    def ours(self, t, case):
        options = call_options(case["options"])
        if case.get("module"):
            return regfast.CrossEntropyLoss(t.get("weight"), **options)(t["input"], t["target"])
        return regfast.cross_entropy(t["input"], t["target"], t.get("weight"), **options)

    def torchs(self, t, case):
        function = counterpart(F.cross_entropy, reference.cross_entropy, case["options"])
        return function(t["input"], t["target"], t.get("weight"))

    def is_torchs(self, case):
        return plain(case["options"])

    def exact(self, t, case):
        return reference.cross_entropy(t["input"], t["target"], t.get("weight"), **exact_options(case["options"]))

    def terms(self, t, case, ups):
        x, options = t["input"], case["options"]
        z, slope = transformed(x, options)
        error = terms.clean(z).abs() if slope is not None else torch.zeros(())
        single = x.dim() == 1
        target = as_row(t["target"]) if single else t["target"]
        z = z.unsqueeze(0) if single else z
        error = error.unsqueeze(0) if single and error.dim() else error
        names = self.outputs(case)
        given = {
            n: (u.unsqueeze(0) if single and u.dim() == 0 and options.get("reduction") == "none" else u)
            for n, u in zip(names, ups, strict=True)
            if u is not None
        }
        if single:
            given = {n: u.unsqueeze(0) if n != "loss" and u.dim() == 0 else u for n, u in given.items()}
        sizes, dz, dt = terms.of_cross_entropy(
            z, error, target, t.get("weight"), options, given, accumulator(dtype_of(case["dtype"]))
        )
        if single:
            sizes = {k: v.squeeze(0) if v.dim() else v for k, v in sizes.items()}
            dz, dt = dz.squeeze(0), dt.squeeze(0)
        scale = abs(options.get("logit_scale", 1.0))
        found = Terms([sizes.get(n) for n in names], {"input": dz * scale})
        if case["probabilities"]:
            found.grads["target"] = dt
        found.scores = (z.squeeze(0) if single else z,) * 2
        return found


def as_row(target):
    """The target of a single row: probabilities, or its class, which torch takes in one dimension too."""
    return target.unsqueeze(0) if target.is_floating_point() else target.reshape(-1)


def transformed(x, options):
    """Scaled and capped logits, and None in place of True where they are the input itself."""
    scale, cap = options.get("logit_scale"), options.get("softcap")
    z = x if scale is None else x * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    return z, (None if scale is None and cap is None else True)


class LinearCrossEntropy(Op):
    name = "linear_cross_entropy"

    def draw(self, r):
        positions = r.choice((0, 0, 0, 0, 0, 1, 2))
        n, d, c, *more = r.sizes(3 + positions, least=0 if r.chance(0.03) else 1)
        single = not more and r.chance(0.05)
        probabilities = r.chance(0.25)
        options = draw_options(r, probabilities, c)
        tensors = {
            "input": r.tensor(),
            "linear_weight": r.tensor(),
            "target": draw_target(r, probabilities, c, options),
        }
        if r.chance(0.5):
            tensors["linear_bias"] = r.tensor()
        if r.chance(0.3):
            tensors["weight"] = r.tensor(r.choice(("uniform", "few_zero")), grad=0.02)
        if r.chance(0.5):
            options["memory_budget"] = r.choice((1, 1000, 20_000, 100_000, 1 << 20))
        if r.chance(0.1):
            options["filter_eps"] = 0.0
        return {
            "sizes": {"n": n, "d": d, "c": c, "positions": more, "single": single},
            "probabilities": probabilities,
            "options": options,
            "tensors": tensors,
            "module": r.chance(0.05) and "normalizer" not in options,
        }

    def outputs(self, case):
        return tuple(case["options"].get("outputs", ("loss",)))

    def places(self, case):
        return [f"{n}={n}" if n in ("linear_bias", "weight") else n for n in case["tensors"]]

    def shapes(self, case):
        s = case["sizes"]
        lead = () if s["single"] else (s["n"],)
        rows = (*lead, *s["positions"])
        return {
            "input": (*lead, s["d"]),
            "linear_weight": (s["c"], *s["positions"], s["d"]),
            "target": (*lead, s["c"], *s["positions"]) if case["probabilities"] else rows,
            "linear_bias": (s["c"], *s["positions"]),
            "weight": (s["c"],),
        }

    def ours(self, t, case):
        options = call_options(case["options"])
        bias = t.get("linear_bias")
        if case.get("module") and t.get("weight") is None:
            s = case["sizes"]
            more = tuple(s["positions"])
            module = regfast.LinearCrossEntropyLoss(
                s["d"], s["c"], out_features=more, bias=bias is not None, device="meta", **options
            )
            own = {"linear.weight": t["linear_weight"].flatten(0, -2)}
            if bias is not None:
                own["linear.bias"] = bias.flatten()
            return torch.func.functional_call(module, own, (t["input"], t["target"]))
        return regfast.linear_cross_entropy(
            t["input"], t["linear_weight"], t["target"], linear_bias=bias, weight=t.get("weight"), **options
        )

    def torchs(self, t, case):
        options = {k: v for k, v in case["options"].items() if k not in ("memory_budget", "filter_eps")}
        if self.is_torchs(case):
            function = counterpart(F.linear_cross_entropy, reference.linear_cross_entropy, options)
        else:
            function = partial(reference.linear_cross_entropy, **call_options(options))
        return function(
            t["input"],
            t["linear_weight"],
            t["target"],
            linear_bias=t.get("linear_bias"),
            weight=t.get("weight"),
        )

    def is_torchs(self, case):
        return hasattr(F, "linear_cross_entropy") and plain(case["options"])  # torch has it since 2.13

    def exact(self, t, case):
        return reference.linear_cross_entropy(
            t["input"],
            t["linear_weight"],
            t["target"],
            linear_bias=t.get("linear_bias"),
            weight=t.get("weight"),
            **exact_options(case["options"]),
        )

    def terms(self, t, case, ups):
        names, options = self.outputs(case), case["options"]
        single = t["input"].dim() == 1
        x = t["input"].unsqueeze(0) if single else t["input"]
        w, b = t["linear_weight"], t.get("linear_bias")
        product = logits_of
        z = product(input=x, linear_weight=w, linear_bias=b)
        size = product(
            input=terms.clean(x).abs(),
            linear_weight=terms.clean(w).abs(),
            linear_bias=None if b is None else terms.clean(b).abs(),
        )
        z, changed = transformed(z, options)
        scale = abs(options.get("logit_scale", 1.0))
        error = terms.beyond(size * scale, accumulator(dtype_of(case["dtype"]))) + (
            terms.clean(z).abs() if changed else 0
        )
        target = as_row(t["target"]) if single else t["target"]
        reduction = options.get("reduction", "mean")
        given = {n: u for n, u in zip(names, ups, strict=True) if u is not None}
        if single:
            given = {n: u.unsqueeze(0) if n != "loss" or reduction == "none" else u for n, u in given.items()}
        sizes, dz, dt = terms.of_cross_entropy(
            z, error, target, t.get("weight"), options, given, accumulator(dtype_of(case["dtype"]))
        )
        tensors = {"input": x, "linear_weight": w, "linear_bias": b}
        grads = terms.of_products(product, tensors, dz * scale)
        for name in ("input", "linear_weight"):
            grads[name] = terms.rounded_factors(grads[name], dtype_of(case["dtype"]))
        found = Terms([sizes.get(n) for n in names], grads)
        if case["probabilities"]:
            found.grads["target"] = dt
        found.scores = (z, error)
        if single:
            found.outputs = [s.squeeze(0) if s is not None and s.dim() else s for s in found.outputs]
            found.grads["input"] = found.grads["input"].squeeze(0)
            if "target" in found.grads:
                found.grads["target"] = dt.squeeze(0)
            found.scores = (z.squeeze(0), error.squeeze(0))
        return found


def logits_of(input, linear_weight, linear_bias):
    bias = None if linear_bias is None else linear_bias.flatten()
    return F.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, linear_weight.shape[:-1])


register(CrossEntropy(), LinearCrossEntropy())
