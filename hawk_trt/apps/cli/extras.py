"""The extras of hawk-trt and the packages that they bring, as the installed distribution says."""

import re


def extras() -> dict[str, dict[str, str]]:
    """Packages by extra of hawk-trt, "" for none, and the lowest that work; empty where it is not installed."""
    from importlib.metadata import PackageNotFoundError, requires  # a twentieth of a start

    found: dict[str, dict[str, str]] = {}
    try:
        requirements = requires("hawk-trt") or []
    except PackageNotFoundError:
        return found
    for requirement in requirements:
        package = re.match(r"([\w-]+)[^;>]*>=([\d.]+)", requirement)
        extra = re.search(r"extra == [\"']([\w-]+)", requirement)
        if package:
            found.setdefault(extra[1] if extra else "", {})[package[1]] = package[2]
    return found
