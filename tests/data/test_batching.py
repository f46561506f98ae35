from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch

from tests import tiny
from valr_ops.data.batching import IGNORED, Batch, BatchingError, Collator, collate
from valr_ops.data.corpus import ImageStore, write_images
from valr_ops.data.records import Image
from valr_ops.recipe.recipe import LatentRecipe


def batch(latents: LatentRecipe | None) -> Batch:
    return collate(tiny.sequences(), tiny.images(), tiny.processor(), latents=latents)


def row(made: Batch, index: int) -> list[int]:
    return made.input_ids[index][made.attention_mask[index].bool()].tolist()


def test_a_stage_1_batch_is_the_sequences_without_their_marker_pairs() -> None:
    made, control = batch(None), tiny.control()
    for index, sequence in enumerate(tiny.sequences()):
        text = [token for token in sequence.input_ids.tolist() if token not in (control.latent, control.latent_end)]
        assert row(made, index) == text
    assert not made.slot_mask.any() and len(made.segment_rows) == 0 and made.targets == []


@pytest.mark.parametrize(("control_tokens", "slots", "fed"), [("outside", 4, 4), ("inside", 6, 4), ("outside", 1, 1)])
def test_every_segment_is_open_slots_close_with_its_first_slot_named(control_tokens: str, slots: int, fed: int) -> None:
    made = batch(LatentRecipe(slots=slots, control_tokens=control_tokens))  # type: ignore[arg-type]
    control = tiny.control()
    assert made.segment_rows.tolist() == [0, 0, 0, 1, 2, 2]
    for segment_row, start in zip(made.segment_rows.tolist(), made.segment_starts.tolist(), strict=True):
        ids = made.input_ids[segment_row, start - 1 : start + fed + 1].tolist()
        assert ids == [control.latent, *[control.latent_pad] * fed, control.latent_end]
        assert made.slot_mask[segment_row, start : start + fed].all()
    assert made.slot_mask.sum() == 6 * fed
    assert torch.equal(made.slot_mask, made.input_ids == control.latent_pad)


@pytest.mark.parametrize("supervise_close", [False, True])
def test_labels_cover_the_response_and_the_opening_token_but_no_slot(supervise_close: bool) -> None:
    made, control = batch(LatentRecipe(slots=4, supervise_close=supervise_close)), tiny.control()
    supervised = made.labels != IGNORED
    assert torch.equal(made.labels[supervised], made.input_ids[supervised])
    for index, sequence in enumerate(tiny.sequences()):
        expected = made.attention_mask[index].bool() & ~made.slot_mask[index]
        expected[: sequence.prompt_length] = False
        if not supervise_close:
            expected &= made.input_ids[index] != control.latent_end
        assert torch.equal(supervised[index], expected)


def test_padding_is_on_the_right_and_ignored() -> None:
    made = batch(LatentRecipe(slots=4))
    for index, length in enumerate(made.attention_mask.sum(1).tolist()):
        assert made.attention_mask[index, :length].all() and not made.attention_mask[index, length:].any()
        assert (made.input_ids[index, length:] == tiny.processor().tokenizer.pad_token_id).all()
        assert (made.labels[index, length:] == IGNORED).all()


def test_pixels_and_token_types_are_what_the_processor_makes() -> None:
    made, store = batch(LatentRecipe(slots=4)), tiny.images()
    pictures = [store.load(digest) for sequence in tiny.sequences() for digest in sequence.image_digests]
    expected = tiny.processor().image_processor(images=pictures, return_tensors="pt")
    assert torch.equal(made.pixel_values, expected["pixel_values"])
    assert torch.equal(made.image_grid_thw, expected["image_grid_thw"])
    assert made.mm_token_type_ids.sum() == expected["image_grid_thw"].prod(1).sum() // 4
    assert torch.equal(made.mm_token_type_ids == 1, made.input_ids == tiny.processor().image_token_id)


def test_a_wide_image_of_400_by_100_pixels_keeps_its_150_positions() -> None:
    one = [sequence for sequence in tiny.sequences() if sequence.id == "tiny/one"]
    made = collate(one, tiny.images(), tiny.processor(), latents=None)
    assert made.image_grid_thw.tolist() == [[1, 12, 50]] and made.mm_token_type_ids.sum() == 150


def test_a_batch_without_images_has_no_pixels() -> None:
    made = collate([tiny.sequence("text", (), (None,))], tiny.images(), tiny.processor(), latents=LatentRecipe(slots=4))
    assert made.pixel_values is None and made.image_grid_thw is None and made.targets == [None]


