# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints that survive kills, full disks and damaged files.

A checkpoint is a folder `<directory>/<step>/` with one subfolder per item (`params`, `opt_state`,
`train`, ...), `meta` (JSON) and, written last, a manifest of sha256 sums. A step counts only once
its manifest is on disk; older steps are deleted only after that. Restoring verifies the sums and
falls back to the newest intact step. Saving costs the caller one device-to-host copy; the rest
happens in one background thread.
"""

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqzjax.errors import CheckpointError
from sqzjax.io import manifest, step_files
from sqzjax.io.lock import WorkdirLock
from sqzjax.typing import PyTree

_log = logging.getLogger(__name__)
_STEP = re.compile(r"0|[1-9]\d*")
_STALE = re.compile(r"\d+" + re.escape(step_files.TEMPORARY_SUFFIX) + r".*")


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held: its step, the items asked for, and the `meta` given to `save`."""

    step: int
    items: dict[str, PyTree]
    meta: dict[str, Any]


class Checkpointer:
    """Saves and restores the steps of one run in `directory`; one writer at a time.

    Reading needs no lock. Writing takes `lock`, or one of its own inside `directory` at the first
    save; what a killed run left behind is removed as soon as the lock is held.

    Args:
        directory: folder of the step folders; created by the first save.
        keep: number of newest steps to keep; None keeps all.
        keep_every: also keep every step divisible by this.
        keep_steps: also keep these.
        async_save: write in a background thread instead of inside `save`.
        on_error: what a failed write does: "raise" `CheckpointError` at the next `save`, `poll` or
            `wait`, or "warn" (log it, at most once per `warn_interval` seconds) and go on.
        lock: lock already held by the caller that covers `directory`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        keep_every: int | None = None,
        keep_steps: Collection[int] = (),
        async_save: bool = True,
        on_error: Literal["raise", "warn"] = "raise",
        warn_interval: float = 300.0,
        lock: WorkdirLock | None = None,
    ):
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'warn'")
        self.directory = Path(directory).absolute()
        self.last_saved: int | None = None
        """Newest step that this object has put on disk or restored."""
        self._keep, self._keep_every, self._keep_steps = keep, keep_every, frozenset(keep_steps)
        self._on_error, self._warn_interval = on_error, warn_interval
        self._async = async_save
        self._last_warning = -float("inf")
        self._own_lock = lock is None
        self._lock = lock or WorkdirLock(self.directory)
        self._prepared = False
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[int, Future[None]] | None = None
        self._failure: BaseException | None = None  # of the last finished save
        if self._lock.held:
            self._prepare()

    # Saving.

    def save(self, step: int, items: Mapping[str, PyTree], meta: Mapping[str, Any]) -> None:
        """Save `items` and the JSON-able `meta` as `step`; the arrays may be donated afterwards.

        Waits for a save still under way, so two are never in flight. A step that this object has
        just saved or restored is not written again. Complete steps >= `step` of an abandoned run
        are renamed to `<step>.abandoned`: never deleted, never mixed with this run's steps.
        """
        self.wait()
        if step < (self.last_saved or 0):
            raise ValueError(
                f"step={step} must not be below {self.last_saved or 0}, the newest step saved or "
                "restored so far; restore an earlier step first"
            )
        document = _as_json(meta)
        host_items = step_files.to_host(items)
        if self._is_saved(step, host_items):
            return
        self._prepare()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = (
            step,
            self._thread.submit(self._write, step, host_items, document),
        )
        if not self._async:
            self.wait()

    def poll(self) -> None:
        """Report a background save that has failed meanwhile; never blocks."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> bool:
        """Wait for the save under way; return whether the last save asked for is on disk."""
        if self._pending is not None:
            step, future = self._pending
            self._failure = future.exception()  # blocks until it is done
            self._pending = None
            if self._failure is None:
                self.last_saved = step
            else:
                self._report(step, self._failure)
        return self._failure is None

    @property
    def failure(self) -> BaseException | None:
        """Why the last finished save failed; None if it did not."""
        return self._failure

    def close(self) -> None:
        """Finish the save under way and give up the lock taken by this object."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
            if self._own_lock:
                self._lock.release()
                self._prepared = False

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading.

    def steps(self) -> list[int]:
        """Return the completely written steps, oldest first, without checking their content."""
        return [step for step, folder in self._step_folders() if manifest.exists(folder)]

    def latest_good(self) -> int | None:
        """Return the newest step whose checksums hold, or None if no step was ever completed.

        Raises `CheckpointError` if there are steps but all are damaged: starting afresh must be
        the user's decision.
        """
        folders = [self._folder(step) for step in reversed(self.steps())]
        return int(_newest_intact(folders).name) if folders else None

    def restore(
        self,
        step: int | None,
        abstract_items: Mapping[str, PyTree],
        *,
        cast: bool = False,
    ) -> Restored:
        """Restore `step`, or the newest intact step for None, as `abstract_items` describes it.

        Leaves are arrays or `ShapeDtypeStruct`s, with a sharding where the place matters; items
        not asked for are not read. Names, shapes and dtypes must match exactly, except that
        `cast` converts between dtypes of one kind. `CheckpointError` lists every mismatch.
        """
        self.wait()
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"step {step}"
            raise CheckpointError(f"no complete {wanted} in {self.directory}; steps: {steps}")
        chosen = reversed(steps) if step is None else [step]
        folder = _newest_intact([self._folder(candidate) for candidate in chosen])
        restored = _read(folder, abstract_items, cast)
        self.last_saved = restored.step
        return restored

    # Inside.

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _step_folders(self) -> list[tuple[int, Path]]:
        if not self.directory.is_dir():
            return []
        names = [name for name in os.listdir(self.directory) if _STEP.fullmatch(name)]
        return [(step, self._folder(step)) for step in sorted(map(int, names))]

    def _prepare(self) -> None:
        """Take the lock and remove what a killed run left: temporary and half-deleted folders.

        An incomplete step stays if no complete one exists, in case its manifest alone was lost.
        """
        if self._prepared:
            return
        self._lock.acquire()
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(self.directory):
            if _STALE.fullmatch(name):
                shutil.rmtree(self.directory / name)
        incomplete = [folder for _, folder in self._step_folders() if not manifest.exists(folder)]
        for folder in incomplete if self.steps() else []:
            _log.info("removing incomplete checkpoint %s", folder)
            shutil.rmtree(folder)
        self._prepared = True

    def _is_saved(self, step: int, host_items: Mapping[str, dict[str, Any]]) -> bool:
        if step != self.last_saved or step not in self.steps():
            return False
        arrays = {item: step_files.describe(flat) for item, flat in host_items.items()}
        try:
            return step_files.read_meta(self._folder(step))["arrays"] == arrays
        except CheckpointError:  # damaged since: write it again
            return False

    def _write(
        self, step: int, host_items: Mapping[str, dict[str, Any]], meta: dict[str, Any]
    ) -> None:
        """Put one step on disk; runs in the background thread."""
        try:
            self._check_space(host_items)
            self._set_aside(step)
            step_files.write_step(self._folder(step), step, host_items, meta)
            manifest.write(self._folder(step))
        except BaseException:
            self._remove_partial(step)  # it may be what fills the disk
            raise
        self._prune(step)

    def _check_space(self, host_items: Mapping[str, dict[str, Any]]) -> None:
        """Say in one line that the disk is full, where orbax's threads would in hundreds."""
        leaves = [leaf for flat in host_items.values() for leaf in flat.values()]
        needed = sum(getattr(leaf, "nbytes", 0) for leaf in leaves)
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            message = f"{needed:,} bytes are needed and {free:,} are free"
            raise OSError(errno.ENOSPC, message, str(self.directory))

    def _set_aside(self, step: int) -> None:
        for later in [found for found in self.steps() if found >= step]:
            target = self.directory / f"{later}.abandoned"
            number = 1
            while target.exists():
                number += 1
                target = self.directory / f"{later}.abandoned-{number}"
            _log.warning("step %d is from an abandoned run; renamed to %s", later, target.name)
            os.rename(self._folder(later), target)
        if self._folder(step).exists():  # incomplete
            shutil.rmtree(self._folder(step))

    def _remove_partial(self, step: int) -> None:
        temporary = str(step) + step_files.TEMPORARY_SUFFIX
        for name in os.listdir(self.directory):
            incomplete = name == str(step) and not manifest.exists(self._folder(step))
            if incomplete or (name.startswith(temporary) and _STALE.fullmatch(name)):
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        if self._keep is None:
            return
        for step in [found for found in self.steps() if found <= newest][: -self._keep]:
            every = self._keep_every is not None and step % self._keep_every == 0
            if every or step in self._keep_steps:
                continue
            try:
                manifest.discard(self._folder(step))
            except OSError as error:  # the new step is safe: no reason to call its save failed
                _log.warning("cannot delete old checkpoint %s: %s", self._folder(step), error)

    def _report(self, step: int, failure: BaseException) -> None:
        message = (
            f"saving step {step} into {self.directory} failed, older steps are intact: {failure}"
        )
        if self._on_error == "raise":
            raise CheckpointError(message) from failure
        if time.monotonic() - self._last_warning >= self._warn_interval:
            self._last_warning = time.monotonic()
            _log.warning("%s; training continues, the next save tries again", message)


