"""A model's folder, looked over before anything in it is read. Called by `sources`.

A folder comes from a stranger. A link in it could make the server read, and show, any file of this machine; a pipe or a
device would never end. What Octavo reads lies in the folder itself or one level below.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from octavo.errors import ModelFileError


def check_folder(folder: Path) -> None:
    """Raises `ModelFileError` for a link that leads out of the folder, and for what is neither a file nor a folder.

    In the cache of the Hugging Face Hub, files of a snapshot are links to the blobs of the same repository: those are
    sound. `folder` itself may be a link, as may whatever leads to it: they are the user's.
    """
    home = folder.resolve()
    inside = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in _entries(home):
        found = Path(os.path.realpath(path))
        if path.is_symlink() and not any(found.is_relative_to(place) for place in inside):
            raise ModelFileError("is a link that leads out of the model's folder: copy the file there", str(path))
        try:
            mode = found.stat().st_mode
        except OSError:  # a link to nothing, or to itself
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ModelFileError("is neither a file nor a folder", str(path))


def _entries(folder: Path) -> Iterator[Path]:
    """In it, and one level below. A folder below that is a link is not looked into: where it leads is checked."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield Path(entry.path)
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                with os.scandir(entry.path) as below:
                    yield from (Path(one.path) for one in below)
