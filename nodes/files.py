"""File names from widgets: whether they are there, and whether a file has changed."""

from collections.abc import Callable, Iterable
from pathlib import Path

from ..svdq_core.errors import SVDQuantError

Finder = Callable[[str], Path]  # raises SVDQuantError for a name that is not offered


def name_error(find: Finder, names: Iterable[str | None]) -> bool | str:
    """A clear message where ComfyUI's would be a list of every file; a linked name comes as None."""
    try:
        return all(find(name).is_file() for name in names if name is not None)
    except SVDQuantError as error:
        return str(error)


def fingerprint(find: Finder, names: Iterable[str | None]) -> str:
    """Changes when a file does, so that it is read again."""
    stats = [find(name).stat() for name in names if name is not None]
    return " ".join(f"{stat.st_mtime_ns} {stat.st_size}" for stat in stats)
