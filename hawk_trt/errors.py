"""The exceptions of hawk_trt. Every error a user can meet is a HawkError.

HawkError
 |- InvalidInput (also a ValueError), CheckpointError, BundleError, BackendError, ParityError
 |- Stopping: of a server, in apps/serve/batcher.py

A message says what was got, what was expected and the command that helps.
"""


class HawkError(Exception):
    """Base of all errors raised on purpose by this project."""


class InvalidInput(HawkError, ValueError):
    """An argument, prompt, image or tensor cannot be used as given."""


class CheckpointError(HawkError):
    """A Hugging Face checkpoint is missing, truncated, inconsistent or of an unsupported architecture."""


class BundleError(HawkError):
    """A bundle or engine folder is missing, damaged, stale, of a newer schema, or does not hold what was asked for."""


class BackendError(HawkError):
    """A runtime is not installed, cannot use the device or dtype, or failed while running."""


class ParityError(HawkError):
    """A parity comparison cannot be made (not one that is out of tolerance)."""
