"""Checkpoints: orbax, asynchronous, with a checksum a leaf.

Orbax restores a flipped bit without a word, so each save carries the CRC-32 of every leaf, and a restore compares.
Where an array is spread over processes each of them writes the checksums of its own shards, which are compared where
the mesh is the same. Layers are saved unstacked under flat names, so that a checkpoint loads into a scanned and into a
looped stack. What is frozen is saved once, in a directory named by its checksum, to which the steps refer.

    checkpoints/<step>/{state, record}      frozen/<checksum>/      checksums/<step>/<process>.json
"""

import functools
import json
import logging
import pathlib
import shutil
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lissom.models.stack import stack_layers, unstack_layers
from lissom.training import sharding
from lissom.training.errors import UserError

FROZEN = "frozen."

# What orbax and tensorstore raise for files that are missing, cut short or nonsense.
DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError)


class Damaged(ValueError):
    """A checkpoint that is not what was saved."""


def flat(tree: Any) -> dict[str, Any]:
    """Any pytree -> {name: leaf}; the names are those of its paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def checksums(leaf: jax.Array) -> dict[str, int]:
    """{"": CRC of the whole array}, or {shard index: CRC} of this process's shards where it holds only some."""
    if leaf.is_fully_addressable:
        return {"": _crc(leaf)}
    return {str(shard.index): _crc(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0}


def _crc(array: Any) -> int:
    array = np.ascontiguousarray(np.asarray(array))
    return zlib.crc32(array.view(np.uint8).reshape(-1)) if array.size else 0


def _names(crc: Any) -> int:
    return _crc(np.frombuffer("\n".join(sorted(crc)).encode(), np.uint8))


@functools.cache
def _say_failures_once() -> None:
    """Orbax, asyncio and tensorstore's callbacks print a traceback for each array of a save that fails; the same error
    is raised to us as well, and `Checkpoints._refused` says it in one sentence."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)):
            previous(unraisable)

    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of one run, under `directory`; `keep` newest are kept."""

    def __init__(self, directory: pathlib.Path | str, keep: int = 2):
        self.directory = pathlib.Path(directory).absolute()
        self.keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._frozen: tuple[Any, dict[str, Any]] | None = None  # what was saved last, and its record

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            _say_failures_once()
            options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, create=True, enable_async_checkpointing=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def steps(self) -> list[int]:
        """Steps that have a finished directory, newest first."""
        if not self.directory.is_dir():
            return []
        return sorted((int(p.name) for p in self.directory.iterdir() if p.name.isdigit()), reverse=True)

    def save(self, step: int, state: Mapping[str, Any], stacks: Mapping, meta: Mapping[str, Any]) -> None:
        """Starts a save; returns once the arrays are copied. Raises UserError where the disk refuses."""
        leaves = flat(unstack_layers(dict(state), dict(stacks)))
        frozen = {name: leaves.pop(name) for name in list(leaves) if name.startswith(FROZEN)}
        crc = {name: checksums(leaf) for name, leaf in leaves.items()}
        try:
            record = {**meta, "crc": crc, "frozen": self._save_frozen(state.get("frozen", {}), frozen)}
            if jax.process_count() > 1:
                record["processes"] = jax.process_count()
                own = self._beside("checksums") / str(step) / f"{jax.process_index()}.json"
                own.parent.mkdir(parents=True, exist_ok=True)
                own.write_text(json.dumps(crc))
                if jax.process_index() == 0:
                    for old in own.parent.parent.iterdir():
                        # A save that is under way is not among the steps yet.
                        if int(old.name) < min(self.steps(), default=0):
                            shutil.rmtree(old, ignore_errors=True)
            # The names are checked too: a damaged one would read as the checkpoint of another model.
            record["names"] = _names(crc)
            self._open().save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), record=ocp.args.JsonSave(record)),
            )
        except DAMAGE as error:
            raise self._refused(step, error) from error

    def _save_frozen(self, tree: Any, leaves: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Writes the frozen arrays unless they stand there already; their checksums and the name of the directory. They
        are not donated: the same arrays in the next save are known without looking at their values."""
        if not leaves:
            return {}
        ids = [id(leaf) for leaf in jax.tree.leaves(tree)]
        if self._frozen is None or [id(leaf) for leaf in jax.tree.leaves(self._frozen[0])] != ids:
            crc = {name: checksums(leaf) for name, leaf in leaves.items()}
            name = f"{zlib.crc32(json.dumps(crc, sort_keys=True).encode()):08x}"
            if jax.process_count() > 1:  # one name for all: that of the first process
                name = f"{int(multihost_utils.broadcast_one_to_all(np.uint32(int(name, 16)))):08x}"
            path = self._beside("frozen") / name
            if not path.is_dir():
                with ocp.StandardCheckpointer() as writer:
                    writer.save(path, dict(leaves))
            self._frozen = tree, {"directory": name, "crc": crc, "names": _names(crc)}
        return self._frozen[1]

    def _beside(self, name: str) -> pathlib.Path:
        return self.directory.parent / name

    def wait(self) -> None:
        """Until what was started is on the disk; raises UserError where the disk refuses."""
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
            except DAMAGE as error:
                raise self._refused(None, error) from error

    def _refused(self, step: int | None, error: BaseException) -> UserError:
        whole = self.steps()
        reason = str(error).strip().split("\n")[0][:300]
        what = "the checkpoint" if step is None else f"the checkpoint of step {step}"
        return UserError(
            f"{what} could not be written under {self.directory} ({reason}); the newest whole one is "
            f"{'step ' + str(whole[0]) if whole else 'none'}: make room and run the same command again"
        )

    def record(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of a step."""
        try:
            record = json.loads((self.directory / str(step) / "record" / "metadata").read_text())
        except DAMAGE as error:
            raise Damaged(f"its record can't be read ({str(error)[:100]})") from error
        for part in (record, record.get("frozen")):
            if part and part.get("names") != _names(part.get("crc", ())):
                raise Damaged("its record is not what was saved")
        frozen = record.get("frozen") or {}
        crc = {**record["crc"], **frozen.get("crc", {})}
        for process in range(1, record.get("processes", 1)):
            try:
                shards = json.loads((self._beside("checksums") / str(step) / f"{process}.json").read_text())
            except DAMAGE as error:
                raise Damaged(f"the checksums of process {process} can't be read ({str(error)[:100]})") from error
            crc = {name: {**crc[name], **shards.get(name, {})} for name in crc}
        return {**record, "crc": crc, "frozen": frozen}

    def load(self, step: int, shapes: Any, stacks: Mapping) -> Any:
        """The state (or those of its top-level entries that `shapes` has) of one step, checked leaf by leaf; raises
        `Damaged` with the name of the first leaf that is not what was saved."""
        target = jax.eval_shape(lambda tree: unstack_layers(tree, dict(stacks)), shapes) if stacks else shapes
        wanted, record = flat(target), self.record(step)
        crc = record["crc"]
        missing = [name for name in wanted if name not in crc]
        if missing:
            raise UserError(
                f"the checkpoint of step {step} under {self.directory} has no {missing[0]!r} "
                f"({len(missing)} of {len(wanted)} arrays are not in it): it is of another model"
            )
        apart = record["frozen"].get("directory")
        restored = _restore(self.directory / str(step) / "state", _part(wanted, False) if apart else wanted)
        if apart:
            restored |= _restore(self._beside("frozen") / apart, _part(wanted, True))
        for name, leaf in restored.items():
            if leaf.shape != wanted[name].shape:
                raise UserError(
                    f"the checkpoint of step {step} under {self.directory} has {name} of shape "
                    f"{leaf.shape}, the model of {wanted[name].shape}: it is of another model"
                )
            known = crc[name]
            for index, value in checksums(leaf).items():
                if index in known and known[index] != value:
                    raise Damaged(f"the checksum of {name} does not fit")
        tree = jax.tree.unflatten(jax.tree.structure(target), [restored[name] for name in wanted])
        if not stacks:
            return tree
        # Apart the layers had no place of their own on the mesh; stacked they go where they belong.
        places = jax.tree.map(lambda leaf: leaf.sharding or _here(), shapes)
        return sharding.put(stack_layers(tree, dict(stacks)), places)

    def newest_at(self, step: int, shapes: Any, stacks: Mapping, say=print) -> Any | None:
        """The state of one step, or None where it is damaged, which is said through `say`."""
        try:
            return self.load(step, shapes, stacks)
        except Damaged as error:
            say(f"the checkpoint of step {step} under {self.directory} is damaged and skipped: {error}")
            return None

    def newest(self, shapes: Any, stacks: Mapping, say=print) -> tuple[int, Any] | None:
        """(step, state) of the newest whole checkpoint; damaged ones are named and skipped."""
        for step in self.steps():
            state = self.newest_at(step, shapes, stacks, say)
            if state is not None:
                return step, state
        return None

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints newer than `step`, which are damaged, so that the run can write those steps again."""
        for newer in self.steps():
            if newer > step:
                aside = self.directory.parent / f"damaged_checkpoint_{newer}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(newer)).rename(aside)

    def close(self) -> None:
        """Waits for what was started and lets go of the directory; raises UserError where the disk refused."""
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except DAMAGE as error:
                raise self._refused(None, error) from error


def _part(leaves: Mapping[str, Any], frozen: bool) -> dict[str, Any]:
    return {name: leaf for name, leaf in leaves.items() if name.startswith(FROZEN) == frozen}


def _reader() -> ocp.Checkpointer:
    if jax.process_count() == 1:
        return ocp.PyTreeCheckpointer()
    # Each process reads alone: where one finds damage, the others must not wait for it inside of orbax.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def _here() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _restore(path: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    if not wanted:
        return {}
    args = {
        name: ocp.ArrayRestoreArgs(sharding=getattr(leaf, "sharding", None) or _here()) for name, leaf in wanted.items()
    }
    how = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=args, partial_restore=True)
    try:
        with _reader() as reader:
            return reader.restore(path, args=how)
    except DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise Damaged(f"{path.parent.name}/{path.name} can't be read ({reason})") from error
