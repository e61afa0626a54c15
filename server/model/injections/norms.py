"""RMS norms, each in one launch."""

from server.model.build import Build, Injected
from server.model.norms import RmsNorm


def inject_norms(build: Build, injected: Injected) -> None:
    for name, module in list(build.model.named_modules()):
        if "Norm" in type(module).__name__ and (norm := RmsNorm.in_place_of(module)) is not None:
            build.replace(name, norm)
