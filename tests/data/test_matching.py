from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.data.endpoint import Asked, Endpoint, Says, completion, error, matches, saying, serving
from valr_ops.data import matching
from valr_ops.data.corpus import CorpusRecord, ImageReference
from valr_ops.data.images import decode
from valr_ops.data.matching import KEY_VARIABLE, REPLIES, Matcher, MatchingError, open_matcher
from valr_ops.data.records import Rejection, Step, Target
from valr_ops.recipe.recipe import MatchingRecipe
from valr_ops.store.chat import Clock

CHECKOUT = Path(__file__).resolve().parents[2]
KEY = "sk-planted-4f1d0c9a77"


def view(number: int, width: int = 80, height: int = 60) -> bytes:
    """The encoded bytes of one view: coarse noise, another one for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.NEAREST).save(file, format="PNG")
    return file.getvalue()


class Views:
    """The images of a corpus in memory; counts how often each is read."""

    def __init__(self) -> None:
        self.bytes: dict[str, bytes] = {}
        self.read: list[str] = []

    def add(self, data: bytes, role: Any = "input") -> ImageReference:
        digest = hashlib.sha256(data).hexdigest()
        self.bytes[digest] = data
        return ImageReference(digest, role, *PIL.Image.open(io.BytesIO(data)).size)

    def __call__(self, digest: str) -> bytes:
        self.read.append(digest)
        return self.bytes[digest]


IMAGES = Views()


def scene(number: int = 0, steps: Sequence[str] = ("The sofa.", "The door."), views: int = 3) -> CorpusRecord:
    """A multi-view record whose steps look at nothing yet."""
    return CorpusRecord(
        id=f"gcot/{number}",
        source="gcot",
        license="CC-BY-NC-4.0",
        split="train",
        kind="multi_view",
        question=f"How far is it, number {number}?",
        answer="2.4",
        images=tuple(IMAGES.add(view(100 * number + i)) for i in range(views)),
        steps=tuple(Step(text) for text in steps),
        where=f"gcot.json row {number}",
    )


class FakeClock(Clock):
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waits: list[float] = []
        self.lock = threading.Lock()

    def now(self) -> float:
        return self.time

    def wait(self, stop: threading.Event, seconds: float) -> None:
        with self.lock:
            self.time += seconds
            self.waits.append(seconds)


def asking(endpoint: Endpoint | str, **changes: Any) -> MatchingRecipe:
    """A recipe that asks this endpoint."""
    return MatchingRecipe(
        by="endpoint",
        model=changes.pop("model", "gpt-4o-2024-08-06"),
        endpoint=endpoint if isinstance(endpoint, str) else endpoint.url,
        requests_per_minute=changes.pop("requests_per_minute", 60_000),
        dollars_per_million_input_tokens=changes.pop("dollars_per_million_input_tokens", 2.5),
        dollars_per_million_output_tokens=changes.pop("dollars_per_million_output_tokens", 10.0),
        **changes,
    )


def opened(recipe: MatchingRecipe, cache: Path, said: list[str] | None = None, clock: Clock | None = None) -> Matcher:
    return open_matcher(recipe, cache, ([] if said is None else said).append, clock=clock or FakeClock())


def looks_at(record: CorpusRecord | Rejection) -> list[int | None]:
    assert isinstance(record, CorpusRecord), record
    return [None if step.target is None else step.target.image for step in record.steps]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (KEY_VARIABLE, "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


# What needs a match, and what becomes of a step without one.


def test_only_multi_view_training_records_with_a_step_without_target_need_a_match(tmp_path: Path) -> None:
    needs = opened(MatchingRecipe(), tmp_path).needs
    record = scene()
    stated = replace(record, steps=(Step("a", Target(1)), Step("b", Target(0))))
    assert needs(record)
    assert needs(replace(record, split="validation"))
    assert needs(replace(record, steps=(*stated.steps, Step("c"))))
    assert not needs(stated)
    assert not needs(replace(record, split="test"))
    assert not needs(replace(record, images=record.images[:1]))
    assert not needs(replace(record, kind="interleaved"))


def test_by_data_leaves_a_step_without_target_as_it_is(tmp_path: Path) -> None:
    record = scene()
    assert opened(MatchingRecipe(by="data"), tmp_path).match([record], IMAGES) == [record]


def test_first_view_is_a_rule_that_the_target_names(tmp_path: Path) -> None:
    record = replace(scene(), steps=(Step("a", Target(2)), Step("b")))
    (done,) = opened(MatchingRecipe(unmatched="first_view"), tmp_path).match([record], IMAGES)
    assert isinstance(done, CorpusRecord)
    assert done.steps == (Step("a", Target(2)), Step("b", Target(0, origin="matched", by="rule:first_view")))


def test_reject_names_the_step_that_nobody_matched(tmp_path: Path) -> None:
    record = replace(scene(), steps=(Step("a", Target(2)), Step("b")))
    (done,) = opened(MatchingRecipe(unmatched="reject"), tmp_path).match([record], IMAGES)
    assert isinstance(done, Rejection)
    assert (done.id, done.source, done.reason) == ("gcot/0", "gcot", "step_match_missing")
    assert "gcot.json row 0: step 2 of 2" in done.detail


def test_nothing_is_paid_where_nobody_is_asked(tmp_path: Path) -> None:
    price = opened(MatchingRecipe(), tmp_path).estimate([scene()])
    assert (price.requests, price.dollars) == (0, 0)


# What the endpoint is shown, and what becomes of its answers.


def test_the_endpoint_is_shown_numbered_small_pictures_the_question_and_numbered_steps(tmp_path: Path) -> None:
    record = replace(scene(), images=(IMAGES.add(view(1, 200, 100)), IMAGES.add(view(2, 30, 40))))
    with saying(matches(2, 1)) as endpoint:
        opened(asking(endpoint, image_side=64), tmp_path).match([record], IMAGES)
    (asked,) = endpoint.asked
    assert asked.path == "/v1/chat/completions"
    assert "Authorization" not in asked.headers
    assert asked.body["model"] == "gpt-4o-2024-08-06"
    assert asked.body["temperature"] == 0
    assert asked.texts[:2] == ["Picture 1:", "Picture 2:"]
    assert asked.texts[2] == (
        "Question: How far is it, number 0?\n\nSteps:\n1. The sofa.\n2. The door.\n\nChoose a picture for step 1, 2."
    )
    assert all(url.startswith("data:image/jpeg;base64,") for url in asked.pictures)
    pictures = [PIL.Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in asked.pictures]
    assert [picture.size for picture in pictures] == [(64, 32), (30, 40)]


def test_a_matched_target_names_the_model_and_the_prompt(tmp_path: Path) -> None:
    with saying(matches(3, 1)) as endpoint:
        (done,) = opened(asking(endpoint), tmp_path).match([scene()], IMAGES)
    assert isinstance(done, CorpusRecord)
    assert looks_at(done) == [2, 0]
    for step in done.steps:
        assert step.target is not None and step.target.origin == "matched" and step.target.box is None
        assert re.fullmatch("endpoint:gpt-4o-2024-08-06:[0-9a-f]{8}", step.target.by)


def test_another_prompt_is_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by(**changes: Any) -> str:
        cache = tmp_path / str(len(list(tmp_path.iterdir())))
        (done,) = opened(asking(endpoint, **changes), cache).match([scene()], IMAGES)
        assert isinstance(done, CorpusRecord) and done.steps[0].target is not None
        return done.steps[0].target.by

    with saying(matches(1, 1)) as endpoint:
        usual, smaller = by(), by(image_side=32)
        monkeypatch.setattr(matching, "_ROLE", "Other words.")
        assert len({usual, smaller, by()}) == 3


def test_only_steps_without_target_are_asked_about_and_stated_targets_stay(tmp_path: Path) -> None:
    record = replace(scene(), steps=(Step("a"), Step("b", Target(1, (0, 0, 20, 20))), Step("c")))
    answer = completion('{"matches": [{"step": 1, "image": 3}, {"step": 2, "image": 3}, {"step": 3, "image": 1}]}')
    with saying(answer) as endpoint:
        (done,) = opened(asking(endpoint), tmp_path).match([record], IMAGES)
    assert endpoint.asked[0].texts[-1].endswith("Choose a picture for step 1, 3.")
    assert looks_at(done) == [2, 1, 0]
    assert isinstance(done, CorpusRecord) and done.steps[1] == record.steps[1]


@pytest.mark.parametrize(
    ("unmatched", "expected"), [("no_target", [1, None]), ("first_view", [1, 0]), ("reject", "step_match_missing")]
)
def test_a_step_that_no_picture_shows_goes_the_way_the_recipe_says(
    tmp_path: Path, unmatched: Any, expected: Any
) -> None:
    with saying(matches(2, None)) as endpoint:
        (done,) = opened(asking(endpoint, unmatched=unmatched), tmp_path).match([scene()], IMAGES)
    assert (done.reason if isinstance(done, Rejection) else looks_at(done)) == expected


def test_an_answer_in_a_fence_of_markdown_is_read(tmp_path: Path) -> None:
    with saying(
        completion('```json\n{"matches": [{"step": 1, "image": 2}, {"step": 2, "image": 2}]}\n```')
    ) as endpoint:
        (done,) = opened(asking(endpoint), tmp_path).match([scene()], IMAGES)
    assert looks_at(done) == [1, 1]


def test_answers_come_back_in_the_order_of_the_records_however_late_they_are(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Says:
        number = int(asked.question.split()[-1].rstrip("?"))
        return replace(matches(1 + number % 3, 1), after=0.02 * (5 - number))

    records = [scene(number) for number in range(6)]
    complete = replace(scene(9), steps=(Step("a", Target(1)),))
    with serving(answer) as endpoint:
        done = opened(asking(endpoint), tmp_path).match([*records[:3], complete, *records[3:]], IMAGES)
    assert [record.id for record in done] == [f"gcot/{number}" for number in (0, 1, 2, 9, 3, 4, 5)]
    assert [looks_at(record)[0] for record in done] == [0, 1, 2, 1, 0, 1, 2]
    assert done[3] is complete


INVALID = {
    "no JSON": completion("The sofa is in picture 2."),
    "nothing": completion(None),
    "half an object": completion('{"matches": [{"step": 1, "image": 2}'),
    "another object": completion('{"pictures": [1, 2]}'),
    "a text for a number": completion('{"matches": [{"step": 1, "image": "2"}, {"step": 2, "image": 1}]}'),
    "a fraction": completion('{"matches": [{"step": 1, "image": 1.5}, {"step": 2, "image": 1}]}'),
    "a step left out": matches(2),
    "picture 4 of 3": matches(4, 1),
    "picture 0": matches(0, 1),
    "picture -1": matches(-1, 1),
    "step 3 of 2": matches(1, 1, 1),
    "two pictures for a step": completion(
        '{"matches": [{"step": 1, "image": 1}, {"step": 1, "image": 2}, {"step": 2, "image": 1}]}'
    ),
    "deep nesting": completion("[" * 100_000),
}


@pytest.mark.parametrize("says", INVALID.values(), ids=INVALID)
def test_an_answer_that_stays_unusable_rejects_the_record_and_is_not_asked_for_again(
    tmp_path: Path, says: Says
) -> None:
    with saying(says) as endpoint:
        (done,) = opened(asking(endpoint), tmp_path).match([scene()], IMAGES)
        assert isinstance(done, Rejection)
        assert done.reason == "step_match_invalid"
        assert "gcot.json row 0" in done.detail and len(done.detail) < 400
        assert len(endpoint.asked) == 3
        assert opened(asking(endpoint), tmp_path).match([scene()], IMAGES) == [done]
        assert len(endpoint.asked) == 3


def test_after_an_unusable_answer_the_model_is_told_why_and_may_correct_itself(tmp_path: Path) -> None:
    with saying(matches(9, 1), matches(2, 1)) as endpoint:
        (done,) = opened(asking(endpoint), tmp_path).match([scene()], IMAGES)
    assert looks_at(done) == [1, 0]
    *_, said, told = endpoint.asked[1].body["messages"]
    assert (said["role"], told["role"]) == ("assistant", "user")
    assert "there is no picture 9, only 1 to 3" in told["content"]


def test_a_question_that_the_endpoint_refuses_rejects_that_record_alone(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Says:
        return error(400, "no", "content_filter") if asked.question.endswith("0?") else matches(1, 1)

    with serving(answer) as endpoint:
        refused, done = opened(asking(endpoint), tmp_path).match([scene(0), scene(1)], IMAGES)
    assert isinstance(refused, Rejection) and refused.reason == "step_match_invalid"
    assert "content_filter" in refused.detail
    assert looks_at(done) == [0, 0]
    assert len(endpoint.asked) == 2


# An endpoint that is broken or wrong.


def test_an_endpoint_that_stays_broken_stops_the_run_and_the_same_call_goes_on(tmp_path: Path) -> None:
    working = threading.Event()

    def answer(asked: Asked) -> Says:
        return matches(1, 2) if working.is_set() or asked.question.endswith(("0?", "1?")) else error(500, "oops")

    records = [scene(number) for number in range(4)]
    clock = FakeClock()
    with serving(answer) as endpoint:
        recipe = asking(endpoint, requests_per_minute=1)
        with pytest.raises(MatchingError) as raised:
            opened(recipe, tmp_path, clock=clock).match(records, IMAGES)
        assert f"data.matching.endpoint={endpoint.url} gave no answer: answered 500 (oops)" in str(raised.value)
        assert "record gcot/2 (gcot.json row 2)" in str(raised.value)
        assert f"2 answers are kept in {tmp_path / REPLIES}" in str(raised.value)
        assert len(endpoint.asked) == 2 + 6
        assert clock.time >= 2 + 4 + 8 + 16 + 32
        working.set()
        del endpoint.asked[:]
        done = opened(recipe, tmp_path).match(records, IMAGES)
    assert [looks_at(record) for record in done] == [[0, 1]] * 4
    assert endpoint.questions == [records[2].question, records[3].question]


def test_an_endpoint_that_is_not_there_stops_the_run(tmp_path: Path) -> None:
    with saying(matches(1, 1)) as endpoint:
        gone = endpoint.url
    with pytest.raises(MatchingError, match="gave no answer: ConnectError"):
        opened(asking(gone), tmp_path).match([scene()], IMAGES)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (error(404, "no such model"), r"answered 404 \(no such model\).*Check data.matching.endpoint"),
        (error(400, "unknown field"), r"answered 400 \(unknown field\)"),
        (error(401, "who are you"), f"asks for a key, which belongs in {KEY_VARIABLE}"),
    ],
)
def test_what_would_meet_every_record_stops_the_run_at_once(tmp_path: Path, says: Says, expected: str) -> None:
    with saying(says) as endpoint, pytest.raises(MatchingError, match=expected):
        opened(asking(endpoint), tmp_path).match([scene()], IMAGES)
    assert len(endpoint.asked) == 1


# The cache.


def test_a_second_run_asks_nothing_and_gives_the_same(tmp_path: Path) -> None:
    records = [scene(number) for number in range(3)]
    with saying(matches(3, 1)) as endpoint:
        first = opened(asking(endpoint), tmp_path).match(records, IMAGES)
        again = opened(asking(endpoint), tmp_path)
        price = again.estimate(records)
        assert (price.requests, price.dollars, price.answered) == (0, 0.0, 3)
        assert again.match(records, IMAGES) == first
    assert len(endpoint.asked) == 3


def test_records_that_ask_the_same_are_asked_for_once(tmp_path: Path) -> None:
    twin = replace(scene(), id="gcot/twin")
    with saying(matches(3, 1)) as endpoint:
        matcher = opened(asking(endpoint), tmp_path)
        assert matcher.estimate([scene(), twin]).requests == 1
        done = matcher.match([scene(), twin], IMAGES)
    assert [looks_at(record) for record in done] == [[2, 0], [2, 0]]
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda record: replace(record, question="Another one?"),
        lambda record: replace(record, steps=(Step("The chair."), *record.steps[1:])),
        lambda record: replace(record, images=record.images[::-1]),
    ],
    ids=["question", "step", "order of the images"],
)
def test_another_question_is_asked_anew(tmp_path: Path, change: Any) -> None:
    with saying(matches(3, 1)) as endpoint:
        matcher = opened(asking(endpoint), tmp_path)
        matcher.match([scene()], IMAGES)
        matcher.match([change(scene())], IMAGES)
        assert len(endpoint.asked) == 2
        opened(asking(endpoint, model="another"), tmp_path).match([scene()], IMAGES)
        assert len(endpoint.asked) == 3


# Price.


def test_the_price_is_that_of_the_pictures_the_text_and_the_longest_answers(tmp_path: Path) -> None:
    record = replace(scene(), images=(IMAGES.add(view(1, 1000, 500)), IMAGES.add(view(2, 60, 80))))
    said: list[str] = []
    matcher = opened(asking("http://127.0.0.1:1/v1", image_side=600), tmp_path, said)
    price = matcher.estimate(iter([record, replace(record, split="test")]))
    # 600 x 300 pixels are two tiles of 512, 60 x 80 are one.
    pictures = (85 + 2 * 170) + (85 + 170)
    assert price.requests == 1
    assert price.output_tokens == 64 + 2 * 32
    assert pictures + 200 < price.input_tokens < pictures + 500
    assert price.dollars == pytest.approx((2.5 * price.input_tokens + 10 * price.output_tokens) / 1e6)
    assert "1 questions to gpt-4o-2024-08-06 at http://127.0.0.1:1/v1 cost about $0.00" in said[0]


def test_a_price_above_the_bound_refuses_before_the_first_request(tmp_path: Path) -> None:
    with saying(matches(1, 1)) as endpoint:
        matcher = opened(asking(endpoint, max_dollars=0.01), tmp_path)
        assert matcher.estimate([scene(0), scene(1)]).requests == 2
        with pytest.raises(MatchingError, match=r"more than data.matching.max_dollars=0.01. Nothing was asked. Raise"):
            matcher.estimate(scene(number) for number in range(3))
    assert endpoint.asked == []


def test_answers_that_cost_more_than_the_bound_stop_the_run_and_are_kept(tmp_path: Path) -> None:
    records = [scene(number) for number in range(4)]
    dear = Says(completion(json.loads(matches(1, 2).body)["choices"][0]["message"]["content"], (4000, 0)).body)
    with saying(dear) as endpoint:
        recipe = asking(endpoint, max_dollars=0.02, requests_per_minute=1)
        with pytest.raises(MatchingError, match=r"was paid about \$0.02 in this run, which reaches"):
            opened(recipe, tmp_path).match(records, IMAGES)
        assert len(endpoint.asked) == 2
        opened(recipe, tmp_path).match(records, IMAGES)
        assert len(endpoint.asked) == 4


# Similarity.


def words() -> Any:
    """A tokenizer of CLIP's shape, learned from a handful of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<start>", "<end>"]
    bpe.train_from_iterator(
        ["The sofa. The door. A red chair by the window."],
        trainers.BpeTrainer(special_tokens=special, show_progress=False),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(name, bpe.token_to_id(name)) for name in special[1:]]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )


