"""Attention over the paged cache, plain or over latents, with one launch of rotary embedding."""

from torch import nn

from server.model.attention import PAGED, CachedLayer, PagedLayer, attach
from server.model.build import Build, Injected, Target
from server.model.families import Foreign, LayerWindow, layer_windows
from server.model.mla import AbsorbedProjection, LatentLayer, is_latent, keep_latents, latent_shape
from server.model.rope import fuse_rope


def inject_attention(build: Build, injected: Injected) -> None:
    names = {module: name for name, module in build.model.named_modules()}
    windows = layer_windows(build.model.config)
    for (attention, shape), window in zip(build.probed.attention, windows, strict=True):
        layer: CachedLayer = PagedLayer(shape, window, build.step)
        if is_latent(attention):
            layer = _latent_layer(build, injected, names[attention], attention, window)
        attach(attention, layer)
        fuse_rope(attention)
        injected.layers.append(layer)
    config: Foreign = build.model.config
    config._attn_implementation = PAGED


def _latent_layer(
    build: Build, injected: Injected, name: str, attention: nn.Module, window: LayerWindow
) -> CachedLayer:
    assert window is None, "no family has latents and windows"
    projection = AbsorbedProjection(attention)
    layer = LatentLayer(projection, latent_shape(attention), build.step)
    linear = f"{name}.kv_b_proj"
    for ops in build.site_ops:
        layer.add_op(*ops.at_absorbed(linear, projection))
    keep_latents(attention)
    injected.bypassed.add(linear)
    injected.targets.append(Target(linear, (projection.out_features, projection.latent)))
    return layer
