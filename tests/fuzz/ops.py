"""The ops: how a case of each is drawn, its tensors, the call of ours, its counterpart, and the size of its terms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import regfast
from regfast import reference

from . import terms
from .compare import accumulator
from .draw import DTYPES, Draw
from .terms import Terms

ACTIVATIONS = tuple(reference.ACTIVATIONS)
REDUCTIONS = reference.REDUCTIONS
FLOATING = reference.OUTPUTS[:4]
Case = dict
Tensors = dict[str, Tensor | None]


def dtype_of(name: str | None) -> torch.dtype:
    return getattr(torch, name) if name else None


def getattr_text(name: str, value: object) -> str:
    if name == "normalizer":
        number, *dtype = value if isinstance(value, list) else [value]
        text = repr(number) if math.isfinite(number) else f"float('{number}')"
        return f"torch.tensor({text}, dtype=torch.{dtype[0]})" if dtype else text
    return f"torch.{value}" if name in ("dtype", "loss_dtype") else repr(value)


def outputs_of(result: Tensor | tuple) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


class Op:
    """What the fuzzer knows of an op. Functions take tensors by name and the case."""

    name: str
    output_names: tuple[str, ...] = ("output",)

    def draw(self, r: Draw) -> Case:
        raise NotImplementedError

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        """Of the tensors that the case has, in the order of the call."""
        raise NotImplementedError

    def ours(self, t: Tensors, case: Case):
        raise NotImplementedError

    def torchs(self, t: Tensors, case: Case):
        """The counterpart in the tensors' dtype, of torch, or of the composite for what torch has not."""
        raise NotImplementedError

    def is_torchs(self, case: Case) -> bool:
        """Whether that is torch's own function, whose exceptions ours has."""
        return True

    def exact(self, t: Tensors, case: Case):
        """The counterpart for tensors in float64."""
        return self.torchs(t, case)

    def terms(self, t: Tensors, case: Case, ups: list[Tensor | None]) -> Terms:
        raise NotImplementedError

    def outputs(self, case: Case) -> tuple[str, ...]:
        return self.output_names

    def text(self, case: Case) -> str:
        """The call as source, of tensors by their names."""
        options = [f"{k}={getattr_text(k, v)}" for k, v in case["options"].items()]
        return f"regfast.{self.name}({', '.join([*self.places(case), *options])})"

    def places(self, case: Case) -> list[str]:
        """The tensors as they stand in the call."""
        return list(case["tensors"])


class Linear(Op):
    name = "linear"

    def draw(self, r):
        n, k, v = r.sizes(3)
        names = ["input", "weight"] + (["bias"] if r.chance(0.6) else [])
        options = {"activation": "none" if r.chance(0.4) else r.choice(ACTIVATIONS)}
        if r.chance(0.05):
            n, k, v = (0 if r.chance(0.4) else s for s in (n, k, v))
        return {
            "sizes": {"n": r.leading(n), "k": k, "v": v},
            "options": options,
            "tensors": {name: r.tensor() for name in names},
            "module": r.chance(0.05),
        }

    def shapes(self, case):
        s = case["sizes"]
        return {"input": (*s["n"], s["k"]), "weight": (s["v"], s["k"]), "bias": (s["v"],)}

    def ours(self, t, case):
        activation = case["options"]["activation"]
        if case.get("module"):
            module = regfast.Linear(1, 1, t.get("bias") is not None, device="meta", activation=activation)
            inner = "" if activation == "none" else "linear."  # as the module holds its parameters
            own = {inner + k: v for k, v in t.items() if k != "input" and v is not None}
            return torch.func.functional_call(module, own, (t["input"],))
        return regfast.linear(t["input"], t["weight"], t.get("bias"), activation=activation)

    def torchs(self, t, case):
        return reference.ACTIVATIONS[case["options"]["activation"]](F.linear(t["input"], t["weight"], t.get("bias")))

    def terms(self, t, case, ups):
        tensors = {k: t.get(k) for k in ("input", "weight", "bias")}
        return terms.of_layer(terms.linear_of, tensors, case["options"]["activation"], ups[0], dtype_of(case["dtype"]))


