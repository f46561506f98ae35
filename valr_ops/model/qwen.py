"""The one place that knows transformers' Qwen2.5-VL: making it, loading it, saving it, positions and image features.

In: widths for a model made on the spot, perhaps with an installed language model as its decoder, or a local folder or
pinned hub revision of a real one. Out: a Hugging Face folder with ``<latent>``, ``</latent>`` and ``<|latent_pad|>`` as
single tokens, their ids in ``config.valr``.
Always: weights are safetensors, no code of a checkpoint is run, the embedding table is never shrunk, and M-RoPE
positions are computed from the whole batch by `rope_positions`, never from state that an earlier call left behind.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from valr_ops.data.batching import Batch
from valr_ops.data.corpus import CorpusRecord, Records
from valr_ops.data.rewriting import (
    CONTROL_STRINGS,
    INSTRUCTION,
    ControlTokens,
    RewritingError,
    load_processor,
    prompt_messages,
    response_pieces,
)
from valr_ops.model.language_model import LanguageModel, read_language_model
from valr_ops.model.tower import TowerTraining, pretrain_tower
from valr_ops.recipe.recipe import BaseModelRecipe, TinyModelRecipe
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import (  # noqa: E402
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.core_model_loading import revert_weight_conversion  # noqa: E402
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # noqa: E402
from transformers.utils import logging  # noqa: E402

Model = TypeVar("Model", bound=Qwen2_5_VLForConditionalGeneration)

CHAT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2.5-VL's special tokens, in the order of their ids."""
SPARE_ROWS = 32
"""Rows of a tiny embedding table beyond the tokenizer, as the real one has 399."""
TINY_POSITIONS = 8192
"""Positions that a model made on the spot holds: as many as a sequence has by default (`DataRecipe.max_length`)."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat format of Qwen2.5-VL for a tokenizer trained here; real checkpoints bring their own template."""
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class ModelError(ValueError):
    """A checkpoint or a model that can't be used: the message says which, why and what to do."""


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer trained on `texts`, with the chat tokens and the three control tokens.

    Args:
        texts: what the model will read and write.
        vocabulary_size: rows of the embedding table that the tokenizer must fit into, with `SPARE_ROWS` left over.

    Raises:
        ModelError: no room for the 256 bytes and the special tokens.
    """
    special = [*CHAT_TOKENS, *CONTROL_STRINGS]
    learned = vocabulary_size - len(special) - SPARE_ROWS
    if learned < 256:
        raise ModelError(
            f"base.from_scratch.vocabulary_size={vocabulary_size} leaves {learned} rows for text, but the bytes alone "
            f"need 256; set it to {256 + len(special) + SPARE_ROWS} or more"
        )
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=learned, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    bpe = json.loads(trained.to_str())["model"]
    return make_tokenizer(bpe["vocab"], bpe["merges"])


def make_tokenizer(vocabulary: Mapping[str, int], merges: Iterable[Iterable[str]]) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer of byte-level BPE; chat and control tokens that `vocabulary` lacks take the ids behind it."""
    special = [*CHAT_TOKENS, *CONTROL_STRINGS]
    return Qwen2Tokenizer(
        vocab=dict(vocabulary),
        merges=[tuple(merge) for merge in merges],  # type: ignore[misc]
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in special if token not in ("<|endoftext|>", "<|im_end|>")],
    )


