"""The latents of a transformers cache in one tensor, as the attention ops read them.

transformers caches a layer of latent attention as keys [B, 1, T, R] (the latents) and values
[B, 1, T, D] (the rotated keys), and a dynamic cache copies both in every step.  Here both are views
of one storage [B, capacity, R + D], which grows by a quarter, and a step writes its tokens only.
The cache object stays transformers' own.  `crop`, `reorder_cache`, `reset` and the others work on
the views, and a layer whose tensors were replaced is copied to a new storage in the next step.
"""

from __future__ import annotations

from torch import Tensor

from ..arithmetic import cdiv

PAGE = 64  # tokens; capacities are multiples, so that a storage is a paged cache
CACHES = "DynamicCache", "StaticCache"
LAYERS = "DynamicLayer", "DynamicIndexedLayer", "StaticLayer", "StaticIndexedLayer"
ATTRIBUTE = "deepkern_latents"


class Latents:
    """The storage [B, capacity, R + D] of a cache layer, and the views that the layer holds.

    Two copies of a layer share this object.  Only the layer whose views are the newest may write
    behind them; `belongs_to` is false for the other one.
    """

    def __init__(self, layer, length: int, capacity: int) -> None:
        """Copies the first `length` tokens of the layer."""
        keys, values = layer.keys, layer.values
        B, self.R = keys.shape[0], keys.shape[3]
        self.storage = keys.new_zeros(B, cdiv(capacity, PAGE) * PAGE, self.R + values.shape[3])
        if length:
            self.storage[:, :length, : self.R] = keys[:, 0, :length]
            self.storage[:, :length, self.R :] = values[:, 0, :length]

    def publish(self, layer, length: int) -> None:
        """Makes the layer's tensors views of the first `length` tokens."""
        tokens = self.storage[:, None, :length]
        self.keys, self.values = layer.keys, layer.values = (
            tokens[..., : self.R],
            tokens[..., self.R :],
        )
        setattr(layer, ATTRIBUTE, self)

    def belongs_to(self, layer) -> bool:
        return layer.keys is self.keys and layer.values is self.values


def check_cache(cache) -> None:
    """Raises ValueError for a kind of cache that the patched attention does not handle."""
    kind = type(cache).__name__
    if kind not in CACHES:
        raise ValueError(f"patch_transformers: cache: expected {' or '.join(CACHES)}, got {kind}")
    if cache.offloading:
        raise ValueError("patch_transformers: cache: expected no offloading, got offloading=True")
    for layer in cache.layers:
        if type(layer).__name__ not in LAYERS:
            raise ValueError(f"patch_transformers: cache: expected layers {', '.join(LAYERS)}, "
                             f"got {type(layer).__name__}")  # fmt: skip


def layer_of(cache, layer_idx: int):
    """The layer of the cache; a lazily built cache gets it here, as in `Cache.update`."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer_idx]


def append_latents(cache, layer_idx: int, latent: Tensor, k_rope: Tensor) -> Tensor:
    """Appends S tokens to a layer, without autograd.

    Args:
        cache: a DynamicCache or StaticCache of transformers.
        layer_idx: the layer.
        latent, k_rope: [B, 1, S, R] and [B, 1, S, D].

    Returns:
        The storage of the layer [B, capacity, R + D], the capacity a multiple of 64.
    """
    layer = layer_of(cache, layer_idx)
    if not layer.is_initialized:
        layer.lazy_initialization(latent, k_rope)
    latents = getattr(layer, ATTRIBUTE, None)
    if latents is not None and not latents.belongs_to(layer):
        latents = None
    if type(layer).__name__.startswith("Static"):
        if latents is None:
            latents = Latents(layer, layer.max_cache_len, layer.max_cache_len)
            latents.publish(layer, layer.max_cache_len)
        layer.update(latent, k_rope)
        return latents.storage
    past = layer.get_seq_length()
    length = past + latent.shape[2]
    if latents is None or length > latents.storage.shape[1]:
        if not past:  # lazy_initialization leaves tensors without a batch
            layer.keys, layer.values = latent[:, :, :0], k_rope[:, :, :0]
        latents = Latents(layer, past, length + max(length // 4, PAGE))
    new = latents.storage[:, past:length]
    new[..., : latents.R], new[..., latents.R :] = latent[:, 0], k_rope[:, 0]
    latents.publish(layer, length)
    return latents.storage
