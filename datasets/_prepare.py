"""Shared by the prepare scripts: resumable downloads and unpacking.

A file gets its final name only when it is complete, so every script can be interrupted and run
again.
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

__all__ = ["PrepareError", "fetch", "fetch_many", "create_parser", "require", "run", "unpack"]

_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without receiving a byte


class PrepareError(Exception):
    """A problem that the user has to fix; the message says how."""


def create_parser(description: str) -> argparse.ArgumentParser:
    """Create a parser with the arguments that all prepare scripts share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))),
        help="folder of the data sets; default: $DETECTRON2_DATASETS, or ./datasets",
    )
    parser.add_argument("--mirror", help="download every file from MIRROR/NAME")
    return parser


def run(main: Callable[[], None]) -> int:
    """Call a script's main function and return the exit status."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to resume.", file=sys.stderr)
        return 130
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(urls: Mapping[str, str], name: str, folder: Path, mirror: str | None = None) -> Path:
    """Download a file unless it exists; an interrupted download resumes where it stopped.

    Args:
        urls: URL by file name.
        name: name of the file.
        folder: folder to put it in.
        mirror: base URL to download it from instead.

    Raises:
        PrepareError: the download fails; the message says what to do by hand.
    """
    path = folder / name
    if path.exists():
        return path
    url = f"{mirror.rstrip('/')}/{name}" if mirror else urls[name]
    try:
        _download(url, path, progress=True)
    except OSError as error:
        raise PrepareError(
            f"Cannot download {url} ({error}). Run the command again, or download {name} by hand "
            f"and put it into {folder.resolve()}; see datasets/README.md for its home page."
        ) from error
    return path


def fetch_many(urls: Mapping[Path, str], what: str, threads: int = 16) -> None:
    """Download many small files, except those that exist already.

    Raises:
        PrepareError: some downloads failed; all others are complete.
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
            f"Cannot download {len(failures)} of {len(urls)} files ({what}), including\n  "
            f"{shown}\nRun the command again to retry them."
        )


def _download(url: str, path: Path, progress: bool = False) -> None:
    """Download to ``path`` through ``path.part``, which stays after an error, to be resumed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # no bytes after the part: it is complete, or of another file
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
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")
    os.replace(part, path)


def unpack(archive: Path, target_path: Callable[[str], Path | None]) -> int:
    """Unpack a zip file, except files that exist with their full size.

    Args:
        archive: the zip file.
        target_path: returns the path to unpack a member to by its name, None to skip it.

    Returns:
        Number of members that are not skipped.

    Raises:
        PrepareError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            members = [
                (member, path)
                for member in content.infolist()
                if not member.is_dir() and (path := target_path(member.filename)) is not None
            ]
            for member, path in tqdm(members, desc=f"Unpacking {archive.name}", unit=" files"):
                if path.exists() and path.stat().st_size == member.file_size:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                _unpack_member(content, member, path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise PrepareError(
            f"{archive.resolve()}: not a complete zip file ({error}). Remove it and run the "
            "command again."
        ) from error
    return len(members)


def _unpack_member(content: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Unpack one file atomically; an error leaves nothing behind.

    ``write_atomically`` would flush each of 100,000 images to the disk, which takes minutes, and
    has to import the package.
    """
    part = path.with_name(path.name + ".part")
    try:
        with content.open(member) as source, open(part, "wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def require(paths: Iterable[Path], archive: str) -> None:
    """Raise if a path is missing after unpacking.

    Raises:
        PrepareError: with the first missing path.
    """
    for path in paths:
        if not path.exists():
            raise PrepareError(f"{path.resolve()} is not in {archive}. Is it the right archive?")
