"""Compares the model that is being loaded with the index and with the trunk's header."""

from torch import nn

from formats import INDEX_NAME
from formats.artifact import Artifact
from formats.errors import FormatError
from formats.index import PackedLinear
from formats.layer_file import FILLER_PREFIX
from loader.hf.modules.expert_layers import experts_modules


def check_matrix(model: nn.Module, path: str, linear: PackedLinear, artifact: Artifact) -> None:
    """Raise FormatError unless the linear layer at `path` has the index's shape and no bias."""
    module = _module(model, path, artifact)
    if not isinstance(module, nn.Linear):
        actual = f"a {type(module).__name__}"
    elif module.bias is not None:
        actual = "a matrix with a bias"
    elif (module.out_features, module.in_features) != (linear.rows, linear.columns):
        actual = f"a matrix [{module.out_features}, {module.in_features}]"
    else:
        return
    raise FormatError(
        f"{artifact.folder / INDEX_NAME}: trunk.packed has {path} as a matrix"
        f" [{linear.rows}, {linear.columns}] without bias, the model has {actual}"
    )


def check_experts(model: nn.Module, path: str, artifact: Artifact) -> None:
    """Raise FormatError unless the experts at `path` have the number and sizes of the index."""
    architecture = artifact.architecture
    experts = architecture.num_local_experts
    width = architecture.intermediate_size
    hidden = architecture.hidden_size
    expected = {
        "gate_up_proj": [experts, 2 * width, hidden],
        "down_proj": [experts, hidden, width],
    }
    module = _module(model, path, artifact)
    shapes = {name: getattr(getattr(module, name, None), "shape", None) for name in expected}
    actual = {name: None if shape is None else list(shape) for name, shape in shapes.items()}
    if actual != expected:
        raise FormatError(
            f"{artifact.folder / INDEX_NAME}: experts at {path} have shapes {expected}, the model"
            f" has {actual}"
        )


def check_no_experts_left(model: nn.Module, artifact: Artifact) -> None:
    """Raise FormatError naming experts of the model that the index does not name."""
    if left := experts_modules(model).keys() - artifact.architecture.expert_modules:
        raise FormatError(
            f"{artifact.folder / INDEX_NAME}: expert_modules lacks {min(left)}, which the model has"
        )


def check_trunk(model: nn.Module, artifact: Artifact) -> None:
    """Raise FormatError unless the trunk has exactly the model's tensors, with their shapes.

    transformers would give random values to a missing tensor and only print a table.
    """
    where = artifact.folder / artifact.index.trunk.file
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if artifact.architecture.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    actual = {
        name: entry.shape
        for name, entry in artifact.trunk_header().entries.items()
        if not name.startswith(FILLER_PREFIX)
    }
    if missing := sorted(expected.keys() - actual.keys()):
        raise FormatError(
            f"{where}: {len(missing)} tensors of the model are missing: {', '.join(missing[:4])}"
        )
    if extra := sorted(actual.keys() - expected.keys()):
        raise FormatError(
            f"{where}: {len(extra)} tensors are not in the model: {', '.join(extra[:4])}"
        )
    for name, shape in expected.items():
        if actual[name] != shape:
            raise FormatError(
                f"{where}: tensor {name} has shape {list(actual[name])}, the model needs"
                f" {list(shape)}"
            )


def _module(model: nn.Module, path: str, artifact: Artifact) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise FormatError(
            f"{artifact.folder / INDEX_NAME}: the model has no module {path}"
        ) from None
