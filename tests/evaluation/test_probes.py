"""Interventions do what they say and nothing else, attention is that of the answer, and sentences follow from rows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tests import tiny
from tests.model.reasoner import CONTROL, SLOTS, batch_of, encoded, prompts, save_reasoner
from tests.training import inputs
from valr_ops.data.batching import collate
from valr_ops.data.images import ImageLimits
from valr_ops.data.records import Image, Record
from valr_ops.data.sequences import Sequences
from valr_ops.evaluation import interventions, probes
from valr_ops.evaluation.findings import check_sentences, decay_sentences
from valr_ops.evaluation.interventions import (
    CONDITIONS,
    LOOKED_AT,
    Answered,
    ProbeError,
    StudyItem,
    Subject,
    ask,
    attention,
    donors,
    latent_intervention,
    replay,
)
from valr_ops.evaluation.questions import Showing, benchmark_of_records
from valr_ops.model import answering, latents
from valr_ops.model.alignment import Projectors, alignment_loss
from valr_ops.model.answering import Generation
from valr_ops.model.decoding import Intervention, ValrForConditionalGeneration
from valr_ops.model.qwen import input_embeddings, load_model, rope_positions, save_model
from valr_ops.recipe.recipe import EvaluationRecipe
from valr_ops.store.artifacts import StageContext

LIMITS = EvaluationRecipe(batch_size=5, max_new_tokens=16, max_segments=3, force_first_latent=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage2")
    save_reasoner(path)
    return path


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    model, processor = load_model(folder, "cpu", "float64", ValrForConditionalGeneration)
    return Subject(model, processor, LIMITS)


@pytest.fixture(scope="module")
def items() -> list[StudyItem]:
    """Eight questions with none, one or two pictures; an answer of an even number of letters is right."""
    return [
        StudyItem(f"mine/{row}", prompt, lambda said: len(said.visible_text) % 2 == 0)
        for row, prompt in enumerate(prompts(8))
    ]


@pytest.fixture(scope="module")
def normal(subject: Subject, items: list[StudyItem]) -> list[Answered]:
    return ask(subject, items)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with random weights writes no line breaks, so every third id ends a step."""
    every_third = frozenset(range(0, CONTROL.latent, 3))
    for module in (answering, interventions):
        monkeypatch.setattr(module, "ends_of_steps", lambda tokenizer: every_third)


def texts(said: Sequence[Answered]) -> list[str]:
    return [one.generation.text for one in said]


def stock_scores(model: Any, item: StudyItem, one: Answered, blind_after: int | None = None) -> Tensor:
    """[ids, vocabulary]: what transformers' decoder says before every id of an answer, given what the slots were fed.

    Positions behind the step `blind_after` don't see the images; at 0 no position does.
    """
    asked = encoded([item.prompt])
    width, ids = asked["input_ids"].shape[1], torch.tensor([one.generation.ids])
    whole = torch.cat([asked["input_ids"], ids], dim=1)
    batch = batch_of(asked, whole, torch.ones_like(whole))
    embedded = input_embeddings(model, batch)
    if one.fed:
        slots = (whole[0, :-1] == CONTROL.latent_pad).nonzero().flatten()
        embedded[0, slots] = torch.cat(one.fed)
    seen = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
    if blind_after is not None:
        behind = torch.tensor([0] * width + list(one.steps)) >= (blind_after + 1 if blind_after else 0)
        seen &= ~(behind[:, None] & (batch.mm_token_type_ids[0] == 1))
        seen |= torch.eye(len(seen), dtype=torch.bool)
    bias = torch.zeros(1, 1, *seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    states = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=bias,
        position_ids=rope_positions(model, batch),
        use_cache=False,
    ).last_hidden_state[0]
    return torch.cat([model.lm_head(states[width - 1 : -1]), states[width - 1 : -1]], dim=1)


