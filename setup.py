"""Builds flatquant/_C.abi3.so: nvcc for csrc/**/*.cu, the host compiler for csrc/*.cpp, by ninja.

No GPU, git or network. The library speaks torch's stable ABI: it builds against any torch >= 2.10,
CPU builds included. Without nvcc the package is pure Python and holds the reference only.

Environment: CUDA_HOME or CUDA_PATH (else nvcc on PATH, else /usr/local/cuda), CXX, MAX_JOBS,
FLATQUANT_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST ("80;90a", "8.0;9.0+PTX"), CUTLASS_PATH, and
FLATQUANT_NVCC_FLAGS for more flags ("-lineinfo -Xptxas=-v").
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "60;61;70;75;80;86;89;90a;100;103;120"  # those of them that the toolkit knows
NINJA_RULES = """\
rule compile
  command = $compiler -MD -MF $out.d -c $in -o $out
  description = compile $in
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -o $out $in $link
  description = link $out
"""


class BuildError(BaseError):
    """A build that cannot go on; setuptools prints the text without a traceback."""


def find_nvcc() -> str | None:
    """The first nvcc of CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in homes] + [os.environ.get("PATH", "")]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))


class Toolkit:
    """What an nvcc says of itself; where it lies tells nothing: it may be a wrapper or a link."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        release = re.search(r"release (\d+)\.(\d+)", self._ask("--version"))
        if not release or int(release[1]) < 12:
            raise BuildError(f"{nvcc}: a CUDA toolkit 12.0 or newer is needed")
        self.version = f"{release[1]}.{release[2]}"  # 13.0
        # such as {"75", "80"}
        self.known = set(re.findall(r"compute_(\d+)", self._ask("--list-gpu-arch")))
        settings = dict(re.findall(r"^#\$ (\w+)=(.*)$", self._ask("--dryrun", "-c", "x.cu"), re.M))
        self.bin = f"{settings['TOP']}/bin"
        self.include = re.findall(r'"-I([^"]+)"', settings["INCLUDES"])
        self.lib = re.findall(r'"-L([^"]+)"', settings["LIBRARIES"])

    def _ask(self, *question: str) -> str:
        answer = subprocess.run([self.nvcc, *question], capture_output=True, text=True)
        return answer.stdout + answer.stderr


def parse_archs(text: str, toolkit: Toolkit) -> list[str]:
    """ "8.0;9.0+PTX" or "80 90+PTX" -> ["80", "90a+PTX"]: wgmma needs 9.0 to be built as 90a."""
    archs: dict[tuple[int, str], str] = {}
    for word in re.findall(r"[^;,\s]+", text):
        match = re.fullmatch(r"(\d+\.\d|\d{2,3})([af]?)(\+PTX)?", word)
        number = match[1].replace(".", "") if match else ""
        # sm_90a is the first that ends in a, sm_100f the first in f.
        if not match or int(number) < {"": 0, "a": 90, "f": 100}[match[2]]:
            raise BuildError(f"{word!r} in {text!r} is no architecture; write 80;90a or 8.0;9.0")
        if number not in toolkit.known:
            known = sorted(toolkit.known, key=int)
            other = "an older" if int(number) < int(known[0]) else "another, or a newer"
            raise BuildError(
                f"CUDA {toolkit.version} ({toolkit.nvcc}) cannot compile for {word}, asked for in "
                f"{text!r}; it knows {' '.join(known)}. Choose with FLATQUANT_CUDA_ARCHS, or take "
                f"{other} toolkit; CUDA 12 was the last for 60, 61 and 70."
            )
        key = int(number), "a" if number == "90" else match[2]
        archs[key] = archs.get(key) or match[3] or ""
    return [f"{number}{suffix}{ptx}" for (number, suffix), ptx in sorted(archs.items())]


def wanted_archs(toolkit: Toolkit) -> list[str]:
    known = ";".join(a for a in DEFAULT_ARCHS.split(";") if a.rstrip("a") in toolkit.known)
    asked = (os.environ.get(name) for name in ("FLATQUANT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"))
    return next(archs for text in (*asked, known) if (archs := parse_archs(text or "", toolkit)))


def gencode_flags(archs: list[str]) -> list[str]:
    """Machine code for each; "+PTX" adds code for newer GPUs, on which "a" code does not run."""
    flags = []
    for real, ptx in (arch.partition("+")[::2] for arch in archs):
        flags.append(f"-gencode=arch=compute_{real},code=sm_{real}")
        if ptx:
            flags.append("-gencode=arch=compute_{0},code=compute_{0}".format(real.rstrip("af")))
    return flags


def torch_folder() -> str:
    spec = importlib.util.find_spec("torch")  # found, not imported: that would take seconds
    version = importlib.metadata.version("torch") if spec and spec.origin else "not installed"
    if not version[0].isdigit() or tuple(map(int, version.split(".")[:2])) < (2, 10):
        raise BuildError(f"torch >= 2.10 is needed to build, torch is {version}: pip install torch")
    return os.path.dirname(spec.origin)


def ninja_file(toolkit: Toolkit, archs: list[str], library: Path) -> str:
    """The text of build.ninja, to be run in ROOT; `library` is relative to ROOT."""
    torch, cxx = torch_folder(), os.environ.get("CXX", "c++")
    newest = max(int(re.match(r"\d+", arch)[0]) for arch in archs)
    skipped = {path.name for path in ROOT.glob("csrc/sm*") if int(path.name[2:]) > newest}
    cutlass = runpy.run_path(str(ROOT / "third_party" / "cutlass.py"))
    try:
        # The oldest that a kernel with CUTLASS is for is 80.
        cutlass_flags = ["-isystem", str(cutlass["include_dir"]())] if newest >= 80 else []
    except cutlass["CutlassError"] as error:
        raise BuildError(str(error)) from None
    # Target the stable ABI of torch 2.10, for device code too: some headers test both macros.
    common = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    common += ["-Icsrc", "-isystem", f"{torch}/include"]
    host_only = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall"]
    host_only += [f"-fmacro-prefix-map={folder}/=" for folder in (torch, *cutlass_flags[1:])]
    host = [*common, *host_only, f'-DFLATQUANT_CUDA_ARCHS="{";".join(archs)}"']
    host += [f"-DFLATQUANT_NEWEST_ARCH={newest}"]
    host += [flag for folder in toolkit.include for flag in ("-isystem", folder)]
    cuda = [*common, *cutlass_flags, "--expt-relaxed-constexpr", *gencode_flags(archs)]
    cuda += ["-ccbin", cxx, f"-Xcompiler={','.join(host_only)}"]
    cuda += shlex.split(os.environ.get("FLATQUANT_NVCC_FLAGS", ""))
    # libtorch.so defines nothing but brings in libtorch_cuda.so, so it must not be dropped.
    link = ["-Wl,--no-as-needed,--allow-shlib-undefined,--exclude-libs,ALL", f"-L{torch}/lib"]
    link += [f"-L{folder}" for folder in toolkit.lib]
    link += ["-ltorch", "-ltorch_cpu", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]

    commands = {"cuda": [toolkit.nvcc, *cuda], "host": [cxx, *host], "cxx": [cxx], "link": link}
    lines = [f"{name} = {shlex.join(words)}".replace("$", "$$") for name, words in commands.items()]
    lines = [f"builddir = {library.parent}", *lines, NINJA_RULES]
    objects = []
    for source in sorted([*ROOT.glob("csrc/**/*.cu"), *ROOT.glob("csrc/*.cpp")]):
        name, compiler = source.relative_to(ROOT), "$cuda" if source.suffix == ".cu" else "$host"
        if name.parts[1] in skipped:
            continue
        objects.append(f"{library.parent / name}.o")
        lines.append(f"build {objects[-1]}: compile {name}\n  compiler = {compiler}")
    return "\n".join([*lines, f"build {library}: link {' '.join(objects)}\n"])


def check_archs(library: Path, archs: list[str], toolkit: Toolkit) -> None:
    """Raises BuildError unless the library holds machine code for every architecture."""
    cuobjdump = shutil.which("cuobjdump", path=f"{toolkit.bin}:{os.environ.get('PATH', '')}")
    if not cuobjdump:
        print("flatquant: no cuobjdump here, so the architectures in the binary are not checked")
        return
    listing = subprocess.run([cuobjdump, "-lelf", library], capture_output=True, text=True).stdout
    missing = {a.partition("+")[0] for a in archs} - set(re.findall(r"\.sm_(\w+)\.", listing))
    if missing:
        raise BuildError(f"{library} lacks code for {', '.join(sorted(missing))}:\n{listing}")


class NinjaBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".abi3.so"

    def build_extension(self, ext: Extension) -> None:
        toolkit = Toolkit(find_nvcc())
        archs = wanted_archs(toolkit)
        # One folder per set of architectures; in-place, editable and wheel builds share it.
        library = Path("build", f"cuda{toolkit.version}-{'-'.join(archs)}", "_C.abi3.so")
        recipe = library.with_name("build.ninja")
        (ROOT / recipe).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / recipe).write_text(ninja_file(toolkit, archs, library))
        print(f"flatquant: CUDA {toolkit.version} ({toolkit.nvcc}), {' '.join(archs)}", flush=True)
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        try:
            subprocess.run([*ninja, "-f", recipe, "-j", jobs], cwd=ROOT, check=True)
        except FileNotFoundError:
            raise BuildError("ninja is needed to build: pip install ninja") from None
        except subprocess.CalledProcessError:
            raise BuildError("the compilation failed; the first error above says why") from None
        check_archs(ROOT / library, archs, toolkit)
        self.force = True  # the library of another set of architectures may be older: copy it still
        self.mkpath(os.path.dirname(self.get_ext_fullpath(ext.name)))
        self.copy_file(ROOT / library, self.get_ext_fullpath(ext.name))


if __name__ == "__main__":
    extensions = [Extension("flatquant._C", [])] if find_nvcc() else []
    abi3 = extensions and "t" not in sys.abiflags  # a free-threaded Python has no abi3
    if not extensions:
        print("flatquant: no nvcc (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda): reference only")
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if abi3 else {},
    )