def tiny_encoder(folder: Path, kind: str) -> Path:
    """A checkpoint of transformers' own CLIP or SigLIP with random weights."""
    import torch

    from valr_ops.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    import transformers

    tokenizer = words()
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 12, **widths}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text |= {"pad_token_id": tokenizer.pad_token_id}
    vision = {"image_size": 32, "patch_size": 16, **widths}
    torch.manual_seed(0)
    if kind == "clip":
        clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model: Any = transformers.CLIPModel(clip)
        images: Any = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        processor: Any = transformers.CLIPProcessor(images, tokenizer)
    else:
        siglip = transformers.SiglipConfig(text_config=text | {"projection_size": 16}, vision_config=vision)
        model = transformers.SiglipModel(siglip)
        images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
        processor = transformers.SiglipProcessor(images, tokenizer)
    # As they are drawn, all pictures look nearly the same to it.
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["clip", "siglip"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoders") / f"tiny-{request.param}", request.param)


def by_similarity(folder: Path, cache: Path) -> Matcher:
    return opened(MatchingRecipe(by="similarity", model=str(folder)), cache)


STEPS = ("The sofa.", "The door.", "A red chair by the window.", "The sofa by the window.", "A door " * 30)


def test_similarity_takes_the_view_that_a_direct_computation_takes(encoder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, AutoProcessor

    records = [scene(number, STEPS[number:], views=4) for number in range(3)]
    model, processor = AutoModel.from_pretrained(encoder).eval(), AutoProcessor.from_pretrained(encoder)
    expected = []
    for record in records:
        inputs = processor(
            text=[step.text for step in record.steps],
            images=[decode(IMAGES(image.digest)) for image in record.images],
            padding="max_length",
            truncation=True,
            max_length=12,
            return_tensors="pt",
        )
        with torch.no_grad():
            expected.append(model(**inputs).logits_per_image.argmax(0).tolist())
    # The random model has to tell the views apart, or any answer would be as good.
    assert len({image for one in expected for image in one}) > 1
    done = by_similarity(encoder, tmp_path).match(records, IMAGES)
    assert [looks_at(record) for record in done] == expected


def test_a_target_found_by_similarity_names_the_model_and_its_weights(encoder: Path, tmp_path: Path) -> None:
    def by(folder: Path) -> str:
        (done,) = by_similarity(folder, tmp_path).match([scene()], IMAGES)
        assert isinstance(done, CorpusRecord) and done.steps[0].target is not None
        assert done.steps[0].target.origin == "matched"
        return done.steps[0].target.by

    from safetensors.torch import load_file, save_file

    copy = tmp_path / encoder.name
    shutil.copytree(encoder, copy)
    assert by(copy) == by(encoder)
    assert re.fullmatch(f"similarity:{encoder.name}:[0-9a-f]{{8}}", by(encoder))
    weights = {name: tensor + 1 for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert by(copy) != by(encoder)


def test_each_distinct_image_is_encoded_once(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_IMAGES_A_BATCH", 2)
    views = Views()
    views.bytes = IMAGES.bytes
    records = [scene(0, STEPS), scene(0, STEPS[:1]), scene(1, STEPS)]
    matcher = by_similarity(encoder, tmp_path)
    first = matcher.match(records, views)
    assert matcher.match(records[::-1], views) == first[::-1]
    distinct = {image.digest for record in records for image in record.images}
    assert sorted(views.read) == sorted(distinct)


def test_remembered_images_are_bounded(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_KEPT_VECTORS", 2)
    records = [scene(number, STEPS, views=4) for number in range(2)]
    matcher = by_similarity(encoder, tmp_path)
    together = matcher.match(records, IMAGES)
    assert [matcher.match([record], IMAGES)[0] for record in records] == together
    assert len(matcher._judge._vectors) == 2  # type: ignore[union-attr]


def test_of_two_views_that_look_the_same_the_first_is_taken(encoder: Path, tmp_path: Path) -> None:
    once = view(0)
    again = io.BytesIO()
    PIL.Image.open(io.BytesIO(once)).save(again, format="BMP")
    record = replace(scene(), images=(IMAGES.add(once), IMAGES.add(again.getvalue())))
    assert len({image.digest for image in record.images}) == 2
    (done,) = by_similarity(encoder, tmp_path).match([record], IMAGES)
    assert looks_at(done) == [0, 0]


@pytest.mark.parametrize(("ahead", "expected"), [(1e-6, 0), (1e-4, 1)])
def test_a_lead_within_rounding_decides_nothing(ahead: float, expected: int) -> None:
    images = {"a": np.array([0.5, 0.1]), "b": np.array([0.5 + ahead, 0.2]), "c": np.array([0.4, 0.9])}
    assert matching._nearest(Step("x"), ["a", "b", "c"], {"x": np.array([1.0, 0.0])}, images) == expected


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _own_code(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "code.Model"}}))


def _another_type(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "bert"}))


def _no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _half_the_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    some = {name: tensor for name, tensor in weights.items() if "text_model" in name}
    save_file(some, folder / "model.safetensors", metadata={"format": "pt"})


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _no_preprocessor(folder: Path) -> None:
    for path in folder.glob("*processor_config.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, "is no folder"),
        (_pickled, "holds no .safetensors file"),
        (_own_code, "brings code of its own"),
        (_another_type, "is a model of type bert"),
        (_no_json, "has a damaged config.json"),
        (_cut, "can't be loaded"),
        (_half_the_weights, "weights are missing"),
        (_no_tokenizer, "holds no tokenizer"),
        (_no_preprocessor, "can't be loaded"),
    ],
)
def test_a_checkpoint_that_can_not_be_trusted_is_refused(
    encoder: Path, tmp_path: Path, damage: Any, expected: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    damage(folder)
    with pytest.raises(MatchingError, match=f"data.matching.model=.*{expected}"):
        by_similarity(folder, tmp_path)


def test_loading_the_module_loads_no_model_library() -> None:
    code = "import sys, valr_ops.data.matching; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
