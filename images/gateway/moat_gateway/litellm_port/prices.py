# SPDX-License-Identifier: Apache-2.0
"""LiteLLM's price table knows each deployment by its id and by the model behind it, and forgets none by itself."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_RETIRED_SECONDS = 600.0  # prices of a deployment are kept this long after it went: requests may still be running
_RETIRED_MOST = 1000


class Prices:
    """Keeps the table from growing with changes, and puts it back after one that failed.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._packaged: frozenset[str] = frozenset()
        self._before: dict[str, Any] = {}
        self._retired: dict[str, float] = {}

    def begin(self) -> None:
        """Note what is LiteLLM's own; call before it loads a configuration."""
        import litellm

        self._packaged = frozenset(litellm.model_cost)

    def note(self, keys: Iterable[str]) -> None:
        """Note what the table holds for a deployment that is about to be made."""
        import litellm

        for key in keys:
            self._before.setdefault(key, copy.copy(litellm.model_cost.get(key)))

    def keep(self) -> None:
        """What was made since the last call serves."""
        self._before.clear()

    def put_back(self) -> None:
        """What was made since does not serve: the table is as it was."""
        import litellm

        for key, before in self._before.items():
            if before is None:
                forget(key)
            else:
                litellm.model_cost[key] = before
        if self._before:
            litellm.utils._invalidate_model_cost_lowercase_map()
        self._before.clear()

    def retire(self, keys: Iterable[str]) -> None:
        """These are of deployments that went."""
        now = self._clock()
        self._retired.update((k, now) for k in keys if k not in self._packaged)

    def used(self, keys: Iterable[str]) -> None:
        """These are of deployments that serve."""
        for key in keys:
            self._retired.pop(key, None)

    def prune(self) -> None:
        """Forget the prices of deployments that went long ago, or very many deployments ago."""
        import litellm

        limit = self._clock() - _RETIRED_SECONDS
        over = len(self._retired) - _RETIRED_MOST
        # In the order in which they went.
        gone = [k for i, (k, since) in enumerate(self._retired.items()) if i < over or since < limit]
        for key in gone:
            del self._retired[key]
            forget(key)
        if gone:
            litellm.utils._invalidate_model_cost_lowercase_map()


def keys_of(router: Any, model: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names under which the table knows a deployment: its id, and the model behind it."""
    params = model["litellm_params"]
    behind = router._backend_cost_map_keys(str(params.get("model", "")), params.get("custom_llm_provider"))
    return (str(model["model_info"]["id"]), *behind)


def forget(key: str) -> None:
    """Take one entry out; the table's look-up map has to be told once afterwards."""
    import litellm

    litellm.model_cost.pop(key, None)
    litellm.utils._registered_pricing_fields().pop(key, None)
