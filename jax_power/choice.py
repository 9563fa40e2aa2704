"""The tables of implementations of this package, and the one place that chooses from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bridge import spec
from jax_power import ops, ops_sdpa, platforms


class _Choice(spec.Choice):
    """`spec.Choice`, made for CUDA and for the other platforms at once, since a program may be lowered for either."""

    def plans(self, operation: str, call: Any, implementation: str | Sequence[str] | None) -> platforms.Plans:
        """Who serves `call` on the default backend, and who on the platforms that it is not.

        Raises:
          ValueError: `implementation` is not a name in the operation's table.
          NotImplementedError: none of those asked for can serve the call on the default backend.
        """
        backend = platforms.backend()
        here = self._plan(operation, call, implementation, backend)
        try:
            elsewhere = self._plan(operation, call, implementation, "cpu" if backend == "cuda" else "cuda")
        except NotImplementedError:
            elsewhere = here  # a program lowered for the others fails there: the kernels are not registered for them
        return platforms.Plans(here, None if elsewhere == here else elsewhere, backend == "cuda")

    def _plan(self, operation: str, call: Any, implementation: str | Sequence[str] | None, platform: str) -> platforms.Plan:
        name = self.choose(operation, call, implementation, platform)
        return platforms.Plan(name, self._tables[operation][name].plan(call))


CHOICE = _Choice({"power_attention": ops.POWER, "dot_product_attention": ops_sdpa.SDPA})

implementation = CHOICE.implementation
