"""Create the project's environment, `.venv`, or check an environment that the user provides.

`make` calls it. It needs Python's standard library only and runs on any Python since 3.6, so that
it can look for a supported one (hence the quoted annotations):

    python3 tools/setup_env.py install [test] [dev] [torch=cpu]   # create or complete .venv
    PYTHON  tools/setup_env.py check   [test] [dev]               # only report what PYTHON lacks

A note in `.venv` records completed groups with a hash of their requirement files: a second run
installs nothing, a changed requirement is installed, an interrupted run continues. Each step prints
one line; what pip prints is in `.venv/setup.log`.

`torch=cpu` installs the build of torch without CUDA. It comes from the package index whose URL is
in the variable TORCH_INDEX, by default that of pytorch.org.

uv is not used: where it is missing, all of pip's steps are needed anyway.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
PINS = REQUIREMENTS / "constraints.txt"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
NOTE = VENV / "reldn_d2_setup.json"  # {group: fingerprint}; also marks .venv as ours
LOG = VENV / "setup.log"
# Python versions that the pinned packages were tested on
SUPPORTED = ((3, 14), (3, 13), (3, 12), (3, 11), (3, 10))
SIZES = {"cuda": 7, "cpu": 2}  # GB that .venv takes, rounded up, by the build of torch
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# Seconds for one connection, and for the whole check whether the package index answers
CONNECT_SECONDS, INDEX_SECONDS = 8, 12

# Conflict warnings would be about a requirement of Detectron2 0.6 that it does not use (a formatter
# of 2021).
USE_PINS = ("-c", str(PINS), "--no-warn-conflicts")
# group: steps of (title for the user, requirement file, more arguments for pip)
STEPS = {
    "base": (
        ("installing pip and build tools", "build.txt", USE_PINS),
        ("installing torch and torchvision (3 GB on Linux)", "torch.txt", USE_PINS),
        (
            "installing Detectron2",
            "detectron2.txt",
            ("--no-deps", "--no-build-isolation", "--require-hashes"),
        ),
        ("installing the other libraries", "libraries.txt", ("--no-build-isolation", *USE_PINS)),
    ),
    "test": (("installing the test tools", "test.txt", USE_PINS),),
    "dev": (("installing the formatters", "dev.txt", USE_PINS),),
}
LOAD_CHECK = """
import cv2, detectron2, fvcore, pycocotools.mask, torch, torchvision
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
print("torch", torch.__version__, "torchvision", torchvision.__version__)
"""

# group: {module: what to install for it}; checked in an environment that the user provides
NEEDED = {
    "base": {
        "torch": "torch",
        "torchvision": "torchvision",
        "detectron2": "--no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2.git'",
        "cv2": "opencv-python",
    },
    "test": {
        "pytest": "pytest",
        "xdist": "pytest-xdist",
        "hypothesis": "hypothesis",
        "h5py": "h5py",
    },
    "dev": {"black": "black", "isort": "isort", "ruff": "ruff"},
}


def main(arguments: "list[str]") -> None:
    """Run `install` or `check` for the base group and the given groups."""
    builds = [x for x in arguments if x.startswith("torch=")]
    groups = [x for x in arguments[1:] if x not in builds]
    if arguments[:1] not in (["install"], ["check"]) or not set(groups) <= set(STEPS):
        sys.exit(__doc__)
    if builds not in ([], ["torch=cpu"]):
        sys.exit("TORCH is {}; the only value is cpu.".format(builds[-1][len("torch=") :]))
    if arguments[0] == "check":
        return check(["base", *groups])
    try:
        install(["base", *groups], cpu_torch=bool(builds))
    except OSError as error:  # no permission, a read-only or a full disk
        sys.exit(f"The setup cannot write its environment {VENV}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def install(groups: "list[str]", cpu_torch: bool = False) -> None:
    """Create `.venv` and install the groups that it lacks, with one line per step.

    Without `cpu_torch`, an existing `.venv` keeps its build of torch.
    """
    note = read_note()
    if note is None and VENV.is_dir() and any(VENV.iterdir()):
        sys.exit(
            f"{VENV} exists, but was not made by `make setup`. To use it as it is: "
            f"make PYTHON={VENV_PYTHON} ...; otherwise move it away."
        )
    version = version_of(VENV_PYTHON, needs="pip")
    if note is None or version is None:  # no environment yet, or an incomplete one
        note, version = {}, None
    # macOS has no CUDA builds.
    build = note.get("torch") or ("cpu" if cpu_torch or sys.platform == "darwin" else "cuda")
    if cpu_torch and build != "cpu":
        sys.exit(f"{VENV} has torch's CUDA build: run `make clean` first to replace it.")
    todo = [
        group for group in groups if version is None or note.get(group) != fingerprint(group, build)
    ]
    if not todo:
        return

    total = sum(len(STEPS[group]) for group in todo) + (version is None) + ("base" in todo)
    if version is None:
        python = find_python()
        check_disk(build)
        shutil.rmtree(str(VENV), ignore_errors=True)
        VENV.mkdir()
        write_note({})  # first, so that the next run recognizes an interrupted .venv
    steps = Steps(total)
    if version is None:
        hint = " On Debian and Ubuntu, `apt install python3-venv` installs the module venv."
        steps.run(f"creating .venv with {python}", [python, "-m", "venv", str(VENV)], hint)
    check_index(steps.environment)
    of_cpu = cpu_options(steps) if build == "cpu" and "base" in todo else ()
    note["torch"] = build
    pip_install = [str(VENV_PYTHON), "-m", "pip", "install"]
    for group in todo:
        for title, requirements, options in STEPS[group]:
            if requirements == "torch.txt" and build == "cpu":
                title, options = "installing torch and torchvision for the CPU", of_cpu
            path = REQUIREMENTS / file_of(requirements, build)
            steps.run(title, [*pip_install, "-r", str(path), *options])
        if group == "base":
            steps.run("checking that everything loads", [str(VENV_PYTHON), "-c", LOAD_CHECK])
            make_importable()
        note[group] = fingerprint(group, build)
        write_note(note)
    print("The environment is complete.\n", flush=True)


def check_disk(build: str) -> None:
    """Print how much space the environment takes; exit if there is less."""
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    size = SIZES[build]
    if free < size:
        other = ""
        if build == "cuda":
            other = (
                f", or use torch without CUDA, which takes {SIZES['cpu']} GB: make TORCH=cpu ..."
            )
        sys.exit(
            f"The environment {VENV} takes up to {size} GB, but only {free:.1f} GB are free there: "
            f"free some space{other}"
        )
    print(f"Creating {VENV}: up to {size} GB of {free:.0f} GB free; pip's output goes to {LOG}")


def check_index(environment: "dict[str, str]", package: str = "pip", url: str = "") -> None:
    """Exit if the package index does not answer; pip itself would try for many minutes.

    pip asks, so that its configuration, its variables and proxies apply. The answer must have the
    version that is installed next: other indexes, such as a folder, may have others.
    """
    file = REQUIREMENTS / ("torch-cpu.txt" if url else "build.txt")
    pinned = re.findall(rf"^{package}==(\S+)", file.read_text(), re.MULTILINE)
    command = [str(VENV_PYTHON), "-m", "pip", "index", "versions", package]
    command += ["--retries", "0", "--timeout", str(CONNECT_SECONDS)]
    command += ["--index-url", url] if url else []
    try:
        output = subprocess.run(
            command,
            env=environment,
            cwd=str(ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=INDEX_SECONDS,
        ).stdout.decode(errors="replace")
    except subprocess.TimeoutExpired:
        output = reason = f"no answer in {INDEX_SECONDS} seconds"
    else:
        reason = f"it has no {package} {' or '.join(pinned)}"
    available = re.search("Available versions: (.*)", output)
    if available and set(pinned) & set(available.group(1).split(", ")):
        return
    with LOG.open("a") as log:
        log.write("\n".join(["", " ".join(command), output]))
    fix = "set TORCH_INDEX to an index that has the CPU build" if url else "set PIP_INDEX_URL"
    sys.exit(
        f"The package index {url or 'of pip'} cannot be used from here: {reason} (log: {LOG}). "
        f"Connect to the network, set HTTPS_PROXY if there is a proxy, or {fix}; then run the same "
        "command again."
    )


def cpu_options(steps: "Steps") -> "tuple[str, ...]":
    """Return pip's options for torch's CPU build; exit if its index does not answer.

    On macOS pip's own index has it.
    """
    if sys.platform == "darwin":
        return USE_PINS
    url = os.environ.get("TORCH_INDEX") or TORCH_INDEX
    check_index(steps.environment, "torch", url)
    return ("--extra-index-url", url, *USE_PINS)


def make_importable() -> None:
    """Let the Python of `.venv` import the package from here, as `pip install -e .` would.

    The path is not asked from that Python: if it is a link to another environment's, it would name
    the folder of that one.
    """
    version = "python{}.{}".format(*version_of(VENV_PYTHON))
    folder = VENV / "lib" / version / "site-packages"
    (folder / "reldn_d2_clone.pth").write_text(f"{ROOT}\n")


class Steps:
    """Runs commands one after the other and prints one line for each; their output is logged."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.index = 0
        self.environment = {
            "PIP_RETRIES": "10",
            "PIP_RESUME_RETRIES": "10",
            "PIP_DEFAULT_TIMEOUT": "60",
            **os.environ,  # the user's settings win, except over the following
            "PIP_USER": "0",
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        for name in ("PYTHONPATH", "PYTHONHOME"):  # would bring in packages of another environment
            self.environment.pop(name, None)

    def run(self, title: str, command: "list[str]", hint: str = "") -> None:
        """Run one step; if it fails, exit with the end of its log and what to do."""
        self.index += 1
        step = f"[{self.index}/{self.count}] {title}"
        print(f"{step} ...", end="", flush=True)
        started = time.time()
        try:
            with LOG.open("ab") as log:
                log.write(f"\n{step}\n".encode())
                log.flush()
                failed = subprocess.call(
                    command, env=self.environment, cwd=str(ROOT), stdout=log, stderr=log
                )
        except KeyboardInterrupt:
            failed = True
        if not failed:
            print(f" {time.time() - started:.0f} s", flush=True)
            return
        print(" failed", flush=True)
        tail = LOG.read_text(errors="replace").splitlines()[-15:]
        sys.exit(
            "\n".join(["", *tail, ""])
            + f"\nThe setup stopped at {step}. The lines above are the end of {LOG}.{hint} "
            "Completed steps are kept: run the same command again to continue here. If it keeps "
            "stopping here, run `make clean` to start from scratch."
        )


def find_python() -> str:
    """Return a Python of a supported version: this one, or the newest one on PATH."""
    if sys.version_info[:2] in SUPPORTED:
        return sys.executable
    for version in SUPPORTED:
        path = shutil.which("python{}.{}".format(*version))
        if path and version_of(path) == version:
            return path
    sys.exit(
        "python3 is Python {}.{}, and there is no Python 3.10 to 3.14 on PATH: install one of "
        "them and run the same command again.".format(*sys.version_info[:2])
    )


def version_of(python: "str | Path", needs: str = "sys") -> "tuple | None":
    """Return (major, minor) of a Python; None if it does not run or lacks the module `needs`."""
    command = [str(python), "-c", f"import {needs}, sys; print(*sys.version_info[:2])"]
    try:
        output = subprocess.check_output(command, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(int(part) for part in output.split())


def file_of(requirements: str, build: str) -> str:
    """Return the requirement file of a step for a build of torch."""
    return "torch-cpu.txt" if (requirements, build) == ("torch.txt", "cpu") else requirements


def fingerprint(group: str, build: str) -> str:
    """Return a hash of what the group installs into `.venv`."""
    digest = hashlib.sha256(repr(version_of(VENV_PYTHON)).encode())
    files = [file_of(requirements, build) for _, requirements, _ in STEPS[group]]
    for path in [REQUIREMENTS / name for name in files] + [PINS]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_note() -> "dict[str, str] | None":
    """Return the note of `.venv`, or None if that is not ours.

    The note has {group: fingerprint} of the completed groups and torch's build.
    """
    try:
        return json.loads(NOTE.read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # truncated, for example because the disk was full
        return {}


def write_note(note: "dict[str, str]") -> None:
    """Write the note atomically."""
    new = NOTE.with_suffix(".new")
    new.write_text(json.dumps(note))
    os.replace(str(new), str(NOTE))


def check(groups: "list[str]") -> None:
    """Exit with what the running Python lacks for the groups; install nothing."""
    python = sys.executable
    if sys.version_info < (3, 10):
        version = "{}.{}".format(*sys.version_info[:2])
        sys.exit(f"{python} is Python {version}; Python 3.10 or newer is needed.")
    needed = {module: source for group in groups for module, source in NEEDED[group].items()}
    # find_spec also finds any folder of that name, but only a package has an origin
    specs = {module: importlib.util.find_spec(module) for module in needed}
    missing = [module for module, spec in specs.items() if spec is None or spec.origin is None]
    if not missing:
        return
    commands = []
    others = [needed[module] for module in missing if module != "detectron2"]
    if others:
        commands.append(f"  {python} -m pip install {' '.join(others)}")
    if "detectron2" in missing:  # last, because its build needs torch
        commands.append(f"  {python} -m pip install {needed['detectron2']}")
    commands = "\n".join(commands)
    sys.exit(
        f"{python} lacks {', '.join(missing)}. To install what is missing (make installs nothing "
        f"into an environment given by PYTHON):\n{commands}\n"
        "Without PYTHON, make uses its own environment in .venv."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
