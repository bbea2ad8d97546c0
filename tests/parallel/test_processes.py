"""How one of several processes ends, without the others."""

import jax
import pytest

from hypenet_jax.parallel import processes


@pytest.fixture
def left(monkeypatch):
    """One of several processes, as far as it is asked; the codes that it left with."""
    codes = []

    def at_once(code):
        raise SystemExit(f"at once, {code}")

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "leave", codes.append)
    monkeypatch.setattr(processes, "_exit_at_once", at_once)
    return codes


def failing(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory"), ValueError("a bug")])
def test_an_error_of_its_own_ends_it_and_is_shown(left, capsys, error):
    assert processes.ended(failing(error)) == 1
    assert left == [1] and str(error) in capsys.readouterr().err


RESET = "UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error [127.0.0.1]:28893: Connection reset by peer"


# A jitted function answers with either, whichever way JAX has called it.
@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_a_lost_process_is_named_and_nobody_waited_for(left, capsys, kind):
    with pytest.raises(SystemExit, match="at once, 76"):
        processes.ended(failing(kind(RESET)))
    assert left == [] and "has lost another process" in capsys.readouterr().err


def test_a_lost_process_is_seen_through_what_a_library_says_of_it(left, capsys):
    def save():
        try:
            raise ValueError(RESET)
        except ValueError as error:
            raise RuntimeError("the save failed") from error

    with pytest.raises(SystemExit, match="at once, 76"):
        processes.ended(save)
    assert left == [] and "Connection reset by peer" in capsys.readouterr().err


def test_a_server_that_hangs_up_is_no_lost_process(left):
    assert processes.ended(failing(ConnectionResetError("Connection reset by peer"))) == 1


def test_alone_an_error_is_an_error():
    with pytest.raises(ValueError, match="a bug"):
        processes.ended(failing(ValueError("a bug")))
