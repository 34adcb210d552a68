"""The build without a GPU: where CUTLASS is found, which architectures are built, what is compiled.

An nvcc of shell script stands in for the toolkit, so that setup.py runs on every machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA_13 = ["75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121"]
CUDA_12 = ["50", "52", "53", "60", "61", "62", "70", "72", "75", "80", "86", "87", "89", "90"]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cutlass = load("cutlass_lookup", ROOT / "third_party" / "cutlass.py")
build = load("flatquant_setup", ROOT / "setup.py")
check_wheel = load("check_wheel", ROOT / "scripts" / "check_wheel.py")


# ------------------------------------------------------------------------------------- CUTLASS


def write_headers(include: Path, version: str) -> Path:
    """`include` as CUTLASS of that version has it."""
    (include / "cutlass").mkdir(parents=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    text = "".join(f"#define CUTLASS_{name} {number} \n" for name, number in numbers)
    (include / "cutlass" / "version.h").write_text("#pragma once\n" + text)
    return include


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without CUTLASS; returns the folder that stands for site-packages."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    monkeypatch.setattr(cutlass, "CHECKOUT", tmp_path / "third_party" / "cutlass")
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.delitem(sys.modules, "cutlass_library", raising=False)
    importlib.invalidate_caches()
    return site


def install_wheel(site: Path, version: str) -> Path:
    package = site / "cutlass_library"
    include = write_headers(package / "source" / "include", version)
    (package / "__init__.py").write_text("raise ImportError('must be found, not imported')")
    importlib.invalidate_caches()
    return include


def test_cutlass_missing_says_where_it_looked_and_what_to_do(nowhere: Path) -> None:
    with pytest.raises(cutlass.CutlassError) as error:
        cutlass.include_dir()
    for part in (str(cutlass.CHECKOUT), "wheel: not installed", cutlass.PIN, "CUTLASS_PATH="):
        assert part in str(error.value)


def test_cutlass_order_is_path_then_checkout_then_wheel(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = install_wheel(nowhere, "4.2.0")
    assert cutlass.include_dir() == wheel
    checkout = write_headers(cutlass.CHECKOUT / "include", "4.3.1")
    assert cutlass.include_dir() == checkout
    own = write_headers(tmp_path / "own" / "include", "5.0.0")
    for path in (own, own.parent):
        monkeypatch.setenv("CUTLASS_PATH", str(path))
        assert cutlass.include_dir() == own
    assert cutlass.version(own) == (5, 0, 0)


def test_cutlass_path_without_headers_is_not_replaced_by_the_wheel(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_wheel(nowhere, "4.2.0")
    monkeypatch.setenv("CUTLASS_PATH", "/no/such/folder")
    with pytest.raises(cutlass.CutlassError, match="CUTLASS_PATH: /no/such/folder/include"):
        cutlass.include_dir()


def test_empty_checkout_is_passed_over(nowhere: Path) -> None:
    cutlass.CHECKOUT.mkdir(parents=True)
    wheel = install_wheel(nowhere, "4.2.0")
    assert cutlass.include_dir() == wheel


@pytest.mark.parametrize("version", ["3.9.2", "4.1.0"])
def test_old_cutlass_is_refused(nowhere: Path, version: str) -> None:
    include = install_wheel(nowhere, version)
    with pytest.raises(cutlass.CutlassError) as error:
        cutlass.include_dir()
    for part in (version, str(include), "4.2", cutlass.PIN):
        assert part in str(error.value)


def test_cutlass_from_the_command_line(tmp_path: Path) -> None:
    include = write_headers(tmp_path / "include", "4.2.0")

    def run(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "third_party" / "cutlass.py", *arguments]
        env = {**os.environ, "CUTLASS_PATH": str(path)}
        return subprocess.run(command, env=env, capture_output=True, text=True)

    assert run(path=tmp_path).stdout.strip() == str(include)
    assert run("--pin", path=tmp_path).stdout.strip() == cutlass.PIN
    missing = run(path=tmp_path / "none")
    assert missing.returncode == 1
    assert "CUTLASS headers not found" in missing.stderr and not missing.stdout


def test_one_pin() -> None:
    assert f'"{cutlass.PIN}"' in (ROOT / "pyproject.toml").read_text()


# ------------------------------------------------------------------------------- architectures


def toolkit(known: list[str], version: str = "13.0") -> SimpleNamespace:
    return SimpleNamespace(
        version=version,
        nvcc="/cuda/bin/nvcc",
        known=set(known),
        bin="",
        include=["/cuda/i"],
        lib=[],
    )


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80;90a;120", ["80", "90a", "120"]),
        ("8.0;8.6;9.0", ["80", "86", "90a"]),
        ("9.0a 10.0, 12.0", ["90a", "100", "120"]),
        ("100a;10.3a;12.0f", ["100a", "103a", "120f"]),
        ("120;80;8.0;90;9.0", ["80", "90a", "120"]),
        ("8.0;8.0+PTX", ["80+PTX"]),
        ("8.0;9.0+PTX", ["80", "90a+PTX"]),
        (" 75 ;", ["75"]),
    ],
)
def test_parse_archs(text: str, archs: list[str]) -> None:
    assert build.parse_archs(text, toolkit(CUDA_13)) == archs


@pytest.mark.parametrize(
    "text", ["Hopper", "sm_90", "9", "9.0.0", "80+ptx", "90b", "80-90", "80a", "90f"]
)
def test_malformed_arch(text: str) -> None:
    with pytest.raises(build.BuildError, match=re.escape(repr(text))):
        build.parse_archs(text, toolkit(CUDA_13))


def test_arch_that_the_toolkit_does_not_know() -> None:
    original_readme = "6.0;6.1;7.0;7.5;8.0;8.6;8.9;9.0"
    with pytest.raises(build.BuildError) as error:
        build.parse_archs(original_readme, toolkit(CUDA_13))
    for part in ("CUDA 13.0", "/cuda/bin/nvcc", "6.0", " ".join(CUDA_13), "FLATQUANT_CUDA_ARCHS"):
        assert part in str(error.value)
    assert "take an older toolkit; CUDA 12 was the last" in str(error.value)
    archs = build.parse_archs(original_readme, toolkit(CUDA_12, "12.4"))
    assert archs == ["60", "61", "70", "75", "80", "86", "89", "90a"]
    with pytest.raises(build.BuildError, match=r"CUDA 12\.4 .* for 120.*or a newer toolkit"):
        build.parse_archs("80;120", toolkit(CUDA_12, "12.4"))


@pytest.mark.parametrize(
    ("own", "torchs", "archs"),
    [
        ("80", "9.0", "80"),
        ("", "9.0", "90a"),
        (None, "8.9", "89"),
        (None, None, "75 80 86 89 90a 100 103 120"),
        ("", " ", "75 80 86 89 90a 100 103 120"),
    ],
)
def test_wanted_archs(
    own: str | None, torchs: str | None, archs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FLATQUANT_CUDA_ARCHS", own), ("TORCH_CUDA_ARCH_LIST", torchs)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert build.wanted_archs(toolkit(CUDA_13)) == archs.split()


def test_gencode_flags() -> None:
    assert build.gencode_flags(["80", "90a+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


# ------------------------------------------------------------------------- nvcc and build.ninja


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def test_nvcc_is_looked_up_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_PATH", raising=False)
    for name in ("home", "path", "shell"):
        script(tmp_path / name / "bin" / "nvcc", "")
    monkeypatch.setenv("PATH", str(tmp_path / "shell" / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no such toolkit"))
    assert build.find_nvcc() == str(tmp_path / "shell/bin/nvcc")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    assert build.find_nvcc() == str(tmp_path / "path/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == str(tmp_path / "home/bin/nvcc")


def test_old_toolkit_is_refused(tmp_path: Path) -> None:
    nvcc = script(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    with pytest.raises(build.BuildError, match=r"12\.0 or newer"):
        build.Toolkit(str(nvcc))


def test_check_archs(tmp_path: Path) -> None:
    listing = "ELF file    1: _C.abi3.1.sm_80.cubin\nELF file    2: _C.abi3.2.sm_90a.cubin"
    tools = SimpleNamespace(bin=str(script(tmp_path / "cuobjdump", f"echo '{listing}'").parent))
    build.check_archs(tmp_path / "_C.abi3.so", ["80", "90a+PTX"], tools)
    with pytest.raises(build.BuildError, match="lacks code for 120"):
        build.check_archs(tmp_path / "_C.abi3.so", ["80", "90a", "120"], tools)


def test_ninja_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_PATH", str(write_headers(tmp_path / "include", "4.2.0")))
    text = build.ninja_file(toolkit(CUDA_13), ["80", "90a"], Path("build/x/_C.abi3.so"))
    commands = dict(re.findall(r"^(\w+) = (.*)$", text, re.M))
    target = f"-DTORCH_TARGET_VERSION=0x{2:02x}{10:02x}{0:012x}"  # 2.10, as torch packs versions
    for compiler in ("cuda", "host"):
        assert {target, "-DUSE_CUDA"} <= set(commands[compiler].split())
    assert "'-DFLATQUANT_CUDA_ARCHS=\"80;90a\"'" in commands["host"]
    assert "-ltorch_python" not in commands["link"] and "-lcuda " not in commands["link"]
    edges = dict(re.findall(r"^build .*: compile (\S+)\n  compiler = (\S+)$", text, re.M))
    kernels = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cu")}
    hosts = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp")}
    assert edges == dict.fromkeys(kernels, "$cuda") | dict.fromkeys(hosts, "$host")


def test_old_gpus_need_no_cutlass_and_get_no_kernel_of_newer_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))  # no headers there
    old = build.parse_archs("60;61;70;75", toolkit(CUDA_12, "12.0"))
    text = build.ninja_file(toolkit(CUDA_12, "12.0"), old, Path("build/x/_C.abi3.so"))
    sources = set(re.findall(r": compile (\S+)$", text, re.M))
    folders = ("simt", "plain")
    paths = [path for folder in folders for path in ROOT.glob(f"csrc/{folder}/**/*.cu")]
    kernels = {str(path.relative_to(ROOT)) for path in paths}
    hosts = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp")}
    assert sources == kernels | hosts
    for number in old:
        assert f"-gencode=arch=compute_{number},code=sm_{number}" in text
    assert "csrc/sm80/" not in text and "csrc/sm90/" not in text


def test_kernels_of_newer_gpus_compile_beside_older_ones() -> None:
    """Compilers for GPUs before 7.0 refuse __grid_constant__ on an empty kernel too."""
    sources = [*ROOT.glob("csrc/**/*.cuh"), *ROOT.glob("csrc/**/*.cu")]
    bare = [path.name for path in sources if re.search(r"\b__grid_constant__\b", path.read_text())]
    assert bare == ["fragment.cuh"]


def test_without_their_architectures_nothing_refers_to_the_kernels(tmp_path: Path) -> None:
    nvcc, nm = build.find_nvcc(), shutil.which("nm")
    if not (nvcc and nm and shutil.which("c++")):
        pytest.skip("no CUDA toolkit, nm or C++ compiler")
    text = build.ninja_file(build.Toolkit(nvcc), ["75"], Path("build/x/_C.abi3.so"))
    host = re.search("^host = (.*)$", text, re.M)
    assert host
    command = [*shlex.split(host[1]), "-O0", "-c", "csrc/torch_ops.cpp"]
    subprocess.run([*command, "-o", str(tmp_path / "o")], cwd=ROOT, check=True)
    undefined = subprocess.run([nm, "-uC", tmp_path / "o"], capture_output=True, text=True).stdout
    assert "flatquant::simt::launch" in undefined and "flatquant::plain::launch" in undefined
    assert "flatquant::sm" not in undefined


NVCC = """\
case "$1" in
  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
  --list-gpu-arch) echo compute_80; echo compute_90 ;;
  --dryrun) cat >&2 <<'TEXT'
