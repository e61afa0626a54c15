"""Python commands that a test runs as somebody else would, from the root of the checkout."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python command...`, with Triton's interpreter off."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=inherited | environment,
                          capture_output=True, text=True, timeout=480)  # fmt: skip
