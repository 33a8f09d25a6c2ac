"""tools/predict_ray.py on a local Ray, with an actor killed in the middle."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from pathlib import Path

import predict_ray
import pytest
from model_utils import ROOT
from PIL import Image
from usage_utils import picture, write_checkpoint

from reldn_d2.bulk import shards as shards_module
from reldn_d2.bulk.output_folder import check_run, write_part
from reldn_d2.bulk.shards import Shard, plan_shards, predict_shard
from reldn_d2.predictor import RelationPredictor
from reldn_d2.scripts.entity_files import FileEntities
from reldn_d2.utils.image_io import ImageError

COUNT = 48


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 48 images in three subfolders and two files that are not images."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(COUNT):
        (folder / str(seed % 3)).mkdir(exist_ok=True)
        Image.fromarray(picture(seed=seed)).save(folder / f"{seed % 3}/{seed // 3:02}.png")
    (folder / "text.jpg").write_text("hello")
    (folder / "1/zero.jpg").write_bytes(b"")
    return folder


@pytest.fixture
def shards(tmp_path):
    """Two tar files with two images each, and one that is cut off."""
    for name in ("0.tar", "1.tar", "cut.tar"):
        with tarfile.open(tmp_path / name, "w") as archive:
            for seed in range(2):
                file = io.BytesIO()
                Image.fromarray(picture(seed=seed)).save(file, "png")
                info = tarfile.TarInfo(f"{seed}.png")
                info.size = file.tell()
                file.seek(0)
                archive.addfile(info, file)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:1000])
    return tmp_path


def keys(folder: Path, pattern: str = "part-*.jsonl") -> list[str]:
    """Return the keys of all lines, with repeats."""
    lines = [x for file in sorted(folder.glob(pattern)) for x in file.read_text().splitlines()]
    return [json.loads(line)["key"] for line in lines]


def images_in(folder: Path) -> set[str]:
    return {str(x.relative_to(folder)) for x in folder.rglob("*.png")}


def test_plan_shards_folders_and_containers(folder, shards):
    plan = plan_shards([folder, str(shards / "*.tar")], 20)
    assert [x.name for x in plan] == [f"{i:06}" for i in range(6)]
    assert [len(x.images) for x in plan] == [20, 20, 10, 0, 0, 0]
    assert [Path(x.container).name for x in plan[3:]] == ["0.tar", "1.tar", "cut.tar"]
    assert {key for x in plan for key, _ in x.images} == images_in(folder) | {
        "text.jpg",
        "1/zero.jpg",
    }
    with pytest.raises(ImageError, match="two images have the key"):
        plan_shards([folder / "0", folder / "1"], 20)


def test_predict_shard_is_written_once(checkpoint, shards, tmp_path):
    predictor = RelationPredictor.from_checkpoint(checkpoint, "cpu")
    rest = (FileEntities(None, None), tmp_path / "out", "jsonl", 20, 0.01)
    first, _, cut = plan_shards([str(shards / "*.tar")], 5)
    with pytest.raises(ValueError, match="out is not the output folder on .* same path"):
        predict_shard(first, predictor, *rest)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/_run.json").write_text("{}")
    assert predict_shard(first, predictor, *rest)[:3] == ("000000", 2, 0)
    written = tmp_path / "out/part-000000.jsonl"
    assert keys(tmp_path / "out") == [f"{shards}/0.tar/{i}.png" for i in range(2)]
    before = written.stat().st_mtime_ns
    assert predict_shard(first, None, *rest)[:3] == ("000000", 2, 0)
    assert written.stat().st_mtime_ns == before
    result = predict_shard(cut, predictor, *rest)
    assert "cut.tar: cannot be read as a tar file" in result.problem
    assert not (tmp_path / "out/part-000002.jsonl").exists()


@pytest.fixture
def one_model(checkpoint, tmp_path):
    """The arguments of predict_shard after the shard, for an output folder "out"."""
    check_run(tmp_path / "out", {})
    predictor = RelationPredictor.from_checkpoint(checkpoint, "cpu")
    return predictor, FileEntities(None, None), tmp_path / "out", "jsonl", 20, 0.01


def test_predict_shard_input_that_this_machine_lacks_is_no_part(one_model, folder, tmp_path):
    missing = Shard("000009", "", (("a", "none/a.png"), ("b", "none/b.png")))
    result = predict_shard(missing, *one_model)
    assert "has none of its files, such as none/a.png: all machines need" in result.problem
    assert not list((tmp_path / "out").glob("*0*"))
    one_missing = Shard("000009", "", (*missing.images, ("c", str(folder / "0/00.png"))))
    assert predict_shard(one_missing, *one_model)[:3] == ("000009", 1, 2)


def test_predict_shard_reading_processes_that_die_are_its_problem(
    one_model, folder, tmp_path, monkeypatch
):
    def die(*_):
        raise ChildProcessError("processes that read images are killed")
        yield

    monkeypatch.setattr(shards_module, "predict_images", die)
    (shard,) = plan_shards([folder], 100)
    result = predict_shard(shard, *one_model)
    assert result.problem == "part-000000: processes that read images are killed"
    assert not list((tmp_path / "out").glob("*0*"))


@pytest.mark.parametrize("times", [1, 9])
def test_predict_shard_that_another_process_writes_as_well_loses_nothing(
    times, one_model, folder, tmp_path, monkeypatch
):
    """The other one, which was believed to be dead, has an error for an image and this one none."""
    calls = []

    def interleave(out, name, kind, records, errors):
        write_part(out, name, kind, records, errors)
        calls.append(name)
        if len(calls) <= times:
            error_file = out / f"_errors-{name}.jsonl"
            before = error_file.read_bytes()
            write_part(out, name, kind, records[1:], errors)
            error_file.write_bytes(before)

    monkeypatch.setattr(shards_module, "write_part", interleave)
    (shard,) = plan_shards([folder], 100)
    if times > 3:
        with pytest.raises(OSError, match="part-000000.jsonl is not what was written into it"):
            predict_shard(shard, *one_model)
        return
    predict_shard(shard, *one_model)
    assert set(keys(tmp_path / "out")) == images_in(folder) and len(calls) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "EMPTY"], "no image in this folder"),
        (["--input", "PHOTOS", "--output", "x.jsonl"], "give --output FOLDER"),
        (["--input", "PHOTOS", "--checkpoint", "none.pth"], "No checkpoint 'none.pth'"),
        (["--input", "TARS", "--boxes", "b.json"], "--boxes and --detections are for image files"),
        (["--input", "PHOTOS", "--top-k", "7"], "another run: --top-k was 20 and is 7"),
        (
            ["--input", "PHOTOS", "--shard-size", "9"],
            "another run: --shard-size was 1000 and is 9. Give",
        ),
        (["--input", "PHOTOS"], "this needs Ray"),
    ],
)
def test_predict_ray_problems_at_the_start_print_one_line(
    arguments, message, checkpoint, folder, shards, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": tmp_path / "empty", "PHOTOS": folder, "TARS": shards / "0.tar"}
    common = ["--checkpoint", checkpoint, "--device", "cpu", "--output", str(tmp_path / "out")]
    if "another" in message:
        assert predict_ray.main([*common, "--input", str(folder)]) == 1
        capsys.readouterr()
    for short, name in names.items():
        arguments = [x.replace(short, str(name)) for x in arguments]
    assert predict_ray.main([*common, *arguments]) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error and error.startswith("predict_ray.py: ")


def test_predict_ray_continued_run_counts_all_parts(
    checkpoint, folder, one_model, tmp_path, capsys, monkeypatch
):
    """The second run has nothing left to do, but the same status and counts."""
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["--checkpoint", checkpoint, "--device", "cpu", "--input", str(folder)]
    command += ["--output", str(tmp_path / "run"), "--shard-size", "20"]
    assert predict_ray.main(command) == 1
    assert "this needs Ray" in capsys.readouterr().err
    for shard in plan_shards([folder], 20):
        predict_shard(shard, *one_model[:2], tmp_path / "run", *one_model[3:])
    assert predict_ray.main(command) == 1
    printed = capsys.readouterr()
    assert "3 of 3 shards were done before" in printed.out
    assert f"{COUNT} of {COUNT + 2} images done in {tmp_path}/run" in printed.out
    assert f"2 could not be used: {tmp_path}/run/_errors-*.jsonl" in printed.err
    assert "remove one and its part-* to try them again" in printed.err


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "1.5", "x"])
def test_predict_ray_bad_number_of_gpus_is_a_usage_error(text, capsys):
    arguments = ["--input", "a", "--output", "b", "--gpus-per-actor"]
    with pytest.raises(SystemExit):
        predict_ray.main([*arguments, text])
    assert "argument --gpus-per-actor: " in capsys.readouterr().err
    parsed = predict_ray.build_parser().parse_args([*arguments, "0.25"])
    assert parsed.gpus_per_actor == 0.25


class StandInError(Exception):
    """Ray's base class of errors."""


