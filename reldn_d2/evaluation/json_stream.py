"""Reads the elements of a long JSON list one by one, from a plain or gzipped file."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any

__all__ = ["list_elements"]

_CHUNK = 1 << 20  # characters read at once
# A parser fails within so many characters of the end where only the rest is missing.
_NEAR_THE_END = 1000


def list_elements(file: str, expected: str) -> Iterator[Any]:
    """The elements of the list that a JSON file consists of.

    Args:
        file: path; gzipped or not is told by its content.
        expected: what the file should be, for the message.

    Raises:
        ValueError: the file is no JSON list, or is cut off; with the number of the element.
    """
    with open(file, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    reader = _ListReader(file, expected)
    try:
        with (gzip.open if zipped else open)(file, "rt", encoding="utf-8-sig") as stream:
            yield from reader.elements(stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{reader.cut_off()} ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected {expected}, in UTF-8 or gzipped: {error}.") from error


class _ListReader:
    """The text of a file as far as it is needed, and the position in it."""

    def __init__(self, file: str, expected: str):
        self.file, self.expected = file, expected
        self.text, self.position, self.done = "", 0, 0

    def cut_off(self) -> str:
        return (
            f"{self.file}: ends within record {self.done}, or before the closing bracket: it is "
            "cut off. Copy or write it again."
        )

    def elements(self, stream: IO) -> Iterator[Any]:
        first = self._next_character(stream)
        if not first:
            raise ValueError(
                f"{self.file}: is empty; expected {self.expected}. Copy or write it again."
            )
        if first != "[":
            begin = self.text[self.position : self.position + 20]
            raise ValueError(f"{self.file}: begins with {begin!r}; expected {self.expected}.")
        self.position += 1
        while self._next_character(stream) != "]":
            if self.done:
                if self._next_character(stream) not in (",", ""):
                    found = self.text[self.position : self.position + 20]
                    raise ValueError(
                        f"{self.file}: {found!r} after record {self.done - 1}; expected a comma or "
                        "the closing bracket. Mend the file there."
                    )
                self.position += 1
            yield self._decode(stream)
            self.done += 1
        self.position += 1
        if self._next_character(stream):
            found = self.text[self.position : self.position + 20]
            raise ValueError(
                f"{self.file}: {found!r} after the closing bracket; expected {self.expected}. "
                "Several lists have to be merged into one."
            )

    def _read(self, stream: IO, size: int) -> bool:
        """Drop what was used and read on; False at the end of the file."""
        more = stream.read(size)
        self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)

    def _next_character(self, stream: IO) -> str:
        """Skip white space; empty at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._read(stream, _CHUNK):
                return ""

    def _decode(self, stream: IO) -> Any:
        self._next_character(stream)
        size = _CHUNK
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.position)
                self.position = end
                return value
            except json.JSONDecodeError as error:
                # The position of an open string is its beginning, however long it is.
                is_open = error.msg.startswith("Unterminated string")
                if not is_open and error.pos < len(self.text) - _NEAR_THE_END:
                    raise self._malformed(error) from error
                near_the_end, rest = error, self.text[error.pos :]
            except (RecursionError, ValueError) as error:  # nested too deeply, too many digits
                raise ValueError(
                    f"{self.file}: record {self.done} cannot be read: {error}. Expected "
                    f"{self.expected}; write the file anew."
                ) from error
            if not self._read(stream, size):
                if rest.strip() and self.text.rstrip().endswith("]"):  # nothing is missing
                    raise self._malformed(near_the_end) from near_the_end
                raise ValueError(self.cut_off()) from near_the_end
            size *= 2  # so that a long element is not parsed over and over

    def _malformed(self, error: json.JSONDecodeError) -> ValueError:
        around = error.doc[max(error.pos - 20, 0) : error.pos + 20]
        return ValueError(
            f"{self.file}: record {self.done} is no JSON: {error.msg}, near {around!r}. Mend it, "
            "or write the file anew with a JSON library."
        )
