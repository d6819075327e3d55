"""NVIDIA's real ONNX parser and builder on a machine with no GPU, for checks: where `import tensorrt` gets them.

The wheel of ONNX Runtime's provider for TensorRT-RTX carries RTX's parser and builder, and these build without a GPU.
The ordinary Python bindings of TensorRT 11 drive them through a few forwarding functions compiled here. It is not
TensorRT proper, and NVIDIA does not support the mix: a pass is strong evidence that TensorRT from 10.15 on takes a
graph, and says nothing of older ones. Only parsing, shapes, profiles and building work; creating a Runtime crashes.

The wheels are fetched when first needed and kept in the user's cache, never in the repository: NVIDIA's licence
does not let others pass them on.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from hawk_trt.errors import BackendError
from hawk_trt.files import cache_folder

# They belong together: the bindings must know no function that the builder lacks.
WHEELS = ("onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0", "tensorrt-cu13-bindings==11.4.0.106")
LIBRARIES = "HAWK_PREFLIGHT_LIBRARIES"
_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
_BINDINGS_ASK_FOR = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_MODULE = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"

# What the bindings call, handed on to RTX with the version that it expects instead of theirs.
_FORWARDING = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
static void* open_library(char const* name) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", getenv("HAWK_PREFLIGHT_LIBRARIES"), name);
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) { fprintf(stderr, "%s\n", dlerror()); exit(1); }
  return handle;
}
static void* find(int of_parser, char const* name) {
  static void *builder, *parser;
  if (!builder) builder = open_library("libtensorrt_rtx.so");
  if (of_parser && !parser) parser = open_library("libtensorrt_onnxparser_rtx.so");
  return dlsym(of_parser ? parser : builder, name);
}
typedef int (*version_function)(void);
typedef void* (*two)(void*, int);
typedef void* (*three)(void*, void*, int);
static int builder_version(void) { return ((version_function)find(0, "getInferLibVersion"))(); }
int getNvOnnxParserVersion(void) { return ((version_function)find(1, "getNvOnnxParserVersion"))(); }
#define BUILDER(name) void* name(void* log, int asked) \
  { (void)asked; return ((two)find(0, #name))(log, builder_version()); }
BUILDER(createInferBuilder_INTERNAL)
BUILDER(createInferRuntime_INTERNAL)
#define PARSER(name) void* name(void* network, void* log, int asked) \
  { (void)asked; return ((three)find(1, #name))(network, log, getNvOnnxParserVersion()); }
PARSER(createNvOnnxParser_INTERNAL)
PARSER(createNvOnnxParserRefitter_INTERNAL)
void* createInferRefitter_INTERNAL(void* engine, void* log, int asked)
  { (void)asked; return ((three)find(0, "createInferRefitter_INTERNAL"))(engine, log, builder_version()); }
void* getPluginRegistry(void) { return ((void* (*)(void))find(0, "getPluginRegistry"))(); }
void* getBuilderPluginRegistry(int capability)
  { return ((void* (*)(int))find(0, "getBuilderPluginRegistry"))(capability); }
int initLibNvInferPlugins(void* log, char const* space) { (void)log; (void)space; return 1; }
"""


def environment() -> dict[str, str]:
    """Variables of a process in which `import tensorrt` gets these; the loader reads them at its start only."""
    folder = _prepared()
    libraries = str(folder / _PACKAGE)
    paths = {"LD_LIBRARY_PATH": libraries, "PYTHONPATH": str(folder)}
    joined = {name: os.pathsep.join(filter(None, (path, os.environ.get(name)))) for name, path in paths.items()}
    return {**os.environ, **joined, LIBRARIES: libraries}


def _prepared() -> Path:
    """The folder with the packages and libraries, made where it is not there yet."""
    python = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    name = "-".join(wheel.partition("==")[2] for wheel in WHEELS)
    folder = cache_folder() / f"preflight-{name}-{python}"
    if folder.is_dir():
        return folder
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BackendError("preflight: no C compiler was found. apt install gcc")
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"preflight: fetching NVIDIA's wheels (about 150 MB, once) into {folder}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        site = Path(partial) / "site"
        _download(Path(partial) / "wheels", site)
        _link_libraries(site / _PACKAGE, compiler)
        (site / "tensorrt").mkdir()
        (site / "tensorrt" / "__init__.py").write_text(_MODULE, encoding="utf-8")
        try:
            site.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def _download(wheels: Path, site: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(wheels), *WHEELS], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip())
        raise BackendError(
            f"preflight: {' and '.join(WHEELS)} cannot be had ({reason}). "
            "They exist for Linux on x86-64, Python 3.10 to 3.13"
        )
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _link_libraries(libraries: Path, compiler: str) -> None:
    """Give every library the names that others look for, and compile the forwarding ones."""
    for library in list(libraries.glob("lib*.so.*")):
        stem, _, version = library.name.partition(".so.")
        for name in (f"{stem}.so", f"{stem}.so.{version.split('.')[0]}"):
            if not (libraries / name).exists():
                (libraries / name).symlink_to(library.name)
    major = WHEELS[1].partition("==")[2].split(".")[0]
    source = libraries / "forwarding.c"
    source.write_text(_FORWARDING, encoding="utf-8")
    for stem in _BINDINGS_ASK_FOR:
        name = f"lib{stem}.so.{major}"
        files = ["-o", str(libraries / name), str(source)]
        subprocess.run([compiler, "-shared", "-fPIC", *files, f"-Wl,-soname,{name}", "-ldl"], check=True)