class PHMLinear(Op):
    name = "phm_linear"

    def draw(self, r):
        parts = r.choice((1, 2, 2, 3, 4, 4, 5, 8))
        n, q, h = r.sizes(3)
        q, h = -(-q // parts), -(-h // parts)
        if r.chance(0.05):
            n, q, h = (0 if r.chance(0.4) else s for s in (n, q, h))
        names = ["input", "a", "s"] + (["bias"] if r.chance(0.6) else [])
        return {
            "sizes": {"n": r.leading(n), "q": q, "h": h, "parts": parts},
            "options": {"activation": "none" if r.chance(0.4) else r.choice(ACTIVATIONS)},
            "tensors": {name: r.tensor() for name in names},
            "module": r.chance(0.05),
        }

    def shapes(self, case):
        s = case["sizes"]
        p = s["parts"]
        return {"input": (*s["n"], p * s["q"]), "a": (p, p, p), "s": (p, s["h"], s["q"]), "bias": (p * s["h"],)}

    def ours(self, t, case):
        activation = case["options"]["activation"]
        if case.get("module"):
            n = case["sizes"]["parts"]
            module = regfast.PHMLinear(n, n, n, t.get("bias") is not None, activation=activation)
            own = {k: v for k, v in t.items() if k != "input" and v is not None}
            own["s"] = own["s"].transpose(0, 1)  # as the module stores it
            return torch.func.functional_call(module, own, (t["input"],))
        return regfast.phm_linear(t["input"], t["a"], t["s"], t.get("bias"), activation=activation)

    def is_torchs(self, case):
        return False

    def torchs(self, t, case):
        return reference.phm_linear(t["input"], t["a"], t["s"], t.get("bias"), **case["options"])

    def terms(self, t, case, ups):
        tensors = {k: t.get(k) for k in ("input", "a", "s", "bias")}
        found = terms.of_layer(terms.phm_of, tensors, case["options"]["activation"], ups[0], dtype_of(case["dtype"]))
        found.rounds |= case["sizes"]["parts"] == 1  # input times a number comes first
        found.outputs = [terms.rounded_factors(size, dtype_of(case["dtype"])) for size in found.outputs]
        for name in found.grads.keys() & {"input", "a", "s"}:
            found.grads[name] = terms.rounded_factors(found.grads[name], dtype_of(case["dtype"]))
        return found


class Softmax(Op):
    def __init__(self, name: str):
        self.name = name

    def draw(self, r):
        count = r.choice((1, 2, 2, 2, 3, 3, 4, 0))
        shape = r.sizes(count, least=0 if r.chance(0.05) else 1)
        dim = r.randint(-count, count - 1) if count else r.choice((-1, 0))
        if r.chance(0.02):
            dim = r.choice((count, -count - 1, 7))
        options = {"dim": dim}
        if r.chance(0.05):
            options["dtype"] = r.choice(DTYPES)
        return {"sizes": {"shape": shape}, "options": options, "tensors": {"input": r.tensor(grad=0.85)}}

    def shapes(self, case):
        return {"input": tuple(case["sizes"]["shape"])}

    def call(self, module, t, case):
        options = case["options"]
        return getattr(module, self.name)(t["input"], options["dim"], dtype=dtype_of(options.get("dtype")))

    def ours(self, t, case):
        return self.call(regfast, t, case)

    def torchs(self, t, case):
        return self.call(torch, t, case)

    def exact(self, t, case):
        return getattr(torch, self.name)(t["input"], case["options"]["dim"])

    def terms(self, t, case, ups):
        return terms.of_softmax(
            t["input"], case["options"]["dim"], self.name == "log_softmax", ups[0], accumulator(dtype_of(case["dtype"]))
        )


class Logsumexp(Op):
    name = "logsumexp"

    def draw(self, r):
        count = r.choice((1, 2, 2, 3, 4, 0))
        shape = r.sizes(count, least=0 if r.chance(0.05) else 1)
        least, most = (-count, count - 1) if count else (-1, 0)
        dim: int | list[int] = r.randint(least, most)
        if r.chance(0.3):
            dim = r.sample(range(most + 1), r.randint(0, most + 1))
            dim = [d - max(count, 1) if r.chance(0.3) else d for d in dim]
        if r.chance(0.02):
            dim = r.choice((count, -count - 1, [0, 0], [9]))
        options = {"dim": dim, "keepdim": r.chance(0.3)}
        return {"sizes": {"shape": shape}, "options": options, "tensors": {"input": r.tensor(grad=0.85)}}

    def shapes(self, case):
        return {"input": tuple(case["sizes"]["shape"])}

    def ours(self, t, case):
        return regfast.logsumexp(t["input"], **case["options"])

    def torchs(self, t, case):
        return torch.logsumexp(t["input"], **case["options"])

    def terms(self, t, case, ups):
        dim, keep = case["options"]["dim"], case["options"]["keepdim"]
        x = t["input"].reshape(1) if t["input"].dim() == 0 else t["input"]
        dims = sorted({d % x.dim() for d in (dim if isinstance(dim, list) else [dim])}) or list(range(x.dim()))
        kept = [d for d in range(x.dim()) if d not in dims]
        order = kept + dims
        outer = math.prod(x.shape[d] for d in kept)
        rows = terms.Rows(x.permute(order).reshape(outer, math.prod(x.shape[d] for d in dims)), torch.zeros(()))
        shape = [1 if d in dims else s for d, s in enumerate(x.shape) if keep or d not in dims]
        found = Terms([rows.lse.reshape(shape if t["input"].dim() else [])], rounds=True)
        if ups[0] is not None:
            g = rows.share * terms.clean(ups[0]).abs().reshape(outer, 1)
            g = g.reshape([x.shape[d] for d in order]).permute([order.index(d) for d in range(x.dim())])
            found.grads["input"] = g.reshape(t["input"].shape)
        return found


class MSELoss(Op):
    name = "mse_loss"

    def draw(self, r):
        shape = r.sizes(r.choice((0, 1, 2, 2, 3)), least=0 if r.chance(0.05) else 1)
        names = ["input", "target"] + (["weight"] if r.chance(0.08) else [])
        tensors = {name: r.tensor() for name in names}
        sizes = {"shape": shape, "other": shape}
        if r.chance(0.06):
            sizes["other"] = [1 if r.chance(0.3) else s for s in shape][r.choice((0, 0, 1)) :]
        if r.chance(0.04):
            tensors["target"]["dtype"] = r.choice(DTYPES)
        options = {"reduction": r.choice(REDUCTIONS)}
        if r.chance(0.03):
            options = r.choice(({"reduction": "max"}, {"size_average": False}, {"reduce": False}, {"reduction": None}))
        return {"sizes": sizes, "options": options, "tensors": tensors, "module": r.chance(0.05)}

    def shapes(self, case):
        s = tuple(case["sizes"]["shape"])
        return {"input": s, "target": tuple(case["sizes"]["other"]), "weight": s}

    def places(self, case):
        return [f"weight={n}" if n == "weight" else n for n in case["tensors"]]

    def ours(self, t, case):
        if case.get("module") and t.get("weight") is None:
            return regfast.MSELoss(**case["options"])(t["input"], t["target"])
        return regfast.mse_loss(t["input"], t["target"], weight=t.get("weight"), **case["options"])

    def torchs(self, t, case):
        return F.mse_loss(t["input"], t["target"], weight=t.get("weight"), **case["options"])

    def terms(self, t, case, ups):
        x, y, w = (None if t.get(k) is None else terms.clean(t[k]).abs() for k in ("input", "target", "weight"))
        one = torch.ones(()) if w is None else w
        residual = x + y
        each = residual.square() * one
        mode = case["options"].get("reduction", "mean")
        found = Terms([each])
        share = torch.ones(())
        if mode == "mean" and each.numel():
            share = 1 / (one.sum() if w is not None else torch.tensor(float(each.numel())))
            share = terms.clean(share)
        if mode in ("mean", "sum") and "reduce" not in case["options"]:
            found.outputs = [each.sum() * share]
        if ups[0] is not None and x.shape == y.shape:
            g = terms.clean(ups[0]).abs() * share
            found.grads = {"input": 2 * residual * one * g, "target": 2 * residual * one * g}
        return found


OPS: dict[str, Op] = {}


def register(*ops: Op) -> None:
    OPS.update({op.name: op for op in ops})


register(Linear(), PHMLinear(), Softmax("softmax"), Softmax("log_softmax"), Logsumexp(), MSELoss())
