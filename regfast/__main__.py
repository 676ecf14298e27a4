"""python -m regfast: each command is a module of regfast.cli with a docstring, add_arguments(parser) and run(args)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from .cli import bench, info, prove

COMMANDS: dict[str, ModuleType] = {"info": info, "prove": prove, "bench": bench}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m regfast", description="What regfast does on this machine.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary, _, _ = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