def is_what_the_model_says(item: StudyItem, one: Answered, said: Tensor, vocabulary: int) -> None:
    """Every id that was chosen is the likeliest, and every slot was fed the state before it."""
    scores, states, opened = said[:, :vocabulary].clone(), said[:, vocabulary:], 0
    scores[:, [CONTROL.latent_pad, CONTROL.latent_end]] = float("-inf")
    for place, token in enumerate(one.generation.ids):
        if opened == LIMITS.max_segments:
            scores[place, CONTROL.latent] = float("-inf")
        if place and token not in (CONTROL.latent_pad, CONTROL.latent_end):
            assert token == int(scores[place].argmax()), item.id
        opened += token == CONTROL.latent
    fed = [place for place, token in enumerate(one.generation.ids[:-1]) if token == CONTROL.latent_pad]
    if fed:
        torch.testing.assert_close(torch.cat(one.fed), states[fed], atol=1e-9, rtol=1e-9)


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_images_are_hidden_from_everything_behind_a_step_and_from_nothing_before(
    subject: Subject, items: list[StudyItem], cut: int
) -> None:
    blind = ask(subject, items, Intervention(image_steps=cut))
    assert max(one.steps[-1] for one in blind) > cut
    with torch.no_grad():
        for item, one in zip(items, blind, strict=True):
            is_what_the_model_says(item, one, stock_scores(subject.model, item, one, cut), 448)


@pytest.mark.usefixtures("short_steps")
def test_hiding_images_behind_the_last_step_changes_nothing_and_earlier_it_changes_answers_with_images_only(
    subject: Subject, items: list[StudyItem]
) -> None:
    seeing = ask(subject, items)
    most = max(one.steps[-1] for one in seeing)
    assert texts(ask(subject, items, Intervention(image_steps=most))) == texts(seeing)
    blind = texts(ask(subject, items, Intervention(image_steps=0)))
    with_images = [bool(item.prompt[0]) for item in items]
    changed = [one != other for one, other in zip(blind, texts(seeing), strict=True)]
    assert any(changed)
    assert not any(one for one, has in zip(changed, with_images, strict=True) if not has)


def test_a_teacher_forced_pass_gives_the_scores_that_the_answer_was_chosen_by(
    subject: Subject, items: list[StudyItem], normal: list[Answered]
) -> None:
    _, scores = replay(subject, items, normal)
    with torch.no_grad():
        for item, one, found in zip(items, normal, scores, strict=True):
            wanted = stock_scores(subject.model, item, one)
            is_what_the_model_says(item, one, wanted, 448)
            torch.testing.assert_close(found, wanted[1:, :448], atol=1e-9, rtol=1e-9)


def test_attention_is_that_of_the_stock_decoder_and_adds_up(
    folder: Path, subject: Subject, items: list[StudyItem], normal: list[Answered]
) -> None:
    stock, _ = load_model(folder, "cpu", "float64", ValrForConditionalGeneration)
    stock.set_attn_implementation("eager")
    for item, one, found in zip(items, normal, attention(subject, items, normal), strict=True):
        torch.testing.assert_close(found.shares.sum(dim=2), torch.ones(found.shares.shape[:2]).double())
        torch.testing.assert_close(found.even.sum(dim=1), torch.ones(len(found.even)).double())
        asked = encoded([item.prompt])
        width, ids = asked["input_ids"].shape[1], torch.tensor([one.generation.ids[:-1]])
        whole = torch.cat([asked["input_ids"], ids], dim=1)
        batch = batch_of(asked, whole, torch.ones_like(whole))
        with torch.no_grad():
            embedded = input_embeddings(stock, batch)
            embedded[0, (whole[0] == CONTROL.latent_pad).nonzero().flatten()] = torch.cat(one.fed)
            weights = stock.model.language_model(
                inputs_embeds=embedded,
                position_ids=rope_positions(stock, batch),
                output_attentions=True,
                use_cache=False,
            ).attentions
        mean = torch.stack(weights)[:, 0].mean(dim=1)[:, width:]
        image = batch.mm_token_type_ids[0] == 1
        segment = (whole[0][:, None] == torch.tensor([*vars(CONTROL).values()])).any(dim=1)
        prompt = (torch.arange(len(image)) < width) & ~image
        wanted = [mean[:, :, kind].sum(dim=2) for kind in (image, prompt, segment, ~image & ~prompt & ~segment)]
        # The stock softmax is one of float32.
        torch.testing.assert_close(found.shares, torch.stack(wanted, dim=2), atol=1e-6, rtol=1e-5)
        assert torch.equal(found.in_segment, segment[width:])
        even = image.sum() / torch.arange(width + 1, width + 1 + len(ids[0])).double()
        torch.testing.assert_close(found.even[:, LOOKED_AT.index("image")], even)


