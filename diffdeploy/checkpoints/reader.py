"""Conversion of a checkpoint and the user's options to a canonical config and its weights."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from diffdeploy.checkpoints.agreement import require_agreement
from diffdeploy.checkpoints.detect import Found, find_blocks
from diffdeploy.checkpoints.fields import Fields, read_config_fields
from diffdeploy.checkpoints.files import TensorFile, open_tensors
from diffdeploy.checkpoints.layouts import Layout
from diffdeploy.checkpoints.options import CheckpointOptions
from diffdeploy.checkpoints.places import choose_block
from diffdeploy.checkpoints.rows import centred_values, to_canonical, turned_back
from diffdeploy.checkpoints.settings import BlockSettings, require
from diffdeploy.checkpoints.sizes import read_sizes
from diffdeploy.checkpoints.tensors import BlockTensors
from diffdeploy.config import AnyConfig, DiffAttentionConfig, DiffAttentionV2Config
from diffdeploy.errors import InputError
from diffdeploy.files import file_sha256

__all__ = ["BlockReader", "Checkpoint", "SourceFile", "list_layers", "read_checkpoint"]


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file from which weights were read."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One block, read from a checkpoint.

    Attributes:
        config: canonical config.
        weights: canonical weights in the checkpoint's dtypes, named as in ``config.weight_shapes()``.
        layout: name of the layout.
        layer: layer index in the key, if there is one.
        keys: the keys that were read.
        files: the files that were read.
        options: the options that were given.
        max_positions: ``max_position_embeddings`` of config.json, if present.
        companions: files that accompany the weights; always empty for a block.
        defaults: fields that the file leaves to the source's own config class, see `BlockSettings.defaults`.
    """

    config: AnyConfig
    weights: dict[str, Tensor]
    layout: str
    layer: int | None
    keys: list[str]
    files: tuple[SourceFile, ...] = ()
    options: CheckpointOptions = field(default_factory=CheckpointOptions)
    defaults: dict[str, str] = field(default_factory=dict)
    max_positions: int | None = None
    companions: tuple[Path, ...] = ()


class BlockReader:
    """Reader of one block, which computes its `config` and `weights` from tensors and settings.

    Args:
        file: tensors of the checkpoint.
        fields: fields of its config.json.
        found: its layout and blocks.
        prefix: prefix of the block.
        options: the options that were given.

    Raises:
        InputError: the block cannot be deployed, or its shapes do not fit each other.
    """

    def __init__(self, file: TensorFile, fields: Fields, found: Found, prefix: str, options: CheckpointOptions) -> None:
        self.layout: Layout = found.layout
        self.layer = found.blocks[prefix]
        self.tensors = BlockTensors(file, prefix, self.layout)
        self.settings = BlockSettings(
            fields,
            found,
            prefix,
            options,
            self.tensors.number,
            has_norm_weight="subln.weight" in self.tensors.sources,
        )
        # Checked before the sizes are read: a cross-attention layer has no key projection, and `read_sizes` would blame
        # its shapes.
        reason = self.layout.refuse(self.tensors.names, fields, self.layer)
        if reason is not None:
            raise InputError(f"{prefix.rstrip('.') or file.path.name} cannot be deployed: {reason}")
        self.sizes = read_sizes(self.tensors, self.layout, fields)

    def config(self) -> AnyConfig:
        """Compute the canonical config.

        Raises:
            InputError: a setting that cannot be inferred was not given.
        """
        self.tensors.require_all_read(self.layout)
        missing: list[str] = []
        config = self._version_1(missing) if self.layout.version == 1 else self._version_2(missing)
        # All missing options are reported at once, so that the user looks them up once.
        require(missing)
        assert config is not None
        require_agreement(self.settings, config)
        return config

    def _version_1(self, missing: list[str]) -> DiffAttentionConfig | None:
        """Config of a block of the first version; ``None`` if an option is missing."""
        settings, sources = self.settings, self.tensors.sources
        lambda_init, gqa_layout, causal = settings.lambda_init(), settings.gqa_layout(self.sizes), settings.causal()
        rope, has_norm, output_scale = settings.rope(missing), settings.has_norm(), settings.output_scale(lambda_init)
        window = settings.sliding_window(missing)
        missing += ["--depth"] if lambda_init is None else []
        missing += ["--output-scale"] if output_scale is None and lambda_init is not None else []
        missing += ["--gqa-layout"] if gqa_layout is None else []
        missing += ["--causal or --no-causal"] if causal is None else []
        if lambda_init is None or output_scale is None or gqa_layout is None or causal is None:
            return None
        return DiffAttentionConfig(
            **self.sizes.of_config(),
            value_head_dim=None if self.sizes.value_dim == 2 * self.sizes.head_dim else self.sizes.value_dim,
            lambda_init=lambda_init,
            lambda_kind=self.layout.lambda_kind,
            softmax_scale=settings.softmax_scale(),
            output_scale=output_scale,
            causal=causal,
            rope=rope,
            gqa_layout=gqa_layout,
            norm_eps=settings.norm_eps() if has_norm else None,
            norm_affine="subln.weight" in sources,
            qk_norm_eps=settings.qk_norm_eps() if "q_norm.weight" in sources else None,
            qkv_bias="q_proj.bias" in sources,
            out_bias="out_proj.bias" in sources,
            sliding_window=window,
        )

    def _version_2(self, missing: list[str]) -> DiffAttentionV2Config | None:
        """Config of a block of the second version; ``None`` if an option is missing."""
        settings = self.settings
        settings.has_norm()  # raises for --norm, which this version does not have
        causal, rope = settings.causal(), settings.rope(missing)
        if causal is None:
            missing.append("--causal or --no-causal")
            return None
        return DiffAttentionV2Config(
            **self.sizes.of_config(),
            causal=causal,
            rope=rope,
            qk_norm_eps=settings.qk_norm_eps() if "q_norm.weight" in self.tensors.sources else None,
            sliding_window=settings.sliding_window(missing),
        )

    def weights(self, config: AnyConfig) -> dict[str, Tensor]:
        """Read the canonical weights.

        Raises:
            InputError: a shape does not fit the others, or a tensor cannot be deployed.
        """
        shapes = config.weight_shapes()
        # Shapes are checked in the header, before gigabytes are read.
        self.tensors.require_shapes(shapes, self.sizes.noise_repeat)
        canonical = to_canonical(self.tensors.sources, self.tensors.get, self.sizes)
        if self.settings.options.norm == "layer":
            canonical = centred_values(canonical, self.sizes)
        if self.settings.turns_back():
            canonical = turned_back(canonical, self.sizes)
        # The order is that of the config, of the state dict and of the bundle's file.
        return {name: canonical[name] for name in shapes}


