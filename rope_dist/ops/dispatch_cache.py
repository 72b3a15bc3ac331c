"""How the key/value cache write is carried out: by the backend that serves the keys."""

from __future__ import annotations

import torch

from . import dispatch, launch_cache
from .arguments import Angles, KeyValueCache, Norms


def write_cache(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KeyValueCache,
    norms: Norms | None,
    angles: Angles,
    *,
    inplace: bool = False,
    key: launch_cache.Key | None = None,
) -> torch.Tensor | None:
    """``q`` rotated, in place or not; rotated keys, and values, go to ``cache``. See :meth:`Backend.write_cache`.

    Args:
        key: of the launch cache, where the launch is to be kept.
    """
    whole = dispatch.whole_rows(angles)

    def prepared(q: torch.Tensor | None, cache: KeyValueCache) -> torch.Tensor | None:
        """Where the queries go. Autograd sees that the tensors change."""
        caches = (cache.k_cache, cache.v_cache)
        torch.autograd.graph.increment_version((q, *caches) if inplace and q is not None else caches)
        return q if inplace or q is None else q.new_empty(q.shape)

    q_out = prepared(q, cache)
    again = dispatch.serving(k).write_cache(q, k, v, q_out, cache, norms, whole)
    if again is not None and whole is angles:

        def launch(q, k, v, cache, norms, angles) -> torch.Tensor | None:
            q_out = prepared(q, cache)
            again(q, k, v, q_out, cache, norms, angles)
            return q_out

        launch_cache.put(key, launch)
    return q_out
