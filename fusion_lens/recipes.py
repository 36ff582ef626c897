"""The names of a model and what goes with it -> a worker, on whatever machine has them."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_lens.atlas import CHECKPOINT
from fusion_lens.models import HookedModel, load_model
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.shelves import Explainer, open_dictionaries
from fusion_lens.workers import Worker


@dataclass(frozen=True, slots=True)
class Recipe:
    """`model`, `dtype` and the rest are those of `load_model`; `fluency` names the perplexity model
    (None: the model itself), `dictionaries` are as `shelves` names them. Calling it makes the
    worker."""

    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    device_map: str | None = None
    fluency: str | None = None
    dictionaries: tuple[str, ...] = ()

    def __call__(self) -> Worker:
        return self.worker(self.opened())

    def opened(self) -> HookedModel:
        """The model.

        Raises:
            ModelError: if it cannot be opened.
        """
        return load_model(
            self.model,
            dtype=self.dtype,
            device=self.device,
            load_in_8bit=self.load_in_8bit,
            load_in_4bit=self.load_in_4bit,
            device_map=self.device_map,
        )

    def worker(self, model: HookedModel) -> Worker:
        """With a model that was opened.

        Raises:
            ModelError: if the perplexity model cannot be opened.
            DictionaryError: if a dictionary does not fit the model.
        """
        fluency = open_perplexity(self.fluency, self.device)
        shelved = open_dictionaries(self.dictionaries, model)
        explain = Explainer(model, shelved) if shelved else None
        return Worker(model, fluency=fluency, explain=explain)


def open_perplexity(source: str | None, device: str | None) -> PerplexityModel | None:
    """The perplexity model of that folder or hub name, or Atlas; None where the model is to read
    its own text.

    Raises:
        ModelError: if it cannot be opened.
    """
    if source is None:
        return None
    return PerplexityModel(CHECKPOINT if source == "atlas" else source, device=device)
