"""python -m regfast: each command is a module of regfast.cli with a docstring, add_arguments(parser) and run(args)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from . import __version__, _environment
from .cli import bench, info, prove

COMMANDS: dict[str, ModuleType] = {"info": info, "prove": prove, "bench": bench}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m regfast", description="What regfast does on this machine.")
    parser.add_argument("--version", action="version", version=f"regfast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="command")
    for name, module in COMMANDS.items():
        summary, _, _ = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    args, others = parser.parse_known_args(arguments)
    if "run" not in args:
        if others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        parser.print_help(sys.stderr)
        return 2
    if others:  # by the command, which knows its options
        args.command.error(f"unrecognized arguments: {' '.join(others)}")
    if _environment.refused and args.run is not info.run:
        print(f"{args.command.prog}: {'; '.join(_environment.refused.values())}", file=sys.stderr)
        return 2
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
