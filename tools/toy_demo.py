#!/usr/bin/env python
"""Train, evaluate and draw RelDN on the built-in dataset, on a laptop's CPU.

Trains one detector, then RelDN twice on top of it: with cross entropy alone (L0), and with the
graphical contrastive losses as well. Finished trainings are reused.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
MODELS = {"L0": "reldn_l0", "L0 + L1 + L2 + L3": "reldn"}  # name in the table: config
TASKS = ("sgdet", "prdcls")
METRICS = {  # key in the results: name in the table
    "R@n": "R@n",
    "mAP": "mAP",
    "AP-holds": "AP holds",
    "AP-plays": "AP plays",
    "AP-wears": "AP wears",
    "AP-on": "AP on",
    "AP-under": "AP under",
    "AP-inside of": "AP inside of",
    "instance_accuracy": "instance accuracy",
    "pairing_accuracy": "pairing accuracy",
}
# Runs the script that the arguments begin with, and ends it when the demo (a process id) has ended.
RUN_WITH_PARENT = """
import os, runpy, signal, sys, threading, time

def watch():
    while os.getppid() == %d:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)  # training writes a checkpoint

threading.Thread(target=watch, daemon=True).start()
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_print_lock = threading.Lock()


class StageFailed(Exception):
    """A training or evaluation failed; the message names its log."""


def say(text: str) -> None:
    """Print and flush a line; lines of different threads are never mixed."""
    with _print_lock:
        print(text, flush=True)


def config_with_bases(path: Path) -> list[Path]:
    """List a config file and all files that it is based on."""
    base = re.search(r'^_BASE_: "(.+)"', path.read_text(), re.MULTILINE)
    return [path] + (config_with_bases(path.parent / base.group(1)) if base else [])


def configuration_fingerprint(config: str, options: list[str], inputs: list[Path]) -> str:
    """Hash what a training depends on: config and bases, options, dataset code, input files."""
    digest = hashlib.sha256(json.dumps(options).encode())
    for path in config_with_bases(PROJECT / "configs" / "Toy" / f"{config}.yaml"):
        digest.update(path.read_bytes())
    for path in sorted((PROJECT / "reldn_d2" / "data" / "datasets").glob("toy/*.py")):
        digest.update(path.read_bytes())
    for path in inputs:
        digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return f"{config} {digest.hexdigest()}"


def run_train_net(name: str, config: str, output: Path, options: list[str]) -> None:
    """Run ``train_net.py`` in a new process and print its progress in short lines.

    Raises:
        StageFailed: the process failed.
    """
    command = [sys.executable, "-W", "ignore", "-c", RUN_WITH_PARENT % os.getpid()]
    command += [str(PROJECT / "train_net.py")]
    command += ["--config-file", str(PROJECT / "configs" / "Toy" / f"{config}.yaml")]
    command += [*options, "OUTPUT_DIR", str(output)]
    output.mkdir(parents=True, exist_ok=True)
    # One thread per training: two trainings in parallel are faster than one with two threads.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    log = output / ("demo_prdcls.log" if "--eval-only" in options else "demo.log")
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            if " eta: " in line:
                progress = line.split(" eta: ")[1].split("  time:")[0]
                say(f"  {name}: eta {' '.join(progress.split())}")
            elif "Inference done" in line:
                say(f"  {name}: evaluating, {line.split('Inference done ')[1].split('.')[0]}")
    if process.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
        raise StageFailed(f"{name} failed. The last lines of {log}:\n{tail}")


def stage(
    name: str,
    config: str,
    output: Path,
    options: list[str],
    inputs: list[Path],
    retrain: bool = False,
) -> Path:
    """Train (which evaluates SGDET at the end) and evaluate PRDCLS, unless that is done already.

    Args:
        name: shown in the progress lines.
        config: file under ``configs/Toy``, without its suffix.
        output: folder of the training; it is emptied first.
        options: ``KEY VALUE`` config options.
        inputs: files that the training starts from.
        retrain: train even if that is done already.

    Returns:
        The file of the trained model.

    Raises:
        StageFailed: a process failed, or the folder has a model that the demo did not train.
    """
    stamp, model = output / "demo_stamp.txt", output / "model_final.pth"
    fingerprint = configuration_fingerprint(config, options, inputs)
    if stamp.exists() and model.exists() and stamp.read_text() == fingerprint and not retrain:
        say(f"  {name}: already trained, see {output}")
        return model
    if model.exists() and not stamp.exists():
        raise StageFailed(
            f"{output} has a model that this demo did not train; choose another --output."
        )
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    stamp.write_text("not finished")
    started = time.time()
    run_train_net(name, config, output, options)
    if config != "detector":
        task = ["TEST.RELATIONS.TASK", "prdcls", "MODEL.WEIGHTS", str(model)]
        run_train_net(f"{name}, PRDCLS", config, output, ["--eval-only", *options, *task])
    stamp.write_text(fingerprint)
    say(f"  {name}: finished in {time.time() - started:.0f} s")
    return model


