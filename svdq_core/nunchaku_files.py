"""Model files that Nunchaku or DeepCompressor wrote, packed for Nunchaku's kernels, as this format's tensors.

Shapes: ``N`` out_features, ``K`` in_features, ``R`` rank, ``G`` group size, ``P`` linears that the file has as one.
N and K are multiples of 128 (the kernels' tiles), R of 16. Codes, scales and branches are moved, none is rounded again.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import SVDQuantError
from .families import FLUX, QWEN_IMAGE, Z_IMAGE
from .formats import AWQ, GELU_SHIFT, NVFP4, get_format
from .formats.int4 import FLOATS
from .linear import QuantizedLinear
from .recipes import W4A16, Recipe, Rule

TILE = 128  # output rows of a packed tile, and entries of a packed vector
HALVES = (torch.bfloat16, torch.float16)
E4M3 = (torch.float8_e4m3fn,)
UNUSED = ("smooth_factor_orig",)  # the λ before it was multiplied into a layer in front
VECTORS = (3, 6)  # a modulation's shift, scale and gate, of which there may be two; 1 is added to the scales
OLDER = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig"}
OTHER = "a Nunchaku file, packed for its own kernels"
INSTEAD = "Use Nunchaku's own loader, or quantize the 16-bit model with SVDQuant Quantize."


@dataclass(frozen=True)
class Family:
    """A model as Nunchaku has it. ``key`` is in every file of it and in no other family's.

    ``names`` are the layers that ComfyUI calls otherwise, ``{i}`` is the block; several names share the rows equally,
    in that order. ``linear1:0`` is the first part of a layer that Nunchaku has in several.
    """

    recipe: Recipe
    key: str
    names: dict[str, tuple[str, ...]]

    def targets(self, layer: str) -> tuple[str, ...]:
        """ComfyUI's names of a layer."""
        template, number = template_of(layer)
        return tuple(name.replace("{i}", number) for name in self.names.get(template, (template,)))

    def rule(self, name: str) -> Rule | None:
        """The recipe's rule for one of ComfyUI's names."""
        return next((rule for rule in self.recipe.rules if rule.matches(name.partition(":")[0])), None)


def template_of(name: str) -> tuple[str, str]:
    """A layer's name with ``{i}`` for the number of its block, and that number; "" if it is in none."""
    number = re.search(r"\.(\d+)\.", name)
    return (name.replace(number[0], ".{i}.", 1), number[1]) if number else (name, "")


