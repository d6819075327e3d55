"""The exceptions of hawk_trt. Every error a user can meet is a HawkError.

HawkError
 |- InvalidInput (also a ValueError)  an argument, prompt, image or tensor that cannot be used
 |- CheckpointError                   a Hugging Face checkpoint that cannot be read or is not supported
 |- BundleError                       a bundle or engine folder that is damaged, stale, foreign or of a newer schema
 |- BackendError                      a runtime that is missing, lacks a device or a dtype, or failed while running
 |- ParityError                       a comparison that cannot be made (not one that is out of tolerance)
 |- QueueFull                         a server has as many requests waiting as it takes; try again later
 |- Stopping                          a server takes no more requests, or ends before this one is done
 |- DeadlinePassed                    a request was not done at its time limit

A message says what was got, what was expected and the command that helps.
"""

__all__ = [
    "BackendError",
    "BundleError",
    "CheckpointError",
    "DeadlinePassed",
    "HawkError",
    "InvalidInput",
    "ParityError",
    "QueueFull",
    "Stopping",
]


class HawkError(Exception):
    """Base of all errors raised on purpose by this project."""


class InvalidInput(HawkError, ValueError):
    """An argument, prompt, image or tensor cannot be used as given."""


class CheckpointError(HawkError):
    """A checkpoint is missing, truncated, inconsistent or of an unsupported architecture."""


class BundleError(HawkError):
    """A bundle is missing, damaged, of a newer schema, or does not hold what was asked for."""


class BackendError(HawkError):
    """A runtime is not installed, cannot use the device or dtype, or failed while running."""


class ParityError(HawkError):
    """A parity comparison cannot be made."""


class QueueFull(HawkError):
    """As many requests wait as may; the same request can be taken later."""


class Stopping(HawkError):
    """The server ends: it takes no more requests, and gives up what it could not finish."""


class DeadlinePassed(HawkError):
    """A request was not done at its time limit."""