def make_processor(tokenizer: Qwen2Tokenizer, base: BaseModelRecipe) -> Qwen2_5_VLProcessor:
    """The real processor class around a tokenizer made here, with the recipe's patch size and pixel bounds."""
    if base.from_scratch is None:
        raise ModelError("make_processor is for base.from_scratch; a real checkpoint brings its own processor")
    patch_size = base.from_scratch.vision_patch_size
    images = Qwen2VLImageProcessor(min_pixels=base.min_pixels, max_pixels=base.max_pixels, patch_size=patch_size)
    return Qwen2_5_VLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=patch_size),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(
    widths: TinyModelRecipe, processor: Qwen2_5_VLProcessor, language: LanguageModel | None = None
) -> Qwen2_5_VLConfig:
    """The nested configuration of a from-scratch model, every vision field set.

    The last vision block sees the whole image and the others windows of 7 x 7 merged tokens, as in the real tower.
    Of 16 M-RoPE pairs 2, 7 and 7 are for time, height and width, since with the real model's 16, 24 and 24 of 64 the
    two would get only slow frequencies; around a language model they have its proportions, 8, 12 and 12. The initial
    standard deviation is .05 because with the usual .02 nothing is learned at this size.
    """
    tokenizer = processor.tokenizer
    if len(tokenizer) > widths.vocabulary_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} ids but base.from_scratch.vocabulary_size={widths.vocabulary_size}; "
            "the embedding table may not be smaller than the tokenizer"
        )
    if widths.hidden_size % widths.attention_heads or widths.hidden_size // widths.attention_heads % 4:
        raise ModelError(
            f"base.from_scratch.hidden_size={widths.hidden_size} over attention_heads={widths.attention_heads} must "
            "give heads whose width is a multiple of 4"
        )
    pairs = widths.hidden_size // widths.attention_heads // 2
    temporal = max(1, pairs // (4 if language else 8))
    temporal += (pairs - temporal) % 2
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in CHAT_TOKENS}
    images = processor.image_processor
    merge = images.merge_size
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": widths.vocabulary_size,
            "hidden_size": widths.hidden_size,
            "intermediate_size": widths.intermediate_size,
            "num_hidden_layers": widths.layers,
            "num_attention_heads": widths.attention_heads,
            "num_key_value_heads": widths.key_value_heads,
            "max_position_embeddings": TINY_POSITIONS,
            "initializer_range": 0.05,
            "rms_norm_eps": language.rms_norm_eps if language else 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": widths.rope_theta,
                "mrope_section": [temporal, (pairs - temporal) // 2, (pairs - temporal) // 2],
            },
            "bos_token_id": special["<|endoftext|>"],
            "eos_token_id": special["<|im_end|>"],
            "pad_token_id": special["<|endoftext|>"],
        },
        vision_config={
            "depth": widths.vision_layers,
            "hidden_size": widths.vision_hidden_size,
            "intermediate_size": 2 * widths.vision_hidden_size,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": widths.vision_patch_size,
            "spatial_merge_size": merge,
            "temporal_patch_size": images.temporal_patch_size,
            "tokens_per_second": 2,
            "window_size": 7 * merge * widths.vision_patch_size,
            "out_hidden_size": widths.hidden_size,
            "fullatt_block_indexes": [widths.vision_layers - 1],
            "initializer_range": 0.05,
        },
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=language is not None,
    )
    config.valr = _ids_as_settings(ControlTokens.of(tokenizer))
    return config