class StandInData:
    """The parts of ray.data that the program uses, with one actor, which is in this process."""

    DataContext = types.SimpleNamespace(get_current=types.SimpleNamespace)
    ActorPoolStrategy = dict

    @staticmethod
    def from_items(items, override_num_blocks):
        assert override_num_blocks == len(items)
        return StandInData(items)

    def __init__(self, items):
        self.items = items

    def map_batches(self, actor_class, fn_constructor_args, **options):
        # Ray 2.64 has no others for its remote functions.
        assert options.keys() == {"batch_size", "batch_format", "compute", "num_cpus", "num_gpus"}
        actor = actor_class(*fn_constructor_args)
        batches = (actor({key: [x[key]] for key in x}) for x in self.items)
        return StandInData({key: x[key][0] for key in x} for x in batches)

    def iter_rows(self):
        return iter(self.items)


class StandInForRay(types.ModuleType):
    """Ray with one machine of 4 CPUs and 1 GPU."""

    def __init__(self):
        super().__init__("ray")
        self.data = StandInData
        self.options: dict = {}

    def init(self, **options):
        self.options = options
        if options.get("address") == "nowhere:1":
            raise ConnectionError("Could not find\nany running instance")

    def nodes(self):
        alive = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}
        return [alive, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--address", "auto", "--gpus-per-actor", "0.5", "--workers", "3"], None),
        ([], None),
        (["--address", "nowhere:1"], "Ray cannot be used: Could not find any running instance"),
        (
            ["--address", "auto", "--gpus-per-actor", "2"],
            "no machine of 1 has 1 CPUs (1 + --workers) and 2 GPUs (--gpus-per-actor) for an actor",
        ),
        (["--address", "auto", "--workers", "4"], "no machine of 1 has 5 CPUs (1 + --workers)"),
    ],
)
def test_start_ray_finds_a_machine_for_an_actor(options, message, monkeypatch):
    ray = StandInForRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    args = predict_ray.build_parser().parse_args(["--input", "a", "--output", "b", *options])
    if message is None:
        predict_ray.start_ray(args)
    else:
        with pytest.raises((ValueError, ConnectionError), match=re.escape(message)):
            predict_ray.start_ray(args)
    if args.address:
        assert ray.options["address"] == args.address and "num_cpus" not in ray.options
    else:  # also if a cluster runs on this machine
        assert ray.options["address"] == "local" and ray.options["num_cpus"] == 2


