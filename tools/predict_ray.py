#!/usr/bin/env python
r"""Predict any number of images with Ray Data, on this machine or on a cluster.

Examples::

    python tools/predict_ray.py --checkpoint model_final.pth --input photos --output found \
        --actors 2
    python tools/predict_ray.py --address auto --checkpoint /shared/model_final.pth \
        --input '/shared/shards/*.tar' --output /shared/found --format parquet \
        --actors 16 --gpus-per-actor 1 --workers 8 --batch-size 16

Each actor has one model and predicts one shard after the other: a tar or Parquet file, or
--shard-size images of folders and lists. A shard's part of the output is written when all of it is
predicted. If an actor dies, another one predicts its shard from the beginning; the same command
continues a run that was killed. All machines must see the input, the checkpoint and --output under
the same paths. docs/bulk.md has the format of the output.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if the package is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  must be imported before Detectron2
import numpy as np
from tqdm import tqdm

from reldn_d2.bulk.output_folder import FORMATS, check_run, is_complete, read_part_keys
from reldn_d2.bulk.shards import (
    Shard,
    ShardResult,
    describe_shards,
    plan_shards,
    predict_shard,
)
from reldn_d2.scripts.bulk_run import check_bulk_options, describe_run
from reldn_d2.scripts.demo import print_left_out
from reldn_d2.scripts.entity_files import FileEntities, read_entities
from reldn_d2.scripts.model_options import (
    add_model_options,
    build_predictor,
    positive,
    zero_or_more,
)
from reldn_d2.utils.user_modules import import_modules, parse_and_import

# A shard that ends its actor so often stops the run, instead of ending one actor after the other.
# Ray repeats it without end, and newer versions have no option for that.
MAX_RETRIES = 10
ATTEMPTS = "_attempts-"  # and the shard's name: a file with one byte per attempt, until it ends
OBJECT_STORE_BYTES = 100 * 2**20  # of a local Ray: only names and counts go through it


def gpu_count(text: str) -> float:
    """Parse a share of one GPU or a whole number of them."""
    value = float(text)
    if not (0 <= value < 1 or value.is_integer() and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is neither in [0, 1] nor a whole number")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="folders, images, globs, .txt lists of paths, tar shards, Parquet files",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that all machines see")
    parser.add_argument("--format", choices=FORMATS, default="jsonl", help="default: jsonl")
    parser.add_argument(
        "--address", help="a cluster: 'auto' on one of its machines; default: Ray on this machine"
    )
    parser.add_argument(
        "--actors", type=positive, default=2, metavar="N", help="max models; default: 2"
    )
    parser.add_argument(
        "--gpus-per-actor",
        type=gpu_count,
        default=0,
        metavar="N",
        help="a fraction such as 0.5 for several actors on one; default: 0, which is the CPU",
    )
    parser.add_argument(
        "--workers",
        type=zero_or_more,
        default=0,
        metavar="N",
        help="processes per actor that read images while the model runs; default: 0, with which "
        "an image that gets its process killed ends the run, instead of being listed",
    )
    parser.add_argument(
        "--shard-size",
        type=positive,
        default=1000,
        metavar="N",
        help="images of folders and lists per shard; default: 1000",
    )
    add_model_options(parser)
    return parser


class ActorError(RuntimeError):
    """An actor cannot work; the message is one line."""


class ShardPredictor:
    """An actor: one model, which predicts one shard after the other."""

    def __init__(self, args: argparse.Namespace, names: Sequence[str], folder: str):
        """
        Args:
            args: the command line.
            names: keys of all images, if entities are looked up by file name.
            folder: the driver's, for relative paths.
        """
        self.args, self.names, self.folder = args, names, folder
        self.predictor = None

    def _load(self) -> None:
        """Load the model; not in the constructor, which Ray calls again and again if it raises."""
        import_modules(self.args.module)
        predictor = build_predictor(self.args)
        self.entities = read_entities(predictor, self.args)
        if isinstance(self.entities, FileEntities):
            self.entities.check_names(self.names)
        self.predictor = predictor

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Predict shards.

        Args:
            batch: ``shard``: shards as JSON.

        Returns:
            ``result``: their ShardResult as JSON; ``failure``: why this actor cannot work, or "".
            Of an error that is raised, Ray's own has several screens.
        """
        results, failures = [], []
        for text in batch["shard"]:
            result, failure = None, ""
            try:
                result = self._predict(Shard(*json.loads(text)))
            except Exception as error:
                reason = " ".join(str(error).split())
                failure = f"{socket.gethostname()}: {type(error).__name__}: {reason}"
            results.append(json.dumps(result))
            failures.append(failure)
        return {"result": results, "failure": failures}

    def _predict(self, shard: Shard) -> ShardResult:
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        args = self.args
        attempts = args.output / f"{ATTEMPTS}{shard.name}"
        if args.output.is_dir():  # otherwise predict_shard says that this machine lacks it
            self._count_attempt(attempts, shard.name)
        if self.predictor is None:
            self._load()
        result = predict_shard(
            shard,
            self.predictor,
            self.entities,
            args.output,
            args.format,
            args.top_k,
            args.min_score,
            args.batch_size,
            args.workers,
        )
        attempts.unlink(missing_ok=True)
        return result

    def _count_attempt(self, attempts: Path, name: str) -> None:
        """Note that a shard is begun, in a file that is still there if this process dies.

        Raises:
            ActorError: it has ended its process too often.
        """
        with open(attempts, "ab") as file:
            file.write(b".")
            count = file.tell()
        if count > 1 + MAX_RETRIES:
            raise ActorError(
                f"part-{name} has ended its process {count - 1} times; with --workers 1 or more, "
                "images that do this are listed"
            )


