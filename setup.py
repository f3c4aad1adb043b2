"""Builds csrc/ into vitkern/_cpu.so and, where nvcc is found, vitkern/_cuda.so.

Both use LibTorch's stable ABI (target 2.10) and hold no Python symbol, so that one wheel serves every Python and every
torch from 2.10. g++ and nvcc are called here: torch's BuildExtension refuses .cu files on a CPU-only torch. Switches:
VITKERN_BUILD_CPU (1), VITKERN_BUILD_CUDA (auto), TORCH_CUDA_ARCH_LIST, MAX_JOBS, VITKERN_SANITIZE (see `make asan`),
VITKERN_CXXFLAGS (tests).
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CPU_SOURCES = [
    "csrc/cpu/isa_default.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
    "csrc/cpu/isa_avx512_bf16.cpp",
    "csrc/cpu/capability.cpp",
    "csrc/cpu/library.cpp",
    "csrc/cpu/window_attention.cpp",
    "csrc/cpu/depthwise_value.cpp",
    "csrc/cpu/window_rows.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/attention_bwd.cpp",
    "csrc/cpu/attention_problem.cpp",
    "csrc/cpu/linear_attention.cpp",
    "csrc/cpu/mask_from_logits.cpp",
    "csrc/cpu/bipartite_match.cpp",
    "csrc/cpu/channel_attention.cpp",
    "csrc/cpu/merge_plan.cpp",
    "csrc/cpu/merge_tokens.cpp",
    "csrc/cpu/neighborhood_attention.cpp",
    "csrc/cpu/unmerge_tokens.cpp",
    "csrc/cpu/select_tokens.cpp",
    "csrc/cpu/selective_scan.cpp",
    "csrc/cpu/chain_sum.cpp",
    "csrc/cpu/feature_rows.cpp",
    "csrc/cpu/grid_sum.cpp",
    "csrc/cpu/restore_tokens.cpp",
    "csrc/cpu/soft_merge.cpp",
    "csrc/cpu/cluster_tokens.cpp",
    "csrc/cpu/cluster_kmeans.cpp",
    "csrc/cpu/reconstruct_tokens.cpp",
    "csrc/cpu/deformable_attention.cpp",
    "csrc/cpu/sampled_window_attention.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/window_attention.cu",
    "csrc/cuda/window_attention_bwd.cu",
    "csrc/cuda/window_attention_reduce.cu",
    "csrc/cuda/window_attention_op.cpp",
    "csrc/cuda/linear_attention.cu",
    "csrc/cuda/linear_attention_bwd.cu",
    "csrc/cuda/linear_attention_op.cpp",
    "csrc/cuda/bipartite_match.cu",
    "csrc/cuda/merge_plan.cu",
    "csrc/cuda/merge_tokens.cu",
    "csrc/cuda/merge_tokens_mlerp.cu",
    "csrc/cuda/tokens_op.cpp",
    "csrc/cuda/deformable_attention.cu",
    "csrc/cuda/deformable_attention_op.cpp",
]
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0+PTX"


def jobs() -> int:
    """Compiler processes: MAX_JOBS, else the cores, at 4 GB each."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 32
    return max(1, min(os.cpu_count() or 1, free))


def nvcc() -> str | None:
    """The nvcc to use, or None where CUDA is not built."""
    wanted = os.environ.get("VITKERN_BUILD_CUDA", "auto")
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if wanted == "1" and not found:
        raise RuntimeError("VITKERN_BUILD_CUDA=1 needs nvcc, and none is on the path or in /usr/local/cuda/bin")
    return None if wanted == "0" else found


def architecture_list() -> list[str]:
    return os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES).replace(" ", ";").split(";")


