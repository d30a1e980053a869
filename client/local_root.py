"""Write a server's tree into one local folder and nowhere else.

Last step of the life of a get into a folder.  Every function blocks and runs in a thread.  Called
by `client.download`; may import `protocol` and shapes of `client`.

Names come from a server, so no path is ever handed to the kernel as a string: each folder is
opened from its parent's descriptor without following symlinks.  A file appears under its name
only complete and synced.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from client.report import local_error
from protocol.errors import HaversackError, InvalidPath, PathOccupied
from protocol.hashing import Buffer, hash_block
from protocol.ids import BlockHash
from protocol.limits import BLOCK_BYTES_MAX, NAME_BYTES_MAX

Parts = tuple[str, ...]
"""A path under the root, as names; never empty for a file."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NAMELESS = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC
_NO_NAMELESS = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS})
_TEMPORARY = ".haversack-{}.part"
_CLOSED = -1


class Standing(enum.Enum):
    """What is at a local path, compared with what the server has."""

    ABSENT = "absent"
    SAME = "same"
    OTHER = "other"


class FileContent(NamedTuple):
    """What a local file is compared with."""

    parts: Parts
    size: int
    mtime_ns: int
    executable: bool
    blocks: tuple[BlockHash, ...]
    content: bytes | None


class LocalRoot:
    """An open local folder, created if need be.  Raises `LocalFileError`.

    May be closed while threads still work in it (their caller was cancelled): what they hold stays
    theirs, and what they ask for next is refused, rather than done to whatever the number of our
    descriptor means by then.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            os.makedirs(path, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise local_error(path, error) from error

    def close(self) -> None:
        """Close the descriptor.  Idempotent."""
        with self._lock:
            if self._descriptor != _CLOSED:
                os.close(self._descriptor)
                self._descriptor = _CLOSED

    def shown(self, parts: Parts) -> str:
        """A path for messages."""
        return os.path.join(self.path, *parts)

    @contextlib.contextmanager
    def folder(self, parts: Parts, *, make: bool) -> Iterator[int]:
        """Descriptor of a folder below the root.  Raises `FileNotFoundError` where it is absent and
        not to be made, `OSError` where a symlink or a file stands in the way."""
        with self._lock:
            descriptor = os.dup(self._descriptor)  # EBADF once closed
        try:
            for part in parts:
                below = _open_folder(descriptor, part, make)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    def make_folder(self, parts: Parts) -> HaversackError | None:
        """Make a folder and its parents."""
        try:
            with self.folder(parts, make=True):
                return None
        except OSError as error:
            return self.refusal(parts, error)

    def compare(self, files: Sequence[FileContent]) -> list[Standing | HaversackError]:
        """What stands at each path.  A file that is the same gets its times and its executable bit
        set, as if it had been written."""
        return [self._compare(file) for file in files]

    def _compare(self, file: FileContent) -> Standing | HaversackError:
        try:
            with self.folder(file.parts[:-1], make=False) as folder:
                return _compare_in(folder, file)
        except FileNotFoundError:
            return Standing.ABSENT
        except OSError as error:
            return self.refusal(file.parts, error)

    def write_files(
        self, files: Sequence[tuple[FileContent, Buffer]], overwrite: bool
    ) -> list[HaversackError | None]:
        """Write small files whole; the error of each that could not be."""
        results: list[HaversackError | None] = []
        for file, data in files:
            try:
                new = NewFile(self, file.parts, file.executable)
                try:
                    new.write(data)
                    new.finish(file.mtime_ns, overwrite)
                finally:
                    new.close()
            except HaversackError as error:
                results.append(error)
            else:
                results.append(None)
        return results

    def write_link(self, parts: Parts, target: str, mtime_ns: int, overwrite: bool) -> bool:
        """Make a symlink; False if it is there already.  Raises `LocalFileError`,
        `PathOccupied`."""
        try:
            with self.folder(parts[:-1], make=True) as folder:
                if _link_target(folder, parts[-1]) == target:
                    return False
                temporary = _TEMPORARY.format(secrets.token_hex(8))
                os.symlink(target, temporary, dir_fd=folder)
                try:
                    os.utime(
                        temporary, ns=(mtime_ns, mtime_ns), dir_fd=folder, follow_symlinks=False
                    )
                    _place(folder, temporary, parts[-1], overwrite)
                finally:
                    _unlink(temporary, folder)
        except OSError as error:
            raise self.refusal(parts, error) from error
        return True

    def sync_folders(self, folders: Sequence[Parts]) -> None:
        """Make the names in these folders durable.  Raises `LocalFileError`."""
        for parts in folders:
            try:
                with self.folder(parts, make=False) as folder:
                    os.fsync(folder)
            except OSError as error:
                raise self.refusal(parts, error) from error

    def refusal(self, parts: Parts, error: OSError) -> HaversackError:
        """What the kernel refused below the root, in words."""
        shown = self.shown(parts)
        if error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY):
            return PathOccupied(f"something else stands at {shown!r}: move it, or use --overwrite")
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return PathOccupied(f"a symlink or a file stands where {shown!r} needs a folder")
        return local_error(shown, error)


class NewFile:
    """A file without a name (`O_TMPFILE`), or with a temporary one where the file system cannot.

    `finish` gives it its own name; `close` drops what is not finished.  A nameless file leaves
    nothing behind when the process is killed, and costs half of what a renamed one does.  `close`
    may come while another thread writes: it waits, and later writes are refused.  Every method
    raises `LocalFileError`; `finish` also `PathOccupied`.
    """

    def __init__(self, root: LocalRoot, parts: Parts, executable: bool) -> None:
        self._root = root
        self._parts = parts
        self._temporary: str | None = None
        self._lock = threading.Lock()
        self._resources = contextlib.ExitStack()
        self.length = 0
        with self._refusals():
            self._folder = self._resources.enter_context(root.folder(parts[:-1], make=True))
            try:
                self._descriptor = self._open(0o777 if executable else 0o666)
            except OSError:
                self._resources.close()
                raise
        self._resources.callback(os.close, self._descriptor)

    def _open(self, mode: int) -> int:
        try:
            return os.open(".", _NAMELESS, mode, dir_fd=self._folder)
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
        name = _TEMPORARY.format(secrets.token_hex(8))
        descriptor = os.open(name, _CREATE, mode, dir_fd=self._folder)
        self._temporary = name
        self._resources.callback(_unlink, name, self._folder)
        return descriptor

    def write(self, data: Buffer) -> None:
        """Append."""
        with self._lock, self._refusals():
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
        self.length += len(data)

    def finish(self, mtime_ns: int, overwrite: bool) -> None:
        """Sync, and give the file its name; nothing but a complete file ever has it."""
        with self._lock, self._refusals():
            os.utime(self._descriptor, ns=(mtime_ns, mtime_ns))
            os.fsync(self._descriptor)
            if self._temporary is None:
                _name(self._folder, self._descriptor, self._parts[-1], overwrite)
            else:
                _place(self._folder, self._temporary, self._parts[-1], overwrite)

    def close(self) -> None:
        """Drop what is not finished, release the descriptors.  Idempotent."""
        with self._lock:
            self._resources.close()
            self._descriptor = _CLOSED

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._root.refusal(self._parts, error) from error


def check_parts(parts: Parts) -> None:
    """Raises `InvalidPath` for names that would leave the root, or that no file can have."""
    for part in parts:
        unsafe = part in ("", ".", "..") or "/" in part or "\0" in part
        if unsafe or len(os.fsencode(part)) > NAME_BYTES_MAX:
            raise InvalidPath(f"the server names a path that is not one: {part[:80]!r}")


def _open_folder(parent: int, name: str, make: bool) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
    return os.open(name, _FOLDER, dir_fd=parent)


def _name(folder: int, descriptor: int, name: str, overwrite: bool) -> None:
    """Give a nameless file its name; only with `overwrite` in the place of another."""
    source = f"/proc/self/fd/{descriptor}"
    try:
        os.link(source, name, dst_dir_fd=folder, follow_symlinks=True)
    except FileExistsError:
        if not overwrite:
            raise
        temporary = _TEMPORARY.format(secrets.token_hex(8))
        os.link(source, temporary, dst_dir_fd=folder, follow_symlinks=True)
        try:
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            _unlink(temporary, folder)


def _unlink(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _place(folder: int, temporary: str, name: str, overwrite: bool) -> None:
    """Give a finished file its name.  Without `overwrite` nothing is ever replaced, not even what
    appeared this instant: a hard link fails where a rename would replace."""
    if overwrite:
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        return
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        try:
            os.lstat(name, dir_fd=folder)
        except FileNotFoundError:
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        else:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from error


def _link_target(folder: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # nothing there, or no symlink
            return None
        raise


def _compare_in(folder: int, file: FileContent) -> Standing:
    try:
        descriptor = os.open(file.parts[-1], _READ, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES, errno.ENXIO):
            return Standing.OTHER
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != file.size:
            return Standing.OTHER
        if not _same_bytes(descriptor, file):
            return Standing.OTHER
        _set_attributes(descriptor, status, file)
    finally:
        os.close(descriptor)
    return Standing.SAME


def _same_bytes(descriptor: int, file: FileContent) -> bool:
    """By content, never by time: a file is only skipped when it was read."""
    if file.content is not None:
        return os.pread(descriptor, file.size + 1, 0) == file.content
    for number, block in enumerate(file.blocks):
        data = os.pread(descriptor, BLOCK_BYTES_MAX, number * BLOCK_BYTES_MAX)
        if hash_block(data) != block:
            return False
    return len(file.blocks) == -(-file.size // BLOCK_BYTES_MAX)


def _set_attributes(descriptor: int, status: os.stat_result, file: FileContent) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if bool(mode & stat.S_IXUSR) != file.executable:
        readable = (mode & 0o444) >> 2
        os.fchmod(descriptor, mode | readable if file.executable else mode & ~0o111)
    if status.st_mtime_ns != file.mtime_ns:
        os.utime(descriptor, ns=(file.mtime_ns, file.mtime_ns))
