"""What TensorRT says while it works: its methods return False or None, and the reason goes to a logger."""

import threading
from collections import deque

import tensorrt as trt

_KEPT = 8
_SERIOUS = ("INTERNAL_ERROR", "ERROR", "WARNING")


class Log(trt.ILogger):
    """Keeps the latest warnings and errors for the message of the next BackendError."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()  # TensorRT logs from threads of its own

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Take a message; TensorRT calls this."""
        if severity.name in _SERIOUS:
            with self._lock:
                self._lines.append(msg.strip())

    def take(self) -> str:
        """The messages since the last call, and forget them."""
        with self._lock:
            text = "; ".join(self._lines)
            self._lines.clear()
        return text or "TensorRT gave no reason"
