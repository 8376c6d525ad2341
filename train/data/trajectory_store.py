# SPDX-License-Identifier: Apache-2.0
"""Recorded trajectories on disk: shards that are complete or not there, and what made them.

`store.json` says how the trajectories were made and how many each shard holds; it is written
first. `shard-00000/` holds one array per file and, written last, a manifest with a checksum of
each. So a recording that stops anywhere goes on with the shards that are missing, and a torn or
changed file is found before it is trained on. About 2 bytes x length x hidden size per trajectory.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sqzjax.errors import DataError
from sqzjax.io import manifest
from train.data.pipeline import differences

HEADER, TOKENIZER = "store.json", "tokenizer"
FOLDER = "trajectories"
"""Where the store lies in the folder of the run that records it."""
FORMAT = 1
HIDDEN = np.dtype(ml_dtypes.bfloat16)

# Arrays of a shard and their dtypes on disk; numpy's file format has no bfloat16.
ARRAYS = {
    "prompt": np.int32,  # n W, right-padded with 0
    "prompt_length": np.int32,  # n
    "tokens": np.int32,  # n Lg
    "rank": np.int16,  # n Lg: the step that filled the position, -1 beyond the response
    "hidden": np.uint16,  # n Lg D: bits of bfloat16
    "reference": np.int32,  # n Lg, right-padded with 0
    "reference_length": np.int32,  # n
}


@dataclass(frozen=True)
class Header:
    """What is recorded and how: `origin` must not change while a store is being filled.

    `settings` are the numbers that readers need: length, block_size, hidden_size, mask_token,
    prompt_width.
    """

    origin: Mapping[str, str]
    settings: Mapping[str, int]
    shards: Sequence[int]  # trajectories in each

    def write(self, folder: Path) -> None:
        """Write the header, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "format": FORMAT,
            "origin": dict(self.origin),
            "settings": dict(self.settings),
            "shards": list(self.shards),
        }
        temporary = folder / (HEADER + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / HEADER)
        manifest.sync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> "Header":
        """Read the header; DataError if there is none or it is of another format."""
        path = folder / HEADER
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise DataError(
                    f"{path} has format {document['format']}, this version reads {FORMAT}; record "
                    "the trajectories again"
                )
            return cls(document["origin"], document["settings"], tuple(document["shards"]))
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError(
                f"{folder} holds no trajectories; record them with a config of kind: collect, and "
                "give the folder that it names"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is unreadable ({error!r}); record again") from error

    @property
    def fingerprint(self) -> str:
        """The sha256 of everything that determines the trajectories."""
        text = json.dumps([FORMAT, dict(self.origin), dict(self.settings), list(self.shards)])
        return sha256(text.encode()).hexdigest()


class StoreWriter:
    """Fill a store shard by shard; what is there already of the same header is kept.

    DataError when the folder holds trajectories of another teacher, data or setting.
    """

    def __init__(self, folder: Path, header: Header):
        self._folder, self.header = folder, header
        if not (folder / HEADER).exists():
            header.write(folder)
            return
        found = Header.read(folder)
        mine = {**header.origin, **header.settings, "shards": list(header.shards)}
        theirs = {**found.origin, **found.settings, "shards": list(found.shards)}
        if different := differences(theirs, mine, "store"):
            raise DataError(
                f"{folder} holds trajectories that were made otherwise; restore the old setting, "
                "choose another folder, or pass --resume never to discard them:\n  "
                + "\n  ".join(different)
            )

    def missing(self) -> tuple[list[int], list[str]]:
        """Return the shards still to be written, and what is wrong with damaged ones."""
        todo, problems = [], []
        for number in range(len(self.header.shards)):
            folder = shard_folder(self._folder, number)
            damage = manifest.verify(folder) if manifest.exists(folder) else ()
            problems += damage
            if damage or not manifest.exists(folder):
                todo.append(number)
        return todo, problems

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write one shard; it counts once its manifest is there."""
        folder = shard_folder(self._folder, number)
        new = folder.with_name(f".{folder.name}.tmp")
        for old in (new, folder):
            if old.exists():
                manifest.discard(old)
        new.mkdir()
        for name, dtype in ARRAYS.items():
            array = arrays[name]
            if name == "hidden":
                array = array.astype(HIDDEN).view(np.uint16)
            np.save(new / f"{name}.npy", np.ascontiguousarray(array, dtype))
        new.rename(folder)
        manifest.write(folder)


class TrajectoryStore:
    """A complete, checked store: `row(i)` reads one trajectory through memory maps.

    Opening reads every file once to check it.
    """

    def __init__(self, folder: Path):
        self.header = Header.read(folder)
        self.folder = folder
        numbers = range(len(self.header.shards))
        self._check([shard_folder(folder, number) for number in numbers])
        self._shards = [self._open(number) for number in numbers]
        self._starts = np.cumsum([0, *self.header.shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> dict[str, Any]:
        """Return the arrays of one trajectory without the leading axis; hidden in bfloat16."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        inside = index - self._starts[shard]
        found = {name: array[inside] for name, array in self._shards[shard].items()}
        return {**found, "hidden": found["hidden"].view(HIDDEN)}

    def column(self, name: str) -> np.ndarray:
        """Return one array of all trajectories, in memory."""
        return np.concatenate([shard[name] for shard in self._shards])

    def _check(self, folders: list[Path]) -> None:
        lacking = sum(not manifest.exists(folder) for folder in folders)
        if lacking:
            raise DataError(
                f"{self.folder} lacks {lacking} of {len(folders)} shards; repeat the command that "
                "records them, it goes on where it stopped"
            )
        problems = [line for folder in folders for line in manifest.verify(folder)]
        if problems:
            raise DataError(
                f"{self.folder} is damaged; repeat the command that records it, it makes damaged "
                "shards anew:\n  " + "\n  ".join(problems[:20])
            )

    def _open(self, number: int) -> dict[str, np.ndarray]:
        folder, count = shard_folder(self.folder, number), self.header.shards[number]
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ARRAYS
        }
        wrong = [name for name, array in arrays.items() if len(array) != count]
        if wrong:
            raise DataError(f"{folder}: {wrong} must hold {count} trajectories; record again")
        return arrays


def shard_folder(folder: Path, number: int) -> Path:
    """Return the folder of a shard."""
    return folder / f"shard-{number:05d}"


def discard(folder: Path) -> None:
    """Delete what a store consists of, the header first, and nothing else."""
    (folder / HEADER).unlink(missing_ok=True)
    for path in sorted(folder.glob("shard-*")) + sorted(folder.glob(".shard-*.tmp")):
        manifest.discard(path)
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
