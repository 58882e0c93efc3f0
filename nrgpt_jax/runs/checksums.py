"""Checksums of the files of a folder, stored in its `checksums.json`.

XXH3 detects damage at the speed of memory; it does not protect against tampering.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from nrgpt_jax import disk, host, paths
from nrgpt_jax.errors import UserError
from nrgpt_jax.processes import gather_texts, host0_first, is_first, raise_on_all_hosts

FILE_NAME = "checksums.json"
_KIND = "xxh3_128"
_CURE = "restore it from a copy"


def write(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the checksums of the current files in a folder. Raises OSError.

    The processes of a run share the work.

    Args:
      folder: the folder of the files.
      names: the names of the files; None: all files in the folder.
    """
    message = json.dumps(_files(folder) if names is None else sorted(names)) if is_first() else ""
    sums = _sums(folder, json.loads(gather_texts(message)[0]))  # the first process's listing
    host0_first(lambda: disk.write_json(folder / FILE_NAME, {_KIND: sums}))


def damage(folder: Path) -> str:
    """Return the first mismatch with a folder's checksums; "" if all match or there are none.

    Raises OSError on all processes if a bucket cannot be reached.
    """
    message = json.dumps(_expected(folder)) if is_first() else ""
    wanted, problem, unreachable = json.loads(gather_texts(message)[0])  # alike on all processes
    if unreachable:
        raise OSError(problem)
    if problem or not wanted:
        return problem
    try:
        sums = _sums(folder, sorted(wanted))
    except (OSError, UserError) as error:
        if isinstance(error, OSError) and paths.on_bucket(folder):
            raise
        return f"{error}"
    wrong = [name for name in sorted(wanted) if sums[name] != wanted[name]]
    return f"its file {wrong[0]} does not match its checksum" if wrong else ""


def exist(folder: Path) -> bool:
    """Return whether a folder has checksums; older versions wrote none."""
    return (folder / FILE_NAME).exists()


def _expected(folder: Path) -> tuple[dict[str, str], str, bool]:
    """Return the recorded checksums by file, any problem, and whether a bucket is unreachable."""
    try:
        record = disk.read_json(folder / FILE_NAME, dict[str, dict[str, str]], _CURE)
        wanted = record[_KIND]
        missing = sorted(set(wanted) - set(_files(folder)))  # a name cannot lead out of the folder
    except FileNotFoundError:
        return {}, "", False
    except (UserError, KeyError, OSError) as error:
        return {}, f"{error}", isinstance(error, OSError) and paths.on_bucket(folder)
    return wanted, f"its file {missing[0]!a:.80} is missing" if missing else "", False


def _files(folder: Path) -> list[str]:
    return [name for name in paths.files(folder) if name.rpartition("/")[2] != FILE_NAME]


def _sums(folder: Path, names: list[str]) -> dict[str, str]:
    """Compute the checksums of files; every process reads its share of them."""
    mine = names[jax.process_index() :: jax.process_count()]

    def of_mine() -> list[str]:
        with ThreadPoolExecutor(min(4, host.cores())) as pool:
            return list(pool.map(lambda name: disk.file_checksum(folder / name), mine))

    texts = gather_texts(json.dumps(dict(zip(mine, raise_on_all_hosts(of_mine), strict=True))))
    return {name: value for text in texts for name, value in json.loads(text).items()}
