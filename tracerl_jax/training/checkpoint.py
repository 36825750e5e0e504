"""Orbax checkpoints of a run: atomic, asynchronous, verified when they are read.

    runs/<name>/checkpoints/<step>/params   policy parameters alone: what rollout, evaluation and export need
                                  /value    value parameters (when there are any)
                                  /train    optimizer states and update counters
                                  /data     JSON: phase, steps, position in the data
                                  /meta     JSON: resolved config, versions
                                  /ahead    JSON: samples that are there for the next RL step (with rl.overlap)
    runs/<name>/checksums/<step>.json       size and CRC-32 of every file, written once the checkpoint is complete

A step folder appears only when it is complete (Orbax writes elsewhere and renames). A folder that was damaged later is
found by its checksums, or by a failing read where a kill came before them; it is set aside and the one before is used.

In a job every process writes and reads its parts of the arrays. Process 0 decides which step is read, and computes the
checksums once all have written.
"""

import contextlib
import errno
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tracerl_jax.config import CheckpointSection
from tracerl_jax.errors import CheckpointError, UserError, in_one_line
from tracerl_jax.files import write_json
from tracerl_jax.parallel import watchdog
from tracerl_jax.parallel.distributed import is_job, is_lead, process_index
from tracerl_jax.parallel.job import is_consequence
from tracerl_jax.parallel.peers import from_lead, gather, own_share
from tracerl_jax.training.interrupt import Interrupted

log = logging.getLogger(__name__)

TREES = ("params", "value", "train")
DOCUMENTS = ("data", "meta", "ahead")
LEAVE_SECONDS = 30.0
READERS = 8  # threads that compute checksums


