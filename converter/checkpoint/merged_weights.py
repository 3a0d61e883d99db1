"""The changes that adapters make to a checkpoint's weights, by the stored weight."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence

import psutil
from torch import Tensor

from converter.checkpoint.adapters.adapter_config import MERGE_WITH_PEFT_HINT, OTHER_BASE_HINT
from converter.checkpoint.adapters.adapter_folder import AdapterFolder
from converter.checkpoint.adapters.adapter_tensors import AdapterTensors
from converter.checkpoint.adapters.changes import Change, ExpertChange, Replacement
from converter.checkpoint.adapters.peft_layers import Changed, changed_tensors
from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.names import EXPERT_MATRICES, ExpertTensor
from converter.checkpoint.source_tensors import HEAD_WEIGHT, stored_tensors
from converter.checkpoint.weight import TORCH_DTYPES, Weight
from formats.errors import DoesNotFitError, SourceError
from formats.files.control_group import within_group
from formats.safetensors_header import max_header_bytes

_TENSORS_PER_WEIGHT = 3
"""An adapter has A, B and, with DoRA, a vector for each weight."""
_COPIES = 2
"""While PEFT stacks the experts' tensors, they are in memory twice."""

_log = logging.getLogger(__name__)


class MergedWeights:
    """The changes of `adapters`, in their order; their tensors stay in memory, in float32.

    name: the checkpoint's, compared with the adapters' base model in a warning. trunk, experts: its
    weights. Raises SourceError unless every tensor of every adapter fits the model, before any is
    read; DoesNotFitError if they do not fit in memory.
    """

    def __init__(
        self,
        adapters: Sequence[AdapterFolder],
        name: str,
        shape: ModelShape,
        trunk: dict[str, Weight],
        experts: dict[ExpertTensor, Weight],
    ) -> None:
        self._shape = shape
        self._trunk = trunk
        self._experts = experts
        self._changes: dict[Weight, list[Change]] = defaultdict(list)
        self.n_bytes = 0
        """Memory of the adapters' tensors."""
        for adapter in adapters:
            _warn_of_other_base(adapter, name)
            self._add(adapter)

    def of_weight(self, weight: Weight) -> Sequence[Change]:
        """Return the changes of a weight in order; empty if no adapter changes it."""
        return self._changes.get(weight, ())

    def _add(self, adapter: AdapterFolder) -> None:
        n_tensors = _TENSORS_PER_WEIGHT * stored_tensors(self._shape)
        header_bytes = max_header_bytes(n_tensors, 1 << 20)
        with AdapterTensors(adapter.folder, TORCH_DTYPES, header_bytes) as tensors:
            shapes = tensors.shapes()
            self._check_vocabulary(shapes, adapter.where)
            planned = changed_tensors(self._shape.model, adapter, shapes)
            for changed in planned:
                for _ in self._changes_of(changed, adapter.where):
                    pass
            n_bytes = sum(changed.n_bytes for changed in planned)
            _check_memory(n_bytes, adapter.where)
            self.n_bytes += n_bytes
            for changed in changed_tensors(self._shape.model, adapter, tensors.values()):
                for weight, change in self._changes_of(changed, adapter.where):
                    self._changes[weight].append(change)

    def _changes_of(self, changed: Changed, where: str) -> Iterator[tuple[Weight, Change]]:
        """Yield the stored weights that make up a tensor of the model, each with its change."""
        path, _, parameter = changed.name.rpartition(".")
        layer = self._shape.experts_layer(path)
        if layer is None:
            weight = self._trunk_weight(changed, where)
            assert changed.change is not None
            yield weight, changed.change
            return
        module = self._shape.experts[layer]
        is_down = parameter == "down_proj"
        for expert in range(module.experts):
            for projection in EXPERT_MATRICES:
                if (projection == "down") != is_down:
                    continue
                first_row = module.intermediate if projection == "up" else 0
                weight = self._experts[ExpertTensor(layer, expert, projection)]
                if isinstance(changed.change, Replacement):
                    rows = changed.change.values[expert, first_row : first_row + weight.shape[0]]
                    yield weight, Replacement(rows)
                else:
                    yield weight, ExpertChange(changed.experts, expert, first_row)

    def _trunk_weight(self, changed: Changed, where: str) -> Weight:
        name = changed.name
        is_head = name == HEAD_WEIGHT
        if self._shape.tied and (is_head or name == self._shape.embedding):
            if changed.is_module:
                raise SourceError(
                    f"{where}: it replaces {name}, which is both embedding and head of this model"
                    " (tie_word_embeddings)",
                    MERGE_WITH_PEFT_HINT,
                )
            name = self._shape.embedding
        if name not in self._trunk:
            raise SourceError(
                f"{where}: it changes {name}, which the checkpoint does not have",
                OTHER_BASE_HINT,
            )
        return self._trunk[name]

    def _check_vocabulary(self, tensors: dict[str, Tensor], where: str) -> None:
        """Raise SourceError if the adapter's embedding or head has another number of tokens."""
        expected = self._shape.architecture.vocab_size
        for name, tensor in tensors.items():
            if ".embed_tokens." not in name and ".lm_head." not in name:
                continue
            if name.endswith("lora_embedding_A"):
                tokens = tensor.shape[-1]
            elif name.endswith((".lm_head.lora_B.weight", "embed_tokens.weight", "lm_head.weight")):
                tokens = tensor.shape[0]
            else:
                continue
            if tokens != expected:
                raise SourceError(
                    f"{where}: {name} has {tokens} tokens, the base model has {expected}: the"
                    " adapter was trained after resize_token_embeddings",
                    f"resize the base model first: model.resize_token_embeddings({tokens}),"
                    " model.save_pretrained(FOLDER); then moe-convert convert FOLDER --adapter …",
                )


def _check_memory(n_bytes: int, where: str) -> None:
    memory = psutil.virtual_memory()
    available, _ = within_group(memory.available, memory.total)
    needed = _COPIES * n_bytes
    if needed > available:
        raise DoesNotFitError(
            f"{where}: the adapter needs {needed} bytes of memory, {available} are available",
            "close other programs",
        )


def _warn_of_other_base(adapter: AdapterFolder, name: str) -> None:
    base = adapter.config.base_model_name_or_path
    if base and _last_part(base) != _last_part(name):
        _log.warning(
            "%s: the adapter was trained on %s, the checkpoint is %s", adapter.where, base, name
        )


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()
