"""The native kernels: an optional extension. Without a C++ compiler llmkit installs all the same and runs in PyTorch.

LLMKIT_BUILD_ISA: "native" (default) compiles the instruction sets that this machine runs and the portable one, "all" every one of the
processor's family, for wheels; which one runs is chosen on the machine (dispatch.cpp). LLMKIT_BUILD_FLAGS: more flags (sanitizers).
"""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = "llmkit/kernels/cpu"
# What /proc/cpuinfo calls the feature that tells each x86 instruction set of isa_*.cpp from the one before.
FEATURES = {"avx2": "avx2", "avxvnni": "avx_vnni", "avx512": "avx512_vnni"}


def native_sets() -> list[str] | None:
    """Return the x86 instruction sets to compile beside the portable one; None: all, also where the machine does not say what it has."""
    wanted = os.environ.get("LLMKIT_BUILD_ISA", "native")
    if wanted not in ("native", "all"):
        raise SystemExit(f'LLMKIT_BUILD_ISA is {wanted!r}; it must be "native" or "all".')
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M) if wanted == "native" and cpuinfo.exists() else None
    return None if flags is None else [name for name, feature in FEATURES.items() if feature in flags[1].split()]


class Build(build_ext):
    """Flags by compiler; GCC and Clang compile on all cores."""

    def build_extensions(self) -> None:
        if self.compiler.compiler_type == "msvc":
            compile_args, link_args = ["/std:c++20", "/O2", "/fp:precise", "/EHsc", "/wd4068"], []  # 4068: pragmas of other compilers
        else:
            # No contraction: whether a * b + c is rounded once must not depend on how a compiler lays out a loop.
            # GCC takes the undefined lanes of its own AVX-512 headers for a mistake of ours, hundreds of times.
            compile_args = [
                "-std=c++20",
                "-O3",
                "-fno-math-errno",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-g0",
                "-Wno-unknown-pragmas",
                "-Wno-maybe-uninitialized",
            ]
            link_args = ["-pthread"] if sys.platform != "darwin" else ["-mmacosx-version-min=11.0"]
            if sys.platform == "darwin":  # the first whose library waits on atomics
                compile_args += link_args
        native = native_sets()
        missing = [] if native is None else [name for name in FEATURES if name not in native]
        extra = os.environ.get("LLMKIT_BUILD_FLAGS", "").split()
        for extension in self.extensions:
            extension.define_macros += [(f"LLMKIT_WITHOUT_{name.upper()}", "1") for name in missing]
            extension.extra_compile_args, extension.extra_link_args = compile_args + extra, link_args + extra
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "unix":
            ext.extra_objects = self._objects(ext)
            ext.sources = []
        super().build_extension(ext)

    def _objects(self, ext: Extension) -> list[str]:
        """Compile each source in a thread of its own: most of the time goes into a file for each instruction set."""
        portable_is_spare = bool(native_sets())

        def compiled(source: str) -> str:
            flags = list(ext.extra_compile_args)
            if source.endswith("isa_portable.cpp") and portable_is_spare:
                flags.append("-O1")  # it runs where somebody asks for it alone, and at -O3 it takes a third of the whole time
            (made,) = self.compiler.compile(
                [source], self.build_temp, ext.define_macros, ext.include_dirs, extra_postargs=flags, depends=ext.depends
            )
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compiled, sorted(ext.sources, key=lambda path: "isa_" not in path)))  # the long ones first


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
