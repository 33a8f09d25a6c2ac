"""Measure a training step by stage on drawn images: no dataset and no weights are needed.

Prints images per second, peak memory, milliseconds by stage and the synchronizations of a step
between host and device, on the CPU the operations that would wait on a GPU. The operations of
convolutions and matrix products are counted too, which no other load on the machine changes. With
--against another checkout is measured in the same run: the steps take turns, so that other load on
the machine affects both alike. --inference also measures prediction: the detector alone against
detector and relations, with 100 drawn detections per image. Nearly all of their pairs are scored,
because an untrained relation head gives none of them a high probability.

Example:
    python tools/benchmark.py training --config-file configs/VRD/reldn_R_50_FPN.yaml --batch 2
    python tools/benchmark.py training --config-file configs/OpenImages/reldn_X_101_64x4d_FPN.yaml \
        --device cuda --batch 2 --precision bf16
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from .measure import print_table

__all__ = ["add_arguments", "run"]

_TOOLS = Path(__file__).resolve().parents[1]
HERE = "here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--config-file", default="configs/VRD/reldn_R_50_FPN.yaml")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="images (default: %(default)s)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), help="height and width")
    parser.add_argument("--steps", type=int, default=5, help="measured steps (default: 5)")
    parser.add_argument(
        "--against",
        metavar="FOLDER",
        type=Path,
        help="another checkout of this repository, which is measured in turns with this one",
    )
    parser.add_argument(
        "--without",
        metavar="KEY",
        nargs="+",
        default=[],
        help="config keys that are True; also measure with each of them False, in the same run",
    )
    parser.add_argument("--inference", action="store_true", help="also measure prediction")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="config options of this checkout"
    )


class _Worker:
    """A process with one checkout's :class:`.training_step.TrainingStep`."""

    def __init__(self, checkout: Path, args: argparse.Namespace, opts: list[str]):
        fields = ("config_file", "device", "batch", "precision", "size", "threads")
        options: dict[str, Any] = {name: getattr(args, name) for name in fields}
        options.update(checkout=str(checkout), opts=opts)
        path = os.pathsep.join([str(checkout), str(_TOOLS)])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.training_step"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(args.threads)},
        )
        self._send(options)

    def _send(self, message: Any) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def call(self, method: str) -> Any:
        """Return what a method of the step returns.

        Raises:
            SystemExit: the process failed; it has printed its error.
        """
        try:
            self._send(method)
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise SystemExit("The training step failed; see the error above.")
        return json.loads(reply)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def measure(
    workers: dict[str, _Worker], num_steps: int, inference: bool = False
) -> dict[str, dict[str, Any]]:
    """Run steps in turns; return the medians of each worker.

    Returns:
        By name: ``losses`` of the first step, ``seconds`` of a step and ``stages``, both as
        [wall, CPU], ``memory`` in MiB, ``synchronizations`` by function and ``operations``. With
        ``inference`` also that, seconds of the ``detector`` and of ``all``.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        first = worker.call("timed")
        results[name] = {"losses": first["losses"], "all": []}
    for _ in range(num_steps):
        for name, worker in workers.items():
            results[name]["all"].append(worker.call("timed")["stages"])
    for name, worker in workers.items():
        result = results[name]
        steps = result.pop("all")
        totals = [[sum(x[i] for x in step.values()) for i in (0, 1)] for step in steps]
        result["seconds"] = [median(x) for x in zip(*totals)]
        result["stages"] = {
            stage: [median(step[stage][i] for step in steps) for i in (0, 1)] for stage in steps[0]
        }
        if inference:
            runs = [worker.call("inference") for _ in range(num_steps + 1)][1:]
            result["inference"] = {
                part: [median(x) for x in zip(*(run[part] for run in runs))] for part in runs[0]
            }
        result["memory"] = worker.call("peak_memory")
        result.update(worker.call("counts"))
    return results


def _print_results(results: dict[str, dict[str, Any]], batch: int, on_gpu: bool) -> None:
    names = list(results)
    summary = []
    for name, result in results.items():
        wall, cpu = result["seconds"]
        row = [name, batch / wall, wall] + ([] if on_gpu else [cpu])
        row += [f"{result['memory']:.0f}", sum(result["synchronizations"].values())]
        row.append(f"{result['operations'] / 1e9:.0f}")
        summary.append(row)
    headers = ["", "images/s", "s per step"] + ([] if on_gpu else ["CPU s per step"])
    print_table(summary, [*headers, "peak memory, MiB", "synchronizations", "GFLOP"])

    # Other processes stretch wall time, but hardly the CPU's; a GPU is measured by its own clock.
    index = 0 if on_gpu else 1
    rows = []
    totals = {name: result["seconds"] for name, result in results.items()}
    for stage in (*results[names[0]]["stages"], "all"):
        times = [(totals[x] if stage == "all" else results[x]["stages"][stage]) for x in names]
        rows.append([stage, *(f"{1e3 * x[index]:.0f}" for x in times)])
    unit = "ms" if on_gpu else "CPU ms"
    print_table(rows, ["stage", *(f"{x}, {unit}" for x in names)])

    if "inference" in results[names[0]]:
        rows = []
        for name, result in results.items():
            detector, both = (result["inference"][part][index] for part in ("detector", "all"))
            rows.append([name, f"{1e3 * detector:.0f}", f"{1e3 * both:.0f}", both / detector])
        headers = [f"detector alone, {unit}", f"detector and relations, {unit}", "ratio"]
        print_table(rows, ["prediction", *headers])

    places = sorted({x for result in results.values() for x in result["synchronizations"]})
    rows = [[x, *(results[name]["synchronizations"].get(x, 0) for name in names)] for x in places]
    print_table(rows, ["function that synchronizes", *names])
    ours = results[names[0]]
    for other in names[1:]:
        theirs = results[other]
        wall, cpu = (b / a for a, b in zip(ours["seconds"], theirs["seconds"]))
        pairs = [(x, theirs["losses"][name]) for name, x in ours["losses"].items()]
        difference = max(abs(x - y) / max(abs(y), 1e-12) for x, y in pairs)
        print(
            f"\n{other} / {names[0]}: {wall:.2f} x by wall, {cpu:.2f} x by CPU time; "
            f"largest relative difference of a loss: {difference:.1e}"
        )


def run(args: argparse.Namespace) -> None:
    """Measure and print the tables."""
    here = _TOOLS.parent
    workers = {HERE: _Worker(here, args, args.opts)}
    try:
        for key in args.without:
            name = f"without {key.rpartition('.')[2]}"
            workers[name] = _Worker(here, args, [*args.opts, key, "False"])
        if args.against:
            workers["against"] = _Worker(args.against.resolve(), args, [])
        results = measure(workers, args.steps, args.inference)
    finally:
        for worker in workers.values():
            worker.close()
    _print_results(results, args.batch, args.device.startswith("cuda"))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")
