"""Differences that are PyTorch's own oddities, each a narrow predicate on the case and the problem, with its reason."""

from __future__ import annotations

from collections.abc import Callable

Case = dict


def _op(case: Case, *names: str) -> bool:
    return case["op"] in names


def _byte_targets(case: Case, problem: str) -> bool:
    target = case["tensors"].get("target", {})
    return _op(case, "cross_entropy", "linear_cross_entropy") and target.get("dtype") == "uint8" and "Byte" in problem


def _negative_smoothing(case: Case, problem: str) -> bool:
    return (
        case.get("probabilities", False)
        and case["options"].get("label_smoothing", 0) < 0
        and problem.startswith("only regfast raised")
    )


def _all_of_logsumexp(case: Case, problem: str) -> bool:
    return _op(case, "logsumexp") and case["options"]["dim"] == [] and problem.startswith("only PyTorch raised")


ODDITIES: dict[str, Callable[[Case, str], bool]] = {
    "torch takes uint8 classes for rows of logits, and refuses them beside further dimensions": _byte_targets,
    "torch checks label_smoothing with probabilities only if it is positive, and else ignores it": _negative_smoothing,
    "torch's logsumexp over no dimension means all, but fails beside keepdim=False": _all_of_logsumexp,
}


def oddity(case: Case, problem: str) -> str | None:
    """The reason why a difference is no fault of ours, or None."""
    return next((reason for reason, holds in ODDITIES.items() if holds(case, problem)), None)
