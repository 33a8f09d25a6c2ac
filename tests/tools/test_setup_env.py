"""The setup of the environment: which steps run again, which Python is used, what is missing."""

import ast
import importlib.util
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_utils import ROOT

SETUP_ENV = ROOT / "tools/setup_env.py"


@pytest.fixture
def setup_env(monkeypatch, tmp_path):
    """`tools/setup_env.py` for an environment under ``tmp_path``."""
    spec = importlib.util.spec_from_file_location("setup_env", SETUP_ENV)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "VENV_PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setattr(module, "NOTE", tmp_path / ".venv/reldn_d2_setup.json")
    monkeypatch.setattr(module, "LOG", tmp_path / ".venv/setup.log")
    return module


def site_packages(setup_env) -> Path:
    version = "python{}.{}".format(*sys.version_info[:2])
    return setup_env.VENV / "lib" / version / "site-packages"


@pytest.fixture
def commands(monkeypatch, setup_env):
    """Records the commands of the setup and runs none; the first creates an environment."""
    made = []

    def call(command, env, cwd, stdout, stderr):
        made.append(command)
        stdout.write(f"output of command {len(made)}\n".encode())
        if "venv" in command:  # a link: its own paths are those of the running environment
            setup_env.VENV_PYTHON.parent.mkdir()
            setup_env.VENV_PYTHON.symlink_to(sys.executable)
            site_packages(setup_env).mkdir(parents=True)
        return 1 if call.fail_at == len(made) else 0

    call.fail_at = None
    made_by = SimpleNamespace(made=made, call=call, asked=[])
    monkeypatch.setattr(setup_env.subprocess, "call", call)
    monkeypatch.setattr(setup_env, "find_python", lambda: sys.executable)
    monkeypatch.setattr(setup_env, "check_index", lambda _, *which: made_by.asked.append(which))
    return made_by


def requirement_files(commands) -> list[str]:
    return [Path(c[c.index("-r") + 1]).name for c in commands.made if "-r" in c]


BASE = ["build.txt", "torch.txt", "detectron2.txt", "libraries.txt"]


def test_install_twice_installs_only_new_groups(setup_env, commands):
    setup_env.install(["base"])
    assert requirement_files(commands) == BASE
    commands.made.clear()
    setup_env.install(["base"])
    assert commands.made == []
    setup_env.install(["base", "test"])
    assert requirement_files(commands) == ["test.txt"]


def test_install_prints_one_line_per_step_and_logs_the_output(setup_env, commands, capsys):
    setup_env.install(["base"])
    lines = capsys.readouterr().out.splitlines()
    assert [x[:5] for x in lines if x.startswith("[")] == [f"[{i}/6]" for i in range(1, 7)]
    assert len(lines) == 9 and str(setup_env.LOG) in lines[0]
    log = setup_env.LOG.read_text()
    assert "[2/6] installing pip and build tools\noutput of command 2\n" in log


def test_install_writes_only_into_its_environment(setup_env, commands, tmp_path):
    """Not into that of the Python which ``.venv/bin/python`` is a link to."""
    setup_env.install(["base"])
    file = site_packages(setup_env) / "reldn_d2_clone.pth"
    assert file.read_text() == f"{ROOT}\n"
    assert [x.name for x in tmp_path.iterdir()] == [".venv"]


def test_install_failed_step_exits_and_the_next_run_continues(setup_env, commands, capsys):
    commands.call.fail_at = 3
    with pytest.raises(SystemExit) as stopped:
        setup_env.install(["base"])
    message = str(stopped.value)
    assert re.search(r"\[3/6\] installing torch .*run the same command again", message)
    assert "\noutput of command 3\n" in message and str(setup_env.LOG) in message
    assert json.loads(setup_env.NOTE.read_text()) == {}
    commands.made.clear()
    commands.call.fail_at = None
    setup_env.install(["base"])
    assert requirement_files(commands) == BASE and "venv" not in commands.made[0]
    assert "[1/5] installing pip" in capsys.readouterr().out


def test_install_incomplete_venv_is_created_again(setup_env, commands):
    setup_env.VENV.mkdir()
    setup_env.write_note({})
    (setup_env.VENV / "left over").touch()
    setup_env.install(["base"])
    assert "venv" in commands.made[0]
    assert not (setup_env.VENV / "left over").exists()


def test_install_changed_requirement_installs_it(setup_env, commands, monkeypatch, tmp_path):
    setup_env.install(["base"])
    commands.made.clear()
    pins = tmp_path / "constraints.txt"
    pins.write_text("torch==2.1\n")
    monkeypatch.setattr(setup_env, "PINS", pins)
    setup_env.install(["base"])
    assert requirement_files(commands) == BASE


