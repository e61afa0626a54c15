"""RMS norms, each in one launch."""

from torch import nn

from server.model.build import Build, Injected
from server.model.norms import RmsNorm


def inject_norms(build: Build, injected: Injected) -> None:
    for name, module in list(build.model.named_modules()):
        if _is_rms_norm(module):
            build.replace(name, RmsNorm(module))


def _is_rms_norm(module: nn.Module) -> bool:
    """One of the served families' norms: all have one weight, and one of two names for epsilon."""
    return type(module).__name__.endswith("RMSNorm") and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))