def test_slots_are_fed_what_the_condition_says(
    subject: Subject, items: list[StudyItem], normal: list[Answered]
) -> None:
    said = {
        condition: ask(subject, items, latent_intervention(condition, items, normal, seed=3))
        for condition in CONDITIONS
    }
    assert texts(said["normal"]) == texts(normal)
    assert not any(states.any() for one in said["zeroed"] for states in one.fed)
    assert all("<|latent_pad|>" not in text and "<latent></latent>" in text for text in texts(said["markers"]))
    for one, other in zip(said["noised"], normal, strict=True):
        # Before the first noise both are the same, so the first states have the same norm.
        torch.testing.assert_close(one.fed[0][0].norm(), other.fed[0][0].norm())
        assert abs(float(F.cosine_similarity(one.fed[0][0], other.fed[0][0], dim=0))) < 0.9
    for one, donor in zip(said["other"], donors(items, normal), strict=True):
        for number, states in enumerate(one.fed):
            lent = normal[donor].fed[number % len(normal[donor].fed)]
            for slot, state in enumerate(states):
                assert torch.equal(state, lent[slot % len(lent)])
    for condition in CONDITIONS[1:]:
        assert texts(said[condition]) != texts(normal), condition


def test_an_item_is_treated_alike_whatever_stands_in_its_batch(
    subject: Subject, items: list[StudyItem], normal: list[Answered]
) -> None:
    one_by_one = replace(subject, limits=LIMITS.model_copy(update={"batch_size": 1}))
    for condition in ("noised", "other"):
        intervention = latent_intervention(condition, items, normal, seed=3)
        assert texts(ask(one_by_one, items, intervention)) == texts(ask(subject, items, intervention)), condition


def test_latents_of_another_item_come_from_one_with_other_pictures_or_are_refused(
    items: list[StudyItem], normal: list[Answered]
) -> None:
    (twice, question), other = (items[1].prompt[0], "Again?"), items[2]
    again = [items[1], replace(items[1], id="again", prompt=(twice, question)), other]
    assert donors(again, [normal[1], normal[1], normal[2]]) == [2, 2, 0]
    with pytest.raises(ProbeError, match="no other of the 1 items shows other pictures"):
        latent_intervention("other", items[:1], normal[:1], seed=0)
    with pytest.raises(ProbeError, match="item mine/1: no other of the 2 items shows other pictures"):
        donors(again[:2], [normal[1], normal[1]])


def test_a_model_without_latents_is_refused_and_its_looking_is_studied_all_the_same(
    tmp_path: Path, items: list[StudyItem]
) -> None:
    save_model(tiny.model(), tiny.processor(), tmp_path, {"stage": 1})
    model, processor = load_model(tmp_path, "cpu", "float32", ValrForConditionalGeneration)
    plain = Subject(model, processor, LIMITS)
    with pytest.raises(ProbeError, match="this model has no latents"):
        probes.latent_check(plain, items, seed=0)
    looked, masked = probes.visual_decay("stage1_sft", plain, items)
    assert {row["positions"] for row in looked} == {"text"}
    assert {row["latents"] for row in looked} == {0.0}
    assert {row["image_steps"] for row in masked} >= {-1, 0}


