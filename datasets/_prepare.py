"""What the prepare scripts share: downloads that can be resumed, and unpacking.

Nothing is half there: a file has its name only once it is complete, so that every script can be
interrupted and run again.
"""

import argparse
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

__all__ = ["PrepareError", "fetch", "fetch_many", "parser_of", "require", "run", "unpack"]

_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without a byte


class PrepareError(Exception):
    """Something that the user has to mend; the text says what."""


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all prepare scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))),
        help="folder of the data sets; default: $DETECTRON2_DATASETS, or ./datasets",
    )
    parser.add_argument("--mirror", help="take every file from MIRROR/NAME")
    return parser


def run(main: Callable[[], None]) -> int:
    """Call a script's main function; returns the exit status."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to go on.", file=sys.stderr)
        return 130
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(urls: Mapping[str, str], name: str, folder: Path, mirror: str | None = None) -> Path:
    """Download a file unless it is there; an interrupted download goes on where it stopped.

    Args:
        urls: URL by name.
        name: of the file.
        folder: for the file.
        mirror: take it from there instead.

    Raises:
        PrepareError: it cannot be downloaded; with what to do by hand.
    """
    path = folder / name
    if path.exists():
        return path
    url = f"{mirror.rstrip('/')}/{name}" if mirror else urls[name]
    try:
        _download(url, path, progress=True)
    except OSError as error:
        raise PrepareError(
            f"{url} cannot be downloaded ({error}). Run the command again, or download {name} by "
            f"hand and put it into {folder.resolve()}; datasets/README.md names its home page."
        ) from error
    return path


def fetch_many(urls: Mapping[Path, str], what: str, threads: int = 16) -> None:
    """Download many small files, those that are there already excepted.

    Raises:
        PrepareError: some cannot be downloaded; all others are there.
    """
    missing = {path: url for path, url in urls.items() if not path.exists()}
    failures = []
    with ThreadPoolExecutor(threads) as pool:
        jobs = {pool.submit(_download, url, path): url for path, url in missing.items()}
        done = tqdm(as_completed(jobs), total=len(urls), initial=len(urls) - len(jobs), desc=what)
        try:
            for job in done:
                if job.exception() is not None:
                    failures.append(f"{jobs[job]}: {job.exception()}")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        shown = "\n  ".join(failures[:10])
        raise PrepareError(
            f"{len(failures)} of {len(urls)} files ({what}) cannot be downloaded, among them\n  "
            f"{shown}\nRun the command again to try them once more."
        )


def _download(url: str, path: Path, progress: bool = False) -> None:
    """Download to ``path`` by way of ``path.part``, which is continued where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing behind the part: it is whole, or of another file
            raise
        part.unlink()
        response = urllib.request.urlopen(url, timeout=_TIMEOUT)
        start = 0
    with response:
        resumed = start > 0 and response.status == 206
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length) + (start if resumed else 0)
        bar = tqdm(
            total=total,
            initial=start if resumed else 0,
            unit="B",
            unit_scale=True,
            desc=path.name,
            disable=not progress,
        )
        with bar, open(part, "ab" if resumed else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"it ended after {part.stat().st_size} of {total} bytes")
    os.replace(part, path)


def unpack(archive: Path, place: Callable[[str], Path | None]) -> int:
    """Unpack a zip file; what is there in full length stays.

    Args:
        archive: the zip file.
        place: gives the path of a member by its name, None for one that is not needed.

    Returns:
        How many members have a place.

    Raises:
        PrepareError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            members = [
                (member, path)
                for member in content.infolist()
                if not member.is_dir() and (path := place(member.filename)) is not None
            ]
            for member, path in tqdm(members, desc=f"Unpacking {archive.name}", unit=" files"):
                if path.exists() and path.stat().st_size == member.file_size:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(path.name + ".part")
                with content.open(member) as source, open(part, "wb") as target:
                    shutil.copyfileobj(source, target, _BLOCK)
                os.replace(part, path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise PrepareError(
            f"{archive.resolve()}: not a complete zip file ({error}). Remove it and run the "
            "command again."
        ) from error
    return len(members)


def require(paths: Iterable[Path], archive: str) -> None:
    """Raise if something is still missing after unpacking.

    Raises:
        PrepareError: with the first path.
    """
    for path in paths:
        if not path.exists():
            raise PrepareError(f"{path.resolve()} is not in {archive}: is it the right archive?")
