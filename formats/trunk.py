"""What trunk.safetensors must hold: names and shapes of everything that is not an expert."""

from formats.errors import FormatError
from formats.index import Architecture, PackedLinear
from formats.packing import tile_packing_named
from formats.safetensors_header import TensorEntry

FLOAT_DTYPES = ("F32", "F16", "BF16")


def attention_linears(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Module name -> (rows, columns) of every attention projection."""
    a = architecture
    q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    shapes = {
        "q_proj": (q, a.hidden_size),
        "k_proj": (kv, a.hidden_size),
        "v_proj": (kv, a.hidden_size),
        "o_proj": (a.hidden_size, q),
    }
    return {
        f"model.layers.{layer}.self_attn.{name}": shape
        for layer in range(a.num_hidden_layers)
        for name, shape in shapes.items()
    }


def packable_linears(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Module name -> (rows, columns) of the matrices that may be packed: attention, and a head of its own."""
    head = {} if architecture.tie_word_embeddings else {"lm_head": (architecture.vocab_size, architecture.hidden_size)}
    return attention_linears(architecture) | head


def plain_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the trunk's tensors that are never packed: embeddings, routers, norms."""
    a = architecture
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (a.hidden_size,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (a.hidden_size,)
        shapes[f"{prefix}.mlp.gate.weight"] = (a.num_local_experts, a.hidden_size)
    shapes["model.norm.weight"] = (a.hidden_size,)
    return shapes


def check_trunk(
    entries: dict[str, TensorEntry], architecture: Architecture, packed: dict[str, PackedLinear], where: str
) -> None:
    """FormatError naming the first tensor of the trunk that is missing, extra, or of a wrong shape or dtype."""
    linears = packable_linears(architecture)
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        name: (shape, FLOAT_DTYPES) for name, shape in plain_tensors(architecture).items()
    }
    for module, (rows, columns) in linears.items():
        if module in packed:
            entry = packed[module]
            if (entry.rows, entry.columns) != (rows, columns):
                raise FormatError(
                    f"{where}: {module} is [{entry.rows}, {entry.columns}], config.json says [{rows}, {columns}]"
                )
            packing = tile_packing_named(entry.packing, f"{where}: {module}")
            expected[f"{module}.packed"] = (packing.stored_shape(rows, columns), (packing.dtype,))
        else:
            expected[f"{module}.weight"] = ((rows, columns), FLOAT_DTYPES)
    if unknown := sorted(packed.keys() - linears.keys()):
        raise FormatError(f"{where}: packed module {unknown[0]} does not belong to this architecture")
    if missing := sorted(expected.keys() - entries.keys()):
        raise FormatError(f"{where}: {len(missing)} tensors are missing: {', '.join(missing[:4])}")
    extra = sorted(name for name in entries.keys() - expected.keys() if not name.startswith("__pad__."))
    if extra:
        raise FormatError(f"{where}: {len(extra)} tensors do not belong there: {', '.join(extra[:4])}")
    for name, (shape, dtypes) in expected.items():
        if entries[name].shape != shape:
            raise FormatError(f"{where}: tensor {name} has shape {list(entries[name].shape)}, expected {list(shape)}")
        if entries[name].dtype not in dtypes:
            raise FormatError(f"{where}: tensor {name} is {entries[name].dtype}, expected {' or '.join(dtypes)}")