class Checkpointer:
    """Saves and restores the state of one run folder."""

    def __init__(self, run_path: str | os.PathLike, options: CheckpointSection):
        self._root = Path(run_path).absolute()
        self._folder = self._root / "checkpoints"
        self._checksums = self._root / "checksums"
        from_lead(lambda: self._checksums.mkdir(parents=True, exist_ok=True))
        policies = [ocp.checkpoint_managers.LatestN(options.keep_last)]
        if options.keep_every:
            policies.append(_EveryRLStep(self._folder, options.keep_every))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1),
            enable_async_checkpointing=True,
        )
        self._manager = self._open_manager()
        self._unsealed: list[int] = [s for s in self._manager.all_steps() if not self._seal_path(s).exists()]
        self._sealer: threading.Thread | None = None
        self._leaving = threading.Event()  # the sealer has no time left

    def _open_manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self._folder, options=self._options, item_names=TREES + DOCUMENTS)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, trees: dict[str, Any], documents: dict[str, dict]) -> None:
        """Start writing a checkpoint; returns when the arrays may be changed again.

        Args:
            step: larger than every step saved before.
            trees: `params`, `train` and possibly `value`.
            documents: JSON-able `data`, `meta` and possibly `ahead`.
        Raises CheckpointError when the disk is full (also for the save before this one).
        """
        if step in self._steps():
            return
        args = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args |= {name: ocp.args.JsonSave(document) for name, document in documents.items()}
        with disk_errors(self._folder):
            self._manager.save(step, args=ocp.args.Composite(**args))
        self._unsealed.append(step)
        self.seal_finished()

    def _steps(self) -> list[int]:
        """That there are, newest first."""
        return from_lead(lambda: sorted(self._manager.all_steps(), reverse=True))

    def restore(self, abstract: Callable[[dict], dict[str, Any]]) -> tuple[int, dict[str, Any], dict[str, dict]] | None:
        """The newest checkpoint that is whole: (step, trees, documents); None for a run that has never saved one.

        Newer ones that are damaged are set aside: those that differ from their checksums, and those that have none and
        cannot be read.

        `abstract(documents)` gives item name -> tree of ShapeDtypeStruct with shardings; another mesh than at saving
        is fine.
        Raises CheckpointError, and moves nothing, when the newest whole one cannot be read for another reason (memory,
        permissions, another model), and when there are or were checkpoints and none of them is whole.
        """
        damaged: dict[int, str] = {}
        steps = self._steps()
        for step in steps:
            is_sealed, problem = self._verify(step, trust_marks=step != steps[-1])
            restored = None
            if problem is None:
                restored, cause = self._try(step, abstract)
                problem, is_everywhere = _problem_of_all(cause)
                if not is_everywhere and is_consequence(cause):
                    raise cause  # they died: the watchdog will say so
                if problem is not None and is_sealed:
                    raise CheckpointError(
                        f"{self._folder / str(step)}: cannot be read ({problem}), although its files are as they were "
                        "written; nothing was changed. Check permissions, free memory (of the devices too) and the "
                        "versions of the packages, and run the same command again"
                    ) from cause
                if not is_everywhere:
                    write_json(self._checksums / f"{step}.unreadable.{process_index()}", problem)
                    raise RuntimeError(f"{self._folder / str(step)}: cannot be read here ({problem}), and others wait "
                                       "for it; the next start sets it aside") from cause
            if problem is None:
                for number, reason in damaged.items():
                    self._set_aside(number, reason)
                from_lead(lambda step=step: self._remove_marks(step))
                return restored
            damaged[step] = problem
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"{self._folder}: none of the checkpoints can be read ({reasons}); nothing was changed. Restore the "
                "folder from a copy, or start a new run with another --config.name"
            )
        if from_lead(lambda: any(self._root.glob("damaged-checkpoint-*"))):
            raise CheckpointError(
                f"{self._root}: has damaged checkpoints (damaged-checkpoint-*) and none that can be read, so it would "
                "start from nothing. Restore checkpoints/ from a copy, start a new run with another --config.name, or "
                "remove the damaged ones to start again here"
            )
        return None

    def _verify(self, step: int, trust_marks: bool) -> tuple[bool, str | None]:
        """Whether there are checksums, and what is wrong with the files. Marks are not for the last hope."""
        checksums, marks = from_lead(lambda: (_read_json(self._seal_path(step)), self._marks(step)))
        if marks and trust_marks:
            return checksums is not None, f"{_read_json(marks[0])}, says {marks[0].relative_to(self._root)}"
        found = None if checksums is None else _checksums_together(self._folder / str(step))
        return checksums is not None, _difference(checksums, found)

    def _try(self, step: int, abstract: Callable[[dict], dict[str, Any]]) -> tuple[tuple | None, Exception | None]:
        """(what `restore` returns, None), or (None, why it cannot be read)."""
        try:
            return (step, *self._read(step, abstract)), None
        except UserError:
            raise
        except Exception as error:  # Orbax raises whatever its parts raise
            return None, error

    def _read(self, step: int, abstract: Callable[[dict], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict]]:
        saved = [name for name in DOCUMENTS if (self._folder / str(step) / name).exists()]
        documents = self._restore_items(step, {name: ocp.args.JsonRestore() for name in saved})
        trees = {name: ocp.args.StandardRestore(tree) for name, tree in abstract(documents).items()}
        return self._restore_items(step, trees), documents

    def _restore_items(self, step: int, args: dict[str, Any]) -> dict[str, Any]:
        items = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: items[name] for name in args}

    def _set_aside(self, step: int, problem: str) -> None:
        damaged = self._folder / str(step)
        self._manager.close()

        def move() -> None:
            kept = self._root / f"damaged-checkpoint-{step}"
            number = 1
            while kept.exists():
                number += 1
                kept = self._root / f"damaged-checkpoint-{step}-{number}"
            log.warning("checkpoint %s is damaged (%s): moved to %s, using the one before", damaged, problem, kept)
            damaged.rename(kept)
            self._seal_path(step).unlink(missing_ok=True)
            self._remove_marks(step)

        from_lead(move)
        self._unsealed = [s for s in self._unsealed if s != step]  # the number may come again
        self._manager = self._open_manager()

    # Checksums. They are computed by a thread of their own once Orbax has committed the folder.

    def _seal_path(self, step: int) -> Path:
        return self._checksums / f"{step}.json"

    def _marks(self, step: int) -> list[Path]:
        """What processes wrote that could not read a checkpoint while the others could."""
        return sorted(self._checksums.glob(f"{step}.unreadable.*"))

    def _remove_marks(self, step: int) -> None:
        for mark in self._marks(step):
            mark.unlink(missing_ok=True)

    def seal_finished(self) -> None:
        """Write checksums of checkpoints that have been committed since; call it now and then, it does not block."""
        if not is_lead() or self._manager.is_saving_in_progress() or (self._sealer and self._sealer.is_alive()):
            return
        steps, self._unsealed = self._unsealed, []
        if steps:
            self._sealer = threading.Thread(target=self._seal, args=(steps,), daemon=True)
            self._sealer.start()

    def _seal(self, steps: list[int]) -> None:
        for step in steps:
            try:
                write_json(self._seal_path(step), _checksums(self._folder / str(step), self._leaving))
            except FileNotFoundError:  # dropped by the preservation policy meanwhile
                continue
            except _GivenUp:
                return
            except (OSError, UserError) as error:
                log.warning("no checksums for checkpoint %d: %s", step, error)
        for path in self._checksums.glob("*.*"):
            if not (self._folder / path.name.partition(".")[0]).exists():
                path.unlink(missing_ok=True)

    def wait(self, seal: bool = True) -> None:
        """Block until everything is on disk and, with `seal`, has its checksums."""
        with disk_errors(self._folder), watchdog.phase("save"):
            self._manager.wait_until_finished()
        if not seal:
            self._leaving.set()
            return
        if self._sealer:
            self._sealer.join()
        self.seal_finished()
        if self._sealer:
            self._sealer.join()

    def close(self, seal: bool = True) -> None:
        self.wait(seal)
        self._manager.close()

    def leave(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """`close`, as the exit of a context.

        Behind a signal time is short: checksums, for which everything is read once more, are left to the next start. A
        process that an error takes out of a job waits for a save under way only so long: the save waits for the other
        processes, which may not know of the error yet.
        """
        if error is None or isinstance(error, Interrupted) or not is_job():
            return self.close(seal=error is None)

        def close() -> None:
            with contextlib.suppress(Exception):  # there is one already
                self.close()

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(LEAVE_SECONDS)


@dataclass(frozen=True)
class _EveryRLStep:
    """Orbax policy: keeps checkpoints whose RL step is a multiple of `every`. Step numbers of checkpoints count the
    updates of the warm-up too, so the RL step is read from the checkpoint; the one still being written is the newest,
    which is kept anyway."""

    folder: Path
    every: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [self._is_kept(checkpoint.step) for checkpoint in checkpoints]

    def _is_kept(self, step: int) -> bool:
        try:
            progress = json.loads((self.folder / str(step) / "data" / "metadata").read_text())
        except (OSError, ValueError):
            return False
        return progress["phase"] == "rl" and progress["rl_step"] % self.every == 0


def load_params(path: str | os.PathLike, abstract: Any, step: int | None = None) -> Any:
    """The policy parameters alone, from a run folder or its `checkpoints` folder (default: the newest step).

    `abstract` is a tree of ShapeDtypeStruct, with shardings if wanted. Raises CheckpointError, also for parameters that
    differ from their checksums.
    """
    folder = Path(path).absolute()
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / "params").is_dir())
    if not steps:
        raise CheckpointError(f"{folder}: no checkpoint with an item `params`; give a run folder (runs/<name>)")
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder}: no step {step}; there are {steps}")
    step = steps[-1] if step is None else step
    chosen = folder / str(step) / "params"
    checksums = _read_json(folder.parent / "checksums" / f"{step}.json")
    problem = None if checksums is None else _difference(_below("params/", checksums), _checksums(chosen))
    if problem:
        others = [other for other in steps if other != step]
        remedy = f"take another step, there are {others}" if others else "restore it from a copy"
        raise CheckpointError(f"{chosen}: damaged ({problem}): {remedy}")
    try:
        return ocp.StandardCheckpointer().restore(chosen, abstract)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{chosen}: cannot be read: {error}") from error


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _problem_of_all(cause: Exception | None) -> tuple[str | None, bool]:
    """What kept a process from reading its part, or None; and whether all know of it: the others may be waiting, inside
    Orbax, for the one that could not."""
    mine = cause and in_one_line(cause)
    try:
        return next((p for p in gather(mine, within=None if mine is None else LEAVE_SECONDS) if p), None), True
    except TimeoutError:
        return mine, False


