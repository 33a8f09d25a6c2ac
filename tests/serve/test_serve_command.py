"""The command ``python -m reldn_d2.serve``, its documentation and its container files."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request

import pytest
import setup_env
import yaml
from benchmarks.service import served
from model_utils import ROOT
from usage_utils import write_precomputed_checkpoint

pytest.importorskip("fastapi", reason="the service needs FastAPI: pip install 'reldn_d2[serve]'")

from serving import running

from reldn_d2.predictor import RelationPredictor
from reldn_d2.serve.__main__ import bind, build_parser, main, server_config
from reldn_d2.serve.prediction_worker import CLOSE_SECONDS

DOCUMENT = (ROOT / "docs/serve.md").read_text()
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()


def test_main_serves_until_sigterm(checkpoint):
    options = ["--checkpoint", str(checkpoint)]
    with served(options, {**os.environ, "PYTHONPATH": str(ROOT)}) as server:
        url = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
            assert json.load(response) == {"status": "ok"}
        with urllib.request.urlopen(f"{url}/", timeout=60) as response:
            assert b"Relations in an image" in response.read()
    assert server.process.returncode == 0


def test_main_errors_are_one_line_before_anything_is_served(tmp_path, capsys):
    (tmp_path / "no_model.pth").write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--checkpoint", "missing.pth", "--port", "0"], "missing.pth"),
            (["--checkpoint", str(tmp_path / "no_model.pth"), "--port", "0"], "no_model.pth"),
            (["--pretrained", "vrd", "--port", "0"], "vrd_boxes"),
            (["--pretrained", "vrd_boxes", "--port", port], "in use"),
            (["--pretrained", "vrd_boxes", "--host", "no.such.host.invalid"], "--host no.such"),
            (
                ["--pretrained", "vrd_boxes", "--port", "0", "--device", "x"],
                "device 'x' is unknown",
            ),
            (["--pretrained", "vrd_boxes", "--port", "0", "--detector", "x.yaml"], "x.yaml"),
            (["--pretrained", "vrd_boxes", "--port", "0", "--detector-weights", "x"], "--detector"),
        ):
            assert main(arguments) == 1
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("reldn-serve: ") and message in error, error


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "python_multipart"])
def test_main_without_the_extra_says_what_to_install(module, monkeypatch, capsys):
    for name in [x for x in sys.modules if x.startswith("reldn_d2.serve.")]:
        if name != "reldn_d2.serve.__main__":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["--pretrained", "vrd_boxes", "--port", "0"]) == 1
    assert "pip install 'reldn_d2[serve]'" in capsys.readouterr().err


def test_build_parser_refuses_values_that_cannot_work(capsys):
    for arguments in ([], ["--pretrained", "a", "--checkpoint", "b"]):
        with pytest.raises(SystemExit):
            build_parser().parse_args(arguments)
    for option in ("--max-boxes 0", "--timeout 0", "--batch-size x", "--port 70000", "--port -1"):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["--pretrained", "vrd_boxes", *option.split()])
    assert build_parser().parse_args(["--pretrained", "vrd_boxes"]).host == "127.0.0.1"


def test_bind_listens_on_ipv6_too():
    try:
        with bind("::1", 0) as listener:
            assert listener.getsockname()[0] == "::1"
    except ValueError:
        pytest.skip("no IPv6 here")


def test_model_without_detector_is_described_and_its_confidence_threshold_used(tmp_path):
    from reldn_d2.serve.__main__ import build_application

    path = str(write_precomputed_checkpoint(tmp_path))
    arguments = ["--checkpoint", path, "--device", "cpu", "--confidence-threshold", "0.4"]
    app = build_application(build_parser().parse_args([*arguments, "--max-boxes", "7"]))
    (route,) = [x for x in app.routes if getattr(x, "path", "") == "/model"]
    import asyncio

    about = asyncio.run(route.endpoint())
    assert about["needs_boxes"] and about["needs_image"] and about["limits"]["max_boxes"] == 7


# ---------------------------------------------------------------------------------- documents


def documented(program: str) -> list[str]:
    """Return the commands of docs/serve.md that start with a program."""
    blocks = re.findall(r"^```bash.*?\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [x for x in lines if x.startswith(f"{program} ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on PATH")
def test_documented_curl_commands_succeed():
    commands = documented("curl")
    assert len(commands) == 6
    predictor = RelationPredictor.from_pretrained("vrd_boxes", "cpu")
    boxes = json.loads((ROOT / "docs/photo_boxes.json").read_text())["photo.jpg"]
    answers = []
    for detector, part in ((None, commands[:5]), (lambda rgb: boxes, commands[5:])):
        with running(predictor, detector) as service:
            for command in part:
                command = command.replace("http://127.0.0.1:8000", service.url)
                answers.append(
                    subprocess.run(
                        ["curl", "-sS", "--fail-with-body", *shlex.split(command)[1:]],
                        cwd=ROOT,
                        capture_output=True,
                        text=True,
                        check=True,
                    ).stdout
                )
    two, alone, about, health = map(json.loads, answers[:4])
    whole = json.loads(answers[5])
    assert len(whole["relations"]["scores"]) == 20 and whole["width"] == 512
    assert two["instances"]["class_names"] == ["person", "camera"]
    assert alone["height"] == 320 and 0 < len(alone["relations"]["scores"]) <= 5
    assert about["name"] == "test model" and health["status"] == "ok"
    assert 'reldn_requests_total{status="200"} 2' in answers[4]
    keys = set(whole) | set(whole["instances"]) | set(whole["relations"])
    assert all(f"`{key}`" in DOCUMENT for key in keys)


def test_documented_limits_are_the_defaults():
    args = vars(build_parser().parse_args(["--pretrained", "vrd_boxes"]))
    rows = re.findall(r"^\| `--([\w-]+)` \| (\d+) \|", DOCUMENT, re.MULTILINE)
    assert len(rows) == 6
    for name, value in rows:
        assert args[name.replace("-", "_")] == int(value)


def test_documented_docker_commands_name_files_of_the_repository():
    names = re.findall(r"docker/[\w.]+", " ".join(documented("docker")))
    assert set(names) == {"docker/Dockerfile", "docker/compose.yaml"}
    assert all((ROOT / x).is_file() for x in names)


# ---------------------------------------------------------------------------------- containers


def instruction(name: str) -> str:
    """Return the arguments of the one instruction of this name in the Dockerfile."""
    text = DOCKERFILE.replace("\\\n", " ")
    (found,) = re.findall(rf"^{name} (.*)$", text, re.MULTILINE)
    return found


def test_dockerfile_starts_the_service():
    program, *options = json.loads(instruction("ENTRYPOINT"))
    assert program == ".venv/bin/reldn-serve"
    args = build_parser().parse_args([*options, *json.loads(instruction("CMD"))])
    assert (args.host, str(args.port)) == ("0.0.0.0", instruction("EXPOSE"))


def test_dockerfile_sets_the_environment_up_with_the_pinned_versions():
    assert re.findall(r"setup_env.py (.*?) ", instruction("RUN")) == ["install"]
    assert "torch=cpu" in instruction("RUN") and "requirements/constraints.txt" in instruction(
        "RUN"
    )
    version = re.match(r"python:(\d+)\.(\d+)-slim", instruction("FROM"))
    assert tuple(map(int, version.groups())) in setup_env.SUPPORTED


def test_dockerfile_health_check_succeeds(predictor):
    check = instruction("HEALTHCHECK").partition("CMD ")[2]
    program, option, code = json.loads(check)
    with running(predictor) as service:
        code = code.replace("http://127.0.0.1:8000", service.url)
        subprocess.run([sys.executable, option, code], check=True)


def test_dockerignore_keeps_what_the_image_needs():
    lines = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    kept = {x[1:] for x in lines if x.startswith("!")}
    assert "*" in lines and all((ROOT / x).exists() for x in kept)
    assert {"pyproject.toml", "reldn_d2", "requirements", "tools/setup_env.py"} <= kept
    assert {"README.md", "LICENSE", "configs"} <= kept  # of pyproject.toml, and of a link


def test_compose_file_runs_the_image():
    (service,) = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"].values()
    folder = ROOT / "docker" / service["build"]["context"]
    assert (folder / service["build"]["dockerfile"]).samefile(ROOT / "docker/Dockerfile")
    assert service["ports"] == [f"127.0.0.1:8000:{instruction('EXPOSE')}"]
    build_parser().parse_args(service["command"])
    grace = int(service["stop_grace_period"].removesuffix("s"))
    timeout = build_parser().parse_args(service["command"]).timeout
    shutdown = server_config(None, timeout).timeout_graceful_shutdown
    assert shutdown > 2 * timeout  # to receive a request, and to answer it
    assert grace > shutdown + CLOSE_SECONDS
