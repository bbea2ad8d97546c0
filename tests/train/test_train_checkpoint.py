import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_training import AXES, MODEL, Interrupted, Stream, init_params, make_stage, records, run

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.rules import param_shardings
from hypenet_jax.train.checkpoint import JSON_NAME, Checkpoints, load_params, read_latest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    params, _ = run(directory)
    return directory, params


@pytest.fixture
def copied(tmp_path, finished):
    shutil.copytree(finished[0], tmp_path / "stage")
    return tmp_path / "stage"


def test_params_load_from_a_stage_or_its_checkpoints(finished):
    directory, params = finished
    for place in (directory, str(directory), directory / "checkpoints"):
        config, loaded = load_params(place)
        assert config == MODEL
        jax.tree.map(np.testing.assert_array_equal, params, loaded)
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {jax.sharding.SingleDeviceSharding(jax.devices()[0])}


def test_params_load_onto_a_mesh(finished):
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    shardings = param_shardings(AXES, init_params(), mesh)
    _, loaded = load_params(finished[0], shardings)
    jax.tree.map(np.testing.assert_array_equal, finished[1], loaded)
    assert loaded["mlp"]["up"].sharding == shardings["mlp"]["up"]


def test_nothing_to_load_is_a_sentence(tmp_path):
    assert read_latest(tmp_path / "absent") is None and read_latest(tmp_path) is None
    with pytest.raises(HypenetError, match="no complete checkpoint"):
        load_params(tmp_path)
    with pytest.raises(HypenetError, match="absent"):
        load_params(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_checkpoint_says_what_made_it(tmp_path):
    run(tmp_path, make_stage(steps=4), mesh=make_mesh({"fsdp": 4, "tensor": 2}), sharded=True, config={"seed": 3})
    about = read_latest(tmp_path)
    assert about["versions"]["jax"] == jax.__version__ and "hypenet_jax" in about["versions"]
    assert about["devices"]["mesh"] == {"data": 1, "fsdp": 4, "seq": 1, "tensor": 2}
    assert about["devices"]["processes"] == 1 and about["config"] == {"seed": 3}
    assert about["data"] == {"position": 4} and about["stage"]["steps"] == 4 and about["model"] == MODEL


def test_a_bucket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HypenetError, match="gs://b/run, a bucket.*gcsfuse b "):
        run("gs://b/run")
    with pytest.raises(HypenetError, match="a bucket"):
        load_params("gs://b/run")
    assert not list(tmp_path.iterdir())


def test_json_lies_in_the_checkpoint(finished):
    assert (finished[0] / "checkpoints" / "12" / "data" / JSON_NAME).is_file()


@pytest.mark.parametrize("before", ["commit", "rename"])
def test_leftovers_of_a_killed_save_are_ignored_and_in_nobodys_way(copied, before):
    checkpoints = copied / "checkpoints"
    leftover = checkpoints / "16.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints / "12", leftover)
    if before == "commit":
        (leftover / "data" / JSON_NAME).unlink()
        (leftover / "commit_success.txt").unlink()
    assert read_latest(copied)["step"] == 12
    assert leftover.exists(), "a reader must not clean up after a training that may be running"
    with Checkpoints(copied) as opened:
        assert opened.latest_step() == 12
        opened.save(16, {"params": {"w": jnp.ones(3)}}, {"model": {}})
        opened.wait()
        assert opened.latest_step() == 16 and opened.about(16)["model"] == {}
    assert not leftover.exists()
    np.testing.assert_array_equal(load_params(copied)[1]["w"], np.ones(3))


def truncate_arrays(step: pathlib.Path) -> None:
    for path in (step / "state").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)


def remove_state(step: pathlib.Path) -> None:
    shutil.rmtree(step / "state")


def break_json(step: pathlib.Path) -> None:
    (step / "data" / JSON_NAME).write_text('{"format": 1, "st')


# Orbax leaves a reading thread behind when another one has failed; its complaint comes after our sentence.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncate_arrays, remove_state, break_json])
def test_a_damaged_checkpoint_is_named_with_its_remedy(copied, damage):
    latest = copied / "checkpoints" / "12"
    damage(latest)
    with pytest.raises(HypenetError, match="delete that directory to continue from step 8") as caught:
        load_params(copied)
    assert str(latest) in str(caught.value)
    with pytest.raises(HypenetError, match="delete that directory to continue from step 8"):
        run(copied)
    shutil.rmtree(latest)
    _, summary = run(copied)
    assert summary["resumed_from"] == 8 and summary["step"] == 12


def test_another_model_is_refused_by_its_parameters(finished):
    directory, _ = finished
    wider = jax.tree.map(lambda p: jax.ShapeDtypeStruct((*p.shape[:-1], 24), jnp.float32), init_params())
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wider = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=single), wider)
    with Checkpoints(directory, read_only=True) as checkpoints:
        with pytest.raises(HypenetError, match=r"parameter embedding has shape \(16, 24\) .* \(16, 8\)"):
            checkpoints.restore(12, {"params": wider})
        with pytest.raises(HypenetError, match="lacks parameter extra"):
            checkpoints.restore(12, {"params": {**wider, "extra": wider["embedding"]}})
        with pytest.raises(HypenetError, match="holds parameter embedding, which this model lacks"):
            checkpoints.restore(12, {"params": {"final_norm": wider["final_norm"]}})
    shardings = {name: single for name in init_params() if name != "embedding"}
    with pytest.raises(HypenetError, match="holds parameter embedding, which this model lacks"):
        load_params(directory, shardings)


def test_the_saved_arrays_do_not_change_under_later_updates(tmp_path):
    """The save runs while the donated state is being overwritten."""
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"params": {"w": jnp.zeros((512, 512))}}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in (1, 2, 3):
            state = update(state)
            checkpoints.save(step, state, {"model": {}})
            state = update(update(state))
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        for step in (1, 2, 3):
            abstract = {"params": {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=single)}}
            w = np.asarray(checkpoints.restore(step, abstract)["params"]["w"])
            assert (w.min(), w.max()) == (3 * step - 2,) * 2


def test_the_next_loss_on_another_mesh_is_the_same(tmp_path):
    stage = make_stage(steps=5, log_every=1)
    with pytest.raises(Interrupted):
        run(tmp_path / "one", stage, stream=Stream(fail_at=4))
    shutil.copytree(tmp_path / "one", tmp_path / "eight")
    run(tmp_path / "one", stage)
    run(tmp_path / "eight", stage, mesh=make_mesh({"fsdp": 4, "tensor": 2}), sharded=True)
    one, eight = records(tmp_path / "one")[-1], records(tmp_path / "eight")[-1]
    assert one["step"] == eight["step"] == 5
    assert one["loss"] == pytest.approx(eight["loss"], rel=1e-6)
    assert one["lr"] == eight["lr"] and one["count"] == eight["count"]


def test_a_process_lost_while_reading_is_no_broken_checkpoint(tmp_path, monkeypatch):
    """Nobody is told to delete it, and the run ends as one that goes on with the same command."""
    run(tmp_path, make_stage(steps=1, checkpoint_every=1, warmup_steps=0))

    def lost(*_, **__):
        raise ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error: Connection reset by peer")

    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", lost)
        with pytest.raises(ValueError, match="Gloo AllGather failed"):
            checkpoints.about(1)