def _read_json(path: Path) -> Any:
    """None for a file that was not written, or not to the end."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _below(prefix: str, checksums: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name.removeprefix(prefix): sums for name, sums in checksums.items() if name.startswith(prefix)}


def _difference(expected: dict[str, list[int]] | None, found: dict[str, list[int]] | None) -> str | None:
    """What is wrong with a folder, or None, also for one without checksums, which is only checked by reading it."""
    if expected is None:
        return None
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"{len(wrong)} files differ from their checksums, the first is {wrong[0]}" if wrong else None


class _GivenUp(Exception):
    pass


def _checksums(folder: Path, leaving: threading.Event | None = None) -> dict[str, list[int]]:
    """{relative path: [bytes, CRC-32]} of every file below a folder. Raises _GivenUp soon after `leaving` is set."""
    return _checksums_of(folder, _files(folder), leaving)


def _checksums_together(folder: Path) -> dict[str, list[int]]:
    """The same, which the processes of a job share."""
    mine = _checksums_of(folder, own_share(from_lead(lambda: _files(folder))))
    return {name: sums for of_process in gather(mine) for name, sums in of_process.items()}


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _checksums_of(
    folder: Path, names: Sequence[str], leaving: threading.Event | None = None
) -> dict[str, list[int]]:
    def sums(name: str) -> list[int]:
        crc = size = 0
        with (folder / name).open("rb") as stream:
            while chunk := stream.read(1 << 22):
                if leaving is not None and leaving.is_set():
                    raise _GivenUp
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
        return [size, crc]

    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(sums, names), strict=True))


class disk_errors:
    """Turns a full disk, however Orbax wraps it, into a CheckpointError with the remedy."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        chain = error
        while chain is not None:
            full = isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or "No space left" in str(chain) or "Disk quota exceeded" in str(chain):
                raise CheckpointError(
                    f"{self._folder}: the disk is full. Earlier checkpoints are intact: free some space and run the "
                    "same command again"
                ) from error
            chain = chain.__cause__ or chain.__context__
        return False
