"""Builds the package as a user's pip does, isolated and without torch, and checks what comes out.

Once with a C++ compiler, by `make wheel`, once without one, from the same sdist. Run by `make package-check`;
takes minutes, for the build requirements are fetched by name.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
CORES, LIMIT = 2, 60.0  # seconds that so many cores have to do for the wheel; 45 measured on a busy machine
QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}")
    return result.stdout + result.stderr


def site_packages() -> str:
    """Where this interpreter has torch."""
    return subprocess.check_output(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()


def busy() -> float:
    """Seconds of processors that ended subprocesses had."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def install(wheel: Path, home: Path) -> Path:
    """The python of a new environment with a wheel, and without torch."""
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", wheel, **QUIET)
    return python


def build(source: Path, target: Path, **environment: str) -> Path:
    """A folder's wheel."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", target, source)
    run(*pip, ODEBLOCK_CUDA="OFF", **environment, **QUIET)
    (wheel,) = target.glob("*.whl")
    return wheel


def try_out(python: Path, program: str, *options: str) -> str:
    """Runs a program with the installed package and this interpreter's torch."""
    path = f"import sys; sys.path.append({site_packages()!r})\n"
    return run(python, "-I", *options, "-c", path + program).strip()


WITH_CORE = """
import re, pathlib, odeblock, torch
from odeblock import native

calls = []
backward = native.core.backward
native.core.backward = lambda *arguments: (calls.append(arguments), backward(*arguments))[1]
readme = pathlib.Path("README.md").read_text()
exec(re.search(r"```python\\n(.*?)```", readme, flags=re.DOTALL)[1])
assert len(calls) == 1, calls

block = odeblock.DeepResBlock(8, 16, dtype=torch.float64)
x = torch.randn(40, 8, dtype=torch.float64)
ours = torch.autograd.grad(block(x).square().sum(), [block.V, block.W])
theirs = torch.autograd.grad(
    odeblock.reference.deep_residual(x, block.V, block.W).square().sum(), [block.V, block.W]
)
torch.testing.assert_close(ours, theirs)
assert len(calls) == 2, calls

info = odeblock.build_info()
assert info["native"] and info["openmp"] and not info["cuda_architectures"], info
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(runtimes) == 1, runtimes
assert odeblock.__file__.startswith(sys.prefix)
print("installed wheel works:", info["cpu_features"], "with torch", torch.__version__)
"""

WITHOUT_CORE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import odeblock, torch
    for strategy in ("auto", "adjoint"):
        block = odeblock.DeepResBlock(8, 64, backward=strategy, dtype=torch.float64)
        x = torch.randn(4, 8, dtype=torch.float64)
        torch.testing.assert_close(block(x), odeblock.reference.deep_residual(x, block.V, block.W))
        block(x).sum().backward()
        assert block.V.grad.isfinite().all()
said = [str(w.message) for w in caught if "native core" in str(w.message)]
assert len(said) == 1 and "no C++ compiler was found" in said[0], caught
info = odeblock.build_info()
assert not info["native"] and "PyTorch" in info["paths"]["cpu"], info
assert odeblock.__file__.startswith(sys.prefix)
print("wheel without a compiler works, and says:", said[0])
"""


def check_contents(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    for needed in ("odeblock/py.typed", "odeblock/_core.pyi", "odeblock/experiments/__init__.py"):
        assert needed in names, f"{needed} is missing from the wheel"
    assert not any(name.startswith(("tests/", "csrc/", "benchmarks/")) for name in names)
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tags = f"{version}-{version}-manylinux_"
    assert tags in wheel.name, f"{wheel.name}: expected {tags}.."
    # No library of its own: libstdc++ is the system's, as PyTorch's is, and the OpenMP runtime is PyTorch's.
    (core,) = (name for name in names if name.startswith("odeblock/_core.") and name.endswith(".so"))
    with archive.open(core) as file:
        tags_of = ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")
        libraries = {tag.needed.split(".")[0] for tag in tags_of}
    system = {"libstdc++", "libgcc_s", "libc", "libm", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert libraries <= system, libraries
    assert not any(".libs/" in name for name in names), names


def main() -> None:
    headers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file()
        and any(f"{name}/" in path.read_text() for name in ("#include <torch", "#include <ATen"))
    ]
    assert not headers, f"the native core includes PyTorch: {headers}"

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        begin = busy()
        run("make", "wheel", f"DIST={home / 'dist'}", ODEBLOCK_CUDA="OFF")
        seconds = (busy() - begin) / CORES
        print(f"sdist and wheel without torch: {seconds:.0f} s")
        assert seconds < LIMIT, f"the build took {seconds:.0f} s, the limit is {LIMIT:.0f} s"

        (wheel,) = (home / "dist").glob("*.whl")
        check_contents(wheel)
        print(wheel.name)
        print(try_out(install(wheel, home / "venv"), WITH_CORE))

        (sdist,) = (home / "dist").glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            assert not any(name.endswith(".so") for name in archive.getnames())
            archive.extractall(home, filter="data")
        source = home / sdist.name.removesuffix(".tar.gz")
        plain = build(source, home / "plain", CXX="/nonexistent/c++")
        assert not any(name.endswith(".so") for name in zipfile.ZipFile(plain).namelist())
        print(try_out(install(plain, home / "venv-plain"), WITHOUT_CORE))
        # What that advises: a compiler, and the same folder once more. No one runs it: not optimised, a fifth
        # of the time.
        build(source, home / "again", ODEBLOCK_NATIVE="ON", CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug")


if __name__ == "__main__":
    main()
