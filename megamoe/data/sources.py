"""Where bytes come from: files, members of zip archives and memory, read in blocks and again at will."""

import hashlib
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO

from megamoe.errors import DataError

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A byte string that can be read any number of times without being held in memory.

    Attributes:
        name: what people call it, for messages and the manifest.
        open: opens the underlying stream at its first byte.
        start: first byte of that stream which belongs to the source.
        n_bytes: length of the source.
    """

    name: str
    open: Callable[[], IO[bytes]] = field(repr=False)
    start: int
    n_bytes: int

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        """The source from its start, in blocks of at most `block_bytes`.

        Raises:
            DataError: the file or archive cannot be read, is damaged, or ends early.
        """
        left = self.n_bytes
        try:
            with self.open() as stream:
                stream.seek(self.start)
                while left and (block := stream.read(min(left, block_bytes))):
                    left -= len(block)
                    yield block
        except (OSError, EOFError, RuntimeError, lzma.LZMAError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self.name}: cannot be read, get a fresh copy ({error})") from None
        if left:
            raise DataError(f"{self.name}: ends {left:,} bytes early, get a fresh copy")

    def part(self, start: int, stop: int) -> "Source":
        """Bytes `start` to `stop` of this source."""
        return replace(self, start=self.start + start, n_bytes=stop - start)


@dataclass(frozen=True)
class Fingerprint:
    """What identifies the content of a source."""

    name: str
    n_bytes: int
    md5: str
    sha256: str


def file_source(path: Path) -> Source:
    """A whole file.

    Raises:
        DataError: there is no such file.
    """
    try:
        return Source(path.name, lambda: path.open("rb"), 0, path.stat().st_size)
    except OSError as error:
        raise DataError(f"{str(path)!r}: cannot be read ({error.strerror})") from None


def bytes_source(name: str, content: bytes) -> Source:
    """Bytes that are in memory already."""
    return Source(name, lambda: io.BytesIO(content), 0, len(content))


def zip_sources(path: Path) -> dict[str, Source]:
    """The files in a zip archive by their last name; folders inside the archive do not matter.

    Nothing is unpacked to disk, so names inside the archive decide nothing but which member is read.

    Raises:
        DataError: not a zip archive, or cut short.
    """

    def opener(member: str) -> Callable[[], IO[bytes]]:
        def open_member() -> IO[bytes]:
            with zipfile.ZipFile(path) as archive:
                return archive.open(member)

        return open_member

    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{str(path)!r}: not a whole zip archive, get a fresh copy ({error})") from None
    return {
        name: Source(f"{path.name}:{name}", opener(member.filename), 0, member.file_size)
        for member in members
        if (name := PurePosixPath(member.filename).name)
    }


def fingerprint(name: str, blocks: Iterable[bytes]) -> Fingerprint:
    """Length and hashes of the content that `blocks` make up."""
    n_bytes, md5, sha256 = 0, hashlib.md5(usedforsecurity=False), hashlib.sha256()
    for block in blocks:
        n_bytes += len(block)
        md5.update(block)
        sha256.update(block)
    return Fingerprint(name, n_bytes, md5.hexdigest(), sha256.hexdigest())


def cut(sources: Iterable[Source], start: int, stop: int) -> tuple[Source, ...]:
    """Bytes `start` to `stop` of the sources laid end to end."""
    return tuple(source.part(first, last) for source, first, last in overlaps(sources, start, stop))


def overlaps(sources: Iterable[Source], start: int, stop: int) -> Iterator[tuple[Source, int, int]]:
    """The sources that hold bytes `start` to `stop` of all laid end to end, and which of theirs these are."""
    offset = 0
    for source in sources:
        first, last = max(start - offset, 0), min(stop - offset, source.n_bytes)
        if first < last:
            yield source, first, last
        offset += source.n_bytes


def next_line_start(sources: Sequence[Source], offset: int) -> int:
    """Where the first line that begins at `offset` or later begins, in the sources laid end to end.

    The end of the last source where no further line begins.
    """
    if offset == 0:
        return 0
    position = offset - 1
    for source in cut(sources, position, sum(source.n_bytes for source in sources)):
        for block in source.blocks():
            newline = block.find(b"\n")
            if newline >= 0:
                return position + newline + 1
            position += len(block)
    return position


def lines_that_begin_in(source: Source, start: int, stop: int) -> Iterator[bytes]:
    """The whole lines of `source` that begin at its bytes `start` to `stop`, in blocks.

    Ranges that make up a source give each of its lines once. Nothing is read but the range, the byte
    before it, and the rest of its last line.
    """
    position = max(start - 1, 0)
    inside = start == 0
    for block in source.part(position, source.n_bytes).blocks():
        first = 0 if inside else block.find(b"\n") + 1
        inside = inside or first > 0
        if inside:
            # The newline at `stop` - 1 or after it is the end of the last line.
            end = block.find(b"\n", max(stop - 1 - position, 0)) + 1
            yield block[first : end or None]
            if end:
                return
        position += len(block)


def whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, cut anew so that every block ends with a newline; a missing last one is added."""
    pending: list[bytes] = []
    for block in blocks:
        lines, newline, rest = block.rpartition(b"\n")
        if newline:
            yield b"".join((*pending, lines, newline))
            pending = []
        if rest:
            pending.append(rest)
    if pending:
        yield b"".join((*pending, b"\n"))
