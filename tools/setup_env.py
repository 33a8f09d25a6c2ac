"""Create the project's environment, `.venv`, or check an environment that the user provides.

`make` calls it. It needs Python's standard library only and runs on any Python since 3.6, so that
it can look for a supported one (hence the quoted annotations):

    python3 tools/setup_env.py install [test] [dev]   # create or complete .venv
    PYTHON  tools/setup_env.py check   [test] [dev]   # only report what PYTHON lacks

A note in `.venv` records completed groups with a hash of their requirement files: a second run
installs nothing, a changed requirement is installed, an interrupted run continues.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
PINS = REQUIREMENTS / "constraints.txt"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
NOTE = VENV / "reldn_d2_setup.json"  # {group: fingerprint}; also marks .venv as ours
SUPPORTED = ((3, 12), (3, 11), (3, 10))  # Python versions that the pinned packages were tested on

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
    actions = {"install": install, "check": check}
    if not arguments or arguments[0] not in actions or not set(arguments[1:]) <= set(STEPS):
        sys.exit(__doc__)
    actions[arguments[0]](["base", *arguments[1:]])


def install(groups: "list[str]") -> None:
    """Create `.venv` and install the groups that it lacks, with visible progress."""
    note = read_note()
    if note is None and VENV.is_dir() and any(VENV.iterdir()):
        sys.exit(
            f"{VENV} exists, but was not made by `make setup`. To use it as it is: "
            f"make PYTHON={VENV_PYTHON} ...; otherwise move it away."
        )
    version = version_of(VENV_PYTHON, needs="pip")
    if note is None or version is None:  # no environment yet, or an incomplete one
        note, version = {}, None
    todo = [group for group in groups if version is None or note.get(group) != fingerprint(group)]
    if not todo:
        return

    steps = Steps(sum(len(STEPS[group]) for group in todo) + (version is None) + ("base" in todo))
    if version is None:
        python = find_python()
        free = shutil.disk_usage(ROOT).free / 1e9
        print(f"Creating the environment {VENV}; it takes up to 6 GB ({free:.0f} GB are free).")
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
        write_note({})  # first, so that the next run recognizes an interrupted .venv
        hint = " On Debian and Ubuntu, `apt install python3-venv` installs the module venv."
        steps.run(f"creating .venv with {python}", [python, "-m", "venv", str(VENV)], hint)
    pip_install = [str(VENV_PYTHON), "-m", "pip", "install"]
    for group in todo:
        for title, requirements, options in STEPS[group]:
            steps.run(title, [*pip_install, "-r", str(REQUIREMENTS / requirements), *options])
        if group == "base":
            steps.run("checking that everything loads", [str(VENV_PYTHON), "-c", LOAD_CHECK])
            make_importable()
        note[group] = fingerprint(group)
        write_note(note)
    print("\nThe environment is complete.\n", flush=True)


def make_importable() -> None:
    """Let the Python of `.venv` import the package from here, as `pip install -e .` would."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = subprocess.check_output([str(VENV_PYTHON), "-c", code]).decode().strip()
    Path(folder, "reldn_d2_clone.pth").write_text(f"{ROOT}\n")


class Steps:
    """Runs commands one after the other and prints which of how many is running."""

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
        """Run one step; if it fails, exit with its title and what to do."""
        self.index += 1
        step = f"[{self.index}/{self.count}] {title}"
        print(f"\n{step}", flush=True)
        try:
            failed = subprocess.call(command, env=self.environment, cwd=ROOT) != 0
        except KeyboardInterrupt:
            failed = True
        if failed:
            sys.exit(
                f"\nThe setup stopped at {step}.{hint} Completed steps are kept: run the same "
                "command again to continue here. If it keeps stopping here, run `make clean` to "
                "start from scratch."
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
        "python3 is Python {}.{}, and there is no Python 3.10, 3.11 or 3.12 on PATH: install one "
        "of them (for example the packages python3.12 and python3.12-venv) and run the same "
        "command again.".format(*sys.version_info[:2])
    )


def version_of(python: "str | Path", needs: str = "sys") -> "tuple | None":
    """Return (major, minor) of a Python; None if it does not run or lacks the module `needs`."""
    command = [str(python), "-c", f"import {needs}, sys; print(*sys.version_info[:2])"]
    try:
        output = subprocess.check_output(command, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(int(part) for part in output.split())


def fingerprint(group: str) -> str:
    """Return a hash of what the group installs into `.venv`."""
    digest = hashlib.sha256(repr(version_of(VENV_PYTHON)).encode())
    for path in [REQUIREMENTS / requirements for _, requirements, _ in STEPS[group]] + [PINS]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_note() -> "dict[str, str] | None":
    """Return {group: fingerprint} of the completed groups, or None if `.venv` is not ours."""
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
    new.replace(NOTE)


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
