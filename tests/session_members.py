"""The processes of a session, for tests that end some of them."""

import time
from pathlib import Path


def members(session):
    """Return {pid: command line} of the living processes of a session."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if fields[3] == str(session) and fields[0] != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text()
        except (OSError, IndexError):  # no process, or it has ended meanwhile
            continue
    return found


def wait_for_no_members(session, seconds=20):
    """Wait until all processes of a session have ended."""
    deadline = time.time() + seconds
    while members(session) and time.time() < deadline:
        time.sleep(0.1)
    assert not members(session)
