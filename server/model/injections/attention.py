"""Attention over the paged cache, plain or over latents, with one launch of rotary embedding."""

from torch import nn

from server.model.attention import PAGED, BorrowingLayer, CachedLayer, PagedLayer, attach
from server.model.build import Build, Injected, Target
from server.model.families import Foreign
from server.model.masks import Visible
from server.model.mla import AbsorbedProjection, LatentLayer, is_latent, keep_latents, latent_shape
from server.model.rope import fuse_rope
from server.model.sparse import skip_indexer
from server.model.temperature import with_temperature


def inject_attention(build: Build, injected: Injected) -> None:
    names = {module: name for name, module in build.model.named_modules()}
    for attention, shape, visible, source in build.probed.attention:
        layer: CachedLayer = PagedLayer(shape, visible, build.step)
        if source is not None and isinstance(lender := injected.layers[source], PagedLayer):
            layer = BorrowingLayer(lender, visible)
        elif is_latent(attention):
            layer = _latent_layer(build, injected, names[attention], attention, visible)
        attach(attention, with_temperature(layer, attention, build.step))
        fuse_rope(attention)
        skip_indexer(attention)
        injected.layers.append(layer)
    config: Foreign = build.model.config
    config._attn_implementation = PAGED


def _latent_layer(build: Build, injected: Injected, name: str, attention: nn.Module, visible: Visible) -> CachedLayer:
    projection = AbsorbedProjection(attention)
    layer = LatentLayer(projection, latent_shape(attention), visible, build.step)
    linear = f"{name}.kv_b_proj"
    for ops in build.site_ops:
        layer.add_op(*ops.at_absorbed(linear, projection))
    keep_latents(attention)
    injected.bypassed.add(linear)
    injected.targets.append(Target(linear, (projection.out_features, projection.latent)))
    return layer
