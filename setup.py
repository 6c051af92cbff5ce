"""Builds what pyproject.toml cannot say: two generated things are built at install, so that no user meets a compiler.

* serving/proto/*_pb2*.py from the .proto files, by grpcio-tools
* model/kernels/packed_cpu.<cpu>.so from C, by the C compiler in the PyPI package `ziglang`: one library for each CPU
  level; the right one is picked when a shard starts
* model/transport/transport.<machine>.so, likewise
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

ROOT = Path(__file__).parent
KERNEL_TARGETS = {          # suffix of the library -> target and CPU of the compiler
    "x86_64_v3": ("x86_64-linux-gnu.2.17", "x86_64_v3"),
    "x86_64_v4": ("x86_64-linux-gnu.2.17", "x86_64_v4"),
    "x86_64_v4_bf16": ("x86_64-linux-gnu.2.17", "x86_64_v4+avx512bf16"),
    "aarch64": ("aarch64-linux-gnu.2.17", "generic"),
}
TRANSPORT_TARGETS = {
    "x86_64": ("x86_64-linux-gnu.2.17", "x86_64"),
    "aarch64": ("aarch64-linux-gnu.2.17", "generic"),
}


class BuildGenerated(Command):
    """Generate the protobuf modules and compile kernels and transport, beside their sources."""

    user_options: list[tuple[str, str, str]] = []
    editable_mode = False
    build_lib: str | None = None

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        protos = sorted((ROOT / "serving/proto").glob("*.proto"))
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"--python_out={ROOT}",
                        f"--pyi_out={ROOT}", f"--grpc_python_out={ROOT}", *map(str, protos)], check=True)
        for source, targets in ((ROOT / "model/kernels/packed_cpu.c", KERNEL_TARGETS),
                                (ROOT / "model/transport/transport.c", TRANSPORT_TARGETS)):
            self._compile(source, targets)

    def _compile(self, source: Path, targets: dict[str, tuple[str, str]]) -> None:
        for suffix, (target, cpu) in targets.items():
            subprocess.run([sys.executable, "-m", "ziglang", "cc", "-target", target, f"-mcpu={cpu}", "-O3", "-std=c11",
                            "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
                            "-o", str(source.with_suffix(f".{suffix}.so")), str(source)], check=True)

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [("build_generated", None), *build.sub_commands]


setup(cmdclass={"build": Build, "build_generated": BuildGenerated})
