"""What is ours in a Transformers model: the list of it.

Each injection finds what it knows (match), puts something of ours in its place (replace), and says which of the base's
linears adapters may act on there (targets). A new one is a file and a line.
"""

from collections.abc import Callable

from server.model.build import Build, Injected
from server.model.injections.attention import inject_attention
from server.model.injections.experts import inject_experts
from server.model.injections.latent_attention import inject_latent_attention
from server.model.injections.layers import inject_layers
from server.model.injections.linears import inject_linears
from server.model.injections.mlps import inject_mlps
from server.model.injections.norms import inject_norms
from server.model.injections.read_backs import inject_without_read_backs

# in this order: linears that attention goes around are not looked at afterwards, gated layers look at theirs, and
# decoder layers at what is inside of them
INJECTIONS: tuple[Callable[[Build, Injected], None], ...] = (
    inject_experts,
    inject_norms,
    inject_attention,
    inject_latent_attention,
    inject_linears,
    inject_mlps,
    inject_layers,
    inject_without_read_backs,
)


def inject(build: Build) -> Injected:
    """Replace in place. Caches get their memory later, when it is known how much is left (`CachedLayer.allocate`)."""
    injected = Injected()
    for injection in INJECTIONS:
        injection(build, injected)
    return injected