def test_a_model_that_opens_no_segment_is_asked_once_and_the_result_says_so(
    subject: Subject, items: list[StudyItem]
) -> None:
    never = replace(subject, limits=LIMITS.model_copy(update={"max_segments": 0, "force_first_latent": False}))
    rows, left_out = probes.latent_check(never, items, seed=0)
    assert {row["condition"] for row in rows} == {"normal"} and left_out == []
    (said,) = check_sentences("stage2_valr_m", rows, left_out, 0.95)
    assert "opens a segment in 0.0 % of its answers. It never enters latent mode" in said


@pytest.mark.parametrize(
    ("wrong_under", "says"),
    [
        ({"zeroed", "noised", "other", "markers"}, "The answers depend on what the latents hold"),
        ({"other"}, "That the model needs them is not shown: without any slot it is not worse."),
        ({"zeroed", "markers"}, "Foreign states in the slots do harm (zeroed), but that another item's"),
        ({"markers"}, "The slots are needed, but that it matters what they hold is not shown"),
        (set(), "That the model uses its latents is not shown"),
    ],
)
def test_the_verdict_on_the_latents_follows_from_the_conditions_that_do_harm(wrong_under: set[str], says: str) -> None:
    rows = [
        {
            "condition": condition,
            "item": str(item),
            "cluster": "",
            "correct": condition not in wrong_under or item % 4 == 0,
            "changed": condition in wrong_under,
            "segments": 1,
        }
        for condition in CONDITIONS
        for item in range(40)
    ]
    first, conditions = check_sentences("stage2_valr_m", rows, [], 0.95)
    assert says in first
    assert conditions.count("n = 40") == 4
    assert conditions.count("differs") == len(wrong_under)


@pytest.mark.parametrize(
    ("even_at_last", "says"),
    [
        (0.2, "fades, more than the growing length alone would make it."),
        (0.021, "fades; whether by more or less than the growing length alone would make it is not shown."),
        (0.0, "fades, less than the growing length alone would make it."),
    ],
)
def test_what_is_said_of_decay_is_measured_against_attention_spread_evenly(even_at_last: float, says: str) -> None:
    looked = [
        {"model": "sft", "item": str(item), "step": step, "positions": "text", "last_line": False}
        | {"image": image + item / 1000, "even_image": even}
        for item in range(20)
        for step, image, even in ((1, 0.5, 0.4), (2, 0.3, 0.3), (3, 0.1 + item / 500, even_at_last))
    ]
    masked = [
        {"model": "sft", "item": str(item), "cluster": "", "image_steps": cut}
        | {"correct": cut != 0, "changed": cut == 0}
        for cut in (-1, 0, 1)
        for item in range(20)
    ]
    (said,) = decay_sentences(looked, masked, 0.95)
    assert f"Attention to the image {says}" in said
    assert "With its images it has 100.0 % of 20 items right." in said
    assert "Without ever seeing them: −100.0 points" in said
    assert "With the images hidden after step 1: +0.0 points" in said


def test_the_control_of_a_map_is_another_image_at_the_same_step_where_there_is_one() -> None:
    targets = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("c", 0)]
    assert probes.controls(targets) == [2, 3, 5, 1, 5, 0]
    with pytest.raises(ProbeError, match="all 2 targets are on one image"):
        probes.controls(targets[:2])


def context(stage: str, folders: dict[str, Path], root: Path, **evaluation: Any) -> StageContext:
    """A context of a study of few items."""
    recipe = tiny.recipe(**{"alignment.teachers": ["dinov3", "siglip2"], "teachers.siglip2": _teacher()})
    limits = recipe.evaluation.model_copy(update={"study_items": 8, **evaluation})
    return inputs.context(stage, recipe.model_copy(update={"evaluation": limits}), folders, root)


def _teacher() -> dict[str, Any]:
    return tiny.recipe().teachers["dinov3"].model_dump(mode="json")


