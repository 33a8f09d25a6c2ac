"""Makes the project's environment, `.venv`, or checks one that the user brought.

`make` calls it. It needs Python's standard library only, and runs on any Python from 3.7 on, so
that it can look for a fitting one:

    python3 tools/setup_env.py install [test] [dev]   # make or complete .venv
    PYTHON  tools/setup_env.py check   [test] [dev]   # only say what PYTHON lacks

A note in `.venv` holds what was completed, by a hash of the requirement files: a second run
installs nothing, a changed requirement is installed, an interrupted run is gone on with.
"""

from __future__ import annotations

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
NOTE = VENV / "reldn_d2_setup.json"  # {group: fingerprint}; also marks .venv as made by this file
SUPPORTED = ((3, 12), (3, 11), (3, 10))  # the Pythons that the pinned versions were tested on

# The warnings would be about what Detectron2 0.6 asks for (a formatter of 2021) and does not use.
USE_PINS = ("-c", str(PINS), "--no-warn-conflicts")
# group: its steps, each (what the user reads, requirement file, further arguments for pip)
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
LOADS = """
import cv2, detectron2, fvcore, pycocotools.mask, torch, torchvision
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
print("torch", torch.__version__, "torchvision", torchvision.__version__)
"""

# group: {module: what to install for it}; asked of an environment that the user brought
NEEDED = {
    "base": {
        "torch": "torch",
        "torchvision": "torchvision",
        "detectron2": "--no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2.git'",
        "cv2": "opencv-python",
    },
    "test": {"pytest": "pytest", "hypothesis": "hypothesis", "h5py": "h5py"},
    "dev": {"black": "black", "isort": "isort", "ruff": "ruff"},
}


def main(arguments: list[str]) -> None:
    """Runs `install` or `check` for the base group and the groups named."""
    actions = {"install": install, "check": check}
    if not arguments or arguments[0] not in actions or not set(arguments[1:]) <= set(STEPS):
        sys.exit(__doc__)
    actions[arguments[0]](["base", *arguments[1:]])


def install(groups: list[str]) -> None:
    """Makes `.venv` and installs the groups that it does not have yet, with visible progress."""
    note = read_note()
    if note is None and VENV.is_dir() and any(VENV.iterdir()):
        sys.exit(
            f"{VENV} is there, but was not made by `make setup`. To use it as it is: "
            f"make PYTHON={VENV_PYTHON} ...; otherwise move it away."
        )
    version = version_of(VENV_PYTHON, needs="pip")
    if note is None or version is None:  # none yet, or one whose making was interrupted
        note, version = {}, None
    todo = [group for group in groups if version is None or note.get(group) != fingerprint(group)]
    if not todo:
        return

    steps = Steps(sum(len(STEPS[group]) for group in todo) + (version is None) + ("base" in todo))
    if version is None:
        python = find_python()
        free = shutil.disk_usage(ROOT).free / 1e9
        print(f"The environment goes to {VENV}; it takes up to 6 GB ({free:.0f} GB are free).")
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
        write_note({})  # first of all: an interrupted .venv is known as ours
        hint = " On Debian and Ubuntu, `apt install python3-venv` gives the module venv."
        steps.run(f"making .venv with {python}", [python, "-m", "venv", str(VENV)], hint)
    pip_install = [str(VENV_PYTHON), "-m", "pip", "install"]
    for group in todo:
        for title, requirements, options in STEPS[group]:
            steps.run(title, [*pip_install, "-r", str(REQUIREMENTS / requirements), *options])
        if group == "base":
            steps.run("checking that everything loads", [str(VENV_PYTHON), "-c", LOADS])
            make_importable()
        note[group] = fingerprint(group)
        write_note(note)
    print("\nThe environment is complete.\n", flush=True)


