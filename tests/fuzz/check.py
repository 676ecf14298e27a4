"""Runs a case: ours with several numbers of threads, its counterpart in the same dtype and in float64; compares."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regfast import _C
from regfast._paths import recorded

from . import direct
from .compare import accumulator, compare, same_bits
from .draw import Draw
from .oddities import oddity
from .ops import OPS, Case, Op, Tensors, dtype_of, outputs_of
from .tensors import classes, lay_out, memory_of, put, values
from .terms import Terms

THREADS = (1, 2, 3, 7)
OTHER_BITS, OF_ATEN = "other bits", " of what ATen has computed"
# Weights that make most of the calls fall where most of the kernels are.
WEIGHTS = {
    "linear": 14,
    "phm_linear": 8,
    "softmax": 8,
    "log_softmax": 8,
    "logsumexp": 8,
    "mse_loss": 6,
    "cross_entropy": 20,
    "linear_cross_entropy": 18,
    "linear_nll": 14,
}


@dataclass
class Report:
    calls: int = 0
    wrong: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)


@dataclass
class Run:
    """What came of a call: outputs and gradients, or an exception."""

    outputs: list[Tensor] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None
    where: str = "forward"


def draw_case(seed: int) -> Case:
    r = Draw(seed)
    if r.chance(0.12):
        return direct.draw(r)
    name = r.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    dtype = r.choices(("float32", "float64", "bfloat16", "float16"), (45, 15, 20, 20))[0]
    case = {"op": name, "dtype": dtype} | OPS[name].draw(r)
    case["upstream"] = [[r.upstream(), r.randrange(1 << 30)] for _ in OPS[name].outputs(case)]
    if r.chance(0.04) and not has_mistake(case):
        case["mismatch"] = [r.choice(list(case["tensors"])), r.choice(("longer", "deeper", "flatter", "dtype"))]
        case["module"] = False  # a module gives its parameters shapes of its own
    return case


def has_mistake(case: Case) -> bool:
    """Whether something else in the case may be refused: of two mistakes, either may be named."""
    options = case["options"]
    return (
        not 0 <= options.get("label_smoothing", 0) <= 1
        or options.get("reduction", "mean") not in ("none", "mean", "sum")
        or any("out_of_range" in spec or spec.get("dtype") == "int32" for spec in case["tensors"].values())
        or case["tensors"].get("weight", {}).get("grad", False)
    )


def make_tensor(spec: dict, shape: tuple[int, ...], case: Case) -> Tensor:
    dtype = dtype_of(spec.get("dtype", case["dtype"]))
    if spec["values"] == "classes":
        count, ignore = case["sizes"]["c"], case["options"].get("ignore_index", -100)
        if dtype == torch.uint8:
            ignore %= 256
        x = classes(shape, count, spec["ignored"], ignore, dtype, spec["seed"])
        if "out_of_range" in spec and x.numel() and dtype != torch.uint8:
            limits = torch.iinfo(dtype)
            x.view(-1)[spec["seed"] % x.numel()] = max(limits.min, min(spec["out_of_range"], limits.max))
    elif dtype.is_floating_point:
        x = put(values(spec["values"], shape, dtype, spec["seed"]), spec.get("hostile", []))
    else:
        x = values(spec["values"], shape, torch.float32, spec["seed"]).to(dtype)
    return lay_out(x, spec["layout"])


def make_tensors(op: Op, case: Case) -> Tensors:
    shapes = op.shapes(case)
    tensors: Tensors = {}
    wrong, how = case.get("mismatch", (None, None))
    for name, spec in case["tensors"].items():
        shape = tuple(shapes[name])
        if name == wrong and how == "longer" and shape:
            shape = (*shape[:-1], shape[-1] + 1)
        elif name == wrong and how == "deeper":
            shape = (1, *shape)
        elif name == wrong and how == "flatter" and shape:
            shape = shape[1:]
        if name == wrong and how == "dtype":
            other = {"float32": "float64", "int64": "float32"}.get(spec.get("dtype", case["dtype"]), "float32")
            spec = spec | {"dtype": other} | ({"values": "integers"} if spec["values"] == "classes" else {})
        tensors[name] = make_tensor(spec, shape, case)
    return tensors


def make_upstream(kind: str, seed: int, like: Tensor) -> Tensor:
    shape, dtype = tuple(like.shape), like.dtype
    if kind in ("one", "zero"):
        return torch.full(shape, float(kind == "one"), dtype=dtype)
    if kind == "broadcast":
        return values("normal", (), dtype, seed).expand(shape)
    if kind == "nan":
        return put(values("normal", shape, dtype, seed), [["element", float("nan"), seed]])
    base = values(kind if kind in ("huge", "spiky") else "normal", shape, dtype, seed)
    return lay_out(base, kind) if kind in ("strided", "transposed") else base


def run(call, op: Op, tensors: Tensors, case: Case, upstream: list[Tensor | None] | None, wide: bool = False) -> Run:
    """A call on fresh leaves, and its gradients for `upstream`, which is made first if there is none yet."""
    leaves, wanted = {}, []
    inplace = case["options"].get("inplace_backward") and not wide
    for name, t in tensors.items():
        leaf = t
        if t.is_floating_point():
            leaf = t.detach().double() if wide else t.detach()
            if case["tensors"][name]["grad"]:
                leaf.requires_grad_()
                wanted.append(name)
        leaves[name] = leaf
    given = leaves
    if inplace and "input" in leaves:
        given = leaves | {"input": leaves["input"].clone()}  # not a leaf, so that it may be overwritten
    result = Run()
    try:
        result.outputs = outputs_of(call(given, case))
        roots = [i for i, o in enumerate(result.outputs) if o.requires_grad]
        if not (roots and wanted):
            return result
        result.where = "backward"
        if upstream is None:
            raise ValueError("no upstream")
        if not upstream:
            for (kind, seed), o in zip(case["upstream"], result.outputs, strict=False):
                upstream.append(make_upstream(kind, seed, o.detach()) if o.is_floating_point() else None)
        ups = [upstream[i].double() if wide else upstream[i] for i in roots]
        grads = torch.autograd.grad(
            [result.outputs[i] for i in roots], [leaves[n] for n in wanted], ups, materialize_grads=True
        )
        result.grads = dict(zip(wanted, grads, strict=True))
    except Exception as error:
        result.error = error
    return result


def check_case(case: Case) -> Report:
    """Everything that can be said against a case."""
    if case["op"] not in OPS:
        return Report(*direct.check(case))
    op, report = OPS[case["op"]], Report()
    tensors = make_tensors(op, case)
    before = {n: memory_of(t).clone() for n, t in tensors.items()}
    upstream: list[Tensor | None] = []

    def counted(t, c):
        report.calls += 1
        return op.ours(t, c)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        theirs = run(op.torchs, op, tensors, case, upstream)
        first = run(counted, op, tensors, case, upstream)
        report.calls += bool(first.grads)
        problems = against(op, case, tensors, first, theirs, upstream)
        if first.error is None:
            for threads in THREADS:
                torch.set_num_threads(threads)
                again = run(counted, op, tensors, case, upstream)
                report.calls += bool(again.grads)
                problems += differences(first, again, threads)
        torch.set_num_threads(1)
        if any(problem.endswith(OTHER_BITS) for problem in problems):
            with recorded(_C) as calls:
                run(op.ours, op, tensors, case, upstream)
            if any(call.path != "kernels" for call in calls):
                problems = [p + OF_ATEN if p.endswith(OTHER_BITS) else p for p in problems]
    for name, t in tensors.items():
        if not torch.equal(memory_of(t), before[name]):
            problems.append(f"{name}: was changed")
    for problem in problems:
        reason = oddity(case, problem)
        (report.odd if reason else report.wrong).append(f"{problem} ({reason})" if reason else problem)
    return report


def differences(first: Run, again: Run, threads: int) -> list[str]:
    what = "another run" if threads == 1 else f"{threads} threads"
    if again.error is not None:
        return [f"{what}: raised {type(again.error).__name__}: {str(again.error)[:200]}"]
    pairs = {f"output {i}": p for i, p in enumerate(zip(first.outputs, again.outputs, strict=True))}
    pairs |= {f"gradient of {n}": (g, again.grads[n]) for n, g in first.grads.items()}
    return [f"{what}: {name}: {OTHER_BITS}" for name, (a, b) in pairs.items() if not same_bits(a, b)]


def against(op: Op, case: Case, tensors: Tensors, ours: Run, theirs: Run, upstream: list[Tensor | None]) -> list[str]:
    """Problems with the first run."""
    if ours.error is not None and "mismatch" in case and not op.is_torchs(case):
        return []  # which shapes belong together, the composite does not say
    if (ours.error is None) != (theirs.error is None):
        who, run_ = ("PyTorch", theirs) if ours.error is None else ("regfast", ours)
        return [f"only {who} raised in {run_.where}: {type(run_.error).__name__}: {str(run_.error)[:300]}"]
    if ours.error is not None:
        if type(ours.error) is type(theirs.error):
            return []
        if not op.is_torchs(case):
            return []  # the composite's checks stand in another order
        names = [f"{type(r.error).__name__}: {str(r.error)[:200]}" for r in (ours, theirs)]
        return [f"raised {names[0]}, PyTorch {names[1]}"]
    exact = run(op.exact, op, tensors, case, upstream, wide=True)
    if exact.error is not None:
        return [f"float64 oracle raised {type(exact.error).__name__}: {str(exact.error)[:200]}"]
    wide = {n: (t.detach().double() if t.is_floating_point() else t) for n, t in tensors.items()}
    ups = [None if u is None else u.detach().double() for u in upstream] or [None] * len(ours.outputs)
    try:
        sizes = op.terms(wide, case, ups)
    except Exception:
        if "mismatch" not in case and case["sizes"].get("other") in (None, case["sizes"].get("shape")):
            raise
        sizes = Terms([None] * len(ours.outputs))  # what broadcasts in a way that is not drawn otherwise
    longest = max(max(t.shape, default=1) for t in tensors.values())
    floor = max([1.0, *(u.nan_to_num(0, 0, 0).abs().max().item() for u in ups if u is not None and u.numel())])
    between: list[Run] = []

    def half(pick):
        """The composite in float32, computed once if it is asked for."""
        if case["dtype"] not in ("bfloat16", "float16"):
            return None
        if not between:
            wider = {n: (t.float() if t.is_floating_point() else t) for n, t in tensors.items()}
            fine = [None if u is None else u.float() for u in upstream]
            between.append(run(lambda t, c: op.exact(t, c), op, wider, case, fine))
        return None if between[0].error is not None else pick(between[0])

    problems = []
    # softmax and log_softmax convert their input to the dtype that is asked for.
    through = dtype_of(case["options"].get("dtype"))
    acc = accumulator(through or dtype_of(case["dtype"]))
    if case.get("mismatch", ("", ""))[1] == "dtype":
        acc = torch.float32  # which one of the tensors may have

    def look(name, a, b, c, size, pick):
        size = None if size is None or not fits(size, c) else size
        problem = compare(a, b, c, size, sizes.rounds, acc, None, floor, longest, through)
        if problem and case["dtype"] in ("bfloat16", "float16"):
            problem = compare(a, b, c, size, sizes.rounds, acc, half(pick), floor, longest, through)
        if problem:
            problems.append(f"{name}: {problem}")

    names = op.outputs(case)
    for i, (a, b, c) in enumerate(zip(ours.outputs, theirs.outputs, exact.outputs, strict=True)):
        if names[i] == "argmax":
            problem = check_argmax(a, b, c, sizes.scores)
            problems += [f"argmax: {problem}"] if problem else []
        else:
            look(names[i], a, b, c, sizes.outputs[i], lambda r, i=i: r.outputs[i])
    if not op.is_torchs(case):  # where no output depends on a tensor, the composite has no gradient and ours is zero
        exact.grads |= {n: torch.zeros(g.shape).double() for n, g in ours.grads.items() if n not in theirs.grads}
        theirs.grads |= {n: torch.zeros_like(g) for n, g in ours.grads.items() if n not in theirs.grads}
    if set(ours.grads) != set(theirs.grads):
        problems.append(f"gradients of {sorted(ours.grads)}, PyTorch {sorted(theirs.grads)}")
    for name in ours.grads.keys() & theirs.grads.keys():
        size = sizes.grads.get(name)
        a, b, c = ours.grads[name], theirs.grads[name], exact.grads[name]
        look(f"gradient of {name}", a, b, c, size, lambda r, n=name: r.grads[n])
    return problems


def fits(size: Tensor, x: Tensor) -> bool:
    return size.dim() <= x.dim() and all(
        a in (b, 1) for a, b in zip(reversed(size.shape), reversed(x.shape), strict=False)
    )


def check_argmax(ours: Tensor, theirs: Tensor, exact: Tensor, scores: tuple[Tensor, Tensor] | None) -> str | None:
    """The first maximum, or one that rounding makes one."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{tuple(ours.shape)} of {ours.dtype}, PyTorch {tuple(theirs.shape)} of {theirs.dtype}"
    wrong = (ours != theirs) & (ours != exact)
    if not wrong.any() or scores is None:
        return None if not wrong.any() else "other classes"
    z, size = scores[0], scores[1].abs()
    dim = 1 if z.dim() > 1 else 0
    # Where products leave the range, the order of their sums decides which class is infinite.
    wrong &= ~(~(size * 4 <= torch.finfo(torch.float32).max)).expand(z.shape).any(dim)
    size = size.nan_to_num(0, 0, 0).expand(z.shape).amax(dim)
    mine = z.gather(dim, ours.unsqueeze(dim)).squeeze(dim)
    near = (z.amax(dim) - mine) <= 16 * torch.finfo(torch.float32).eps * size
    wrong &= ~near
    if not wrong.any():
        return None
    at = int(wrong.reshape(-1).nonzero()[0])
    return f"row {at}: {describe_class(ours, at)}, PyTorch {describe_class(theirs, at)}"


def describe_class(x: Tensor, at: int) -> int:
    return int(x.reshape(-1)[at])
