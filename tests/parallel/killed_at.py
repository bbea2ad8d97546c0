"""`python killed_at.py POINT CALL VICTIM PROGRAM ARGUMENTS...`: the program, of which one process kills itself.

POINT is a function, `package.module:name` or `package.module:Class.name`; process VICTIM dies as it calls it for the
CALL-th time.
"""

import functools
import importlib
import os
import runpy
import signal
import sys


def kill_at(point, call):
    module, _, name = point.partition(":")
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function, left = getattr(owner, name), call

    def watched(*arguments, **options):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, watched)


point, call, victim, program, *arguments = sys.argv[1:]
if os.environ["HYPENET_PROCESS_ID"] == victim:
    kill_at(point, int(call))
sys.argv = [program, *arguments]
sys.path.insert(0, os.path.dirname(program))
runpy.run_path(program, run_name="__main__")