def prepare(args: argparse.Namespace) -> tuple[list[Shard], list[str]]:
    """Check everything that can be known before the actors start; prepare the output folder.

    The model is built once here, so that an unusable one is a line and not the end of an actor.

    Returns:
        all shards, and the names of the model's classes.

    Raises:
        OSError, ValueError, ImportError: unusable input, output, model or options.
    """
    check_bulk_options(args)
    shards = plan_shards(args.input, args.shard_size)
    if any(shard.container for shard in shards) and (args.boxes or args.detections):
        raise ValueError(
            "--boxes and --detections are for image files; with tar and Parquet files use "
            "--detector or a model with a detector"
        )
    on_cpu = copy(args)
    on_cpu.device = args.device if args.gpus_per_actor == 0 else "cpu"
    predictor = build_predictor(on_cpu)
    description = describe_run(args, predictor, read_entities(predictor, on_cpu))
    description["options"]["shard_size"] = args.shard_size
    check_run(
        args.output,
        {"format": args.format, **description, "images": describe_shards(shards)},
    )
    for file in args.output.glob(f"{ATTEMPTS}*"):  # of an earlier run
        file.unlink()
    return shards, predictor.thing_classes


def describe_idle_actors(shards: Sequence[Shard], actors: int) -> str:
    """Return how --shard-size would give each actor a shard, or "" if each one has one."""
    idle = actors - len(shards)
    if idle <= 0:
        return ""
    images = [len(shard.images) for shard in shards if not shard.container]
    actors_for_images = len(images) + idle
    line = f"{len(shards)} shard{'s'[len(shards) == 1:]} for {actors} actors"
    if sum(images) < actors_for_images:  # also if there are only tar and Parquet files
        return f"{line}: {idle} of these stay idle"
    size = sum(images) // actors_for_images
    return f"{line}: start with --shard-size {size} and another --output to use all of them"


