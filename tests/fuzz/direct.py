"""The ops of the schema called directly, as hooks, sharding rules and decompositions do: with what they expect, and
with arguments that do not fit, where a right result and an exception are all that may come.

Tensors end at an unmapped page, so that an access beyond them is a crash, and freed memory has other numbers.
"""

from __future__ import annotations

import math
import re
from functools import cache

import torch
from torch import Tensor

from regfast import reference

from .. import guard
from . import likelihoods  # noqa: F401  registers its ops, and losses' with them
from .compare import same_bits
from .draw import Draw
from .ops import OPS, Case, dtype_of
from .tensors import values

PREFIX = "regfast::"
NUMBERS = (-(1 << 63), -(1 << 40), -2, -1, 0, 1, 2, 3, 7, 100, 1 << 31, 1 << 40, (1 << 63) - 1)
REALS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 2.0, 1e300)
TYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool", "complex64")
TENSOR_FAULTS = (
    *("none", "scalar", "shorter", "longer", "flatter", "deeper", "empty", "dtype", "dtype", "meta", "expanded"),
    *("transposed", "negative", "sparse", "first shorter", "first longer"),
)


@cache
def names() -> list[str]:
    """All ops of the schema, without the namespace; a new one is called without further ado, but for those whose names
    begin with _: what changes the process, and the products of chunks, which tests/test_wide_products.py has."""
    found = {s.name.removeprefix(PREFIX) for s in torch._C._jit_get_all_schemas() if s.name.startswith(PREFIX)}
    return sorted(n for n in found if not n.startswith("_"))


def schema(name: str):
    return getattr(torch.ops.regfast, name).default._schema


def base_of(name: str) -> str:
    """The op of ops.py whose tensors and options it takes."""
    name = name.removeprefix("composite_")
    return next(b for b in sorted(OPS, key=len, reverse=True) if name.startswith(b))


def draw(r: Draw) -> Case:
    name = r.choice(names())
    r.room = r.choice((300, 3000))
    base = base_of(name)
    case = {"op": f"torch.ops.regfast.{name}", "dtype": r.choice(("float32", "float64", "bfloat16", "float16"))}
    case |= OPS[base].draw(r)
    for spec in case["tensors"].values():
        for key in ("hostile", "out_of_range"):
            spec.pop(key, None)
    case |= {"module": False, "seed": r.randrange(1 << 30), "faults": []}
    if r.chance(0.85):
        for _ in range(r.choice((1, 1, 1, 2, 3))):
            case["faults"].append([r.choice([a.name for a in schema(name).arguments]), r.randrange(1 << 30)])
    return case


def arguments(name: str, case: Case) -> dict[str, object]:
    """What the op expects, for the base's tensors and options."""
    from .check import make_tensor

    r = Draw(case["seed"])
    base = OPS[base_of(name)]
    shapes = base.shapes(case)
    t: dict[str, Tensor | None] = {}
    for key, spec in case["tensors"].items():
        x = make_tensor(spec | {"layout": "contiguous"}, tuple(shapes[key]), case)
        t[key] = guard.place(x) if spec["layout"] == "contiguous" else make_tensor(spec, tuple(shapes[key]), case)
    options, dtype = case["options"], dtype_of(case["dtype"])
    reduction = options.get("reduction", "mean")
    given: dict[str, object] = dict(t)
    outputs = options.get("outputs", ["loss"])
    given |= {
        "activation": options.get("activation", "none"),
        "save_preactivation": r.chance(0.5),
        "dim": options.get("dim", -1) if not isinstance(options.get("dim"), list) else -1,
        "log": base.name == "log_softmax" or r.chance(0.5),
        "keepdim": options.get("keepdim", False),
        "reduction": reference.REDUCTIONS.index(reduction) if reduction in reference.REDUCTIONS else 1,
        "ignore_index": options.get("ignore_index", -100),
        "label_smoothing": options.get("label_smoothing", 0.0),
        "z_loss": options.get("z_loss", 0.0),
        "softcap": options.get("softcap"),
        "logit_scale": options.get("logit_scale"),
        "outputs": sum(1 << reference.OUTPUTS.index(n) for n in outputs),
        "argmax": r.chance(0.5),
        "inplace_backward": False,
        "loss_dtype": dtype_of(options.get("loss_dtype")),
        "memory_budget": options.get("memory_budget"),
        "filter_eps": 0.0,
        "upstream": r.choice((1.0, 1.0, 0.5, -3.0)),
        "family": reference.FAMILIES.index(case.get("family", "squared")),
        "variance": 1.0,
        "full": bool(options.get("full", False)),
        "grad_target": r.chance(0.5),
        "scale": t.get("pos_weight") if t.get("pos_weight") is not None else t.get("sigma"),
    }
    count = {"linear": 3, "phm_linear": 4, "mse_loss": 2, "cross_entropy": 2}.get(base.name, 4)
    count = 3 if name == "linear_cross_entropy_forward_backward" else count
    given["output_mask"] = [r.chance(0.6) for _ in range(count)]
    if "backward" in name and "forward" not in name:
        given |= of_backward(name, base.name, given, r, dtype)
    return {a.name: given.get(a.name) for a in schema(name).arguments}


