"""Shared by the prepare scripts: resumable downloads and unpacking.

A file gets its final name only when it is complete, so every script can be interrupted and run
again.
"""

import argparse
import errno
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

__all__ = [
    "PrepareError",
    "Source",
    "create_parser",
    "drive_file",
    "fetch",
    "fetch_many",
    "require",
    "run",
    "unpack",
]

_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without receiving a byte
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # no address helps
_DRIVE = "https://drive.usercontent.google.com/download"


class PrepareError(Exception):
    """A problem that the user has to fix; the message says how."""


class Source(NamedTuple):
    """Where a file comes from.

    Attributes:
        page: documents the file, for a download by hand.
        addresses: URLs, tried in this order.
        hint: another way to get it, for the message when all have failed.
    """

    page: str
    addresses: tuple[str, ...]
    hint: str = ""

    def all_addresses(self) -> tuple[str, ...]:
        """Return the addresses, and at the end those of the Internet Archive's copies."""
        archive = "https://web.archive.org/web/2020id_/"  # the copy nearest to 2020, unchanged
        known = [x for x in self.addresses if not x.startswith(_DRIVE)]
        return (*self.addresses, *(archive + x for x in known))


def drive_file(file_id: str) -> str:
    """Return the URL of a file on Google Drive, without the page that asks for confirmation."""
    return f"{_DRIVE}?id={file_id}&export=download&confirm=t"


def create_parser(description: str) -> argparse.ArgumentParser:
    """Create a parser with the arguments that all prepare scripts share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))),
        help="folder of the datasets; default: $DETECTRON2_DATASETS, or ./datasets",
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


def fetch(
    sources: Mapping[str, Source], name: str, folder: Path, mirror: str | None = None
) -> Path:
    """Download a file unless it exists; an interrupted download resumes where it stopped.

    Args:
        sources: by file name.
        name: name of the file.
        folder: folder to put it in.
        mirror: base URL to download it from instead.

    Raises:
        PrepareError: no address works; the message says what to do by hand.
    """
    path = folder / name
    if path.exists():
        return path
    source = sources[name]
    addresses = (_mirrored(mirror, name),) if mirror else source.all_addresses()
    failures = []
    for index, address in enumerate(addresses):
        try:
            # Each address has a part of its own: another address may have another file.
            _download(address, path, f".part{index or ''}", progress=True)
        except OSError as error:
            if error.errno in _LOCAL_ERRORS:
                raise
            failures.append(f"{address} ({error})")
            if index + 1 < len(addresses):
                print(f"{failures[-1]}: trying the next address", file=sys.stderr)
        else:
            for part in folder.glob(f"{name}.part*"):  # begun from another address
                part.unlink()
            return path
    tried = "\n  ".join(failures)
    raise PrepareError(
        f"Cannot download {name}:\n  {tried}\nRun the command again to retry. If that does not "
        f"help, download it by hand (see {source.page}), put it into {folder.resolve()} as {name} "
        "and run the command again, or give the address of a folder that has it: --mirror URL."
        f"{source.hint}"
    )


def _mirrored(mirror: str, name: str) -> str:
    return f"{mirror.rstrip('/')}/{name}"


def fetch_many(sources: Mapping[Path, tuple[str, ...]], what: str, threads: int = 16) -> None:
    """Download many small files, except those that exist already.

    Args:
        sources: addresses by path, tried in their order.
        what: for messages.
        threads: number of parallel downloads.

    Raises:
        PrepareError: some downloads failed; all others are complete.
    """
    missing = {path: x for path, x in sources.items() if not path.exists()}
    failures = []
    with ThreadPoolExecutor(threads) as pool:
        jobs = {pool.submit(_download_any, x, path): path for path, x in missing.items()}
        done = tqdm(
            as_completed(jobs), total=len(sources), initial=len(sources) - len(jobs), desc=what
        )
        try:
            for job in done:
                if job.exception() is not None:
                    failures.append(str(job.exception()))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        shown = "\n  ".join(failures[:10])
        raise PrepareError(
            f"Cannot download {len(failures)} of {len(sources)} files ({what}), including\n  "
            f"{shown}\nRun the command again to retry them, or put them into "
            f"{next(iter(sources)).parent.resolve()} by hand."
        )


def _download_any(addresses: tuple[str, ...], path: Path) -> None:
    """Download a small file from the first address that works."""
    failures = []
    for index, address in enumerate(addresses):
        try:
            return _download(address, path, f".part{index or ''}")
        except OSError as error:
            if error.errno in _LOCAL_ERRORS:
                raise
            failures.append(f"{address}: {error}")
    raise OSError("; ".join(failures))


def _download(url: str, path: Path, suffix: str, progress: bool = False) -> None:
    """Download to ``path`` through a part file, which stays after an error, to be resumed.

    Args:
        url: the address.
        path: the file.
        suffix: of the part file.
        progress: show a bar.

    Raises:
        OSError: the download fails, or what comes is a web page instead of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + suffix)
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
        # Hosts that no longer have a file, and Google Drive when a quota is used up, answer with a
        # page that must not be stored as the file.
        if response.headers.get_content_type() == "text/html":
            raise OSError("the server sent a web page instead of the file")
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