def in_blocks(theirs: str, ours: str, names: Mapping[str, str | tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """``names`` in each block: Nunchaku's after ``theirs``, ComfyUI's after ``ours``."""
    split = {source: (name,) if isinstance(name, str) else name for source, name in names.items()}
    return {f"{theirs}.{{i}}.{source}": tuple(f"{ours}.{{i}}.{name}" for name in split[source]) for source in split}


FLUX_DOUBLE = {
    "qkv_proj": "img_attn.qkv", "out_proj": "img_attn.proj", "mlp_fc1": "img_mlp.0", "mlp_fc2": "img_mlp.2",
    "qkv_proj_context": "txt_attn.qkv", "out_proj_context": "txt_attn.proj",
    "mlp_context_fc1": "txt_mlp.0", "mlp_context_fc2": "txt_mlp.2",
}  # fmt: skip
FLUX_DOUBLE_MODULATION = {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"}
FLUX_DOUBLE_NORMS = {
    "norm_q": "img_attn.norm.query_norm", "norm_k": "img_attn.norm.key_norm",
    "norm_added_q": "txt_attn.norm.query_norm", "norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip
FLUX_SINGLE = {"qkv_proj": "linear1:0", "mlp_fc1": "linear1:1", "out_proj": "linear2:0", "mlp_fc2": "linear2:1"}
FLUX_SINGLE_MODULATION = {"norm.linear": "modulation.lin"}
FLUX_SINGLE_NORMS = {"norm_q": "norm.query_norm", "norm_k": "norm.key_norm"}
AFTER_GELU = "linear2:1"  # a part, whose rule does not tell
QWEN_NAMES = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
Z_IMAGE_NAMES: dict[str, str | tuple[str, ...]] = {
    "attention.to_qkv": "attention.qkv", "attention.to_out.0": "attention.out",
    "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),  # diffusers' SwiGLU: value, then gate
    "feed_forward.net.2": "feed_forward.w2",
}  # fmt: skip

FAMILIES = (
    Family(
        FLUX,
        "single_transformer_blocks.0.mlp_fc1.qweight",
        in_blocks("transformer_blocks", "double_blocks", FLUX_DOUBLE | FLUX_DOUBLE_MODULATION | FLUX_DOUBLE_NORMS)
        | in_blocks(
            "single_transformer_blocks", "single_blocks", FLUX_SINGLE | FLUX_SINGLE_MODULATION | FLUX_SINGLE_NORMS
        ),
    ),
    Family(
        QWEN_IMAGE,
        "transformer_blocks.0.attn.to_qkv.qweight",
        in_blocks("transformer_blocks", "transformer_blocks", QWEN_NAMES),
    ),
    Family(
        Z_IMAGE,
        "layers.0.attention.to_qkv.qweight",
        {
            source: names
            for blocks in Z_IMAGE.lists
            for source, names in in_blocks(blocks, blocks, Z_IMAGE_NAMES).items()
        },
    ),
)


Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Nobody is waiting."""


def marks_of(metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Keys by which ComfyUI knows a variant of a model, and which diffusers has in its config instead."""
    try:
        config = json.loads(metadata.get("config", "{}"))
    except ValueError:
        return {}
    edit_2511 = isinstance(config, dict) and config.get("zero_cond_t")  # of Qwen-Image
    return {"__index_timestep_zero__": torch.zeros(0)} if edit_2511 else {}


def is_nunchaku(keys: Collection[str]) -> bool:
    """Whether a state dict is of a model in Nunchaku's format."""
    return any(key.endswith(".qweight") and key.replace(".qweight", ".wscales") in keys for key in keys)


def family_in(keys: Collection[str]) -> Family | None:
    """The family of a Nunchaku file, if it is one that can be read."""
    return next((family for family in FAMILIES if family.key in keys), None)


def refusal() -> str:
    """What a Nunchaku file of no family here is, and why it is not read."""
    return f"{OTHER} (only {', '.join(family.recipe.title for family in FAMILIES)} are read)"


def from_nunchaku_model(sd: Mapping[str, Tensor], where: str, progress: Progress = no_progress) -> dict[str, Tensor]:
    """The quantized layers in this format, and what is named like them, under ComfyUI's names; the rest as it is.

    Tensors may be on the meta device: then only shapes and dtypes are checked. Else every layer is moved in memory,
    which takes seconds: ``progress`` gets how many are done, and of how many.
    """
    family = family_in(sd)
    if family is None:
        raise SVDQuantError(f"{where}: {refusal()}. {INSTEAD}")
    layers = [key.removesuffix(".qweight") for key in sd if key.endswith(".qweight")]
    packed = {layer: Packed({}, f"{layer}.", where) for layer in layers}
    out: dict[str, Tensor] = {}
    for key, tensor in sd.items():
        layer, _, name = key.rpartition(".")
        if layer in packed:
            packed[layer].tensors[OLDER.get(name, name)] = tensor
            continue
        targets = family.targets(layer)
        for target, rows in zip(targets, tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,)):
            out[f"{target}.{name}" if target else key] = rows
    linears: dict[str, QuantizedLinear] = {}
    for i, (layer, part) in enumerate(packed.items()):
        linears |= read_layer(part, family, family.targets(layer))
        progress(i + 1, len(packed))
    for name, linear in joined(linears, where).items():
        out |= linear.state_dict(name)
    return out


def joined(linears: dict[str, QuantizedLinear], where: str) -> dict[str, QuantizedLinear]:
    """The same layers with those of FLUX.1's that Nunchaku has in two parts as one."""
    out = {name: linear for name, linear in linears.items() if ":" not in name}
    for name in dict.fromkeys(name.partition(":")[0] for name in linears if ":" in name):
        first, second = (linears.get(f"{name}:{i}") for i in range(2))
        if first is None or second is None:
            raise SVDQuantError(f"{where}: a part of {name} is missing. The file is incomplete; download it again.")
        if first.fmt is not second.fmt:
            raise SVDQuantError(f"{where}: {name}: one of its two parts is INT4, the other is NVFP4. {INSTEAD}")
        out[name] = (above if name.endswith("linear1") else beside)(first, second, f"{where}: {name}")
    return out


def above(first: QuantizedLinear, second: QuantizedLinear, where: str) -> QuantizedLinear:
    """One layer of two that read the same input, their outputs one after the other; exact."""
    (smooth, down, up), (other_smooth, other_down, other_up) = map(branch_of, (first, second))
    if (first.bias is None) != (second.bias is None):
        raise SVDQuantError(f"{where}: one of its parts has no bias. The file is incomplete; download it again.")
    if not (smooth.is_meta or torch.equal(smooth, other_smooth)):
        raise SVDQuantError(f"{where}: its two parts have different smooth factors. {INSTEAD}")
    return replace(
        first,
        tensors=side_by_side(first, second, 0),
        proj_down=torch.cat([down, other_down], 1),
        proj_up=torch.block_diag(up, other_up),
        bias=None if first.bias is None or second.bias is None else torch.cat([first.bias, second.bias]),
    )


def beside(first: QuantizedLinear, second: QuantizedLinear, where: str) -> QuantizedLinear:
    """One layer of two whose outputs are added, their inputs side by side.

    A layer's input is shifted as a whole or not at all: where only the second one's is, the bias takes the shift back.
    Weights and branches are theirs; the second input is then rounded to the signed grid, as SVDQuant Quantize has it.
    A layer has one tensor scale, too: the smaller one, and the other one's λ takes what they differ by. So inputs only
    grow by that, for which there is room: small ones would fall below the smallest scale of an activation.
    """
    (smooth, down, up), (other_smooth, other_down, other_up) = map(branch_of, (first, second))
    if isinstance(first.fmt, NVFP4):
        ratio = ratio_of_scales(first, second, where)
        smooth, other_smooth = smooth.float() * ratio.clamp(max=1), other_smooth.float() / ratio.clamp(min=1)
    bias = torch.zeros(up.shape[0], device=up.device)
    for layer in (first, second):
        bias = bias if layer.bias is None else bias + layer.bias.float()
    if second.act_unsigned:
        residual = second.fmt.unpack(second.tensors, torch.float32) / other_smooth.float()
        bias = bias + GELU_SHIFT * residual.sum(dim=1)
    return replace(
        first,
        tensors=side_by_side(first, second, 1),
        smooth_factor=torch.cat([smooth, other_smooth]),
        proj_down=torch.block_diag(down, other_down),
        proj_up=torch.cat([up, other_up], 1),
        bias=bias.to(up.dtype),
    )


def branch_of(layer: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """λ (K,), ``proj_down (K, R)`` and ``proj_up (N, R)``, which every layer in Nunchaku's format has."""
    assert layer.smooth_factor is not None and layer.proj_down is not None and layer.proj_up is not None
    return layer.smooth_factor, layer.proj_down, layer.proj_up


def side_by_side(first: QuantizedLinear, second: QuantizedLinear, dim: int) -> dict[str, Tensor]:
    """Codes and scales of two layers, rows (0) or columns (1) of one after those of the other; NVFP4's tensor scales
    by row, or the smaller ones."""
    nvfp4 = isinstance(first.fmt, NVFP4)
    dims = {"weight": dim, "weight_scale": dim if nvfp4 else 1 - dim}  # INT4 has a scale's rows last
    tensors = {name: torch.cat([first.tensors[name], second.tensors[name]], dims[name]) for name in dims}
    if nvfp4:
        whole = [layer.tensors["weight_scale_2"] for layer in (first, second)]
        by_row = [scale.expand(layer.shape[0]) for scale, layer in zip(whole, (first, second))]
        tensors["weight_scale_2"] = torch.cat(by_row) if dim == 0 else torch.minimum(*whole)
    return tensors


def ratio_of_scales(first: QuantizedLinear, second: QuantizedLinear, where: str) -> Tensor:
    """The second layer's tensor scale in the first one's, one number for all rows."""
    ratio = second.tensors["weight_scale_2"] / first.tensors["weight_scale_2"]
    if not ratio.is_meta and bool((ratio != ratio.flatten()[0]).any()):
        raise SVDQuantError(f"{where}: the tensor scales of its two parts differ by more than a factor. {INSTEAD}")
    return ratio.flatten()[0]


@dataclass
class Packed:
    """A layer's tensors by the last part of their names; they are taken out one by one, each checked."""

    tensors: dict[str, Tensor]
    prefix: str
    where: str

    def take(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        tensor = self.tensors.pop(name, None)
        wanted = f"expected shape {shape} of {' or '.join(map(plain_name, dtypes))}"
        if tensor is None:
            raise self.error(name, f"missing ({wanted}). The file is incomplete; download it again.")
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise self.error(name, f"{wanted}, found {tuple(tensor.shape)} of {plain_name(tensor.dtype)}.")
        return tensor

    def maybe(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor | None:
        return self.take(name, shape, dtypes) if name in self.tensors else None

    def finish(self) -> None:
        """Raise for tensors that nobody took."""
        if rest := [name for name in self.tensors if name not in UNUSED]:
            shape = tuple(self.tensors[rest[0]].shape)
            raise self.error(rest[0], f"unexpected in such a layer (shape {shape}). {INSTEAD}")

    def error(self, name: str, problem: str) -> SVDQuantError:
        return SVDQuantError(f"{self.where}: {self.prefix}{name}: {problem}")


def plain_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_layer(packed: Packed, family: Family, targets: tuple[str, ...]) -> dict[str, QuantizedLinear]:
    """One of Nunchaku's layers as ComfyUI's, by name."""
    rule = family.rule(targets[0])
    if rule is None:
        raise packed.error("qweight", f"{family.recipe.title} has no 4-bit layer of that name. {INSTEAD}")
    if rule.kind == W4A16:
        linears = [read_modulation(packed)]
    else:
        linears = read_w4a4(packed, len(targets), rule.after_gelu or targets[0].endswith(AFTER_GELU))
    packed.finish()
    return dict(zip(targets, linears))


def read_w4a4(packed: Packed, parts: int, after_gelu: bool) -> list[QuantizedLinear]:
    """P linears that read the same input from one packed layer, INT4 or NVFP4.

    The bias already subtracts what the shift of an unsigned layer adds, and the branch reads the raw input, as here.
    """
    n, k = check_codes(packed, parts)
    fp4 = "wscales" in packed.tensors and packed.tensors["wscales"].dtype in E4M3
    fmt = get_format("nvfp4" if fp4 else "int4")
    codes = unpack_codes(packed.take("qweight", (n, k // 2), (torch.int8,)))
    extra: list[dict[str, Tensor]] = [{}] * parts
    if isinstance(fmt, NVFP4):
        codes = codes.view(torch.uint8)
        # of a file's header single numbers are read, the rest is on the meta device
        extra = [{"weight_scale_2": t.to(codes.device)} for t in tensor_scales(packed, n, parts)]
        scales = unpack_micro_scales(packed.take("wscales", (k // 16, n), E4M3)).chunk(parts)
    else:
        scales = unpack_scales(packed.take("wscales", (k // 64, n), HALVES)).chunk(parts, dim=1)
    smooth = unpack_vector(packed.take("smooth_factor", (k,), HALVES))
    down, up = unpack_branch(packed, n, k)
    bias = packed.maybe("bias", (n,), HALVES)
    biases = [None] * parts if bias is None else unpack_vector(bias).chunk(parts)
    return [
        QuantizedLinear(
            fmt,
            {"weight": weight, "weight_scale": scales[i]} | extra[i],
            smooth.clone(),  # layers share no memory: safetensors would not save them
            down.clone(),
            up.chunk(parts)[i],
            biases[i],
            act_unsigned=after_gelu and fmt.has_unsigned,
        )
        for i, weight in enumerate(codes.chunk(parts))
    ]


def check_codes(packed: Packed, parts: int) -> tuple[int, int]:
    """(N, K) of a packed 4-bit layer."""
    codes = packed.tensors["qweight"]
    if codes.dim() != 2 or codes.shape[0] % TILE or 2 * codes.shape[1] % TILE or codes.shape[0] % parts:
        split = f" that {parts} layers share equally" if parts > 1 else ""
        raise packed.error(
            "qweight",
            f"expected (N, K/2) with multiples of {TILE} for N and K{split}, found shape {tuple(codes.shape)}.",
        )
    return codes.shape[0], 2 * codes.shape[1]


def tensor_scales(packed: Packed, n: int, parts: int) -> list[Tensor]:
    """P scales in float32, () or (N/P,), from ``wtscale`` (one number) and ``wcscales (N,)``, which may be absent.

    DeepCompressor writes one number a layer, and the numbers of linears that it joins repeated over their rows.
    """
    found = packed.tensors.get("wtscale")
    shape = () if found is not None and found.dim() == 0 else (1,)
    whole = packed.maybe("wtscale", shape, FLOATS)
    scale = torch.ones(()) if whole is None else whole.float().reshape(())
    rows = packed.maybe("wcscales", (n,), HALVES)
    if rows is None:
        return [scale.clone() for _ in range(parts)]
    return [scale * part for part in unpack_vector(rows).float().chunk(parts)]


def unpack_branch(packed: Packed, n: int, k: int) -> tuple[Tensor, Tensor]:
    """``proj_down (K, R)`` and ``proj_up (N, R)``."""
    found = packed.tensors.get("proj_down")
    rank = 32 if found is None or found.dim() != 2 else found.shape[1]
    if rank % 16:
        raise packed.error("proj_down", f"expected a rank that is a multiple of 16, found {rank}.")
    down, up = packed.take("proj_down", (k, rank), HALVES), packed.take("proj_up", (n, rank), HALVES)
    return untile(down), untile(up, transposed=True)


def unpack_codes(packed: Tensor) -> Tensor:
    """``qweight (N, K/2)`` int8 in plain order.

    A tile has 128 rows and 64 columns; in memory it is ``[8][8][4][2][2]`` words: row // 16, row % 8,
    column // 8 % 4, row // 8 % 2, column // 32. A word is 8 columns, two to a byte, the even one in the low nibble.
    """
    n, half = packed.shape
    words = packed.view(torch.int32).reshape(n // TILE, half // 32, 8, 8, 4, 2, 2)
    return words.permute(0, 2, 5, 3, 1, 6, 4).reshape(n, half // 4).view(torch.int8)


def unpack_scales(packed: Tensor) -> Tensor:
    """16-bit ``wscales (K/G, N)`` in plain order.

    128 rows of one group follow each other as ``[8][4][2][2]``: row // 16, row // 2 % 4, row // 8 % 2, row % 2. Tiles
    of rows come first, then groups: a packed tensor's shape tells its size only.
    """
    groups, n = packed.shape
    tiles = packed.reshape(n // TILE, groups, 8, 4, 2, 2)
    return tiles.permute(1, 0, 2, 4, 3, 5).reshape(groups, n)


def unpack_vector(packed: Tensor) -> Tensor:
    """A bias, a λ or scales by row ``(N,)``: packed as the scales of a single group are."""
    return unpack_scales(packed.reshape(1, -1)).reshape(-1)


def unpack_micro_scales(packed: Tensor) -> Tensor:
    """e4m3 ``wscales (K/16, N)`` as ``(N, K/16)`` in plain order.

    128 words of a row's four groups each follow each other as ``[8][4][4]``: row % 8, row // 8 % 4, row // 32.
    """
    groups, n = packed.shape
    words = packed.view(torch.int32).reshape(n // TILE, groups // 4, 8, 4, 4)
    return words.permute(0, 4, 3, 2, 1).reshape(n, groups // 4).view(packed.dtype)


def untile(packed: Tensor, transposed: bool = False) -> Tensor:
    """Half of a branch ``(C, R)`` in plain order: tiles of 16×16 in the order of a 16-bit tensor-core operand.

    In memory a tile is ``[8][4][2][2][2]``: row % 8, column // 2 % 4, row // 8, column // 8, column % 2, where rows
    are ranks and columns channels. In ``transposed`` tiles (the up half) rows are channels and columns ranks.
    """
    channels, rank = packed.shape
    tiles = packed.reshape(channels // 16, rank // 16, 8, 4, 2, 2, 2)
    order = (0, 4, 2, 1, 5, 3, 6) if transposed else (0, 5, 3, 6, 1, 4, 2)
    return tiles.permute(order).reshape(channels, rank)


def read_modulation(packed: Packed) -> QuantizedLinear:
    """A W4A16 layer: Nunchaku has ``w = code * scale + zero``, outputs in the order (feature, vector) instead of
    (vector, feature), and in the bias the 1 that the model itself adds to the scales."""
    n, k, vectors = check_modulation(packed)
    codes = unpack_awq_codes(packed.take("qweight", (n // 4, k // 2), (torch.int32,)))
    scale = packed.take("wscales", (k // AWQ.group, n), HALVES)
    zero = exactly(packed.take("wzeros", (k // AWQ.group, n), HALVES).float() + 8 * scale.float(), scale.dtype)
    tensors = {
        "weight": by_vector(codes, vectors),
        "weight_scale": by_vector(scale.t(), vectors).t(),
        "weight_zero": by_vector(zero.t(), vectors).t(),
    }
    bias = packed.take("bias", (n,), HALVES)
    added = torch.tensor([0.0, 1.0, 0.0] * (vectors // 3), device=bias.device)[:, None]  # of shift, scale, gate
    plain = by_vector(bias, vectors).float().reshape(vectors, -1) - added
    return QuantizedLinear(get_format(AWQ.name), tensors, bias=exactly(plain.reshape(n), bias.dtype))


def check_modulation(packed: Packed) -> tuple[int, int, int]:
    """N, K, and how many vectors of K the N outputs are."""
    found = packed.tensors["qweight"]
    n, k = (4 * found.shape[0], 2 * found.shape[1]) if found.dim() == 2 else (0, 0)
    if k == 0 or k % AWQ.group or n not in [k * vectors for vectors in VECTORS]:
        raise packed.error(
            "qweight",
            f"expected (N/4, K/2), K a multiple of {AWQ.group} and N {' or '.join(map(str, VECTORS))} times K, found "
            f"shape {tuple(found.shape)}.",
        )
    return n, k, n // k


def unpack_awq_codes(packed: Tensor) -> Tensor:
    """``qweight (N/4, K/2)`` int32 in plain order: int8 ``(N, K/2)``, two codes to a byte, the even column's low.

    Four rows are interleaved 64 columns at a time. Of 32 columns, 16-bit number j holds j, j + 8, j + 16 and j + 24.
    """
    quarter, half = packed.shape
    even, odd = packed.view(torch.int16).reshape(quarter, half // 32, 4, 2, 4, 2).unbind(-1)
    pairs = [((even >> shift) & 0xF | ((odd >> shift) & 0xF) << 4).to(torch.uint8) for shift in (0, 4, 8, 12)]
    return torch.stack(pairs, dim=-2).transpose(1, 2).reshape(4 * quarter, half).view(torch.int8)


def by_vector(rows: Tensor, vectors: int) -> Tensor:
    """Rows of a modulation in the order (vector, feature)."""
    return rows.unflatten(0, (-1, vectors)).transpose(0, 1).flatten(0, 1)


def exactly(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers in ``dtype`` if that holds them, else as they are."""
    short = numbers.to(dtype)
    return short if numbers.is_meta or torch.equal(short.float(), numbers) else numbers