def of_backward(name: str, base: str, given: dict, r: Draw, dtype: torch.dtype) -> dict[str, object]:
    """What forward left, and upstream gradients."""
    ops, seed = torch.ops.regfast, r.randrange(1 << 30)

    def like(x: Tensor, kind=None) -> Tensor:
        return guard.place(values("normal", tuple(x.shape), kind or x.dtype, seed))

    if base in ("linear", "phm_linear"):
        keys = ("input", "weight", "bias") if base == "linear" else ("input", "a", "s", "bias")
        saves = given["activation"] in ("gelu", "gelu_tanh", "silu")
        y, z = getattr(ops, f"{base}_forward")(*(given.get(k) for k in keys), given["activation"], saves)
        saved = None if given["activation"] == "none" else z if saves else y
        return {"grad": like(y), "saved": None if saved is None else guard.place(saved)}
    if base in ("softmax", "log_softmax"):
        y = ops.softmax(given["input"], given["dim"], given["log"])
        return {"grad": like(y), "output": guard.place(y)}
    if base == "logsumexp":
        lse = ops.logsumexp(given["input"], given["dim"], given["keepdim"])
        wide = lse.to(torch.promote_types(dtype, torch.float32))
        return {"grad": like(lse), "lse": guard.place(wide)}
    if base == "mse_loss":
        return {"grad": like(ops.mse_loss(given["input"], given["target"], given["reduction"]))}
    if base == "linear_nll":
        keys = [a.name for a in schema("linear_nll").arguments]
        return {"grad": like(ops.linear_nll(*(given.get(k) for k in keys)))}
    keys = [a.name for a in schema(f"{base}_forward").arguments]
    found = getattr(ops, f"{base}_forward")(*(given.get(k) for k in keys))
    wanted = [n for n in reference.OUTPUTS if given["outputs"] >> reference.OUTPUTS.index(n) & 1]
    grads = {f"grad_{n}": like(o) for n, o in zip(wanted, found, strict=False) if n != "argmax" and r.chance(0.9)}
    if base == "cross_entropy":
        grads |= {"stats": guard.place(found[-2]), "weight_sum": found[-1]}
    if name.endswith("unless_"):  # the loss's alone, which there always is
        grads.setdefault("grad_loss", like(found[0] if "loss" in wanted else found[0].new_empty(())))
        grads["grad"] = torch.zeros_like(given["input"])
    return grads


def spoil(value: object, kind: str, seed: int) -> object:
    """An argument that may not fit; most of the faults that a type can have."""
    r = Draw(seed)
    if "Tensor" in kind:
        return spoil_tensor(value, r)
    if "int" in kind and "[" not in kind:
        return None if r.chance(0.05) else r.choice(NUMBERS)
    if "float" in kind:
        return r.choice(REALS)
    if kind == "bool":
        return not value
    if "str" in kind:
        return r.choice(("", "relu", "gelu", "tanh", "none", "softplus"))
    if "bool[" in kind or "List[bool" in kind:
        return [r.chance(0.5) for _ in value] if r.chance(0.7) else [*value, True]
    return dtype_of(r.choice(TYPES))


def spoil_tensor(x: Tensor | None, r: Draw) -> Tensor | None:
    fault = r.choice(TENSOR_FAULTS)
    if x is None:
        return values("normal", tuple(r.randint(0, 5) for _ in range(r.randint(0, 3))), torch.float32, 1)
    if fault == "none":
        return None
    if fault == "dtype":
        return guard.place(x.resolve_neg().to(dtype_of(r.choice(TYPES[:6]))).contiguous()) if x.dim() else x.long()
    if fault == "meta":
        return x.to("meta")
    if fault == "scalar":
        return torch.ones((), dtype=x.dtype)
    if fault == "sparse":
        return x.to_sparse() if x.dim() else x
    if fault == "negative":
        return torch._neg_view(x) if x.is_floating_point() else -x - 1
    if fault == "deeper":
        return x[None]
    if not x.dim():
        return torch.ones((r.randint(0, 3),), dtype=x.dtype)
    if fault == "flatter":
        return x.reshape(-1)
    if fault == "transposed":
        return x.transpose(0, -1)
    if fault == "expanded":
        return x[:1].expand(x.shape)
    dim = 0 if "first" in fault else -1
    sizes = list(x.shape)
    sizes[dim] = 0 if fault == "empty" else max(0, sizes[dim] + (1 if "longer" in fault else -1))
    fresh = values("normal", tuple(sizes), torch.float32, 3)
    return guard.place(fresh.abs().to(x.dtype) if not x.is_floating_point() else fresh.to(x.dtype))


