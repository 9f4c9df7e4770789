"""The C++ of the kernels by itself (check.cpp): other compilers, other processors under an emulator, and the sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "llmkit" / "kernels" / "cpu"
SOURCES = [path for path in sorted(KERNELS.glob("*.cpp")) if not path.name.startswith("module")]
FLAGS = ("-std=c++20", "-fno-math-errno", "-ffp-contract=off", "-pthread", f"-I{KERNELS}")
ARM = ("neon_i8mm", "neon_dotprod", "portable")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(command: Sequence[str | Path], cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(folder: Path, compiler: str, *flags: str, objects: Sequence[Path] = ()) -> Path:
    """check.cpp with the kernels, as one program; `objects` stand for the sources of their names."""
    sources = [path for path in (*SOURCES, Path(__file__).with_name("check.cpp")) if path.stem not in {made.stem for made in objects}]

    def compiled(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        run([compiler, *FLAGS, *flags, "-c", source, "-o", out])
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = [*pool.map(compiled, sources), *objects]
    run([compiler, *flags, "-pthread", *parts, "-o", folder / "check"])
    return folder / "check"


def results(output: str) -> dict[str, str]:
    """Name of an instruction set -> digest of its results."""
    return {name: digest for name, _, digest in map(str.split, output.splitlines())}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return results(run([build(tmp_path_factory.mktemp("native"), tool("g++"), "-O3")]))


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool("qemu-aarch64")
    return build(tmp_path_factory.mktemp("arm"), tool("aarch64-linux-gnu-g++"), "-O3", "-static")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose extension is built with the sanitizers."""
    tool("g++")
    folder = tmp_path_factory.mktemp("sanitized")
    for name in ("llmkit", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    run([sys.executable, "setup.py", "build_ext", "--inplace", "-j", "2"], cwd=folder, LLMKIT_BUILD_FLAGS=flags)
    assert list(folder.glob("llmkit/kernels/cpu/_native*.so"))
    return folder


def test_all_instruction_sets_give_the_same_bits(native: dict[str, str]) -> None:
    assert "portable" in native
    assert len(set(native.values())) == 1


def test_clang_gives_the_same_bits(native: dict[str, str], tmp_path: Path) -> None:
    assert results(run([build(tmp_path, tool("clang++"), "-O3")])) == native


def test_arm_gives_the_same_bits(native: dict[str, str], arm: Path) -> None:
    assert results(run(["qemu-aarch64", "-cpu", "max", arm])) == dict.fromkeys(ARM, native["portable"])


@pytest.mark.parametrize(("processor", "first"), [("max", 0), ("cortex-a76", 1), ("cortex-a53", 2)])
def test_arm_processors_are_told_apart(arm: Path, processor: str, first: int) -> None:
    assert run(["qemu-aarch64", "-cpu", processor, arm, "names"]).split() == list(ARM[first:])


def test_avx_vnni_by_its_evex_encoding(native: dict[str, str], tmp_path: Path) -> None:
    """AVX-VNNI is one instruction of AVX512-VNNI in another encoding: with that changed, processors without it run the same code."""
    if "avx512_vnni" not in native:
        pytest.skip("this processor has no AVX512-VNNI")
    source, made = tmp_path / "isa_avxvnni.s", tmp_path / "isa_avxvnni.o"
    run([tool("g++"), *FLAGS, "-O3", "-S", KERNELS / "isa_avxvnni.cpp", "-o", source])
    text = source.read_text()
    assert text.count("{vex} vpdpbusd") > 100
    source.write_text(text.replace("{vex} vpdpbusd", "{evex} vpdpbusd"))
    run(["g++", "-c", source, "-o", made])
    found = results(run([build(tmp_path, "g++", "-O3", objects=[made]), "avxvnni"]))
    assert found == {"avxvnni": native["portable"]}


@pytest.mark.parametrize("sanitizers", ["address,undefined,float-cast-overflow", "thread"])
def test_sanitizers_find_nothing(native: dict[str, str], tmp_path: Path, sanitizers: str) -> None:
    program = build(tmp_path, tool("g++"), "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    # ThreadSanitizer wants its addresses where address randomisation may have put something else.
    command = [tool("setarch"), platform.machine(), "-R", program] if sanitizers == "thread" else [program]
    assert results(run(command, TSAN_OPTIONS="halt_on_error=1")) == native


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library as Linux does")
@pytest.mark.parametrize("file", ["test_native.py", "test_faults.py"])
def test_python_tests_under_sanitizers(sanitized: Path, file: str) -> None:
    """The extension as Python loads it. torch leaks on purpose, and a Python that is not sanitized needs the library first."""
    libraries = [run(["g++", f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    output = run(
        # Forks, limits and exits are the system's matter, and would test the sanitizer's own threads and address space.
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "not fork and not system and not interpreter", file],
        cwd=sanitized / "tests" / "kernels",
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
        PYTHONPATH=str(sanitized),
    )
    assert " passed" in output  # all would be skipped if the extension did not load