def restore_params(
    path: str | os.PathLike[str],
    abstract_params: PyTree | None = None,
    *,
    cast: bool = False,
) -> Restored:
    """Restore `params` alone from a step folder, or from the newest intact step of a folder.

    Without `abstract_params` they arrive as a nested dict on the default device, in the stored
    dtypes. Other items are neither read nor verified.
    """
    path = Path(path).absolute()
    steps = [path / str(step) for step in reversed(Checkpointer(path).steps())]
    if not steps and not manifest.exists(path):
        raise CheckpointError(f"{path} is neither a complete step nor a folder with one")
    folder = _newest_intact(steps or [path], only=("params", step_files.META))
    if abstract_params is None:
        arrays = step_files.read_meta(folder)["arrays"]
        abstract_params = step_files.abstract_nested(arrays.get("params", {}))
    return _read(folder, {"params": abstract_params}, cast)


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `meta` that was given to `save`, from a step folder."""
    return step_files.read_meta(Path(path).absolute())["meta"]


def _read(folder: Path, abstract_items: Mapping[str, PyTree], cast: bool) -> Restored:
    document = step_files.read_meta(folder)
    items = step_files.read_items(folder, abstract_items, cast=cast)
    return Restored(step=document["step"], items=items, meta=document["meta"])


def _newest_intact(folders: list[Path], only: tuple[str, ...] | None = None) -> Path:
    """Return the first of `folders` (newest first) whose checksums hold."""
    damage: list[str] = []
    for folder in folders:
        problems = manifest.verify(folder, only)
        if not problems:
            return folder
        _log.warning("checkpoint %s is damaged: %s", folder, "; ".join(problems[:3]))
        damage += problems
    raise CheckpointError(
        "\n  ".join(["no intact checkpoint found (nothing was deleted):", *damage])
        + "\nrestore the files from a backup, or start with --resume never"
    )


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy, so that later changes by the caller do not reach the background thread."""
    try:
        return json.loads(json.dumps(dict(meta)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta must hold JSON values only: {error}") from error
