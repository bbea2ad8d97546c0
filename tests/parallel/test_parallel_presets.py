import pathlib

import pytest

from hypenet_jax.config import load_config
from hypenet_jax.errors import HypenetError

DEMO = pathlib.Path(__file__).parents[2] / "configs" / "demo.py"


def test_a_config_may_name_a_machine():
    assert load_config(DEMO, ["mesh=v5e-256"]).mesh == {"fsdp": 32, "tensor": 8}
    assert load_config(DEMO, ["mesh.fsdp=4"]).mesh == {"fsdp": 4}
    with pytest.raises(HypenetError, match="'v9'.*sizes by axis"):
        load_config(DEMO, ["mesh=v9"])
