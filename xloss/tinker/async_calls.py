"""The calls of the training client as coroutines: older names that the cookbook's loops still use."""

from __future__ import annotations

from typing import Any


class AsyncCalls:
    """``name_async(...)`` for every ``name`` of the client; the result is that of ``name``, to be awaited as such."""

    forward: Any
    forward_backward: Any
    forward_backward_custom: Any
    optim_step: Any
    save_state: Any
    load_state: Any
    load_state_with_optimizer: Any
    save_weights_for_sampler: Any
    save_weights_and_get_sampling_client: Any
    create_sampling_client: Any
    get_info: Any

    async def forward_async(self, *args: Any, **kwargs: Any) -> Any:
        """``forward``."""
        return self.forward(*args, **kwargs)

    async def forward_backward_async(self, *args: Any, **kwargs: Any) -> Any:
        """``forward_backward``."""
        return self.forward_backward(*args, **kwargs)

    async def forward_backward_custom_async(self, *args: Any, **kwargs: Any) -> Any:
        """``forward_backward_custom``."""
        return self.forward_backward_custom(*args, **kwargs)

    async def optim_step_async(self, *args: Any, **kwargs: Any) -> Any:
        """``optim_step``."""
        return self.optim_step(*args, **kwargs)

    async def save_state_async(self, *args: Any, **kwargs: Any) -> Any:
        """``save_state``."""
        return self.save_state(*args, **kwargs)

    async def load_state_async(self, *args: Any, **kwargs: Any) -> Any:
        """``load_state``."""
        return self.load_state(*args, **kwargs)

    async def load_state_with_optimizer_async(self, *args: Any, **kwargs: Any) -> Any:
        """``load_state_with_optimizer``."""
        return self.load_state_with_optimizer(*args, **kwargs)

    async def save_weights_for_sampler_async(self, *args: Any, **kwargs: Any) -> Any:
        """``save_weights_for_sampler``."""
        return self.save_weights_for_sampler(*args, **kwargs)

    async def save_weights_and_get_sampling_client_async(self, *args: Any, **kwargs: Any) -> Any:
        """``save_weights_and_get_sampling_client``."""
        return self.save_weights_and_get_sampling_client(*args, **kwargs)

    async def create_sampling_client_async(self, *args: Any, **kwargs: Any) -> Any:
        """``create_sampling_client``."""
        return self.create_sampling_client(*args, **kwargs)

    async def get_info_async(self) -> Any:
        """``get_info``."""
        return self.get_info()