#$ TOP={top}/bin/..
#$ INCLUDES="-I{top}/include" "-I{top}/more"
#$ LIBRARIES=  "-L{top}/lib/stubs" "-L{top}/lib"
#$ gcc -x c++ x.cu
TEXT
    ;;
  *) # ... -MD -MF DEPFILE -c SOURCE -o OBJECT
    while [ "$1" != -MD ]; do shift; done
    exec c++ -fPIC -Icsrc -MD -MF "$3" -x c++ -c "$5" -o "$7" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """setup.py with two small kernels, a host file and a toolkit of shell script."""
    root = tmp_path / "project"
    for kernel in ("one", "two"):
        (root / "csrc" / kernel).mkdir(parents=True)
        (root / "csrc" / kernel / "kernel.cuh").write_text(f"inline int {kernel}() {{ return 0; }}")
        (root / "csrc" / kernel / "fp16.cu").write_text(f'#include "{kernel}/kernel.cuh"\n')
    (root / "csrc" / "ops.cpp").write_text("extern const char archs[] = FLATQUANT_CUDA_ARCHS;\n")
    (root / "flatquant").mkdir()
    (root / "third_party").mkdir()
    for name in ("setup.py", "third_party/cutlass.py"):
        shutil.copy(ROOT / name, root / name)
    top = tmp_path / "cuda"
    script(top / "bin" / "nvcc", NVCC.format(top=top))
    script(top / "bin" / "cuobjdump", "echo _C.abi3.1.sm_80.cubin; echo _C.abi3.2.sm_90a.cubin")
    (top / "lib").mkdir()
    (top / "lib" / "libcudart_static.a").write_bytes(b"!<arch>\n")
    write_headers(tmp_path / "cutlass" / "include", "4.2.0")
    return root