def predict_with_stand_in(monkeypatch, arguments) -> int:
    """Run the program with one actor, which is in this process."""
    ray = StandInForRay()
    for name, module in (
        *(("ray", ray), ("ray.data", ray.data)),
        ("ray.exceptions", types.SimpleNamespace(RayError=StandInError)),
    ):
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            monkeypatch.setattr(ray, name.split(".")[1], module, raising=False)
    return predict_ray.main(arguments)


@pytest.mark.parametrize(
    "trouble, message",
    [
        ("", ""),
        ("model", "an actor failed on .*: RuntimeError: the model is broken. The same command"),
        ("load", "an actor failed on .*: ValueError: no such weights here. The same command con"),
        ("ray", "an actor failed: it has died. The same command continues this run"),
    ],
)
def test_predict_ray_results_and_failures_of_actors(
    trouble, message, checkpoint, folder, shards, tmp_path, capsys, monkeypatch
):
    arguments = ["--checkpoint", checkpoint, "--device", "cpu", "--output", str(tmp_path / "out")]
    arguments += ["--input", str(folder / "0"), str(shards / "*.tar")]

    def fail(*_, **options):
        raise {
            "load": ValueError("no such\nweights here"),
            "ray": StandInError("a\nit has died"),
        }.get(trouble, RuntimeError("the model is broken"))

    if trouble == "model":
        monkeypatch.setattr(RelationPredictor, "predict_inputs", fail)
    if trouble == "load":
        monkeypatch.setattr(predict_ray.ShardPredictor, "_load", fail)
    if trouble == "ray":
        monkeypatch.setattr(predict_ray.ShardPredictor, "__call__", fail)
    assert predict_with_stand_in(monkeypatch, arguments) == 1
    printed = capsys.readouterr()
    if trouble:
        assert re.search(f"^predict_ray.py: {message}", printed.err.splitlines()[-1])
        return
    assert "20 of 20 images done" in printed.out
    assert "1 shards have no part:\n  part-000003: " in printed.err and "cut.tar" in printed.err
    assert len(keys(tmp_path / "out")) == 20
    assert not list((tmp_path / "out").glob("_attempts-*"))
    # The cut file is replaced, and the run is continued.
    (shards / "cut.tar").write_bytes((shards / "1.tar").read_bytes())
    assert predict_with_stand_in(monkeypatch, arguments) == 0
    assert "3 of 4 shards were done before\n22 of 22 images" in capsys.readouterr().out


