"""Machinery of a run that no objective needs to know: hardware, optimisers, evaluation, checkpoints, folders."""