def build_in_place(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLATQUANT_")}
    env |= {"CUDA_HOME": str(root.parent / "cuda"), "CUTLASS_PATH": str(root.parent / "cutlass")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=root, env=env | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_build_in_place(project: Path) -> None:
    library = project / "flatquant" / "_C.abi3.so"

    def compiled(**environment: str) -> set[str]:
        result = build_in_place(project, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return set(re.findall(r"compile (\S+)", result.stdout))

    everything = {"csrc/one/fp16.cu", "csrc/two/fp16.cu", "csrc/ops.cpp"}
    assert compiled(FLATQUANT_CUDA_ARCHS="80") == everything
    assert b"80\0" in library.read_bytes()
    assert compiled(FLATQUANT_CUDA_ARCHS="80") == set()
    (project / "csrc" / "one" / "kernel.cuh").write_text("inline int one() { return 1; }")
    assert compiled(FLATQUANT_CUDA_ARCHS="8.0", MAX_JOBS="1") == {"csrc/one/fp16.cu"}

    # Another set of architectures is another build, and coming back compiles nothing.
    assert compiled(FLATQUANT_CUDA_ARCHS="8.0;9.0") == everything
    assert b"80;90a\0" in library.read_bytes()
    assert compiled(FLATQUANT_CUDA_ARCHS="80") == set()
    assert b"80;90a\0" not in library.read_bytes()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FLATQUANT_CUDA_ARCHS": "70"}, "error: CUDA 13.0"),
        ({"CUTLASS_PATH": "/no/such/folder"}, "error: CUTLASS headers not found"),
        ({"CXX": "false"}, "error: the compilation failed"),
    ],
)
def test_build_errors_are_one_clear_text(
    project: Path, environment: dict[str, str], message: str
) -> None:
    result = build_in_place(project, **environment)
    assert result.returncode != 0
    assert message in result.stderr and "Traceback" not in result.stderr


# -------------------------------------------------------------------------------------- wheels


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
@pytest.mark.parametrize("abiflags", ["", "t"])
def test_wheel_is_named_after_what_it_holds(project: Path, abiflags: str) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "quant_ops.py"):
        shutil.copy(ROOT / name, project / name)
    for name in ("__init__.py", "_version.py"):
        shutil.copy(ROOT / "flatquant" / name, project / "flatquant" / name)
    (project / "setup_of_this_python.py").write_text(
        "import runpy, sys, sysconfig\nsysconfig.get_config_vars()\n"  # found by the true flags
        f"sys.abiflags = {abiflags!r}\n"
        "sys.argv[0] = 'setup.py'\nrunpy.run_path('setup.py', run_name='__main__')\n"
    )
    env = {**os.environ, "FLATQUANT_CUDA_ARCHS": "90", "CUDA_HOME": str(project.parent / "cuda")}
    env["CUTLASS_PATH"] = str(project.parent / "cutlass")
    command = [sys.executable, "setup_of_this_python.py", "--quiet"]
    command += ["egg_info", "--tag-build=+cu130.sm90", "bdist_wheel"]
    run = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    # A free-threaded Python has no abi3.
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tag = f"{own}-{own}" if abiflags else "cp310-abi3"
    assert wheel.name.startswith(f"flatquant_cutlass-{version()}+cu130.sm90-{tag}")
    assert "flatquant/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()


