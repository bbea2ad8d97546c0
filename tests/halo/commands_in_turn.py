"""Several commands in one life of a process: `python commands_in_turn.py LINES`, a JSON list of argument lists.

["copy", FROM, TO, WITHOUT] is one of them too: a directory without the one at WITHOUT inside it.
"""

import json
import os
import shutil
import sys

from hypenet_jax import cli
from hypenet_jax.parallel import processes, startup


def run() -> int:
    startup.start()
    for name, *arguments in json.loads(sys.argv[1]):
        if name == "copy":
            processes.first(lambda arguments=arguments: copy(*arguments))
        elif code := cli.main([name, *arguments]):
            return code
    return 0


def copy(source, target, without):
    shutil.copytree(source, target)
    shutil.rmtree(os.path.join(target, without))


if __name__ == "__main__":
    sys.exit(processes.ended(run))
