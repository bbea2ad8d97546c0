"""Kernels of hypenet_jax: functions on arrays that know nothing of models.

Each kernel is a package with `api.py` (the typed public function), `reference.py` (slow and obviously right), `xla.py`
(portable) and, where one exists, a file per accelerator. `dispatch.py` picks among them.
"""
