import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_training import Interrupted, Stream, init_params, loss_fn, make_stage, one_device, records, run

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.train import loop
from hypenet_jax.train.checkpoint import Checkpoints, load_params, read_latest
from hypenet_jax.train.metrics import SilentReporter
from hypenet_jax.train.preemption import EXIT_PREEMPTED
from hypenet_jax.train.step import abstract_state


def final_state(directory, stage):
    """The whole saved state as numpy, and where the data stood."""
    mesh = one_device()
    shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), init_params())
    with Checkpoints(directory, read_only=True) as checkpoints:
        state, about = checkpoints.restore_latest(abstract_state(init_params(), stage, shardings, mesh))
    return jax.tree.map(np.asarray, state), about["data"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    _, summary = run(directory)
    return directory, summary


def assert_same_run(directory, other, stage=None):
    stage = make_stage() if stage is None else stage
    (ours, our_data), (theirs, their_data) = final_state(directory, stage), final_state(other, stage)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert our_data == their_data
    assert records(directory) == records(other)


@pytest.mark.parametrize("fail_at", [2, 4, 7, 11])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, uninterrupted, fail_at):
    with pytest.raises(Interrupted):
        run(tmp_path, stream=Stream(fail_at=fail_at))
    _, summary = run(tmp_path)
    assert summary["resumed_from"] == fail_at // 4 * 4
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 4, 6, 8, 10, 12]
    assert_same_run(tmp_path, uninterrupted[0])


def test_records_say_what_happened(uninterrupted):
    directory, summary = uninterrupted
    first, last = records(directory)[0], records(directory)[-1]
    assert first["lr"] == pytest.approx(1e-2 / 3) and last["lr"] == pytest.approx(1e-3)
    assert last["tokens"] == 12 * 8 * 8 == summary["tokens"]
    assert last["loss"] == summary["loss"] < first["loss"]
    params, batch = init_params(), {key: jnp.asarray(x) for key, x in next(Stream()).items()}
    assert first["loss"] == pytest.approx(float(loss_fn(params, 0.5, batch)[0]), rel=1e-6)


def test_only_the_newest_checkpoints_stay(uninterrupted):
    assert sorted(os.listdir(uninterrupted[0] / "checkpoints"), key=int) == ["8", "12"]
    about = read_latest(uninterrupted[0])
    assert about["step"] == 12 and about["data"] == {"position": 12} and about["model"]["layers"] == [1, 2]
    assert about["stage"]["batch_size"] == 8 and about["versions"]["jax"] == jax.__version__


def test_a_finished_stage_returns_without_compiling(uninterrupted, monkeypatch):
    directory, first = uninterrupted
    monkeypatch.setattr(loop, "make_step", None)
    stream = Stream(fail_at=0)
    params, summary = run(directory, stream=stream)
    assert stream.position == 0
    assert summary == first | {"resumed_from": 12}
    jax.tree.map(np.testing.assert_array_equal, params, load_params(directory)[1])


def test_donation_and_accumulation_change_no_result(tmp_path, uninterrupted):
    run(tmp_path / "kept", donate=False)
    assert_same_run(tmp_path / "kept", uninterrupted[0])
    stage = make_stage(gradient_accumulation=4)
    run(tmp_path / "parts", stage)
    losses = [[record["loss"] for record in records(d)] for d in (tmp_path / "parts", uninterrupted[0])]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_sharded_training_equals_one_device(tmp_path, uninterrupted):
    run(tmp_path, mesh=make_mesh({"fsdp": 4, "tensor": 2}), sharded=True)
    sharded = [record["loss"] for record in records(tmp_path)]
    single = [record["loss"] for record in records(uninterrupted[0])]
    np.testing.assert_allclose(sharded, single, rtol=1e-5)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 4}, {"data": 4, "seq": 2}])
def test_a_checkpoint_continues_on_another_mesh(tmp_path, uninterrupted, axes):
    with pytest.raises(Interrupted):
        run(tmp_path, stream=Stream(fail_at=5))
    _, summary = run(tmp_path, mesh=make_mesh(axes), sharded=True)
    assert summary["resumed_from"] == 4
    losses = [[record["loss"] for record in records(d)] for d in (tmp_path, uninterrupted[0])]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


class Unlearned(Stream):
    """Nothing of the batches 1, 2 and 12 is to be learned."""

    def __next__(self):
        batch = super().__next__()
        return batch | {"loss_mask": batch["loss_mask"] & (self.position not in (1, 2, 12))}


