"""Compiles the simt and plain kernels with NVRTC of CUDA 12, for GPUs that CUDA 13 has forgotten.

    python tests/simt_nvrtc.py simt.ptx              # PTX for compute_60
    FLATQUANT_SIMT_PTX=simt.ptx python -m pytest tests/test_old_gpus.py

The second line runs that PTX on a GPU whose machine need not have NVRTC. The PTX ends in the digest
of its source. NVRTC and the headers it
wants are in the test extra (Linux on x86-64): nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# The kernels for each dtype; and how simt cuts a problem, which the host must know to launch it.
SOURCE = """
#include "plain/kernel.cuh"
#include "simt/kernel.cuh"
namespace flatquant::plain {
template __global__ void kernel<__half>(Problem, int);
template __global__ void kernel<__nv_bfloat16>(Problem, int);
template __global__ void kernel<float>(Problem, int);
}
namespace flatquant::simt {
#define KERNELS(Element)                                                 \\
  template __global__ void kernel<Element, tile, false>(Problem, Plan); \\
  template __global__ void kernel<Element, tile, true>(Problem, Plan);  \\
  template __global__ void kernel<Element, low_tile, true>(Problem, Plan);
KERNELS(__half)
KERNELS(__nv_bfloat16)
KERNELS(float)
extern "C" __global__ void make_plan(Problem problem, int shared_limit, Plan* plan, int* numbers) {
  *plan = plan_of<float>(problem, shared_limit);  // which asks for the most alignment
  numbers[0] = plan->tokens;
  numbers[1] = plan->threads;
  numbers[2] = plan->shared_bytes;
  numbers[3] = sizeof(Plan);
  numbers[4] = plan->tile_height;
  numbers[5] = plan->is_whole;
}
}
"""

# NVRTC has no standard library; the device code needs no more of it than these types.
HEADERS = {
    "cmath": "",
    "cstring": "",
    "cstdint": """
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t, uintptr_t;
""",
}


def source_digest() -> str:
    """SHA-256 of the source that the PTX is made of, this file's part included; a PTX comment."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(CSRC.rglob("*.h")) + sorted(CSRC.rglob("*.cuh")):
        digest.update(path.read_bytes())
    return f"// source: {digest.hexdigest()}"


class NvrtcMissing(Exception):
    pass


def _folder(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise NvrtcMissing(f"no {package}: pip install -e '.[test]' (Linux on x86-64)")
    return Path(next(iter(spec.submodule_search_locations)))


def compile_simt(architecture: str) -> bytes:
    """PTX for "compute_60" and the like, machine code (a cubin) for "sm_60".

    Raises:
        NvrtcMissing: NVRTC of CUDA 12 or its headers are not installed.
        RuntimeError: the source does not compile; with the compiler's log.
    """
    library = _folder("nvidia.cuda_nvrtc") / "lib" / "libnvrtc.so.12"
    include = _folder("nvidia.cuda_runtime") / "include"
    for path in (library, include / "cuda_fp16.h"):
        if not path.exists():
            raise NvrtcMissing(f"no {path}")
    nvrtc = ctypes.CDLL(str(library))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p

    def strings(texts: list[str]) -> ctypes.Array[ctypes.c_char_p]:
        return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))

    def output(what: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def check(result: int) -> None:
        if result:
            raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result).decode()}")

    program = ctypes.c_void_p()
    check(
        nvrtc.nvrtcCreateProgram(
            *(ctypes.byref(program), SOURCE.encode(), b"simt.cu"),
            *(len(HEADERS), strings(list(HEADERS.values())), strings(list(HEADERS))),
        )
    )
    options = [
        f"-arch={architecture}",
        "-std=c++17",
        "-default-device",
        f"-I{CSRC}",
        f"-I{include}",
    ]
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), strings(options)):
            raise RuntimeError(f"for {architecture}:\n{output('ProgramLog').decode()}")
        return output("PTX" if architecture.startswith("compute_") else "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FILE")
    ptx = compile_simt("compute_60").rstrip(b"\0").decode()
    Path(sys.argv[1]).write_text(f"{ptx}{source_digest()}\n", encoding="utf-8")
