from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from valr_ops.data.batching import Batch, collate
from valr_ops.data.corpus import CorpusRecord, ImageReference, write_records
from valr_ops.data.records import Step, Target
from valr_ops.data.rewriting import CONTROL_STRINGS
from valr_ops.model.qwen import (
    SPARE_ROWS,
    ModelError,
    build_base_model,
    check_block,
    check_length,
    control_tokens,
    input_embeddings,
    load_model,
    rope_positions,
    save_model,
    train_tokenizer,
    vision_embeddings,
)
from valr_ops.recipe.recipe import LatentRecipe, Recipe
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.store.progress import Progress
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import (  # noqa: E402
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
)


def batch() -> Batch:
    return collate(tiny.sequences(), tiny.images(), tiny.processor(), latents=LatentRecipe(slots=4))


def build(folder: Path, recipe: Recipe) -> tuple[Path, StageReport]:
    corpus, out = folder / "cot_corpus", folder / "base_model"
    corpus.mkdir(parents=True)
    out.mkdir()
    steps = tuple(Step(text, Target(0)) for text in tiny.STEPS)
    images = (ImageReference("a", "input", 64, 64),)
    record = CorpusRecord(
        "tiny/0", "tiny", "CC0-1.0", "train", "single_view", tiny.QUESTION, "blue square", images, steps
    )
    write_records(corpus, [record])
    context = StageContext("base_model", recipe, {"cot_corpus": corpus}, out, folder / "work", Progress())
    return out, build_base_model(context)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny.model(seed=3), tiny.processor(), folder, {"slots": 4, "block": 1})
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL checkpoint as the hub has them: no control tokens anywhere, spare rows in the embedding table."""
    folder = tmp_path_factory.mktemp("plain")
    model, processor = tiny.model(seed=5), tiny.processor()
    del model.config.valr
    bpe = json.loads(processor.tokenizer.backend_tokenizer.to_str())["model"]
    extra = [token for token in processor.tokenizer.extra_special_tokens if token not in CONTROL_STRINGS]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=extra,
    )
    model.save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        video_processor=processor.video_processor,
        chat_template=processor.chat_template,
    ).save_pretrained(folder)
    return folder


def test_the_control_strings_are_one_id_each_and_survive_saving(saved: Path) -> None:
    processor = AutoProcessor.from_pretrained(saved, local_files_only=True)
    for string in CONTROL_STRINGS:
        assert len(processor.tokenizer.encode(string)) == 1
        assert processor.tokenizer.encode(f"a {string}b") == [
            *processor.tokenizer.encode("a "),
            *processor.tokenizer.encode(string),
            *processor.tokenizer.encode("b"),
        ]
    assert control_tokens(processor.tokenizer) == tiny.control()
    assert processor.tokenizer.decode(tiny.sequences()[0].input_ids, skip_special_tokens=True).count("latent") == 0


def test_the_tokenizer_leaves_spare_rows_and_is_a_function_of_its_texts() -> None:
    texts = [f"{word} {number}" for word in ("red", "blue", "circle") for number in range(300)]
    tokenizer = train_tokenizer(texts, 448)
    assert len(tokenizer) <= 448 - SPARE_ROWS
    assert tokenizer.get_vocab() == train_tokenizer(texts, 448).get_vocab()
    assert tokenizer.decode(tokenizer.encode("naïve Δ 漢字 🙂\n")) == "naïve Δ 漢字 🙂\n"


def test_a_vocabulary_too_small_for_all_bytes_is_refused() -> None:
    with pytest.raises(ModelError, match="vocabulary_size=256"):
        train_tokenizer(["text"], 256)


def test_a_saved_model_loads_by_name_of_its_real_class_with_identical_weights(saved: Path) -> None:
    before = tiny.model(seed=3).state_dict()
    foreign = AutoModelForImageTextToText.from_pretrained(saved, local_files_only=True)
    ours, processor = load_model(saved, "cpu", "float32")
    for after in (foreign, ours):
        assert type(after).__name__ == "Qwen2_5_VLForConditionalGeneration"
        assert after.state_dict().keys() == before.keys()
        assert all(torch.equal(after.state_dict()[name], before[name]) for name in before)
    assert ours.config.valr["slots"] == 4 and control_tokens(ours.config) == control_tokens(processor.tokenizer)
    assert not any(parameter.requires_grad for parameter in ours.model.visual.parameters())
    assert all(parameter.requires_grad for parameter in ours.model.language_model.parameters())
    assert processor.image_processor.patch_size == 8


def test_positions_of_every_row_are_those_of_the_row_alone() -> None:
    model, made = tiny.model(), batch()
    positions = rope_positions(model, made)
    assert positions.shape == (3, *made.input_ids.shape)
    seen = 0
    for row, sequence in enumerate(tiny.sequences()):
        length, images = int(made.attention_mask[row].sum()), len(sequence.image_digests)
        alone, _ = model.model.get_rope_index(
            made.input_ids[row : row + 1, :length],
            mm_token_type_ids=made.mm_token_type_ids[row : row + 1, :length],
            image_grid_thw=made.image_grid_thw[seen : seen + images],
        )
        seen += images
        assert torch.equal(positions[:, row, :length], alone[:, 0])
        assert (positions[:, row, length:] == 0).all()
    slots = positions[:, made.slot_mask]
    assert (slots == slots[0]).all()


def test_positions_and_embeddings_make_the_forward_that_transformers_makes_from_ids() -> None:
    model, made = tiny.model(), batch()
    theirs = model(
        input_ids=made.input_ids,
        attention_mask=made.attention_mask,
        pixel_values=made.pixel_values,
        image_grid_thw=made.image_grid_thw,
        mm_token_type_ids=made.mm_token_type_ids,
    ).logits
    assert model.model.rope_deltas is not None
    model.model.rope_deltas += 7
    ours = model(
        inputs_embeds=input_embeddings(model, made),
        attention_mask=made.attention_mask,
        position_ids=rope_positions(model, made),
    ).logits
    real = made.attention_mask.bool()
    assert torch.allclose(ours[real], theirs[real], atol=1e-6)


def text_batch() -> Batch:
    rows = [tiny.sequence("short", (), ()), tiny.sequence("long", (), (None, None))]
    return collate(rows, tiny.images(), tiny.processor(), latents=LatentRecipe(slots=4))


def text_and_images_batch() -> Batch:
    rows = [tiny.sequence("text", (), (None,)), *tiny.sequences()]
    return collate(rows, tiny.images(), tiny.processor(), latents=LatentRecipe(slots=4))


def frames_batch() -> Batch:
    """Four frames of a clip as four images of one prompt, beside a row about one of them."""
    store = tiny.Images(dict(zip("0123", tiny.video(5, 4), strict=True)))
    rows = [tiny.sequence("frames", ("0", "1", "2", "3"), (None,), store), tiny.sequence("frame", ("2",), (), store)]
    return collate(rows, store, tiny.processor(), latents=LatentRecipe(slots=4))


@pytest.mark.parametrize("make", [tiny.video_batch, text_batch, text_and_images_batch, frames_batch])
def test_what_the_decoder_gets_is_what_transformers_makes_of_any_mix_of_text_images_and_videos(make: Any) -> None:
    model, made = tiny.model(dtype=torch.float64), make()
    stock: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: stock.update(kwargs), with_kwargs=True
    )
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    theirs = model(
        input_ids=made.input_ids,
        attention_mask=made.attention_mask,
        mm_token_type_ids=made.mm_token_type_ids,
        **{name: getattr(made, name) for name in names},
    ).logits
    hook.remove()
    inputs, positions = input_embeddings(model, made), rope_positions(model, made)
    ours = model(inputs_embeds=inputs, attention_mask=made.attention_mask, position_ids=positions).logits
    real = made.attention_mask.bool()
    assert torch.allclose(inputs[real], stock["inputs_embeds"][real], atol=1e-12)
    assert torch.allclose(ours[real], theirs[real], atol=1e-10)
    if made.pixel_values is not None:
        assert torch.equal(positions, stock["position_ids"])


def test_a_video_has_the_positions_of_its_seconds() -> None:
    model, made = tiny.model(), tiny.video_batch()
    assert made.second_per_grid_ts is not None and made.second_per_grid_ts.tolist() == pytest.approx([1, 2, 2 / 3, 4])
    first = rope_positions(model, made)[0, 0][made.mm_token_type_ids[0] == 2].unique()
    assert (first - first[0]).tolist() == [0, 2]  # two positions a second, two temporal patches
    slower = replace(made, second_per_grid_ts=3 * made.second_per_grid_ts)
    first = rope_positions(model, slower)[0, 0][made.mm_token_type_ids[0] == 2].unique()
    assert (first - first[0]).tolist() == [0, 6]


def test_vision_embeddings_are_one_per_vision_position_and_carry_no_gradient() -> None:
    model = tiny.model()
    for made, positions in ((batch(), 16 + 150 + 32 + 16), (tiny.video_batch(), 32 + 12 + 18 + 16 + 16)):
        features = vision_embeddings(model, made)
        assert features.shape == ((made.mm_token_type_ids > 0).sum(), 32) == (positions, 32)
        assert not features.requires_grad
    text = collate([tiny.sequence("text", (), ())], tiny.images(), tiny.processor(), latents=None)
    assert vision_embeddings(model, text).shape == (0, 32)
    assert rope_positions(model, text)[0].tolist() == [list(range(text.input_ids.shape[1]))]


def test_features_that_are_there_already_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny.model(), tiny.video_batch()
    vision, expected = vision_embeddings(model, made), input_embeddings(model, made)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the tower ran")

    monkeypatch.setattr(model.model.visual, "forward", refuse)
    assert torch.equal(input_embeddings(model, made, vision), expected)


def test_vision_features_that_are_not_finite_stop_with_the_records_named() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.visual.merger.ln_q.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="tiny/three"):
        vision_embeddings(model, batch())
    with pytest.raises(ModelError, match="tiny/mixed"):
        vision_embeddings(model, tiny.video_batch())


def test_pixels_that_do_not_fit_the_positions_stop_with_the_records_named() -> None:
    model, made = tiny.model(), tiny.video_batch()
    with pytest.raises(ModelError, match=r"tiny/mixed.*94 image and video positions.*32 features"):
        vision_embeddings(model, replace(made, pixel_values_videos=None, video_grid_thw=None))
    with pytest.raises(ModelError, match=r"16 image and video positions.* 0 features"):
        text = collate(tiny.sequences()[-1:], tiny.images(), tiny.processor(), latents=None)
        vision_embeddings(model, replace(text, pixel_values=None, image_grid_thw=None))


def test_two_builds_of_a_base_model_give_equal_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    one, report = build(tmp_path / "one", tiny.recipe())
    two, _ = build(tmp_path / "two", tiny.recipe())
    other, _ = build(tmp_path / "other", tiny.recipe(seed=1))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tower_loss.png", "report.json"} <= set(names)
    assert [name for name in names if (one / name).read_bytes() != (two / name).read_bytes()] == []
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    model, _ = load_model(one, "cpu", "float32")
    assert report.summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert 0 <= report.summary["tower_cell_accuracy"] <= 1  # type: ignore[operator]
    assert "&lt;\\|im_start\\|>user" in report.tables["A rendered prompt"]


def test_control_tokens_of_a_checkpoint_take_spare_rows_as_spread_as_the_others(plain: Path, tmp_path: Path) -> None:
    base = {"base.from_scratch": None, "base.path": str(plain)}
    out, _ = build(tmp_path, tiny.recipe(**base))
    before = tiny.model(seed=5).state_dict()
    model, processor = load_model(out, "cpu", "float32")
    ids = control_tokens(processor.tokenizer)
    used = ids.latent
    assert (ids.latent, ids.latent_end, ids.latent_pad) == (used, used + 1, used + 2)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        old, new = before[name], model.state_dict()[name]
        assert new.shape == old.shape
        assert torch.equal(new[:used], old[:used]) and torch.equal(new[used + 3 :], old[used + 3 :])
        mean, deviation = old[:used].mean(0), old[:used].std()
        apart = new[used : used + 3] - mean
        assert (apart.std(1) / deviation).allclose(torch.tensor(1.0), atol=0.3)
        # Far from each other as well: what comes after <latent> must not look like what comes after </latent>.
        assert torch.cosine_similarity(apart[0], apart[1], dim=0).abs() < 0.5


def test_a_table_without_spare_rows_grows_and_never_shrinks(plain: Path) -> None:
    from valr_ops.model.qwen import add_control_tokens

    processor = Qwen2_5_VLProcessor.from_pretrained(plain, local_files_only=True)
    model = tiny.model()
    model.resize_token_embeddings(len(processor.tokenizer) + 1, mean_resizing=False)
    assert add_control_tokens(model, processor, seed=0) == list(CONTROL_STRINGS)
    assert model.get_input_embeddings().weight.shape[0] == 384 >= len(processor.tokenizer)
    assert add_control_tokens(model, processor, seed=0) == []


def test_a_checkpoint_without_control_tokens_is_refused_with_the_fix(plain: Path) -> None:
    with pytest.raises(ModelError, match=r"Set base\.path to it and run the stage base_model"):
        load_model(plain, "cpu", "float32")


def test_a_truncated_foreign_or_pickled_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    truncated = shutil.copytree(saved, tmp_path / "truncated")
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        load_model(truncated, "cpu", "float32")
    (truncated / "model.safetensors").rename(truncated / "pytorch_model.bin")
    with pytest.raises(ModelError, match="must be safetensors"):
        load_model(truncated, "cpu", "float32")
    (truncated / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="'llama'"):
        load_model(truncated, "cpu", "float32")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path, "cpu", "float32")


def test_weights_that_do_not_fit_the_config_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    config["text_config"]["layer_types"] = ["full_attention"] * 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="weights are missing"):
        load_model(folder, "cpu", "float32")


def test_a_block_the_model_does_not_have_is_refused_with_the_range() -> None:
    check_block(tiny.model().config, 2)
    with pytest.raises(ModelError, match=r"alignment\.block=3 but this model has blocks 0\.\.2"):
        check_block(tiny.model().config, 3)


def test_sequences_longer_than_the_model_are_refused_before_it_is_written(tmp_path: Path) -> None:
    config = tiny.model().config
    held = config.get_text_config().max_position_embeddings
    check_length(config, held)
    wanted = rf"data\.max_length={held + 1} but this model holds {held} positions .* set data\.max_length to {held}"
    with pytest.raises(ModelError, match=wanted):
        build(tmp_path, tiny.recipe(**{"data.max_length": held + 1}))
    assert not any((tmp_path / "base_model").iterdir())
