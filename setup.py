"""Builds the native core with CMake and Ninja; everything else about the package is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configure, build and install CMakeLists.txt into the place where setuptools expects the extension.

    The environment variables ODEBLOCK_NATIVE (AUTO, ON) and ODEBLOCK_CUDA (AUTO, ON, OFF) are passed on;
    CMAKE_ARGS adds any other option. Where there is no C++ compiler CMake builds nothing, and the package
    is installed without its native core.
    """

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # What was found last time may be gone (pip's isolated tools) or have come since (a compiler).
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={package.parent}",
            f"-DODEBLOCK_NATIVE={os.environ.get('ODEBLOCK_NATIVE', 'AUTO')}",
            f"-DODEBLOCK_CUDA={os.environ.get('ODEBLOCK_CUDA', 'AUTO')}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)
        ext.optional = not Path(self.get_ext_fullpath(ext.name)).exists()


setup(ext_modules=[Extension("odeblock._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
