"""ONNX Runtime's CUDA provider on a machine without a GPU: the real onnxruntime-gpu wheel over stub CUDA libraries.

The stubs show one made-up card of compute capability 9.0 whose memory is host memory; a kernel launch does nothing. A
session then registers kernels, places nodes and adds copies as on a GPU, and a run goes through every call of the
provider. What is computed is meaningless, and nothing is said about speed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hawk_trt.errors import BackendError

CACHE = Path("build/onnxruntime-gpu")
_PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
_DONE = "done"
# What a kernel may load when it first runs.
_LOADED_AT_RUN = ("libcudnn.so.9",)
# CUDA's headers as a wheel, for machines without the toolkit.
_HEADERS = "nvidia-cuda-runtime"
# What the stubs must do; every other function that the provider imports returns 0.
_SOURCE = r"""
#include <driver_types.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
static int handle;
static int zeroed(void** at, size_t size) {
    *at = NULL;
    if (posix_memalign(at, 256, size ? size : 1) != 0) return 2;
    memset(*at, 0, size);
    return 0;
}
static int released(void* at) { free(at); return 0; }
static int moved(void* to, void const* from, size_t size) { memmove(to, from, size); return 0; }
static int properties(struct cudaDeviceProp* p) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "stub");
    p->major = 9;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->regsPerBlock = 65536;
    p->totalGlobalMem = (size_t)80 << 30;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    return 0;
}
int cudaGetDeviceCount(int* count) { *count = 1; return 0; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaRuntimeGetVersion(int* version) { *version = CUDART_MAJOR * 1000; return 0; }
int cudaDriverGetVersion(int* version) { *version = CUDART_MAJOR * 1000; return 0; }
int cudaMemGetInfo(size_t* available, size_t* total) {
    *total = (size_t)80 << 30;
    *available = (size_t)60 << 30;
    return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrMultiProcessorCount: *value = 132; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
        default: *value = 1;
    }
    return 0;
}
int cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) { return properties(p); }
int cudaGetDeviceProperties_v2(struct cudaDeviceProp* p, int device) { return properties(p); }
int cudaMalloc(void** at, size_t size) { return zeroed(at, size); }
int cudaMallocAsync(void** at, size_t size, void* stream) { return zeroed(at, size); }
int cudaMallocHost(void** at, size_t size) { return zeroed(at, size); }
int cudaHostAlloc(void** at, size_t size, unsigned flags) { return zeroed(at, size); }
int cudaFree(void* at) { return released(at); }
int cudaFreeAsync(void* at, void* stream) { return released(at); }
int cudaFreeHost(void* at) { return released(at); }
int cudaMemcpy(void* to, void const* from, size_t size, int kind) { return moved(to, from, size); }
int cudaMemcpyAsync(void* to, void const* from, size_t size, int kind, void* s) { return moved(to, from, size); }
int cudaMemset(void* at, int value, size_t size) { memset(at, value, size); return 0; }
int cudaMemsetAsync(void* at, int value, size_t size, void* stream) { memset(at, value, size); return 0; }
int cudaStreamCreate(void** stream) { *stream = &handle; return 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned flags) { *stream = &handle; return 0; }
int cudaEventCreate(void** event) { *event = &handle; return 0; }
int cudaEventCreateWithFlags(void** event, unsigned flags) { *event = &handle; return 0; }
int cudaStreamEndCapture(void* stream, void** graph) { *graph = &handle; return 0; }
int cudaGraphInstantiate(void** executable, void* graph, unsigned long long flags) { *executable = &handle; return 0; }
int cudnnCreate(void** created) { *created = &handle; return 0; }
int cublasCreate_v2(void** created) { *created = &handle; return 0; }
int cublasLtCreate(void** created) { *created = &handle; return 0; }
char const* cudaGetErrorName(int error) { return "stub"; }
char const* cudaGetErrorString(int error) { return "stub"; }
char const* cublasGetStatusName(int status) { return "stub"; }
char const* cublasGetStatusString(int status) { return "stub"; }
void** __cudaRegisterFatBinary(void* binary) { static void* none[4]; return none; }
"""


def environment(version: str, cache: Path = CACHE) -> dict[str, str]:
    """Variables of a process that imports an onnxruntime-gpu over the stubs; wheel and stubs are made where missing.

    Args:
        version: of onnxruntime-gpu.
        cache: folder that keeps both.
    """
    site = wheel_folder(version, cache)
    stubs = _stub_folder(site, cache / version / "stubs", cache)
    paths = {"PYTHONPATH": site, "LD_LIBRARY_PATH": stubs}
    return {
        name: os.pathsep.join(filter(None, (str(path.resolve()), os.environ.get(name)))) for name, path in paths.items()
    }


def wheel_folder(version: str, cache: Path = CACHE) -> Path:
    """The unpacked wheel of a version, for this Python."""
    return _unpacked(f"onnxruntime-gpu=={version}", cache / version / f"site-{sys.implementation.cache_tag}")


def _stub_folder(site: Path, folder: Path, cache: Path) -> Path:
    """The stub libraries that a provider asks for."""
    if (folder / _DONE).is_file():
        return folder
    provider = site / _PROVIDER
    imported = re.findall(r" U (\w+)", _output("nm", "-D", "--undefined-only", str(provider)))
    needed = re.findall(r"NEEDED\).*\[(lib(?:cu|nv)[^\]]+)\]", _output("readelf", "-d", str(provider)))
    wanted = {name for name in imported if re.match(r"__cuda|cu(?:[A-Z]|blas|da|dnn|fft|rand)|nvrtc", name)}
    wanted |= {name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", provider.read_bytes())}
    rest = sorted(wanted - set(re.findall(r"\b(\w+)\([^;]*\) \{", _SOURCE)))
    major = next(name for name in needed if name.startswith("libcudart.so.")).rpartition(".")[2]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "stubs.c"
    source.write_text(_SOURCE + "".join(f"int {name}() {{ return 0; }}\n" for name in rest), encoding="utf-8")
    flags = ("-w", "-O1", "-shared", "-fPIC", f"-DCUDART_MAJOR={major}", f"-I{_headers(cache)}")
    for name in {*needed, *_LOADED_AT_RUN}:
        _output("gcc", *flags, f"-Wl,-soname,{name}", "-o", str(folder / name), str(source))
    (folder / _DONE).touch()
    return folder


def _headers(cache: Path) -> Path:
    """A folder with CUDA's driver_types.h."""
    toolkits = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr")]
    for folder in toolkits:
        if (folder / "include" / "driver_types.h").is_file():
            return folder / "include"
    return next(_unpacked(_HEADERS, cache / "headers").rglob("driver_types.h")).parent


def _unpacked(requirement: str, folder: Path) -> Path:
    """A wheel from the package index, unpacked into a folder, whole or not at all."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheels, content = Path(scratch) / "wheels", Path(scratch) / "content"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        _output(*command, "-d", str(wheels), requirement)
        for wheel in wheels.iterdir():
            zipfile.ZipFile(wheel).extractall(content)
        content.replace(folder)
    return folder


def _output(*command: str) -> str:
    """What a command prints."""
    if shutil.which(command[0]) is None:
        raise BackendError(f"{command[0]}: not found; the stub CUDA libraries need it. apt install gcc binutils")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(f"{' '.join(command[:6])} failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout
