"""Checkpoints: saving in the background, restoring on any mesh. The only file that knows Orbax.

A stage's `checkpoints/` holds one directory a kept step: `100/state` (arrays: params, opt_state, step) and
`100/data/hypenet_checkpoint.json` (model config, stage, versions, data position, metrics of that step). A step
directory gets its name only when everything in it is written, so a save that was killed leaves nothing that counts.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jaxlib
import optax
import orbax.checkpoint as ocp

from hypenet_jax import __version__
from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.processes import check_local, lost_process

DIRECTORY = "checkpoints"
JSON_NAME = "hypenet_checkpoint.json"
FORMAT = 1
# What a checkpoint takes beside its arrays, generously.
OVERHEAD_BYTES = 1 << 20

_T = TypeVar("_T")


def versions() -> dict[str, str]:
    """The versions of what computed and wrote a checkpoint."""
    return {
        "hypenet_jax": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "orbax": ocp.__version__,
    }


def checkpoints_directory(directory: str | os.PathLike[str]) -> str:
    """`checkpoints/` of a stage directory, or the directory itself when it is one; HypenetError for a bucket."""
    check_local(directory, "the checkpoint directory")
    directory = os.path.abspath(directory)
    inside = os.path.join(directory, DIRECTORY)
    return inside if os.path.isdir(inside) else directory


def load_params(directory: str | os.PathLike[str], shardings: Any = None) -> tuple[dict[str, Any], Any]:
    """The model config and the parameters of the latest complete checkpoint; the moments are not read.

    Args:
      directory: a stage's directory or its `checkpoints`.
      shardings: a tree of shardings like the parameters, or one sharding for all; None puts them on the first device.

    Returns:
      (config as the dict given to `train` as model_info, params as nested dicts of arrays in their stored dtype).

    Raises:
      HypenetError: no complete checkpoint there, or one that cannot be read.
    """
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.require_latest()
        stored = checkpoints.stored_shapes(step)["params"]
        if shardings is None:
            shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if isinstance(shardings, jax.sharding.Sharding):
            shardings = jax.tree.map(lambda _, one=shardings: one, stored)
        checkpoints.check_names(step, stored, shardings)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored, shardings
        )
        return checkpoints.about(step)["model"], checkpoints.restore(step, {"params": abstract})["params"]


def read_latest(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The JSON of the latest complete checkpoint (step, model, stage, versions, data, metrics), or None."""
    if not os.path.isdir(directory):
        return None
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        return None if step is None else checkpoints.about(step)


class Checkpoints:
    """The checkpoints of one stage; a context manager that waits for the save in flight on exit.

    Args:
      directory: a stage's directory or its `checkpoints`.
      keep: how many checkpoints stay.
      read_only: look without cleaning up, so that a running training is left alone.

    Raises:
      HypenetError: read_only and the directory does not exist.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2, read_only: bool = False):
        self.directory = checkpoints_directory(directory)
        if read_only and not os.path.isdir(self.directory):
            raise HypenetError(f"there is no checkpoint directory {self.directory}; train first or give another one")
        if not read_only and os.path.basename(self.directory) != DIRECTORY:
            self.directory = os.path.join(self.directory, DIRECTORY)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(filename=JSON_NAME),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the save in flight."""
        self._manager.close()

    def wait(self) -> None:
        """Returns when the save in flight, if any, is complete."""
        self._manager.wait_until_finished()

    def path(self, step: int) -> str:
        return os.path.join(self.directory, str(step))

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, or None."""
        return self._manager.latest_step()

    def require_latest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise HypenetError(f"{self.directory} holds no complete checkpoint; train first or give another directory")
        return step

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied to the host, so the state may be donated at once.

        Only one save is in flight: a second waits for the first, so that the host never holds two copies. Raises
        HypenetError where the disk has no room for it.
        """
        self.wait()
        self._check_space(state)
        about = {"format": FORMAT, "step": step, "versions": versions(), **about}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(about))
        self._manager.save(step, args=args, force=True)

    def about(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step."""
        args = ocp.args.Composite(data=ocp.args.JsonRestore())
        about = self._readable(step, lambda: self._manager.restore(step, args=args)["data"])
        if about.get("format") != FORMAT:
            raise HypenetError(
                f"checkpoint {self.path(step)} has format {about.get('format')!r}; this version reads {FORMAT}"
            )
        return about

    def stored_shapes(self, step: int) -> dict[str, Any]:
        """The saved tree, with leaves that have .shape and .dtype."""
        return self._readable(step, lambda: self._manager.item_metadata(step)["state"].tree)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The saved arrays, each shard read straight to its device.

        Args:
          step: a complete step.
          abstract: tree of jax.ShapeDtypeStruct with shardings, on any mesh; it may lack parts of what was saved.

        Raises:
          HypenetError: an array has another shape than was saved, or the checkpoint cannot be read.
        """
        self._check_shapes(step, abstract)
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return self._readable(step, lambda: self._manager.restore(step, args=ocp.args.Composite(state=args))["state"])

    def restore_latest(self, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state, JSON) of the latest complete checkpoint; see `restore`."""
        step = self.require_latest()
        return self.restore(step, abstract), self.about(step)

    def _check_space(self, state: Any) -> None:
        # On a full disk Orbax fails in a dozen threads at once, each with a traceback of its own.
        needed = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(state)) + OVERHEAD_BYTES
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise HypenetError(
                f"a checkpoint in {self.directory} needs {needed / 1e6:,.1f} MB but the disk has {free / 1e6:,.1f} MB "
                "free; make room and run the same command again"
            )

    def _check_shapes(self, step: int, abstract: dict[str, Any]) -> None:
        # Only the parameters: the moments follow them, and their path names differ between the two trees.
        found = self.stored_shapes(step)["params"]
        self.check_names(step, found, abstract["params"])
        stored = _named(found)
        for name, leaf in _named(abstract["params"]).items():
            if tuple(stored[name].shape) != tuple(leaf.shape):
                raise HypenetError(
                    f"parameter {name} has shape {tuple(leaf.shape)} here, but checkpoint {self.path(step)} holds it "
                    f"with shape {tuple(stored[name].shape)}; use the model it was trained with or another directory"
                )

    def check_names(self, step: int, stored: Any, wanted: Any) -> None:
        """Raise HypenetError unless two trees of parameters have the same names: that of a step, and what is wanted."""
        held, asked = _named(stored).keys(), _named(wanted).keys()
        for name in sorted(held ^ asked):
            which = f"holds parameter {name}, which this model lacks" if name in held else f"lacks parameter {name}"
            raise HypenetError(
                f"checkpoint {self.path(step)} {which}; use the model it was trained with or another directory"
            )

    def _readable(self, step: int, read: Callable[[], _T]) -> _T:
        try:
            return read()
        # Orbax and TensorStore report a damaged file as any of a dozen types, some of their own.
        except Exception as error:
            if lost_process(error):
                raise  # the checkpoint is well: nobody should delete it
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            earlier = [s for s in self._manager.all_steps() if s < step]
            then = f"continue from step {max(earlier)}" if earlier else "start the stage again"
            raise HypenetError(
                f"checkpoint {self.path(step)} cannot be read ({reason}); delete that directory to {then}"
            ) from error


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
