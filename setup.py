"""The native kernels: an optional extension. Without a C++ compiler llmkit installs all the same and runs in PyTorch."""

import os
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = "llmkit/kernels/cpu"


class Build(build_ext):
    """Flags by compiler. Every instruction set is in every build: which one runs is chosen on the machine (dispatch.cpp)."""

    def build_extensions(self) -> None:
        if self.compiler.compiler_type == "msvc":
            compile_args, link_args = ["/std:c++20", "/O2", "/fp:precise", "/EHsc", "/wd4068"], []  # 4068: pragmas of other compilers
        else:
            # No contraction: whether a * b + c is rounded once must not depend on how a compiler lays out a loop.
            compile_args = [
                "-std=c++20",
                "-O3",
                "-fno-math-errno",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-g0",
                "-Wno-unknown-pragmas",
            ]
            link_args = ["-pthread"] if sys.platform != "darwin" else ["-mmacosx-version-min=11.0"]
            if sys.platform == "darwin":  # the first whose library waits on atomics
                compile_args += link_args
        extra = os.environ.get("LLMKIT_BUILD_FLAGS", "").split()  # sanitizers, for the tests
        for extension in self.extensions:
            extension.extra_compile_args, extension.extra_link_args = compile_args + extra, link_args + extra
        super().build_extensions()


setup(
    ext_modules=[
        Extension(
            "llmkit.kernels.cpu._native",
            sorted(glob(f"{HERE}/*.cpp")),
            depends=sorted(glob(f"{HERE}/*.h") + glob(f"{HERE}/*.inl")),
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": Build},
)
