"""The file that a proof is: proofs/<gpu>-<driver>-<build>.json in the user's cache directory, or in REGFAST_PROOFS."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import _C
from .machine import Identity, slug

FORMAT = 1
_MOST_BYTES = 1 << 24  # of a file that is read: a proof has some 50 KB
_PROBE_BYTES = 1 << 20


class NoProof(Exception):
    """Why there is no proof to go by; `corrupt` where there is a file that is none."""

    def __init__(self, why: str, corrupt: bool = False):
        super().__init__(why)
        self.corrupt = corrupt


class NoFolder(OSError):
    """Why there is no telling where proofs are."""


@dataclass
class Proof:
    """What was found on a machine."""

    machine: Identity
    date: str  # UTC, "2026-11-29"
    ops: dict[str, str]  # each of _C.CUDA_OPS: "" where its kernels are right, else why it stays on PyTorch
    choices: dict[str, str]  # as CudaChoices of csrc/shared/cuda_kernels.h
    failures: list[dict[str, str]] = field(default_factory=list)  # op, case, error
    ceilings: dict[str, float] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)  # what was not measured, and why

    @property
    def proven(self) -> list[str]:
        return [op for op, why in self.ops.items() if not why]


def folder() -> Path:
    """Where proofs are kept."""
    if asked := os.environ.get("REGFAST_PROOFS"):
        return Path(asked)
    try:
        from platformdirs import user_cache_dir
    except ModuleNotFoundError:
        raise NoFolder(
            "the user's cache directory is told by the package platformdirs, which is not installed"
        ) from None
    return Path(user_cache_dir("regfast", appauthor=False)) / "proofs"


def write(proof: Proof) -> Path:
    """Puts a proof in its place, whole or not at all; raises OSError where that cannot be done."""
    where = folder()
    where.mkdir(parents=True, exist_ok=True)
    path = where / proof.machine.file_name
    text = json.dumps({"format": FORMAT, **asdict(proof)}, indent=1) + "\n"
    # Under a name of its own first, so that who reads meanwhile, or another prove at the same time, finds a whole file.
    handle, part = tempfile.mkstemp(dir=where, prefix=".proof-")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    return path


def check_writable() -> None:
    """Raises the OSError that `write` would, before the work is done: of a full disk too."""
    where = folder()
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=where) as file:
        file.write(bytes(_PROBE_BYTES))
        file.flush()


@contextmanager
def alone(waits: Callable[[], None]) -> Iterator[None]:
    """While no other process proves by this folder, since two would spoil each other's times; waits() is called before
    the other is waited for. Where files cannot be locked, as on some network drives, nobody is."""
    with ExitStack() as kept:
        with suppress(ModuleNotFoundError, OSError):
            import fcntl  # not on Windows

            lock = kept.enter_context(open(folder() / ".lock", "a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waits()
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read(machine: Identity) -> Proof:
    """The proof of this machine; raises NoProof."""
    try:
        path = folder() / machine.file_name
    except NoFolder as error:
        raise NoProof(str(error)) from None
    try:
        if not path.exists():
            raise NoProof(_what_changed(machine))
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise NoProof(f"{path} is no file of a proof's size", corrupt=True)
        content = json.loads(path.read_text())
    except OSError as error:
        raise NoProof(f"{path} cannot be read: {error.strerror}", corrupt=True) from None
    except (ValueError, RecursionError):
        raise NoProof(f"{path} is not JSON", corrupt=True) from None
    return _checked(content, machine, path)


def _what_changed(machine: Identity) -> str:
    """Of the proofs of this GPU, if there are any, they are of another driver or build."""
    others = list(folder().glob(f"{slug(machine.gpu)}-*.json"))
    return "the proof at hand is of another driver or build" if others else "there is no proof"


def _checked(content: object, machine: Identity, path: Path) -> Proof:
    def refuse(what: str) -> NoProof:
        return NoProof(f"{path} {what}", corrupt=True)

    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise refuse(f"is no proof of format {FORMAT}")
    if content.get("machine") != asdict(machine):
        raise refuse("is of another machine than its name says")
    tables: dict[str, dict[str, str]] = {}
    for name in ("ops", "choices"):
        table = content.get(name)
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise refuse(f"has no table of {name}")
        tables[name] = table
    if set(tables["ops"]) != set(_C.CUDA_OPS):
        raise refuse("is about other ops than there are")
    rest = {"failures": list, "ceilings": dict, "measured": list, "left_out": list, "date": str}
    if missing := [name for name, kind in rest.items() if not isinstance(content.get(name), kind)]:
        raise refuse(f"has no {missing[0]}")
    return Proof(machine, ops=tables["ops"], choices=tables["choices"], **{name: content[name] for name in rest})