def test_shard_predictor_shard_that_ends_its_process_again_and_again_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the actor does it too; this goes back
    check_run(tmp_path / "out", {})
    attempts = tmp_path / "out/_attempts-000003"
    attempts.write_bytes(b"." * 10)
    arguments = ["--input", "a", "--output", "out", "--checkpoint", "none.pth"]
    args = predict_ray.build_parser().parse_args(
        arguments
    )  # a path relative to the driver's folder
    actor = predict_ray.ShardPredictor(args, [], str(tmp_path))
    batch = {"shard": [json.dumps(Shard("000003", "", (("a", "a"),)))]}
    assert "none.pth" in actor(batch)["failure"][0]
    assert attempts.read_bytes() == b"." * 11
    (failure,) = actor(batch)["failure"]
    assert "part-000003 has ended its process 11 times; with --workers 1 or more" in failure


@pytest.mark.parametrize(
    "actors, containers, message",
    [
        (3, [], ""),
        (4, [], "3 shards for 4 actors: start with --shard-size 12 and another --output"),
        (100, [], "3 shards for 100 actors: 97 of these stay idle"),
        (5, ["0.tar"], "4 shards for 5 actors: start with --shard-size 12 and another --output"),
    ],
)
def test_describe_idle_actors(actors, containers, message, folder, shards):
    plan = plan_shards([folder, *(shards / x for x in containers)], 20)
    assert predict_ray.describe_idle_actors(plan, actors).startswith(message)
    assert bool(message) == bool(predict_ray.describe_idle_actors(plan, actors))


SLOW_MODEL = """
import os, pathlib, time
from reldn_d2.predictor import RelationPredictor

folder, predict = pathlib.Path(__file__).parent, RelationPredictor.predict_inputs

def slow(self, inputs):
    with open(folder / "log", "a") as file:
        for x in inputs:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or "none"
            file.write(f"{os.getpid()} {gpus} {x.record['file_name']}\\n")
    time.sleep(0 if (folder / "fast").exists() else 0.3)
    return predict(self, inputs)

RelationPredictor.predict_inputs = slow
"""