def test_install_venv_of_the_user_is_not_touched(setup_env, commands):
    setup_env.VENV.mkdir()
    (setup_env.VENV / "pyvenv.cfg").touch()
    with pytest.raises(SystemExit, match="was not made by `make setup`"):
        setup_env.install(["base"])
    assert commands.made == []


def test_install_too_little_space_exits_before_anything_is_written(
    setup_env, commands, monkeypatch
):
    usage = SimpleNamespace(free=6.9e9)
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match="up to 7 GB, but only 6.9 GB are free.*TORCH=cpu"):
        setup_env.main(["install"])
    assert commands.made == [] and not setup_env.VENV.exists()
    setup_env.main(["install", "torch=cpu"])
    usage.free = 1e9
    shutil.rmtree(setup_env.VENV)
    with pytest.raises(SystemExit, match="up to 2 GB, but only 1.0 GB are free there: free some"):
        setup_env.main(["install", "torch=cpu"])


def test_install_no_permission_exits_with_one_line(setup_env, commands, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()  # nothing can be created below it, even by root
    for name, path in (("VENV", ""), ("NOTE", "note"), ("LOG", "log")):
        monkeypatch.setattr(setup_env, name, file / ".venv" / path)
    with pytest.raises(SystemExit) as stopped:
        setup_env.main(["install"])
    assert "cannot write its environment" in stopped.value.code
    assert "\n" not in stopped.value.code and commands.made == []


def test_install_cpu_torch_takes_the_build_from_its_index(setup_env, commands, monkeypatch):
    monkeypatch.setenv("TORCH_INDEX", "https://my.index/cpu")
    setup_env.main(["install", "torch=cpu"])
    assert requirement_files(commands) == ["build.txt", "torch-cpu.txt", *BASE[2:]]
    (command,) = [x for x in commands.made if any("torch-cpu" in word for word in x)]
    assert command[command.index("--extra-index-url") + 1] == "https://my.index/cpu"
    assert commands.asked == [(), ("torch", "https://my.index/cpu")]
    commands.made.clear()
    setup_env.main(["install"])  # keeps the build that is installed
    assert commands.made == []


def test_install_cpu_torch_index_unreachable_exits_before_installing(
    setup_env, commands, monkeypatch
):
    def check_index(environment, package="pip", url=""):
        if url:
            sys.exit("no index")

    monkeypatch.setattr(setup_env, "check_index", check_index)
    with pytest.raises(SystemExit, match="no index"):
        setup_env.main(["install", "torch=cpu"])
    assert requirement_files(commands) == []


def test_install_on_macos_takes_the_cpu_build_from_pips_index(setup_env, commands, monkeypatch):
    """No other index has it: the versions of pytorch.org's have no +cpu there."""
    monkeypatch.setattr(setup_env.sys, "platform", "darwin")
    setup_env.main(["install", "torch=cpu"])
    assert requirement_files(commands) == ["build.txt", "torch-cpu.txt", *BASE[2:]]
    assert commands.asked == [()] and not any("--extra-index-url" in x for x in commands.made)
    commands.made.clear()
    setup_env.main(["install"])  # the same build
    assert commands.made == []


def test_install_cpu_torch_over_the_cuda_build_exits(setup_env, commands):
    setup_env.main(["install"])
    with pytest.raises(SystemExit, match="has torch's CUDA build: run `make clean` first"):
        setup_env.main(["install", "torch=cpu"])
    with pytest.raises(SystemExit, match="TORCH is rocm; the only value is cpu"):
        setup_env.main(["install", "torch=rocm"])


def test_cpu_torch_requirements_are_the_pinned_versions():
    pins = (ROOT / "requirements/constraints.txt").read_text().splitlines()
    pinned = {x.replace(" ; ", "+cpu ; ") for x in pins if re.match(r"torch(vision)?==", x)}
    lines = (ROOT / "requirements/torch-cpu.txt").read_text().splitlines()
    ours = {x.split(" and sys_platform")[0] for x in lines if "+cpu" in x}
    assert ours == pinned and len(ours) == 4


def ask_index(setup_env, monkeypatch, tmp_path, url):
    """Ask a package index for pip; return the message and the seconds that it took."""
    monkeypatch.setattr(setup_env, "VENV_PYTHON", sys.executable)
    monkeypatch.setattr(setup_env, "LOG", tmp_path / "setup.log")
    environment = {**os.environ, "PIP_INDEX_URL": url, "PIP_CONFIG_FILE": os.devnull}
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        environment.pop(name, None)
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        setup_env.check_index(environment)
    return stopped.value.code, time.monotonic() - started


@pytest.mark.parametrize("host", ["nowhere.invalid", "127.0.0.1:9"])
def test_check_index_unreachable_exits_within_seconds(setup_env, monkeypatch, tmp_path, host):
    message, seconds = ask_index(setup_env, monkeypatch, tmp_path, f"https://{host}/simple")
    assert seconds < 20 and "\n" not in message
    assert "package index of pip cannot be used from here" in message
    assert "set HTTPS_PROXY" in message and "PIP_INDEX_URL" in message


def test_check_index_folder_with_another_version_exits(setup_env, monkeypatch, tmp_path):
    (tmp_path / "simple/pip").mkdir(parents=True)
    page = tmp_path / "simple/pip/index.html"
    page.write_text('<a href="pip-99.9-py3-none-any.whl">pip-99.9-py3-none-any.whl</a>')
    url = f"file://{tmp_path}/simple"
    message, _ = ask_index(setup_env, monkeypatch, tmp_path, url)
    assert "it has no pip 25.3" in message and str(setup_env.LOG) in message
    page.write_text(page.read_text() + '<a href="pip-25.3-py3-none-any.whl">pip-25.3</a>')
    setup_env.check_index({**os.environ, "PIP_INDEX_URL": url})


def test_check_index_silent_server_exits_within_seconds(setup_env, monkeypatch, tmp_path):
    """Act like a firewall that drops packets: accept connections and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(setup_env, "INDEX_SECONDS", 4)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/simple"
        message, seconds = ask_index(setup_env, monkeypatch, tmp_path, url)
    assert seconds < 8 and "no answer in 4 seconds" in message


def test_find_python_unsupported_version_finds_another(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 15, 0))
    paths = {"python3.14": "/broken", "python3.13": "/good"}
    monkeypatch.setattr(setup_env.shutil, "which", paths.get)
    monkeypatch.setattr(setup_env, "version_of", {"/good": (3, 13)}.get)
    assert setup_env.find_python() == "/good"
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    with pytest.raises(
        SystemExit, match="python3 is Python 3.15, and there is no Python 3.10 to 3.14 on PATH"
    ):
        setup_env.find_python()


def test_supported_versions_are_the_same_everywhere(setup_env):
    versions = ["3.{}".format(minor) for _, minor in setup_env.SUPPORTED]
    assert versions == [f"3.{minor}" for minor in range(14, 9, -1)]
    project = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'Python :: (3\.\d+)"', project) == versions[::-1]
    assert 'requires-python = ">=3.10"' in project
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"python(3\.\d+)", makefile) == versions
    for file in ("Makefile", "README.md", "tools/setup_env.py"):
        assert "Python 3.10 to 3.14" in (ROOT / file).read_text(), file


def test_check_missing_modules_exits_with_the_commands(setup_env, monkeypatch):
    found = SimpleNamespace(origin="a file")
    specs = {"torch": found, "torchvision": found, "detectron2": SimpleNamespace(origin=None)}
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", specs.get)
    with pytest.raises(SystemExit) as stopped:
        setup_env.check(["base", "test"])
    message = str(stopped.value)
    assert "lacks detectron2, cv2, pytest, xdist, hypothesis, h5py" in message
    assert (
        f"{sys.executable} -m pip install opencv-python pytest pytest-xdist hypothesis h5py\n"
        in message
    )
    assert "'git+https://github.com/facebookresearch/detectron2.git'\n" in message
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: found)
    setup_env.check(["base", "test"])


def test_setup_env_syntax_is_python_3_6():
    """On an old Python it must get as far as naming the supported versions."""
    tree = ast.parse(SETUP_ENV.read_text(), feature_version=(3, 6))
    assert not any(isinstance(x, ast.ImportFrom) and x.module == "__future__" for x in tree.body)
    functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    annotations = [x.returns for x in functions]
    annotations += [x.annotation for f in functions for x in f.args.args]
    for annotation in filter(None, annotations):  # evaluated when the function is defined
        assert isinstance(annotation, (ast.Name, ast.Constant)), ast.unparse(annotation)


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.9"])
def test_setup_env_old_python_exits_with_one_line(version, tmp_path):
    python = shutil.which(f"python{version}")
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)  # HOME is a temporary folder
    folders = home.glob(f".pyenv/versions/{version}.*/bin/python")
    python = next((str(x) for x in folders), python)
    if python is None:
        pytest.skip(f"no Python {version}")
    tools = tmp_path / "tools"
    tools.mkdir()
    shutil.copy(SETUP_ENV, tools)
    command = [python, str(tools / "setup_env.py"), "install"]
    result = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    message = f"python3 is Python {version}, and there is no Python 3.10 to 3.14 on PATH"
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1
