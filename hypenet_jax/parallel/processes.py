"""Several processes of one run: which of them writes, how the others wait, and arrays that no process holds whole."""

from __future__ import annotations

import collections
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from hypenet_jax.errors import HypenetError

# How long the others wait for process 0 to pack or to write. If it dies they hear of it by its heartbeat, not by this.
WAIT_SECONDS = 24 * 3600
# How long a process that ends with an error waits for the others to end with the same one.
LEAVE_SECONDS = 10

# The exit code where another process has died: EX_PROTOCOL of sysexits.h. The same command continues, but unlike after
# a preemption nobody knows whether the cause has gone.
EXIT_LOST = 76
# How XLA's collectives and the coordination service speak of a process that is gone.
LOST_WORDS = ("closed by peer", "reset by peer", "onnection refused", "imed out", "UNAVAILABLE", "heartbeat")
# XLA's errors begin so; a call through JAX's C++ path raises them as ValueError.
XLA_STATUS = r"[A-Z_]+: "

_DONE, _FAILED = "done", "failed "
_calls = itertools.count()
_meshes: collections.Counter[tuple[int, ...]] = collections.Counter()


def is_writer() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def said_once(say: Callable[[str], Any]) -> Callable[[str], Any]:
    """`say` on the process that prints, and silence on the others."""
    return say if is_writer() else lambda _line: None


def first(work: Callable[[], object]) -> None:
    """Process 0 does `work`, the others wait until it is done: what it wrote can then be read everywhere.

    All processes must call it, in the same order. A HypenetError of process 0 is raised on every process.
    """
    if jax.process_count() == 1:
        work()
        return
    key = f"hypenet/first/{next(_calls)}"
    if not is_writer():
        said = _client().blocking_key_value_get(key, WAIT_SECONDS * 1000)
        if said != _DONE:
            raise HypenetError(said.removeprefix(_FAILED))
        return
    try:
        work()
    except HypenetError as error:
        _client().key_value_set(key, f"{_FAILED}{error}")
        raise
    _client().key_value_set(key, _DONE)


def connect(mesh: Mesh) -> None:
    """Open every connection between CPU processes that collectives over axes of the mesh can ask for.

    All processes of the mesh must call it, in the same order. Gloo makes a connection at the first collective that
    needs it and gives the others 30 seconds to come to it; programs that take longer to compile on one host than on
    another would miss each other.
    """
    devices = mesh.devices.ravel()
    members = sorted({device.process_index for device in devices})
    if devices[0].platform != "cpu" or len(members) == 1 or jax.process_index() not in members:
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    groups = [group for count in range(1, len(axes) + 1) for group in itertools.combinations(axes, count)]
    one_each = PartitionSpec(tuple(axes))
    others = [PartitionSpec(tuple(axis for axis in axes if axis not in group)) for group in groups]

    def sums(x: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(x, group) for group in groups]

    ones = place(np.ones(mesh.size, np.float32), NamedSharding(mesh, one_each))
    ready = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=one_each, out_specs=others)).lower(ones).compile()
    # Counted for these processes: others may have made meshes without them.
    _meshes[tuple(members)] += 1
    name = f"hypenet/connect/{'-'.join(map(str, members))}/{_meshes[tuple(members)]}"
    _client().wait_at_barrier(name, WAIT_SECONDS * 1000, process_ids=members)
    jax.block_until_ready(ready(ones))


def check_local(directory: str | os.PathLike[str], what: str) -> None:
    """Raise HypenetError for a bucket: packing, metrics and exports append to and rename files."""
    scheme, separator, rest = os.fspath(directory).partition("://")
    if separator:
        raise HypenetError(
            f"{what} is {os.fspath(directory)}, a bucket, but files are appended to and renamed there; mount it (for "
            f"{scheme}, say, `gcsfuse {rest.partition('/')[0]} /mnt/bucket` on every host) and give the path there"
        )


def on_host(array: Any) -> np.ndarray:
    """The array as numpy on every process; one that lies over several processes is gathered, by all of them."""
    gathered = _whole(array)
    return np.asarray(gathered.addressable_data(0) if gathered is not array else array)


