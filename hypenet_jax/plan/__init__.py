"""Compile a run for a machine that is not here: does it fit, what does it send, how long would it take."""
