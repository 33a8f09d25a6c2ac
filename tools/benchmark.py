"""Time and memory of the package beside plain formulations of the same thing, in the same run.

Examples:
    python tools/benchmark.py losses
    python tools/benchmark.py head --device cuda
"""

import argparse
import importlib
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "benchmarks"
BENCHMARKS = sorted(
    path.stem for path in _FOLDER.glob("[a-z]*.py") if path.stem not in ("measure", "plain")
)


def main(arguments=None) -> None:
    """Run one benchmark, each a module of tools/benchmarks with ``add_arguments`` and ``run``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    modules = {}
    for name in BENCHMARKS:
        modules[name] = importlib.import_module(f"benchmarks.{name}")
        summary = modules[name].__doc__.strip().splitlines()[0]
        command = commands.add_parser(name, help=summary, description=modules[name].__doc__)
        modules[name].add_arguments(command)
    args = parser.parse_args(arguments)
    modules[args.benchmark].run(args)


if __name__ == "__main__":
    sys.path.insert(0, str(_FOLDER.parent))
    main()
