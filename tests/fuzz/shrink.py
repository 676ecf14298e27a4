"""Makes a failing case smaller for as long as it fails in the same way, and prints it as a script."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Iterator

import torch

from . import direct
from .check import OPS, make_tensors, make_upstream
from .ops import Case
from .processes import Runner

LITERAL = 48  # elements up to which a tensor is printed number by number


def kind_of(problem: str) -> str:
    """What a problem is about, without its numbers."""
    if problem.startswith("crashed"):
        return "crashed"
    head = problem.split(": at ")[0] if ": at " in problem else problem
    return re.sub(r"[-+\d.]+(e[-+]?\d+)?|\[[^]]*\]|\([^)]*\)", "#", head)[:90]


def _smaller(value) -> Iterator:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        yield from sorted({0, 1, 2, value // 2, value - value // 4, value - 1} - {value} - set(range(value, 3)))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield value[:i] + value[i + 1 :]
            for n in _smaller(value[i]):
                yield [*value[:i], n, *value[i + 1 :]]


def simpler(case: Case) -> Iterator[Case]:
    """Cases that are one step simpler."""

    def changed(*path, to=None, drop=False) -> Case:
        result = copy.deepcopy(case)
        inner = result
        for key in path[:-1]:
            inner = inner[key]
        if drop:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to
        return result

    for i in range(len(case.get("faults", []))):
        yield changed("faults", to=case["faults"][:i] + case["faults"][i + 1 :])
    for name in ("mismatch", "module"):
        if case.get(name):
            yield changed(name, drop=True)
    for name, value in case["sizes"].items():
        for n in _smaller(value):
            yield changed("sizes", name, to=n)
    for name in case["options"]:
        yield changed("options", name, drop=True)
    if case["options"].get("activation", "none") != "none":
        yield changed("options", "activation", to="none")
    if case["options"].get("reduction") in ("mean", "none"):
        yield changed("options", "reduction", to="sum")
    for i in range(len(case["options"].get("outputs", [])) if len(case["options"].get("outputs", [])) > 1 else 0):
        fewer = changed("options", "outputs", to=case["options"]["outputs"][:i] + case["options"]["outputs"][i + 1 :])
        if "upstream" in case:
            fewer["upstream"] = case["upstream"][:i] + case["upstream"][i + 1 :]
        yield fewer
    for name, spec in case["tensors"].items():
        yield changed("tensors", name, drop=True)
        if spec["layout"] != "contiguous":
            yield changed("tensors", name, "layout", to="contiguous")
        for values in ("ones", "integers", "normal"):
            if spec["values"] == values:
                break
            if spec["values"] != "classes":
                yield changed("tensors", name, "values", to=values)
        if spec["grad"]:
            yield changed("tensors", name, "grad", to=False)
        for key in ("hostile", "out_of_range"):
            if key in spec:
                yield changed("tensors", name, key, drop=True)
        for i in range(len(spec.get("hostile", []))):
            yield changed("tensors", name, "hostile", to=spec["hostile"][:i] + spec["hostile"][i + 1 :])
        if spec.get("ignored"):
            yield changed("tensors", name, "ignored", to=0.0)
    for i, (kind, seed) in enumerate(case.get("upstream", [])):
        if kind != "one":
            yield changed("upstream", to=[*case["upstream"][:i], ["one", seed], *case["upstream"][i + 1 :]])
    if case["dtype"] != "float32":
        yield changed("dtype", to="float32")


def shrink(case: Case, problem: str, runner: Runner, seconds: float) -> tuple[Case, str]:
    """A smaller case with the same kind of problem."""
    kind, deadline = kind_of(problem), time.monotonic() + seconds
    progress = True
    while progress:
        progress = False
        for candidate in simpler(case):
            if time.monotonic() > deadline:
                return case, problem
            same = [p for p in runner.run(candidate).wrong if kind_of(p) == kind]
            if same:
                case, problem, progress = candidate, same[0], True
                break
    return case, problem


# The script


def _literal(x: torch.Tensor) -> str:
    shape = f".reshape({tuple(x.shape)})" if not x.numel() else ""
    return f"torch.tensor({x.tolist()}, dtype={x.dtype}){shape}"


def _upstream(kind: str, seed: int, o: torch.Tensor) -> str:
    if o.numel() <= LITERAL:
        return _literal(make_upstream(kind, seed, o))
    return f"make_upstream({kind!r}, {seed}, torch.empty({tuple(o.shape)}, dtype={o.dtype}))"


def script(case: Case) -> str:
    """A script that makes the call of a case and prints what comes of it, next to the counterpart in float64."""
    if case["op"] not in OPS:
        return direct_script(case)
    op = OPS[case["op"]]
    lines, project = [], set()
    try:
        tensors = make_tensors(op, case)
    except Exception:
        return json.dumps(case)
    wanted = []
    for name, spec in case["tensors"].items():
        x = tensors[name]
        if x.numel() <= LITERAL:
            text = _literal(x)
            if spec["layout"] != "contiguous":
                text, project = f"lay_out({text}, {spec['layout']!r})", project | {"lay_out"}
        else:
            text, project = f"make_tensors(OPS[{case['op']!r}], case)[{name!r}]", project | {"make_tensors"}
        if spec["grad"]:
            text += ".requires_grad_()"
            wanted.append(name)
        lines.append(f"{name} = {text}")
    head = ["import torch", "from torch import inf, nan", "import regfast"]
    if "lay_out" in project:
        head.append("from tests.fuzz.tensors import lay_out")
    if "make_tensors" in project:
        head += ["from tests.fuzz.check import OPS, make_tensors", f"case = {case!r}"]
    lines.append(f"out = {op.text(case)}")
    lines.append("print(out)")
    if wanted:
        try:
            outs = op.ours({n: t.detach() for n, t in tensors.items()}, case)
            outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
            ups = [_upstream(k, s, o) for (k, s), o in zip(case["upstream"], outs, strict=False)]
            if any(u.startswith("make_upstream") for u in ups):
                head.append("from tests.fuzz.check import make_upstream")
            lines.append(f"ups = [{', '.join(ups)}]")
        except Exception:
            lines.append("ups = [torch.ones_like(o) for o in ([out] if isinstance(out, torch.Tensor) else out)]")
        lines += [
            "pairs = [(o, u) for o, u in zip([out] if isinstance(out, torch.Tensor) else out, ups) if o.requires_grad]",
            f"print(torch.autograd.grad([p[0] for p in pairs], [{', '.join(wanted)}], [p[1] for p in pairs]))",
        ]
    return "\n".join([*head, *lines])


def direct_script(case: Case) -> str:
    """As script, for an op of the schema."""
    lines = ["import torch", "from torch import inf, nan", "import regfast"]
    try:
        _, found = direct.call_of(case)
    except Exception as error:
        return f"# no arguments: {error}"
    for name, x in found.items():
        if not isinstance(x, torch.Tensor):
            lines.append(f"{name} = {x!r}")
        elif x.is_meta or x.layout != torch.strided or x.numel() > LITERAL:
            place = "meta" if x.is_meta else "cpu"
            lines.append(f"{name} = torch.ones({tuple(x.shape)}, dtype={x.dtype}, device={place!r})  # {x.layout}")
        else:
            lines.append(f"{name} = {_literal(x)}")
    return "\n".join([*lines, f"print({case['op']}({', '.join(f'{n}={n}' for n in found)}))"])
