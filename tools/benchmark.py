"""Measure time and memory of the package against plain formulations of the same thing, in one run.

Examples:
    python tools/benchmark.py losses
    python tools/benchmark.py head --device cuda
    python tools/benchmark.py training --config-file configs/VRD/reldn_R_50_FPN.yaml
"""

import argparse
import importlib
import sys
from pathlib import Path

BENCHMARKS = ("data", "detectors", "evaluation", "head", "inference", "losses") + (
    *("predicate_backbone", "service", "training"),
)


def main(arguments: list[str] | None = None) -> None:
    """Run one benchmark: a module of tools/benchmarks with ``add_arguments`` and ``run``.

    ``run(args)`` prints tables. Every benchmark has ``--threads``, which is applied here.
    """
    user_modules = importlib.import_module("reldn_d2.utils.user_modules")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    user_modules.add_module_argument(parser)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in BENCHMARKS}
    for name, module in modules.items():
        command = commands.add_parser(
            name,
            help=module.__doc__.strip().splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--threads", type=int, default=2, help="CPU threads of torch (default: %(default)s)"
        )
        module.add_arguments(command)
    args = user_modules.parse_and_import(parser, arguments)
    measure = importlib.import_module("benchmarks.measure")
    measure.set_up(getattr(args, "device", "cpu"), args.threads)
    modules[args.benchmark].run(args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