def test_rows_do_not_depend_on_who_else_is_in_the_batch() -> None:
    latents, whole = LatentRecipe(slots=4), batch(LatentRecipe(slots=4))
    for index, sequence in enumerate(tiny.sequences()):
        alone = collate([sequence], tiny.images(), tiny.processor(), latents=latents)
        assert row(alone, 0) == row(whole, index)
        assert alone.labels[0].tolist() == whole.labels[index, : alone.labels.shape[1]].tolist()


def test_each_image_is_processed_once_while_the_cache_holds_it() -> None:
    roomy, store = Collator(tiny.images(), tiny.processor(), None), tiny.images()
    roomy.images = store
    first, second = roomy(tiny.sequences()), roomy(tiny.sequences())
    assert store.loads == 3
    assert torch.equal(first.pixel_values, second.pixel_values)
    narrow = Collator(tiny.images(), tiny.processor(), None, cache_bytes=1)
    assert torch.equal(narrow(tiny.sequences()).pixel_values, first.pixel_values)


def test_an_image_with_another_grid_than_its_sequence_was_written_for_is_refused() -> None:
    sequence = dataclasses.replace(tiny.sequences()[0], image_grids=((1, 8, 10),))
    with pytest.raises(BatchingError, match=r"tiny/three.*build the stage latent_corpus again"):
        collate([sequence], tiny.images(), tiny.processor(), latents=None)


def image_store(folder: Path, encoded: dict[str, bytes]) -> ImageStore:
    write_images(folder, [Image(data, tiny.digest(name), 64, 64, "input") for name, data in encoded.items()])
    return ImageStore(folder)


def png(number: int) -> bytes:
    file = io.BytesIO()
    tiny.image(number).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("damaged", [b"no image at all", png(1)[:-100], png(1)[:20] + b"\0" * 200, b""])
def test_a_damaged_image_stops_with_record_image_and_fix_named(tmp_path: Path, damaged: bytes) -> None:
    store = image_store(tmp_path, {"a": png(0), "b": damaged})
    collator = Collator(store, tiny.processor(), None)
    assert collator([tiny.stored(tiny.sequence("whole", ("a",), ()))]).pixel_values is not None
    message = rf"tiny/two: image {tiny.digest('b')[:12]} can't be decoded.*build the stage cot_corpus again"
    with pytest.raises(BatchingError, match=message):
        collator([tiny.stored(tiny.sequences()[2])])


def test_an_image_that_the_corpus_lacks_stops_with_record_image_and_fix_named(tmp_path: Path) -> None:
    store = image_store(tmp_path, {"a": png(0)})
    with pytest.raises(BatchingError, match=rf"tiny/two: .*has no image {tiny.digest('b')};.*make both again"):
        collate([tiny.stored(tiny.sequences()[2])], store, tiny.processor(), latents=None)


def test_a_flipped_byte_among_the_images_stops_with_record_file_and_rows_named(tmp_path: Path) -> None:
    image_store(tmp_path, {"a": png(0), "b": png(1)})
    shard = tmp_path / "images-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[data.index(png(1)) + 30] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BatchingError, match=r"tiny/two: .*images-00000\.arrow is damaged: rows 0 to 1 .*valr run cot_"):
        collate([tiny.stored(tiny.sequences()[2])], ImageStore(tmp_path), tiny.processor(), latents=None)


def test_a_row_may_be_as_long_as_the_limit_with_its_slots_and_not_longer() -> None:
    longest = batch(LatentRecipe(slots=9)).input_ids.shape[1]
    within = Collator(tiny.images(), tiny.processor(), LatentRecipe(slots=9), max_length=longest)
    assert within(tiny.sequences()).input_ids.shape[1] == longest
    short = Collator(tiny.images(), tiny.processor(), LatentRecipe(slots=9), max_length=longest - 1)
    message = rf"tiny/one has {longest} positions.*data\.max_length={longest - 1}; raise .* or lower latents\.slots=9"
    with pytest.raises(BatchingError, match=message):
        short(tiny.sequences())
    with pytest.raises(BatchingError, match=r"more than data\.max_length=9; raise data\.max_length$"):
        Collator(tiny.images(), tiny.processor(), None, max_length=9)(tiny.sequences())


def test_moving_a_batch_moves_its_videos_too() -> None:
    moved = tiny.video_batch().to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 12 and all(tensor.is_meta for tensor in tensors)