def on_writer(array: Any) -> np.ndarray | None:
    """`on_host` for process 0 alone: the others take part in gathering and get None, no copy on their host."""
    gathered = _whole(array)
    if not is_writer():
        jax.block_until_ready(gathered)  # else they would ask for the next arrays while this one is still there
        return None
    return np.asarray(gathered.addressable_data(0) if gathered is not array else array)


def _whole(array: Any) -> Any:
    """The array itself where this process can read it, or a copy that every device holds whole."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return array
    mesh = array.sharding.mesh  # type: ignore[attr-defined]
    return _gather(NamedSharding(mesh, PartitionSpec()))(array)


def _gather(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(_same, out_shardings=sharding)


def _same(array: jax.Array) -> jax.Array:
    return array


def place(array: Any, sharding: Sharding, may_alias: bool | None = None) -> jax.Array:
    """An array that every process has, laid out anew; from the host each device is sent its own part alone.

    may_alias: as in `jax.device_put`.
    """
    on_devices = isinstance(array, jax.Array) and not array.is_fully_addressable
    if on_devices or sharding.is_fully_addressable:
        if may_alias is False and isinstance(array, jax.Array) and array.sharding != sharding:
            # Where one device's part is the whole array, device_put takes its buffer all the same.
            array = jnp.copy(array)
        return jax.device_put(array, sharding, may_alias=may_alias)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def own_rows(sharding: Sharding, rows: int, length: int) -> list[int]:
    """The rows of a batch [rows, length] of which this process's devices hold a part, ascending."""
    parts = sharding.addressable_devices_indices_map((rows, length)).values()
    return sorted({row for part in parts for row in range(*part[0].indices(rows))})  # type: ignore[index]


def place_rows(array: np.ndarray, sharding: Sharding, rows: int) -> jax.Array:
    """An array [rows, T, ...] over all processes; `array` holds this process's `own_rows` of it, or all rows."""
    shape = (rows, *array.shape[1:])
    own = own_rows(sharding, rows, array.shape[1]) if len(array) < rows else range(rows)
    place_of = {row: place for place, row in enumerate(own)}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # JAX asks for the parts of devices, which have an index
        start, stop, _ = index[0].indices(rows)
        # Neighbours here too, for `own` ascends and holds all of the part.
        return array[place_of[start] : place_of[start] + stop - start][:, *index[1:]]

    return jax.make_array_from_callback(shape, sharding, part)


def leave(code: int) -> None:
    """Before exiting with an error: at once if the others do not end the same way, for some may wait for ever.

    JAX lets processes end together only, and would keep this one for minutes, to be aborted in the end.
    """
    if not jax.distributed.is_initialized():
        return
    try:
        _client().wait_at_barrier(f"hypenet/leave/{code}", LEAVE_SECONDS * 1000)
    except jax.errors.JaxRuntimeError:
        _exit_at_once(code)


def _exit_at_once(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def ended(run: Callable[[], int]) -> int:
    """The exit code of `run()`; with several processes this one ends, and says why, where another has died."""
    try:
        code = run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if lost := lost_process(error):
            reason = str(lost).strip().splitlines()[0]
            print(
                f"hypenet: process {jax.process_index()} has lost another process ({reason[:200]}); "
                "the same command continues from the last checkpoint, with any number of processes",
                file=sys.stderr,
            )
            _exit_at_once(EXIT_LOST)
        # Raised as it is, it would keep this process waiting for the others, and them for it.
        traceback.print_exc()
        code = 1
    if code:
        leave(code)
    return code


def lost_process(error: BaseException | None) -> BaseException | None:
    """The error that tells of a process that is gone: this one, or one that it was raised from."""
    while error is not None:
        of_xla = isinstance(error, jax.errors.JaxRuntimeError) or (
            isinstance(error, ValueError) and re.match(XLA_STATUS, str(error))
        )
        if of_xla and any(word in str(error) for word in LOST_WORDS):
            return error
        error = error.__cause__ or error.__context__
    return None


def _client() -> Any:
    # JAX's coordination service. Its public face (multihost_utils) only has barriers made of device computations, which
    # time out on CPUs and cannot carry a message.
    from jax._src import distributed

    return distributed.global_state.client