def start_ray(args: argparse.Namespace) -> None:
    """Start Ray on this machine, or connect to the cluster.

    Raises:
        ImportError: Ray is not installed.
        ValueError: no machine has what one actor needs.
        ConnectionError: Ray does not start, or there is no cluster.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"this needs Ray ({error}): pip install 'ray[data]'") from None
    cpus = 1 + args.workers
    options: dict[str, Any] = {"address": args.address}
    if not args.address:
        options = {
            "address": "local",  # otherwise Ray joins a cluster of this machine, if there is one
            "num_cpus": args.actors * cpus,  # processes share the cores if there are fewer
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # of many types, some of them Exception itself
        raise ConnectionError(f"Ray cannot be used: {' '.join(str(error).split())}") from error
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    need = {"CPU": cpus, "GPU": args.gpus_per_actor}
    if not any(all(node.get(x, 0) >= count for x, count in need.items()) for node in nodes):
        raise ValueError(
            f"no machine of {len(nodes)} has {cpus} CPUs (1 + --workers) and "
            f"{args.gpus_per_actor:g} GPUs (--gpus-per-actor) for an actor"
        )


def run_shards(
    args: argparse.Namespace, shards: Sequence[Shard], names: Sequence[str]
) -> Iterator[ShardResult]:
    """Yield the result of each shard, as Ray finishes them.

    Raises:
        ActorError: an actor raised an error or died again and again.
    """
    import ray.data
    import ray.exceptions

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    dataset = ray.data.from_items(
        [{"shard": json.dumps(shard)} for shard in shards], override_num_blocks=len(shards)
    )
    dataset = dataset.map_batches(
        ShardPredictor,
        batch_size=1,
        batch_format="numpy",
        fn_constructor_args=(args, names, os.getcwd()),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=args.actors, initial_size=args.actors
        ),
        num_cpus=1 + args.workers,
        num_gpus=args.gpus_per_actor,
    )
    try:
        for row in dataset.iter_rows():
            if row["failure"]:
                raise ActorError(
                    f"an actor failed on {row['failure']}. The same command continues this run"
                )
            yield ShardResult(*json.loads(row["result"]))
    except ray.exceptions.RayError as error:
        last_line = str(error).strip().splitlines()[-1]
        raise ActorError(
            f"an actor failed: {last_line}. The same command continues this run"
        ) from error


def run(args: argparse.Namespace) -> int:
    """Predict what has no result yet and return the exit status."""
    shards, thing_classes = prepare(args)
    if idle := describe_idle_actors(shards, args.actors):
        print(idle)
    remaining, predicted, errors = [], 0, 0
    for shard in shards:
        if is_complete(args.output, shard.name, args.format):
            keys, error_keys = read_part_keys(args.output, shard.name, args.format)
            predicted, errors = predicted + len(keys), errors + len(error_keys)
        else:
            remaining.append(shard)
    earlier = len(shards) - len(remaining)
    if earlier:
        print(f"{earlier} of {len(shards)} shards were done before")
    left_out: Counter[str] = Counter()
    problems = []
    if remaining:
        by_name = args.boxes is not None or args.detections is not None
        names = [key for shard in shards for key, _ in shard.images] if by_name else []
        start_ray(args)
        start, before = time.monotonic(), predicted + errors
        with tqdm(total=len(shards), initial=earlier, unit="shard") as progress:
            for result in run_shards(args, remaining, names):
                predicted += result.predicted
                errors += result.errors
                left_out.update(result.left_out)
                problems += [result.problem] if result.problem else []
                count = predicted + errors - before
                rate = count / (time.monotonic() - start)
                progress.set_postfix_str(f"{count} images, {rate:.1f}/s", refresh=False)
                progress.update()
    print(f"{predicted} of {predicted + errors} images done in {args.output}")
    print_left_out(left_out, thing_classes)
    if errors:
        print(
            f"{errors} could not be used: {args.output}/_errors-*.jsonl list them with the reason; "
            "remove one and its part-* to try them again",
            file=sys.stderr,
        )
    if problems:
        print("\n  ".join([f"{len(problems)} shards have no part:", *problems]), file=sys.stderr)
    return 1 if errors or problems else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the prediction and return the exit status."""
    args = parse_and_import(build_parser(), arguments)
    try:
        return run(args)
    except (OSError, ValueError, ImportError, ActorError) as error:
        print(f"predict_ray.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
