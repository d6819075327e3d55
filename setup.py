"""Says which packages the wheel holds; all else is in pyproject.toml.

export/, engines/ and plugins/ lie beside hawk_trt/ in the repository, and inside hawk_trt once installed.
"""

from setuptools import find_packages, setup

INSIDE = {f"hawk_trt.{folder}": folder for folder in ("export", "engines", "plugins")}
DATA = {"hawk_trt.data.tiny_vlm": "examples/tiny-vlm", "hawk_trt.data.tiny_task": "examples/tiny_task"}

setup(
    package_dir=INSIDE | DATA,
    packages=[
        *find_packages(include=["hawk_trt", "hawk_trt.*"]),
        *(f"hawk_trt.{name}" for folder in INSIDE.values() for name in find_packages(include=[folder, f"{folder}.*"])),
        *DATA,
    ],
)