def list_layers(path: str | Path, layout: str | None = None) -> list[int]:
    """Layers of a checkpoint that have differential attention.

    Raises:
        InputError: the file cannot be read, its layout is unknown, or its keys have no layer index.
    """
    file = open_tensors(Path(path))
    found = find_blocks(file.keys(), read_config_fields(file.path), layout, file.path)
    layers = [layer for layer in found.blocks.values() if layer is not None]
    if not layers:
        raise InputError(f"{file.path} holds one block without a layer index; omit --layer")
    return layers


def read_checkpoint(
    path: str | Path, options: CheckpointOptions | None = None, *, layer: int | None = None
) -> Checkpoint:
    """Read one differential-attention block; only its own tensors are read from a large checkpoint.

    Args:
        path: ``.safetensors`` or ``torch.save`` file, index of shards, or a directory with one of these; the block may
            be part of a larger state dict.
        options: settings that the file does not contain; a ``config.json`` next to the weights may contain them, too.
        layer: shorthand for the most common option, `CheckpointOptions.layer`.

    Raises:
        InputError: the file cannot be read, the block is incomplete, a shape or value is wrong, or a setting that
            cannot be inferred was not given.
    """
    options = options or CheckpointOptions()
    if layer is not None:
        if options.layer not in (None, layer):
            raise InputError(f"layer is {layer}, but {options.layer} in the options; give only one of them")
        options = replace(options, layer=layer)
    if options.names is not None:
        raise InputError("names are for a whole model, but this is a block; omit them")
    file = open_tensors(Path(path))
    fields = read_config_fields(file.path)
    found = find_blocks(file.keys(), fields, options.layout, file.path)
    prefix = choose_block(found.blocks, file.path, layer=options.layer, prefix=options.prefix)
    reader = BlockReader(file, fields, found, prefix, options)
    config = reader.config()
    weights = reader.weights(config)
    # Only the shards with tensors of the block are hashed: digests of all shards would require reading the whole model.
    holders = dict.fromkeys(file.holder(key) for key in reader.tensors.keys)
    return Checkpoint(
        config=config,
        weights=weights,
        layout=found.layout.name,
        layer=reader.layer,
        files=tuple(SourceFile(name=p.name, size=p.stat().st_size, sha256=file_sha256(p)) for p in holders),
        keys=reader.tensors.keys,
        options=options,
        defaults=reader.settings.defaults(),
        max_positions=reader.settings.max_positions(),
    )