def architectures() -> list[str]:
    """nvcc -gencode flags from TORCH_CUDA_ARCH_LIST, in torch's own syntax."""
    flags = []
    for entry in architecture_list():
        number = entry.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if entry.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def sanitizer() -> list[str]:
    if not os.environ.get("VITKERN_SANITIZE"):
        return []
    return ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class Build(build_ext):
    """Compiles each source that is older than something in csrc/, then links with g++."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext):
        import torch

        base = Path(torch.__file__).parent
        includes = [f"-isystem{base}/include", f"-isystem{base}/include/torch/csrc/api/include"]
        plain = ["-std=c++17", "-fPIC", "-fvisibility=hidden", TARGET, *includes]
        cuda = ext.name.endswith("_cuda")
        target = Path(self.get_ext_fullpath(ext.name))
        folder = ROOT / "build" / ("asan" if sanitizer() else "objects") / ext.name.rsplit(".")[-1]
        if cuda:
            folder /= "_".join(architecture_list())
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        newest = max(f.stat().st_mtime for f in [*ROOT.glob("csrc/**/*"), Path(__file__)])
        objects = [folder / (Path(s).stem + ".o") for s in ext.sources]
        commands = []
        for source, obj in zip(ext.sources, objects, strict=True):
            if obj.exists() and obj.stat().st_mtime > newest and not self.force:
                continue
            if source.endswith(".cu"):
                host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-std=c++17", "-O3", "--compress-mode=size"]
                commands.append([nvcc(), *architectures(), *host, "-c", source, "-o", str(obj)])
            elif cuda:
                commands.append(
                    [os.environ.get("CXX", "g++"), *plain, "-O2", "-DUSE_CUDA", "-c", source, "-o", str(obj)]
                )
            else:
                speed = [
                    "-O3",
                    "-ffp-contract=fast",
                    "-fno-math-errno",
                    "-fopenmp-simd",
                    "-Wno-psabi",
                    *sanitizer(),
                    *os.environ.get("VITKERN_CXXFLAGS", "").split(),
                ]
                commands.append([os.environ.get("CXX", "g++"), *plain, *speed, "-c", source, "-o", str(obj)])
        with ThreadPoolExecutor(jobs()) as pool:
            list(pool.map(self.call, commands))
        libraries = ["-lc10", "-ltorch_cpu"]
        if cuda:
            runtime = Path(shutil.which(nvcc())).resolve().parent.parent
            places = [runtime / "lib64", Path("/usr/local/cuda/lib64"), runtime / "targets/x86_64-linux/lib"]
            libraries += [f"-L{p}" for p in places] + ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        link = ["-shared", *map(str, objects), f"-L{base}/lib", *libraries, *sanitizer(), "-o", str(target)]
        self.call([os.environ.get("CXX", "g++"), *link])

    def call(self, command):
        self.announce(" ".join(command), level=2)
        subprocess.run(command, check=True, cwd=ROOT)


# The newest symbols of libstdc++ that a platform tag allows (PEP 600's policies), by glibc.
GLIBCXX = {(2, 17): (3, 4, 19), (2, 28): (3, 4, 25), (2, 34): (3, 4, 29), (2, 35): (3, 4, 30), (2, 39): (3, 4, 33)}


def platform_tag(libraries, machine):
    """manylinux of the oldest glibc that has every symbol the libraries ask for."""
    newest = {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 19)}
    for library in libraries:
        symbols = subprocess.run(["objdump", "-T", library], check=True, capture_output=True, text=True).stdout
        for name, version in re.findall(r"\b(GLIBC|GLIBCXX)_([\d.]+)", symbols):
            newest[name] = max(newest[name], tuple(map(int, version.split("."))))
    fits = [glibc for glibc, cxx in GLIBCXX.items() if newest["GLIBCXX"] <= cxx]
    if not fits:
        return f"linux_{machine}"
    major, minor = max(newest["GLIBC"], min(fits))
    return f"manylinux_{major}_{minor}_{machine}"


class Wheel(bdist_wheel):
    """The libraries hold no Python symbol: one wheel for every Python 3, on every Linux whose glibc is new enough."""

    def get_tag(self):
        tag = super().get_tag()[2]
        built = sorted(Path(self.bdist_dir).glob("vitkern/*.so"))
        return "py3", "none", platform_tag(built, platform.machine()) if built and tag.startswith("linux") else tag


extensions = []
if os.environ.get("VITKERN_BUILD_CPU", "1") != "0":
    extensions.append(Extension("vitkern._cpu", CPU_SOURCES))
if nvcc():
    extensions.append(Extension("vitkern._cuda", CUDA_SOURCES))

if __name__ != "read":  # a test looks at the functions
    setup(ext_modules=extensions, cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
