"""What pyproject.toml cannot say: wheels with HEDDLE_PREBUILT=1 bring the host's kernels, compiled.

They are for machines without a compiler, for a few kinds of processors (kernels/host/build.py), and make the wheel one
of this platform. Without it a wheel has their sources only, and is for any.
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PREBUILT = os.environ.get("HEDDLE_PREBUILT") == "1"


def compilation() -> ModuleType:
    """kernels.host.build without kernels.host, which needs torch."""
    source = Path(__file__).resolve().parent / "kernels" / "host" / "build.py"
    spec: Any = importlib.util.spec_from_file_location("host_build", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class WithLibraries(build_py):
    def run(self) -> None:
        super().run()
        if PREBUILT and not self.editable_mode:
            compilation().bring(Path(self.build_lib) / "kernels" / "host" / "prebuilt")


class OfThisPlatform(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not PREBUILT

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3: the libraries know nothing of it."""
        platform = super().get_tag()[2]
        return ("py3", "none", platform)


setup(cmdclass={"build_py": WithLibraries, "bdist_wheel": OfThisPlatform})