def call_of(case: Case):
    """The op and the arguments of a case."""
    name = case["op"].removeprefix("torch.ops.regfast.")
    found = arguments(name, case)
    kinds = {a.name: str(a.type) for a in schema(name).arguments}
    for argument, seed in case["faults"]:
        if argument == "target" and seed % 2 and isinstance(found.get(argument), Tensor):
            bad = found[argument].resolve_neg().clone()
            if bad.numel() and not bad.is_floating_point() and not bad.is_meta:
                bad.view(-1)[seed % bad.numel()] = (-1, 127, bad.numel(), 101)[seed // 2 % 4]
                found[argument] = bad
                continue
        found[argument] = spoil(found[argument], kinds[argument], seed)
    return getattr(torch.ops.regfast, name).default, found


def tensors_in(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result or () if isinstance(x, Tensor)]


def check(case: Case) -> tuple[int, list[str]]:
    """Calls, and what is wrong with them."""
    try:
        op, found = call_of(case)
    except (RuntimeError, IndexError, ValueError, NotImplementedError):
        return 0, []  # what forward refuses has no backward
    changes = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
    results = []
    for _ in range(1 if changes else 2):
        given = {k: v.clone() if changes and isinstance(v, Tensor) and not v.is_meta else v for k, v in found.items()}
        try:
            results.append(tensors_in(op(**given)))
        except Exception as error:
            if isinstance(error, SystemError):
                return len(results) + 1, [f"raised {type(error).__name__}: {str(error)[:200]}"]
            if not case["faults"] and expected_to_answer(op, case) and not stricter(str(error)):
                return len(results) + 1, [f"refused what fits: {type(error).__name__}: {str(error)[:200]}"]
            return len(results) + 1, []
    problems = []
    # Composites consist of torch's operators, whose bits may differ from one alignment or number of threads to another.
    if (
        len(results) > 1
        and "composite_" not in case["op"]
        and not all(
            a.layout == b.layout and (a.is_meta or a.is_sparse or same_bits(a, b))
            for a, b in zip(*results, strict=True)
        )
    ):
        problems.append("another run: other bits")
    # What leaves the range depends on the order of operations.
    if not any(spec["values"] == "huge" for spec in case["tensors"].values()):
        problems += against_composite(op, found, results[0])
    return len(results), problems


def expected_to_answer(op, case: Case) -> bool:
    """Ops of CUDA alone have no CPU kernel, and what is drawn to be refused is refused."""
    options = case["options"]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU"):
        return False
    shape, other = case["sizes"].get("shape"), case["sizes"].get("other")
    return (
        0 <= options.get("label_smoothing", 0.0) <= 1
        and (other is None or other == shape)
        and (shape is None or "dim" not in options or isinstance(options["dim"], list) or fits(options["dim"], shape))
        and not any(t.get("dtype") for t in case["tensors"].values())
        and not any(t.get("grad") and n == "weight" for n, t in case["tensors"].items() if "cross" in case["op"])
    )


def stricter(message: str) -> bool:
    """What an op may refuse that the public function never asks of it."""
    return bool(re.search(r"output_mask: expected no gradient of a scale|reduction: expected 1 \(mean\) or 2", message))


def fits(dim: int, shape: list[int]) -> bool:
    count = max(1, len(shape))
    return -count <= dim < count


def against_composite(op, found: dict, ours: list[Tensor]) -> list[str]:
    """Forward ops give what their composite gives, about; all that is exact is the public functions' to check."""
    name = op.name().removeprefix(PREFIX)
    base = name.removesuffix("_forward")
    composite = getattr(torch.ops.regfast, f"composite_{base}", None)
    if name.startswith("composite_") or composite is None or any(x.is_meta for x in ours):
        return []
    keys = [a.name for a in composite.default._schema.arguments]
    try:
        theirs = tensors_in(composite(**{k: found[k] for k in keys}))
    except Exception as error:
        weight = found.get("weight")
        if "cross_entropy" in name and weight is not None and weight.dtype != found["input"].dtype:
            return []  # kernels convert class weights, of which the function refuses those that torch refuses
        return [f"answered what the composite refuses: {type(error).__name__}: {str(error)[:200]}"]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a.shape != b.shape:
            return [f"output {i}: shape {tuple(a.shape)}, the composite's {tuple(b.shape)}"]
        if not a.is_floating_point() or a.is_sparse or b.is_sparse:
            continue
        a, b = a.detach().double(), b.detach().double()
        size = b[b.isfinite()].abs().max() if b.isfinite().any() else torch.ones(())
        if (
            a.isfinite().all() and b.isfinite().all() and not (a - b).abs().max() <= 0.1 * size + 1e-3
            if a.numel()
            else False
        ):
            return [f"output {i}: differs from the composite's by {(a - b).abs().max().item():.3g}"]
    return []