TWO_MACHINES = """
import sys
from ray.cluster_utils import Cluster

machine = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
cluster.add_node(**machine)
print("ADDRESS", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def read_log(folder: Path) -> list[tuple[int, str, str]]:
    """Return (process, its GPUs, key) of each image that the model has been given."""
    rows = [x.split(" ", 2) for x in (folder / "log").read_text().splitlines()]
    return [(int(pid), gpus, "/".join(Path(path).parts[-2:])) for pid, gpus, path in rows]


def kill_busy_actor(folder: Path, out: Path, process: subprocess.Popen) -> tuple[int, set[str]]:
    """Kill an actor that has predicted a part of its shard.

    Returns:
        its id, and the images that it had predicted and not written.
    """
    while True:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
        if not (folder / "log").exists() or len(list(out.glob("part-*"))) < 2:
            continue
        rows = read_log(folder)
        if len({pid for pid, *_ in rows}) < 2:
            continue
        victim = rows[-1][0]
        os.kill(victim, signal.SIGSTOP)
        lost = {key for pid, _, key in read_log(folder) if pid == victim} - set(keys(out))
        if lost:
            os.kill(victim, signal.SIGKILL)
            return victim, lost
        os.kill(victim, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="stops a process with a signal")
def test_predict_ray_actor_killed_in_the_middle_loses_and_doubles_nothing(
    checkpoint, folder, tmp_path
):
    pytest.importorskip("ray", reason="tools/predict_ray.py needs Ray")
    out = tmp_path / "out"
    (tmp_path / "slow_model.py").write_text(SLOW_MODEL)
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/predict_ray.py"), "--device"]
    command += ["cpu", "--checkpoint", checkpoint, "--input", str(folder), "--output", str(out)]
    command += ["--actors", "2", "--shard-size", "4", "--module", str(tmp_path / "slow_model.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_agent_register_timeout_ms": "300000"}
    environment["RAY_TMPDIR"] = tempfile.mkdtemp()  # a short path, as its sockets need
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        victim, lost = kill_busy_actor(tmp_path, out, process)
        before = {pid for pid, *_ in read_log(tmp_path)}
        done = len(list(out.glob("part-*")))
        (tmp_path / "fast").touch()
        printed, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1 and "2 could not be used" in printed, printed
    assert len(before) == 2 and done < 13, "killed in the middle"
    assert f"{COUNT} of {COUNT + 2} images done" in printed, printed
    assert len(list(out.glob("part-*"))) == 13
    assert sorted(keys(out)) == sorted(images_in(folder))
    assert sorted(keys(out, "_errors-*.jsonl")) == ["1/zero.jpg", "text.jpg"]
    rows = read_log(tmp_path)
    assert {pid for pid, *_ in rows} - before, "another actor took its place"
    assert lost <= {key for pid, _, key in rows if pid != victim}, "its shard was repeated"
    assert len(rows) == COUNT + len(lost) and {gpus for _, gpus, _ in rows} == {"none"}
    print(f"killed with {done} of 13 parts written; {len(lost)} images were predicted twice")

    # What is missing, here two parts, is predicted by the same command, also on a cluster.
    for name in ("part-000003.jsonl", "part-000011.jsonl"):
        (out / name).unlink()
    (tmp_path / "log").unlink()
    cluster = subprocess.Popen(
        [sys.executable, "-c", TWO_MACHINES],
        env=environment,
        start_new_session=True,
        stdin=subprocess.PIPE,
        **pipes,
    )
    try:
        address = next(x.split()[1] for x in cluster.stdout if x.startswith("ADDRESS "))
        command += ["--address", address, "--gpus-per-actor", "1"]
        again = subprocess.run(
            command, env=environment, text=True, capture_output=True, check=False
        )
        assert "11 of 13 shards were done before" in again.stdout, again.stdout + again.stderr
        assert f"{COUNT} of {COUNT + 2} images done" in again.stdout and again.returncode == 1
        assert sorted(keys(out)) == sorted(images_in(folder))
        rows = read_log(tmp_path)
        assert len(rows) == 8 and {gpus for _, gpus, _ in rows} == {"0"}
    finally:
        cluster.communicate(timeout=100)  # the end of its input ends it
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)
