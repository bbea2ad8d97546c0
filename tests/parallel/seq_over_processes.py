"""What several processes make of cases of test_parallel_equality: `python seq_over_processes.py MESH FILE NAMES...`.

The devices are dealt out so that seq, the innermost axis here, joins one device of each process.
"""

import json
import sys

import numpy as np

from hypenet_jax.parallel import processes, startup


def run() -> int:
    startup.start()
    import jax
    import test_parallel_equality as cases

    from hypenet_jax.parallel.mesh import make_mesh

    devices = np.reshape(jax.devices(), (jax.process_count(), -1)).T.ravel()
    mesh = make_mesh(json.loads(sys.argv[1]), list(devices))
    assert len({device.process_index for device in mesh.devices[0, 0, :, 0]}) == jax.process_count()
    params = placed(cases.draw(cases.STUDENT, 2), cases.STUDENT.param_axes(), mesh)
    found = {}
    for name in sys.argv[3:]:
        if name in cases.STAGES:
            found[name] = gradients(cases, name, mesh)
        else:
            with jax.set_mesh(mesh):
                found[name] = jax.tree.map(processes.on_host, getattr(cases, name)(params))
    if processes.is_writer():
        leaves = jax.tree_util.tree_leaves_with_path(found)
        np.savez(sys.argv[2], **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})
    return 0


def placed(params, axes, mesh):
    import jax

    from hypenet_jax.parallel.rules import param_shardings

    return jax.tree.map(processes.place, params, param_shardings(axes, params, mesh))


def gradients(cases, name, mesh):
    """(loss, count, gradients) on the host of every process; each has read its own rows."""
    import jax

    from hypenet_jax.parallel.rules import batch_sharding

    loss, params, axes, frozen = cases.stage(name)
    params, frozen = placed(params, axes, mesh), placed(frozen, cases.TEACHER.param_axes(), mesh)
    sharding, rows, length = batch_sharding(mesh), *cases.batch()["tokens"].shape
    own = processes.own_rows(sharding, rows, length)
    batch = {key: processes.place_rows(array[own], sharding, rows) for key, array in cases.batch().items()}
    with jax.set_mesh(mesh):
        (value, metrics), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, frozen, batch)
    return jax.tree.map(processes.on_host, (value, metrics["count"], found))


if __name__ == "__main__":
    sys.exit(processes.ended(run))