def test_a_batch_without_anything_to_learn_has_no_loss(tmp_path):
    reporter = SilentReporter()
    _, summary = run(tmp_path, stream=Unlearned(), reporter=reporter)
    for record in reporter.records:
        assert ("loss" in record) == ("accuracy" in record) == (record["step"] not in (1, 2, 12)), record
        assert ("loss" in record) == (record["count"] > 0) and record["lr"] > 0
    assert summary["step"] == 12 and "loss" not in summary and summary["tokens"] == 12 * 8 * 8
    # A finished stage says the same again.
    assert run(tmp_path, stream=Unlearned(), reporter=reporter)[1] == summary | {"resumed_from": 12}


class Poisoned(Stream):
    """Marks batch number 6, the seventh, by a token that no other batch has."""

    def __next__(self):
        batch = super().__next__()
        if self.position == 7:
            batch["tokens"][0, 0] = -1
        return batch


@pytest.mark.parametrize(("log_every", "poison"), [(2, "loss"), (50, "loss"), (3, "grad_norm")])
def test_a_value_that_is_not_finite_stops_and_names_the_step(tmp_path, log_every, poison):
    def poisoned(params, frozen, batch):
        loss, metrics = loss_fn(params, frozen, batch)
        zero = jnp.sum(params["final_norm"]) - jnp.sum(jax.lax.stop_gradient(params["final_norm"]))
        # sqrt has an infinite slope at 0: a finite loss with a gradient that is not.
        bad = jnp.nan if poison == "loss" else jnp.sqrt(jnp.abs(zero))
        return loss + jnp.where(batch["tokens"][0, 0] == -1, bad, 0.0 if poison == "loss" else zero), metrics

    step = 7 if poison == "loss" else 1
    with pytest.raises(HypenetError, match=f"toy: {poison} is nan at step {step}; .*peak_lr 0.01"):
        run(tmp_path, make_stage(log_every=log_every), stream=Poisoned(), loss_fn=poisoned)
    if poison == "loss":
        assert read_latest(tmp_path)["step"] == 4
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_params(tmp_path)[1]))
    else:
        assert read_latest(tmp_path) is None


def test_sigterm_saves_and_leaves_with_its_code(tmp_path, uninterrupted):
    class Terminated(Stream):
        def __next__(self):
            if self.position == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    before = signal.getsignal(signal.SIGTERM)
    reporter = SilentReporter()
    with pytest.raises(SystemExit) as left:
        run(tmp_path, stream=Terminated(), reporter=reporter)
    assert left.value.code == EXIT_PREEMPTED == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped at step 7" in reporter.messages[-1] and read_latest(tmp_path)["step"] == 7
    _, summary = run(tmp_path)
    assert summary["resumed_from"] == 7
    ours, theirs = final_state(tmp_path, make_stage())[0], final_state(uninterrupted[0], make_stage())[0]
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_sigterm_after_the_last_update_is_not_forgotten(tmp_path, monkeypatch):
    """It comes while the last checkpoint is on its way: the stage ends, and then what the signal meant before."""
    save, later = Checkpoints.save, []

    def terminated(self, step, *arguments):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", terminated)
    before = signal.signal(signal.SIGTERM, lambda *_: later.append(read_latest(tmp_path)))
    try:
        run(tmp_path, make_stage(steps=4, warmup_steps=1))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [latest["step"] for latest in later] == [4]


def test_training_outside_the_main_thread_leaves_signals_alone(tmp_path):
    failures = []

    def body():
        try:
            run(tmp_path, make_stage(steps=4, warmup_steps=1))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert not failures and read_latest(tmp_path)["step"] == 4


def test_refusals_name_the_thing(tmp_path, uninterrupted):
    directory = uninterrupted[0]
    with pytest.raises(HypenetError, match="peak_lr is 0.5 .* trained with 0.01"):
        run(directory, make_stage(peak_lr=0.5))
    with pytest.raises(HypenetError, match="vocab = 17 .* 16"):
        run(directory, model_info={"vocab": 17, "layers": [1, 2]})
    with pytest.raises(HypenetError, match="batch_size 4 .* fsdp=8"):
        run(tmp_path, make_stage(batch_size=4), mesh=make_mesh(None))
    with pytest.raises(HypenetError, match="seq_len is 8, .* 16 half-blocks of seq=8"):
        run(tmp_path, mesh=make_mesh({"seq": 8}))
    with pytest.raises(HypenetError, match=r"'tokens' has shape \(4, 8\); the stage needs \[8, 8\]"):
        run(tmp_path, stream=Stream(rows=4))
    with pytest.raises(HypenetError, match="the data ended before step 4 of 12"):
        run(tmp_path, stream=Stream(end_at=3))
