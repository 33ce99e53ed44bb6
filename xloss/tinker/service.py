"""``ServiceClient``: stands where a recipe makes ``tinker.ServiceClient``, and makes local clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xloss.errors import OptionError
from xloss.tinker import checkpoints
from xloss.tinker.client import TrainingClient
from xloss.tinker.futures import Future, Ready
from xloss.tinker.model import LanguageModel
from xloss.tinker.sampling import SamplingClient


class ServiceClient(Ready):
    """Makes clients of local models by name.

    Args:
        make_model: ``make_model(base_model, lora_rank)`` gives the model of that name, with adapters of that rank, or
            without any for ``None`` (a sampler of the base model).
        checkpoint_dir: where each client has a folder of its own, ``run-0``, ``run-1``, ...; ``None``: saving raises.
        client_options: further arguments of each ``TrainingClient``.
    """

    def __init__(
        self,
        make_model: Callable[[str, int | None], LanguageModel],
        *,
        checkpoint_dir: str | Path | None = None,
        **client_options: Any,
    ) -> None:
        self._make_model = make_model
        self._folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        self._options = client_options

    def _client(
        self, base_model: str, rank: int | None, user_metadata: dict[str, str] | None = None, trains: bool = True
    ) -> TrainingClient:
        model = self._make_model(base_model, rank)
        model.name = base_model
        folder = checkpoints.new_run(self._folder) if trains and self._folder is not None else None
        return TrainingClient(
            model, lora_rank=rank, user_metadata=user_metadata, checkpoint_dir=folder, **self._options
        )

    def create_lora_training_client(
        self, base_model: str, rank: int = 32, *, user_metadata: dict[str, str] | None = None
    ) -> TrainingClient:
        """A client of ``make_model(base_model, rank)``; its checkpoints keep ``user_metadata``."""
        return self._client(base_model, rank, user_metadata)

    def create_training_client_from_state(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> TrainingClient:
        """A client of the base model and rank that ``save_state`` noted, with the saved weights; a fresh optimizer."""
        client = self._client(*checkpoints.origin(path), user_metadata)
        client.load_state(path)
        return client

    def create_training_client_from_state_with_optimizer(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> TrainingClient:
        """The same with its optimizer."""
        client = self._client(*checkpoints.origin(path), user_metadata)
        client.load_state_with_optimizer(path)
        return client

    def create_sampling_client(self, model_path: str | None = None, base_model: str | None = None) -> SamplingClient:
        """A sampler of saved weights, or of a base model. Raises ``OptionError`` unless one is given."""
        if model_path is not None:
            return self._client(*checkpoints.origin(model_path), trains=False).create_sampling_client(model_path)
        if base_model is None:
            raise OptionError("give model_path or base_model")
        return self._client(base_model, None, trains=False).save_weights_and_get_sampling_client(kind="inflight")

    def create_rest_client(self) -> RestClient:
        """Looks into checkpoints and deletes them."""
        return RestClient()

    async def create_lora_training_client_async(self, *args: Any, **kwargs: Any) -> TrainingClient:
        """``create_lora_training_client``."""
        return self.create_lora_training_client(*args, **kwargs)

    async def create_training_client_from_state_async(self, *args: Any, **kwargs: Any) -> TrainingClient:
        """``create_training_client_from_state``."""
        return self.create_training_client_from_state(*args, **kwargs)

    async def create_training_client_from_state_with_optimizer_async(self, *args: Any, **kwargs: Any) -> TrainingClient:
        """``create_training_client_from_state_with_optimizer``."""
        return self.create_training_client_from_state_with_optimizer(*args, **kwargs)

    async def create_sampling_client_async(self, *args: Any, **kwargs: Any) -> SamplingClient:
        """``create_sampling_client``."""
        return self.create_sampling_client(*args, **kwargs)


@dataclass(frozen=True)
class TrainingRun:
    """Of ``tinker.types.TrainingRun``, what a file tells."""

    base_model: str
    lora_rank: int | None
    user_metadata: dict[str, str]


class RestClient:
    """Of ``tinker``'s, the calls of the cookbook's loops, on checkpoint files."""

    def get_training_run_by_tinker_path(self, path: str) -> Future[TrainingRun]:
        """The run that saved the checkpoint."""
        return Future(TrainingRun(*checkpoints.origin(path), checkpoints.metadata(path)))

    def delete_checkpoint_from_tinker_path(self, path: str) -> Future[None]:
        """Delete the file. Raises ``OptionError`` where there is none."""
        checkpoints.delete(path)
        return Future(None)

    async def get_training_run_by_tinker_path_async(self, path: str) -> TrainingRun:
        """The result of ``get_training_run_by_tinker_path``."""
        return await self.get_training_run_by_tinker_path(path)

    async def delete_checkpoint_from_tinker_path_async(self, path: str) -> None:
        """The result of ``delete_checkpoint_from_tinker_path``."""
        await self.delete_checkpoint_from_tinker_path(path)