def version() -> str:
    return load("flatquant_version", ROOT / "flatquant" / "_version.py").__version__


GOOD_WHEEL = {
    "name": "flatquant_cutlass-1.2.3+cu130.sm80-cp310-abi3-manylinux_2_34_x86_64.whl",
    "size": 1000,
    "libraries": ["flatquant/_C.abi3.so"],
    "links": ["libtorch.so", "libtorch_cpu.so"],
    "symbols": "manylinux_2_34_x86_64",
    "listing": "_C.abi3.1.sm_80.cubin _C.abi3.2.sm_86.cubin _C.abi3.3.sm_89.cubin",
    "abi3audit": 0,
    "torch-abi-audit": 0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"name": "flatquant_cutlass-1.2.3-cp310-abi3-manylinux_2_34_x86_64.whl"}, "the name is"),
        ({"name": GOOD_WHEEL["name"].replace("abi3", "cp311")}, "the name is"),
        ({"size": 60_000_000}, "60000000 is the limit"),
        ({"libraries": []}, "holds the libraries"),
        ({"libraries": ["flatquant/_C.abi3.so", "flatquant/libcudart.so.13"]}, "libcudart"),
        ({"links": ["libcuda.so.1", "libtorch.so", "libtorch_cpu.so"]}, "links .*libcuda"),
        ({"symbols": "manylinux_2_36_x86_64"}, "its symbols allow manylinux_2_36"),
        ({"listing": "_C.abi3.1.sm_80.cubin _C.abi3.2.sm_89.cubin"}, r"code for \['80', '89'\]"),
        ({"listing": GOOD_WHEEL["listing"] + " _C.abi3.4.sm_90a.cubin"}, "90a"),
        ({"abi3audit": 1}, "abi3audit: refused"),
        ({"torch-abi-audit": 1}, "torch-abi-audit: refused"),
    ],
    ids=str,
)
def test_check_wheel(
    change: dict[str, Any], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = GOOD_WHEEL | change
    show = {"external_libs": dict.fromkeys(facts["links"]), "sym_tag": facts["symbols"]}
    script(tmp_path / "auditwheel", f"echo '{json.dumps(show)}'")
    script(tmp_path / "cuobjdump", f"echo '{facts['listing']}'")
    for audit in ("abi3audit", "torch-abi-audit"):
        script(tmp_path / audit, f"echo refused; exit {facts[audit]}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    wheel = tmp_path / facts["name"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for library in facts["libraries"]:
            archive.writestr(library, b"")
        archive.writestr("padding", bytes(facts["size"]))
    if message is None:
        assert "sm_80 sm_86 sm_89; audits passed" in check_wheel.check(wheel, ["80", "86", "89"])
        return
    with pytest.raises(check_wheel.WheelError, match=message):
        check_wheel.check(wheel, ["80", "86", "89"])