def test_the_maps_are_the_alignment_that_training_computes(tmp_path: Path) -> None:
    folders = inputs.write_inputs(tmp_path / "inputs", ("dinov3", "siglip2"))
    del folders["stage1_sft"]
    inputs.write_corpus(folders["latent_corpus"], [replace(one, split="validation") for one in inputs.sequences(4)])
    model = tiny.model(3)
    stage2 = folders["stage2_valr_m"] = tmp_path / "stage2_valr_m"
    settings = {"slots": SLOTS, "control_tokens": "outside", "block": 1, "stage": 2}
    save_model(model, tiny.processor(), stage2, settings)
    at = context("alignment_maps", folders, tmp_path)
    torch.manual_seed(0)
    projectors = Projectors({"dinov3": 6, "siglip2": 6}, 32, at.recipe.alignment)
    save_file(projectors.state_dict(), stage2 / "projectors.safetensors")
    report = probes.build_alignment_maps(at)

    rows = pq.read_table(at.out / "maps.parquet").to_pylist()
    assert report.summary["segments"] * 2 == len(rows) and all(check.passed for check in report.checks)
    assert all(row["other_digest"] != row["digest"] for row in rows)
    sequences = list(Sequences(folders["latent_corpus"], "validation"))
    batch = collate(sequences, probes.ImageStore(folders["cot_corpus"]), tiny.processor(), latents=at.recipe.latents)
    with torch.no_grad():
        states = latents.forward(model, batch, block=1).states
        for name in ("dinov3", "siglip2"):
            store = probes.open_features(at, [name], probes.ImageStore(folders["cot_corpus"]), "cpu")[name]
            features = [None if target is None else store.features([target])[0] for target in batch.targets]
            alone = Projectors({name: 6}, 32, at.recipe.alignment)
            alone[name] = projectors[name]
            trained = alignment_loss(alone, states, {name: features}, batch.targets, upsample="bilinear").teachers[name]
            cosines = [row["cosine"] for row in rows if row["teacher"] == name]
            found = torch.tensor(cosines).mean(dim=1)
            assert trained.segments == len(found)
            torch.testing.assert_close(found.sum(), -trained.loss_sum, atol=1e-5, rtol=1e-5)
    assert {"alignment_maps.png", "alignment_maps.svg", "maps.parquet", "result.md"} == set(inputs.content(at.out))


def test_items_are_taken_evenly_and_judged_as_in_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    tiny.image(0).save(data, "PNG")
    shown = Image(data.getvalue(), tiny.digest("a"), 64, 64, "input")
    records = [
        Record(f"r{number}", "mine", "none", "test", "single_view", "Is it red?", (shown,), (), "true")
        for number in range(16)
    ]
    showing = Showing(ImageLimits(8, 10**6), 4, tmp_path)
    monkeypatch.setattr(probes, "open_benchmarks", lambda context: [benchmark_of_records("mine", records, showing)])
    found = probes.study_items(context("latent_check", {}, tmp_path))
    assert [item.id for item in found] == [f"mine/r{number}" for number in range(0, 16, 2)]
    said = Generation("The first row.\nAnswer: true<|im_end|>", (), "", (), 8, 8, 8, "stop", 0.0)
    assert found[0].judge(said)
    assert not found[0].judge(replace(said, text="Answer: false<|im_end|>"))
    assert not found[0].judge(replace(said, finish_reason="length")), "an answer that was cut off is wrong"


def test_equal_inputs_give_equal_bytes(
    tmp_path: Path, folder: Path, items: list[StudyItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "study_items", lambda context: items[:4])
    studies = {
        "latent_check": (probes.build_latent_check, {"answers.parquet"}),
        "visual_decay": (probes.build_visual_decay, {"attention.parquet", "masked.parquet"}),
    }
    for stage, (build, tables) in studies.items():
        made = []
        for place in ("one", "two"):
            (tmp_path / place).mkdir(exist_ok=True)
            limits = {"max_new_tokens": 8, "max_segments": 2, "force_first_latent": True}
            at = context(stage, {"stage2_valr_m": folder}, tmp_path / place, **limits)
            report = build(at)
            made.append(inputs.content(at.out))
        assert made[0] == made[1]
        assert set(made[0]) == {f"{stage}.png", f"{stage}.svg", "result.md", *tables}
        assert all(check.passed for check in report.checks)
        assert report.summary["items"] == 4
