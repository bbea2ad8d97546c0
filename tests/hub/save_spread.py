"""`python save_spread.py DIRECTORY BYTES`: a model spread over all processes saved, with what process 0 held of it."""

import json
import pathlib
import sys
import tracemalloc

import numpy as np

from hypenet_jax.parallel import processes, startup


def model_and_params():
    import hypenet_jax as hn

    config = hn.ModelConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=4, num_kv_heads=2,
        head_dim=64, mixers=("attention",) * 4, eos_ids=(0,),
    )  # fmt: skip
    model, rng = hn.LanguageModel(config), np.random.default_rng(0)
    return model, {name: draw(leaf, rng) for name, leaf in model.param_shapes().items()}


def draw(node, rng):
    if isinstance(node, dict):
        return {name: draw(child, rng) for name, child in node.items()}
    return rng.standard_normal(node.shape, np.float32)


def save() -> int:
    startup.start()
    import jax

    import hypenet_jax as hn
    from hypenet_jax.parallel.mesh import make_mesh
    from hypenet_jax.parallel.rules import param_shardings

    model, params = model_and_params()
    params = jax.tree.map(processes.place, params, param_shardings(model.param_axes(), params, make_mesh()))
    spread = len(jax.live_arrays())
    whole, gather = [], processes._whole

    def watched(array):
        gathered = gather(array)
        whole.append(sum(a.nbytes for a in jax.live_arrays() if a.is_fully_replicated))
        return gathered

    processes._whole = watched
    tracemalloc.start()
    hn.save(model, params, sys.argv[1], max_shard_bytes=int(sys.argv[2]))
    found = {"gathered": max(whole), "host": tracemalloc.get_traced_memory()[1], "arrays": spread}
    found["left"] = len(jax.live_arrays())
    pathlib.Path(f"{sys.argv[1]}-{jax.process_index()}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(processes.ended(save))
