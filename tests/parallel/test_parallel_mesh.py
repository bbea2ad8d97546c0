import math

import jax
import pytest
from jax.sharding import AxisType

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.mesh import AXES, make_mesh
from hypenet_jax.parallel.presets import PRESETS, preset


def test_default_puts_every_device_on_fsdp():
    mesh = make_mesh(None)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "seq": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_given_sizes_and_the_rest():
    assert dict(make_mesh({"fsdp": 4, "tensor": 2}).shape) == {"data": 1, "fsdp": 4, "seq": 1, "tensor": 2}
    assert dict(make_mesh({"data": -1, "tensor": 2}).shape) == {"data": 4, "fsdp": 1, "seq": 1, "tensor": 2}
    assert make_mesh({"data": 2}, jax.devices()[:2]).size == 2
    assert make_mesh(None).axis_names == AXES


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"fsdp": 3, "tensor": 2}, ["fsdp=3", "tensor=2", "8 devices"]),
        ({"fsdp": 16}, ["fsdp=16", "8 devices"]),
        ({"fsdp": -1, "tensor": 3}, ["tensor=3", "8 devices"]),
        ({"fsdp": -1, "tensor": -1}, ["fsdp and tensor"]),
        ({"expert": 8}, ["'expert'", "tensor"]),
        ({"fsdp": 0}, ["'fsdp'", "0"]),
        ({"fsdp": 2.0}, ["'fsdp'", "2.0"]),
    ],
)
def test_wrong_sizes_name_axes_and_sizes(axes, words):
    with pytest.raises(HypenetError) as caught:
        make_mesh(axes)
    for word in words:
        assert word in str(caught.value)


def test_slices_stand_in_front():
    mesh = make_mesh({"dcn": 2, "fsdp": -1})
    assert dict(mesh.shape) == {"dcn": 2, "data": 1, "fsdp": 4, "seq": 1, "tensor": 1}
    assert [device.id for device in mesh.devices[1].flat] == [4, 5, 6, 7]


def test_presets_multiply_to_the_chips_of_the_machine():
    chips = {"h200x2": 2, "h100x8": 8, "cpu8": 8}
    for machine in PRESETS:
        kind, _, count = machine.partition("-")
        wanted = chips[machine] if not count else int(count) // (2 if kind == "v5p" else 1)
        assert math.prod(preset(machine).values()) == wanted, machine
    assert preset("2xv5p-64") == {"dcn": 2, "fsdp": 32}
    assert preset("16xv5e-256") == {"dcn": 16, "fsdp": 32, "tensor": 8}
    for name in ("v9-1", "1xv5e-16", "65xv5e-16", "2xv5e-17", "2xcpu8", "2x2xv5e-16"):
        with pytest.raises(HypenetError, match=f"'{name}'.*v5e-16.*2 to 64 slices"):
            preset(name)