def make_importable() -> None:
    """Lets the Python of `.venv` import the package from here, as `pip install -e .` would."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = subprocess.check_output([str(VENV_PYTHON), "-c", code], text=True).strip()
    Path(folder, "reldn_d2_clone.pth").write_text(f"{ROOT}\n")


class Steps:
    """Runs commands one after the other and says which of how many is being run."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.number = 0
        self.environment = {
            "PIP_RETRIES": "10",
            "PIP_RESUME_RETRIES": "10",
            "PIP_DEFAULT_TIMEOUT": "60",
            **os.environ,  # the user's own settings go first, but for these
            "PIP_USER": "0",
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        for name in ("PYTHONPATH", "PYTHONHOME"):  # another environment's packages are not ours
            self.environment.pop(name, None)

    def run(self, title: str, command: list[str], hint: str = "") -> None:
        """Runs one step; if it fails, says which one that was and what to do."""
        self.number += 1
        step = f"[{self.number}/{self.count}] {title}"
        print(f"\n{step}", flush=True)
        try:
            failed = subprocess.call(command, env=self.environment, cwd=ROOT) != 0
        except KeyboardInterrupt:
            failed = True
        if failed:
            sys.exit(
                f"\nThe set-up stopped at {step}.{hint} What was completed before is kept: run "
                "the same command again to go on from here. If it stops here again and again, "
                "`make clean` makes the next set-up start from nothing."
            )


def find_python() -> str:
    """Returns a Python of a supported version: this one, or one on PATH, the newest first."""
    if sys.version_info[:2] in SUPPORTED:
        return sys.executable
    for version in SUPPORTED:
        path = shutil.which("python{}.{}".format(*version))
        if path and version_of(path) == version:
            return path
    sys.exit(
        "python3 is Python {}.{}, and no Python 3.10, 3.11 or 3.12 was found on PATH: install one "
        "of them (for example the packages python3.12 and python3.12-venv) and run the same "
        "command again.".format(*sys.version_info[:2])
    )


def version_of(python: str | Path, needs: str = "sys") -> tuple | None:
    """Returns (major, minor) of a Python; None if it does not run or lacks the module `needs`."""
    command = [str(python), "-c", f"import {needs}, sys; print(*sys.version_info[:2])"]
    try:
        output = subprocess.check_output(command, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(int(number) for number in output.split())


def fingerprint(group: str) -> str:
    """Returns a hash of what the group installs into `.venv`."""
    digest = hashlib.sha256(repr(version_of(VENV_PYTHON)).encode())
    for path in [REQUIREMENTS / requirements for _, requirements, _ in STEPS[group]] + [PINS]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_note() -> dict[str, str] | None:
    """Returns {group: fingerprint} of what was completed, or None if `.venv` is not ours."""
    try:
        return json.loads(NOTE.read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # cut short, by a full disk for example
        return {}


def write_note(note: dict[str, str]) -> None:
    """Writes the note in one go."""
    new = NOTE.with_suffix(".new")
    new.write_text(json.dumps(note))
    new.replace(NOTE)


def check(groups: list[str]) -> None:
    """Says what the running Python lacks for the groups, and installs nothing."""
    python = sys.executable
    if sys.version_info < (3, 10):
        version = "{}.{}".format(*sys.version_info[:2])
        sys.exit(f"{python} is Python {version}; Python 3.10 or newer is needed.")
    needed = {module: source for group in groups for module, source in NEEDED[group].items()}
    # find_spec also finds any folder of that name; a package has an origin
    specs = {module: importlib.util.find_spec(module) for module in needed}
    missing = [module for module, spec in specs.items() if spec is None or spec.origin is None]
    if not missing:
        return
    commands = []
    others = [needed[module] for module in missing if module != "detectron2"]
    if others:
        commands.append(f"  {python} -m pip install {' '.join(others)}")
    if "detectron2" in missing:  # after the others: its build needs torch
        commands.append(f"  {python} -m pip install {needed['detectron2']}")
    commands = "\n".join(commands)
    sys.exit(
        f"{python} lacks {', '.join(missing)}. To install what is missing (make installs nothing "
        f"into an environment given by PYTHON):\n{commands}\n"
        "Without PYTHON, make uses an environment of its own in .venv."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
