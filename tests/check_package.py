"""Builds the package as a user's pip does, isolated and without torch, and checks what comes out.

Once with a C++ compiler, once without one. Run by `make package-check`; takes about a minute, for the build
requirements are fetched by name.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORES, LIMIT = 2, 75.0  # seconds that so many cores have to do for the native core without CUDA; 55 measured


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


def build_and_install(folder: str, name: str, **environment: str) -> tuple[list[str], Path, float]:
    """A wheel built in isolation by a new environment's pip: its files, the environment's python, and for how
    many seconds CORES had to do, whatever else ran there."""
    home = Path(folder) / name
    built = ("build", "*.egg-info", "*.so", ".*", "outputs")
    shutil.copytree(ROOT, home / "source", ignore=shutil.ignore_patterns(*built))
    venv.create(home / "venv", with_pip=True)
    python = home / "venv" / "bin" / "python"
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    begin = busy()
    run(
        python,
        "-m",
        "pip",
        "wheel",
        home / "source",
        "--no-deps",
        "-w",
        home,
        ODEBLOCK_CUDA="OFF",
        **environment,
        **quiet,
    )
    seconds = (busy() - begin) / CORES
    (wheel,) = home.glob("odeblock-*.whl")
    run(python, "-m", "pip", "install", "--no-deps", wheel, **quiet)
    return zipfile.ZipFile(wheel).namelist(), python, seconds


def try_out(python: Path, program: str, *options: str) -> str:
    """Runs a program with the installed package and this interpreter's torch."""
    isolated = "-P" if sys.version_info >= (3, 11) else "-E"
    path = f"import sys; sys.path.append({site_packages()!r})\n"
    return run(python, isolated, *options, "-c", path + program).strip()


WITH_CORE = """
import odeblock, torch
block = odeblock.DeepResBlock(8, 16)
block(torch.randn(4, 8)).sum().backward()
info = odeblock.build_info()
assert info["native"] and not info["cuda_architectures"], info
assert "venv" in odeblock.__file__
print("installed wheel works:", info["cpu_features"])
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
assert "venv" in odeblock.__file__
print("wheel without a compiler works, and says:", said[0])
"""


def main() -> None:
    headers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file()
        and any(f"{name}/" in path.read_text() for name in ("#include <torch", "#include <ATen"))
    ]
    assert not headers, f"the native core includes PyTorch: {headers}"

    with tempfile.TemporaryDirectory() as folder:
        names, python, seconds = build_and_install(folder, "native", ODEBLOCK_NATIVE="ON")
        for needed in ("odeblock/py.typed", "odeblock/_core.pyi", "odeblock/experiments/__init__.py"):
            assert needed in names, f"{needed} is missing from the wheel"
        assert any(name.startswith("odeblock/_core.") and name.endswith(".so") for name in names)
        assert not any(name.startswith(("tests/", "csrc/", "benchmarks/")) for name in names)
        print(f"isolated CPU build without torch: {seconds:.0f} s")
        assert seconds < LIMIT, f"the build took {seconds:.0f} s, the limit is {LIMIT:.0f} s"
        print(try_out(python, WITH_CORE))

        names, python, _ = build_and_install(folder, "plain", CXX="/nonexistent/c++")
        assert not any(name.endswith(".so") for name in names)
        print(try_out(python, WITHOUT_CORE))

        # What that advises: a compiler, and the same folder installed once more.
        again = Path(folder) / "plain" / "source"
        run(
            python,
            "-m",
            "pip",
            "wheel",
            again,
            "--no-deps",
            "-w",
            folder,
            ODEBLOCK_CUDA="OFF",
            ODEBLOCK_NATIVE="ON",
        )


if __name__ == "__main__":
    main()