def tiny_model(
    widths: TinyModelRecipe, processor: Qwen2_5_VLProcessor, seed: int, language: LanguageModel | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """A from-scratch model of the real class with random float32 weights, the same for the same seed.

    Args:
        language: becomes the decoder; only vision tower, merger and the rows of new tokens are random then.

    Raises:
        ModelError: the widths do not fit the tokenizer, one another or the language model.
    """
    if language:
        _check_widths(widths, language)
    config = tiny_config(widths, processor, language)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    if language:
        _take_over(model, language, seed)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return freeze_tower(model.eval())


def _check_widths(widths: TinyModelRecipe, language: LanguageModel) -> None:
    for name, width in language.widths.items():
        if getattr(widths, name) != width:
            raise ModelError(
                f"base.from_scratch.{name}={getattr(widths, name)} but the language model of {language.name} has "
                f"{width}; set it to that, or base.language_model to null"
            )


def _take_over(model: Qwen2_5_VLForConditionalGeneration, language: LanguageModel, seed: int) -> None:
    """Put the weights of `language` into the decoder, and rows for new tokens behind its own."""
    given = dict(language.weights)
    table = given.pop("embed_tokens.weight")
    decoder = model.model.language_model
    left = decoder.load_state_dict(given, strict=False)
    biases = [f"layers.{block}.self_attn.{part}_proj.bias" for block in range(len(decoder.layers)) for part in "qkv"]
    if left.unexpected_keys or sorted(left.missing_keys) != sorted(["embed_tokens.weight", *biases]):
        raise ModelError(f"{language.name}: other weights than a decoder of Qwen2.5-VL without biases has: {left}")
    with torch.no_grad():
        for name in biases:
            decoder.get_parameter(name).zero_()
        decoder.embed_tokens.weight[: len(table)] = table
    _set_new_rows(model, len(table), range(len(table), model.config.get_text_config().vocab_size), seed)


def freeze_tower(model: Model) -> Model:
    """`model` with its vision tower and merger frozen, as in both stages (paper, section 4)."""
    model.model.visual.requires_grad_(False)
    return model


def control_tokens(source: Qwen2_5_VLConfig | PreTrainedTokenizerBase) -> ControlTokens:
    """Ids of the control tokens, from a model's config (its ``valr`` settings) or from a tokenizer.

    Raises:
        ModelError: they are missing there.
    """
    if not isinstance(source, Qwen2_5_VLConfig):
        try:
            return ControlTokens.of(source)
        except RewritingError as error:
            raise ModelError(str(error)) from None
    settings = getattr(source, "valr", None) or {}
    names = ("latent_token_id", "latent_end_token_id", "latent_pad_token_id")
    missing = [name for name in names if name not in settings]
    if missing:
        raise ModelError(
            f"config.json has no valr settings {missing}: this is a plain Qwen2.5-VL checkpoint. "
            "Set base.path to it and run the stage base_model, which puts the control tokens in place"
        )
    return ControlTokens(*(int(settings[name]) for name in names))


def _ids_as_settings(ids: ControlTokens) -> dict[str, int]:
    return {
        "latent_token_id": ids.latent,
        "latent_end_token_id": ids.latent_end,
        "latent_pad_token_id": ids.latent_pad,
    }


def check_block(config: Qwen2_5_VLConfig, block: int) -> None:
    """Raise `ModelError` unless `block` is the zero-based index of a decoder block (paper, table 6)."""
    blocks = config.get_text_config().num_hidden_layers
    if not 0 <= block < blocks:
        raise ModelError(
            f"alignment.block={block} but this model has blocks 0..{blocks - 1}; "
            f"set alignment.block to {min(12, blocks // 2)} (12 of 28 in the paper, table 6)"
        )


def check_length(config: Qwen2_5_VLConfig, max_length: int) -> None:
    """Raise `ModelError` unless a sequence of `max_length` positions fits into the model."""
    held = config.get_text_config().max_position_embeddings
    if max_length > held:
        raise ModelError(
            f"data.max_length={max_length} but this model holds {held} positions (max_position_embeddings in its "
            f"config.json); set data.max_length to {held} or less"
        )


def rope_positions(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Tensor:
    """M-RoPE position ids of a whole batch, computed once on the final layout; slots are ordinary text positions.

    Returns:
        [3, batch, length] int64 on the device of the batch; 0 at padding. `model.rope_deltas` is neither read nor set.
    """
    # get_rope_index reads single elements, which on a GPU would wait for the device each time.
    positions, _ = model.model.get_rope_index(
        batch.input_ids.cpu(),
        mm_token_type_ids=batch.mm_token_type_ids.cpu(),
        image_grid_thw=None if batch.image_grid_thw is None else batch.image_grid_thw.cpu(),
        video_grid_thw=None if batch.video_grid_thw is None else batch.video_grid_thw.cpu(),
        second_per_grid_ts=None if batch.second_per_grid_ts is None else batch.second_per_grid_ts.cpu(),
        attention_mask=batch.attention_mask.cpu(),
    )
    return positions.to(batch.input_ids.device)


def vision_embeddings(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Tensor:
    """Merged features of all images and videos of a batch, without gradient (the tower is frozen).

    Returns:
        [vision positions, hidden] in the model's dtype, in reading order over image and video positions alike;
        [0, hidden] for a batch of text alone.

    Raises:
        ModelError: the tower returned something that is not finite, or not as many features as there are positions.
    """
    pixels = [one for one in (batch.pixel_values, batch.pixel_values_videos) if one is not None]
    grids = [one for one in (batch.image_grid_thw, batch.video_grid_thw) if one is not None]
    tower = model.model.visual
    if pixels:
        with torch.no_grad():
            merged = tower(torch.cat(pixels).to(tower.dtype), grid_thw=torch.cat(grids)).pooler_output.to(model.dtype)
    else:
        merged = torch.empty(0, model.config.get_text_config().hidden_size, device=model.device, dtype=model.dtype)
    if not torch.isfinite(merged).all():
        raise ModelError(
            f"the vision tower returned values that are not finite for records {batch.record_ids}; "
            "load the model in float32, or check the checkpoint's vision weights"
        )
    kinds = batch.mm_token_type_ids[batch.mm_token_type_ids > 0]
    if len(kinds) != len(merged):
        raise ModelError(
            f"records {batch.record_ids} have {len(kinds)} image and video positions, but their pixels make "
            f"{len(merged)} features; build the batch with the processor of this model"
        )
    # The tower's output is all images, then all videos, each in reading order: the order of a stable sort by kind.
    return torch.empty_like(merged).index_copy_(0, kinds.argsort(stable=True), merged)


def input_embeddings(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, vision: Tensor | None = None) -> Tensor:
    """[batch, length, hidden]: token embeddings with vision features at the image and video positions.

    Slots hold the embedding of the slot token; whoever feeds latents replaces them.

    Args:
        vision: what `vision_embeddings` returned for this batch; None computes it here.
    """
    embeddings = model.get_input_embeddings()(batch.input_ids)
    vision = vision_embeddings(model, batch) if vision is None else vision
    at_vision = (batch.mm_token_type_ids > 0).unsqueeze(-1)
    return embeddings.masked_scatter(at_vision, vision.to(embeddings.dtype))


def build_base_model(context: StageContext) -> StageReport:
    """The model that stage 1 starts from: made on the spot, or a given checkpoint with the control tokens added.

    Writes a Hugging Face folder, report.json and, for a model made on the spot, tower_loss.png.

    Raises:
        ModelError: the checkpoint is not a whole Qwen2.5-VL, or the recipe's widths or block do not fit.
    """
    recipe = context.recipe
    torch.set_num_threads(recipe.runtime.threads)
    records = Records(context.inputs["cot_corpus"])
    started = time.perf_counter()
    tower: TowerTraining | None = None
    if recipe.base.from_scratch:
        widths = recipe.base.from_scratch
        language = read_language_model(recipe.base.language_model) if recipe.base.language_model else None
        tokenizer = (
            make_tokenizer(language.vocabulary, language.merges)
            if language
            else train_tokenizer(_texts(records), widths.vocabulary_size)
        )
        processor = make_processor(tokenizer, recipe.base)
        model = tiny_model(widths, processor, recipe.seed, language)
        tower = pretrain_tower(
            model,
            processor,
            recipe.data.synthetic,
            steps=widths.tower_pretraining_steps,
            seed=recipe.seed,
            progress=context.progress,
        )
    else:
        model, processor = _given_checkpoint(recipe.base, context)
        added = add_control_tokens(model, processor, recipe.seed)
        context.progress.say(f"control tokens added: {', '.join(added) or 'none, they were there'}")
    check_block(model.config, recipe.alignment.block)
    check_length(model.config, recipe.data.max_length)
    save_model(model, processor, context.out, {})
    summary = {**_parameter_counts(model), "vocabulary": len(processor.tokenizer)}
    summary["spare_rows"] = summary["vocabulary_rows"] - summary["vocabulary"]
    accuracy = {f"tower_{name}_accuracy": value for name, value in tower.accuracy.items()} if tower else {}
    report = {**summary, **accuracy}
    (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    if tower:
        _plot_losses(tower.losses, context.out / "tower_loss.png")
    return StageReport(
        summary=report,
        tables={"Parameters": _parameter_table(summary), "A rendered prompt": _prompt_table(processor, records[0])},
        plots=("tower_loss.png",) if tower else (),
        timings={"seconds": time.perf_counter() - started},
    )


def _texts(records: Iterable[CorpusRecord]) -> Iterator[str]:
    """Everything that a model of this corpus reads and writes, for training its tokenizer."""
    yield INSTRUCTION
    for record in records:
        yield record.question
        yield from response_pieces((step.text for step in record.steps), record.answer)


def _given_checkpoint(
    base: BaseModelRecipe, context: StageContext
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The checkpoint in ``base.path``, or the pinned hub revision, in the precision it was saved in."""
    if base.path is not None:
        folder = Path(base.path)
    else:
        context.progress.say(f"fetching {base.hub_id} at {base.revision}")
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        folder = Path(snapshot_download(str(base.hub_id), revision=base.revision, allow_patterns=patterns))
    _check_checkpoint(folder)
    processor = _load_processor(folder)
    processor.image_processor.size = {"shortest_edge": base.min_pixels, "longest_edge": base.max_pixels}
    return _load_weights(folder, Qwen2_5_VLForConditionalGeneration, "auto"), processor


def add_control_tokens(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seed: int
) -> list[str]:
    """Put the control tokens that are missing on spare rows of the embedding table, and return them.

    The table only ever grows.
    """
    tokenizer = processor.tokenizer
    used = len(tokenizer)
    added = [string for string in CONTROL_STRINGS if string not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"extra_special_tokens": added}, replace_extra_special_tokens=False)
    ids = [tokenizer.convert_tokens_to_ids(string) for string in added]
    if len(tokenizer) > _tables(model)[0].shape[0]:
        model.resize_token_embeddings(-(-len(tokenizer) // 128) * 128, mean_resizing=False)
    _set_new_rows(model, used, ids, seed)
    return added


def _set_new_rows(model: Qwen2_5_VLForConditionalGeneration, used: int, rows: Iterable[int], seed: int) -> None:
    """Begin with `rows` of the embedding and, if it is not tied, of the head at random, as spread as the first `used`.

    Rows near the mean, which disturb the least, are near each other too, and far from where a learning rate made for
    the other rows gets them: with a tied table ``<latent>`` cost 6 nats after 20 updates, instead of 0 after 5.
    """
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in _tables(model):
            known = table[:used].float()
            mean, deviation = known.mean(dim=0), known.std()
            for row in rows:
                table[row] = (mean + deviation * torch.randn(mean.shape, generator=noise)).to(table.dtype)


def _tables(model: Qwen2_5_VLForConditionalGeneration) -> list[Tensor]:
    """The embedding table and, where it has weights of its own, the head: each [rows, hidden]."""
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    return [cast(Tensor, table) for table in ([embedding] if head is embedding else [embedding, head])]


def _parameter_counts(model: Qwen2_5_VLForConditionalGeneration) -> dict[str, int]:
    tables = sum(table.numel() for table in _tables(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    vision = sum(parameter.numel() for parameter in model.model.visual.parameters())
    return {
        "parameters": total,
        "vision_parameters": vision,
        "embedding_parameters": tables,
        "decoder_parameters": total - vision - tables,
        "blocks": model.config.get_text_config().num_hidden_layers,
        "hidden_size": model.config.get_text_config().hidden_size,
        "vocabulary_rows": _tables(model)[0].shape[0],
    }


def _parameter_table(counts: Mapping[str, int]) -> str:
    rows = [
        ("decoder blocks", counts["decoder_parameters"], "trained in both stages"),
        ("embedding and head", counts["embedding_parameters"], "trained in both stages"),
        ("vision tower and merger", counts["vision_parameters"], "frozen"),
        ("all", counts["parameters"], ""),
    ]
    lines = ["| part | parameters | |", "| --- | ---: | --- |"]
    return "\n".join(lines + [f"| {part} | {count:,} | {note} |" for part, count, note in rows])


def _prompt_table(processor: Qwen2_5_VLProcessor, record: CorpusRecord) -> str:
    """The prompt of one record as the chat template renders it, one line a row, before images are expanded."""
    images = sum(image.role == "input" for image in record.images)
    prompt = processor.apply_chat_template(
        prompt_messages(record.question, images), add_generation_prompt=True, tokenize=False
    )
    rendered = prompt + "".join(response_pieces((step.text for step in record.steps), record.answer))
    lines = [f"| {record.id} |", "| --- |"]
    for line in rendered.split("\n"):
        shown = line.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {shown} |")
    return "\n".join(lines)


def _plot_losses(losses: list[float], path: Path) -> None:
    # Imported here because everything that runs a model imports this module, and few of them draw.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(0, len(losses), 2), losses[0::2], label="grids: cell, row, column", color="#4477aa")
    axes.plot(range(1, len(losses), 2), losses[1::2], label="scattered shapes: colour, shape", color="#cc6677")
    axes.set(xlabel="step of the vision tower's pretraining", ylabel="cross-entropy, nats")
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def load_model(
    folder: Path,
    device: str,
    precision: str,
    model_class: type[Model] = Qwen2_5_VLForConditionalGeneration,  # type: ignore[assignment]
    *,
    plain: bool = False,
) -> tuple[Model, Qwen2_5_VLProcessor]:
    """A model folder that a stage wrote, as (model in evaluation mode with its tower frozen, processor).

    Args:
        folder: base_model, stage1_sft or a stage-2 artifact.
        device: "cpu" or "cuda".
        precision: "float32", "bfloat16" or, for tests, "float64".
        model_class: Qwen2_5_VLForConditionalGeneration or a subclass with the same parameters.
        plain: take a Qwen2.5-VL as it is released too, which has no control tokens.

    Raises:
        ModelError: no or another kind of model, missing or truncated weights, control tokens missing or at ids other
            than the tokenizer's.
    """
    _check_checkpoint(folder)
    if precision not in _PRECISIONS:
        raise ModelError(f"precision={precision!r} is not known; choose one of {', '.join(_PRECISIONS)}")
    processor = _load_processor(folder)
    model = _load_weights(folder, model_class, _PRECISIONS[precision])
    if not plain or getattr(model.config, "valr", None):
        ids, read = control_tokens(model.config), control_tokens(processor.tokenizer)
        if ids != read:
            raise ModelError(
                f"{folder}: config.valr has the control tokens {ids} but the tokenizer has {read}; "
                "tokenizer and weights come from different models, build the artifact again"
            )
    model.to(torch.device(device))  # type: ignore[arg-type]
    return freeze_tower(model.eval()), processor


def save_model(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: Path, settings: Mapping[str, Any]
) -> None:
    """Write `model` and `processor` as a Hugging Face folder; the same model gives the same bytes.

    Args:
        settings: goes into ``config.valr`` beside the ids of the control tokens, e.g. slots, block and stage.
    """
    ids = control_tokens(processor.tokenizer)
    model.config.valr = {**_ids_as_settings(ids), **dict(sorted(settings.items()))}
    write_model(model, folder)
    processor.save_pretrained(folder)


def write_model(model: Qwen2_5_VLForConditionalGeneration, folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Write config, generation config and weights of `model` to `folder`, under the names of the stock class.

    transformers' own `save_pretrained` would import every training engine that is installed, and name our subclass,
    which is unknown to every other reader.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [Qwen2_5_VLForConditionalGeneration.__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    weights = model.state_dict()
    if model.lm_head.weight is model.get_input_embeddings().weight:
        del weights["lm_head.weight"]
    save_torch_state_dict(
        revert_weight_conversion(model, weights), folder, max_shard_size=max_shard_size, metadata={"format": "pt"}
    )


def _check_checkpoint(folder: Path) -> None:
    """Raise `ModelError` unless `folder` holds a whole Qwen2.5-VL checkpoint in safetensors."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelError(
            f"{folder} has no config.json; give the folder of a Qwen2.5-VL checkpoint in Hugging Face form"
        )
    try:
        kind = json.loads(config_path.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{config_path} is no JSON object ({error}); copy the checkpoint again") from None
    if kind != Qwen2_5_VLConfig.model_type:
        raise ModelError(
            f"{folder} holds a model of type {kind!r}, but only {Qwen2_5_VLConfig.model_type!r} is supported; "
            "set base.path to a Qwen2.5-VL checkpoint"
        )
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        names = sorted(set(json.loads(index_path.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ModelError(
                f"{folder} lacks {name}; weights must be safetensors (pickled .bin files are not read), "
                "download the missing file or convert the checkpoint"
            )
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is truncated or no safetensors file ({error}); copy it again") from None


def _load_processor(folder: Path) -> Qwen2_5_VLProcessor:
    try:
        return load_processor(folder)
    except RewritingError as error:
        raise ModelError(str(error)) from None


def _load_weights(folder: Path, model_class: type[Model], precision: torch.dtype | str) -> Model:
    shown = logging.is_progress_bar_enabled()
    # Its bar says nothing about a local file, and stands in the way of ours.
    logging.disable_progress_bar()
    try:
        loaded: Any = model_class.from_pretrained(
            folder, dtype=precision, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"{folder}: the weights do not fit config.json ({error}); copy the checkpoint again") from None
    finally:
        if shown:
            logging.enable_progress_bar()
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        wrong = missing or sorted(str(key) for key in info["mismatched_keys"])
        raise ModelError(
            f"{folder}: {len(wrong)} weights are missing or of another shape, first {wrong[0]}; "
            "copy the checkpoint again"
        )
    return model
