"""Checks of the engine builder: each build against a reference, all graphs without a GPU, all of it on this GPU."""
