"""The toy training as one of several processes: `python processes_toy.py DIRECTORY MESH STEPS STOP`.

STOP is the step after which the stage is cut off, 0 for nowhere.
"""

import contextlib
import json
import sys

from hypenet_jax.parallel import processes, startup


def train() -> int:
    startup.start()
    from toy_training import Interrupted, Stream, make_stage, run

    from hypenet_jax.parallel.mesh import make_mesh
    from hypenet_jax.parallel.rules import batch_sharding

    directory, axes, steps, stop = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    mesh, stage = make_mesh(axes), make_stage(steps=steps, log_every=1, checkpoint_every=5, schedule="constant")
    own = processes.own_rows(batch_sharding(mesh), stage.batch_size, stage.seq_len)

    class OwnRows(Stream):
        def __next__(self):
            return {name: array[own] for name, array in super().__next__().items()}

    with contextlib.suppress(Interrupted):
        run(directory, stage, mesh=mesh, stream=OwnRows(fail_at=stop + 1 if stop else None), sharded=True)
    return 0


if __name__ == "__main__":
    sys.exit(processes.ended(train))