def draw_data_set() -> str:
    """Draw the dataset's images that do not exist yet; return the folder of the test set."""
    code = (
        "import os, reldn_d2; from detectron2.data import DatasetCatalog as c;"
        "train, test = [c.get(n) for n in ('toy_vrd_train', 'toy_vrd_test')];"
        "print(len(train), len(test), os.path.dirname(test[0]['file_name']))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    # In the current folder, like the trainings, because FVCORE_CACHE may be a relative path.
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    train, test, folder = done.stdout.strip().splitlines()[-1].split(" ", 2)
    print(f"  {train} images in toy_vrd_train; {test} images in toy_vrd_test, in {folder}")
    return folder


def train_relations(
    output: Path,
    detector: Path,
    seeds: list[int],
    options: list[str],
    jobs: int,
    retrain: bool = False,
    modules: list[str] | None = None,
) -> None:
    """Train both models with each seed, ``jobs`` trainings at a time.

    ``modules`` are passed on as ``--module``; a change of their files trains again.
    """
    flags = [x for module in modules or () for x in ("--module", module)]
    inputs = [detector, *(Path(x) for x in modules or () if Path(x).is_file())]
    with ThreadPoolExecutor(jobs) as pool:
        futures = []
        for seed in seeds:
            for name, config in MODELS.items():
                extra = [*flags, *options, "MODEL.WEIGHTS", str(detector), "SEED", str(seed)]
                label = name if len(seeds) == 1 else f"{name}, seed {seed}"
                folder = output / f"seed_{seed}" / config
                futures.append(pool.submit(stage, label, config, folder, extra, inputs, retrain))
        try:
            for future in futures:
                future.result()
        except StageFailed:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read_results(output: Path, seeds: list[int]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Read the metrics by task and model: a list with one dict per seed."""
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for task in TASKS:
        for name, config in MODELS.items():
            files = [output / f"seed_{s}" / config / f"results_{task}.json" for s in seeds]
            runs = [json.loads(path.read_text()).get(f"relations_{task}") for path in files]
            if None in runs:
                raise StageFailed(
                    f"{files[0]} has no results for {task}; do not override TEST.RELATIONS."
                )
            results.setdefault(task, {})[name] = runs
    return results


def format_table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Format the comparison as a Markdown table; several seeds give mean ± standard deviation."""
    from statistics import mean, stdev

    from tabulate import tabulate

    def cell(runs: list[dict[str, float]], key: str) -> str:
        values = [run[key] for run in runs]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        return f"{mean(values):.1f}{spread}"

    rows = []
    for key, head in METRICS.items():
        runs = [results[task][name] for task in TASKS for name in MODELS]
        rows.append([head] + [cell(x, key) for x in runs])
    heads = ["%"] + [f"{task.upper()}, {name}" for task in TASKS for name in MODELS]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def main(arguments: list[str] | None = None) -> int:
    """Run all five steps and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("output/toy"), help="folder for all results"
    )
    parser.add_argument("--retrain", action="store_true", help="retrain from scratch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="train once per seed")
    parser.add_argument("--jobs", type=int, default=2, help="trainings run in parallel")
    parser.add_argument("--pictures", type=int, default=6, help="test images to draw; 0: none")
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="FILE_OR_NAME",
        help="your own Python module, imported by the RelDN trainings; see train_net.py --help",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE config options of the RelDN trainings"
    )
    args = parser.parse_args(arguments)
    output, started = args.output.resolve(), time.time()
    try:
        say("[1/5] drawing the dataset")
        images = draw_data_set()
        say("[2/5] training and evaluating the detector")
        detector = stage(
            "detector", "detector", output / "detector", ["SEED", "1"], [], args.retrain
        )
        say("[3/5] training and evaluating RelDN, with L0 alone and with all four losses")
        train_relations(
            output, detector, args.seeds, args.opts, args.jobs, args.retrain, args.module
        )
        say("[4/5] making the table")
        table = format_table(read_results(output, args.seeds))
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command to continue; an unfinished stage is run again.")
        return 130
    except (StageFailed, subprocess.CalledProcessError) as error:
        print(f"\n{error}\nFix this, then run the same command again.", file=sys.stderr)
        return 1
    (output / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\n{EXPLANATION}\n")
    if args.pictures:
        say("[5/5] drawing pictures")
        from toy_pictures import draw_pictures

        folders = {
            name: output / f"seed_{args.seeds[0]}" / config for name, config in MODELS.items()
        }
        for path in draw_pictures(folders, output / "pictures", args.pictures):
            print(f"  {path}")
    say(f"Done in {time.time() - started:.0f} s; all results are in {output}")
    checkpoint = output / f"seed_{args.seeds[0]}" / list(MODELS.values())[-1] / "model_final.pth"
    print(
        "To try the model on other images:\n"
        f"  {os.path.relpath(sys.executable)} demo/demo.py --input {images} \\\n"
        f"      --checkpoint {os.path.relpath(checkpoint)} --output output/tried"
    )
    return 0


EXPLANATION = """\
SGDET: everything is predicted. PRDCLS: boxes and classes are given.
R@n: share of an image's ground-truth relations among its top n predicted triplets, n being the
number of its ground-truth relations.
Instance accuracy: how often the related one of several entities of the same class is ranked first.
Pairing accuracy: how often the true pairing is ranked above swapped ones of neighboring pairs."""

if __name__ == "__main__":
    sys.exit(main())
