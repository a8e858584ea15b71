"""Builds the package as a user's pip does, isolated and without torch, and checks what comes out.

Run by `make package-check`; takes about a minute, for the build requirements are fetched by name.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 60.0  # seconds for the native core without CUDA on 2 cores


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


def main() -> None:
    headers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file()
        and any(f"{name}/" in path.read_text() for name in ("#include <torch", "#include <ATen"))
    ]
    assert not headers, f"the native core includes PyTorch: {headers}"

    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        begin = time.perf_counter()
        run(python, "-m", "pip", "wheel", ".", "--no-deps", "-w", folder, ODEBLOCK_CUDA="OFF", **quiet)
        seconds = time.perf_counter() - begin
        (wheel,) = Path(folder).glob("odeblock-*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        for needed in ("odeblock/py.typed", "odeblock/_core.pyi", "odeblock/experiments/__init__.py"):
            assert needed in names, f"{needed} is missing from the wheel"
        assert any(name.startswith("odeblock/_core.") and name.endswith(".so") for name in names)
        assert not any(name.startswith(("tests/", "csrc/", "benchmarks/")) for name in names)
        print(f"isolated CPU build without torch: {seconds:.0f} s, {wheel.stat().st_size / 1e3:.0f} kB")
        assert seconds < LIMIT, f"the build took {seconds:.0f} s, the limit is {LIMIT:.0f} s"

        # Where torch is, the installed wheel runs on its native core.
        run(python, "-m", "pip", "install", "--no-deps", wheel, **quiet)
        site = subprocess.check_output(
            [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
        lines = run(
            python,
            "-P" if sys.version_info >= (3, 11) else "-E",
            "-c",
            f"import sys; sys.path.append({site!r}); import odeblock, torch;"
            "block = odeblock.DeepResBlock(8, 16); block(torch.randn(4, 8)).sum().backward();"
            "info = odeblock.build_info(); assert info['native'] and not info['cuda_architectures'], info;"
            "assert 'venv' in odeblock.__file__; print('installed wheel works:', info['cpu_features'])",
        )
        print(lines.strip())


if __name__ == "__main__":
    main()
