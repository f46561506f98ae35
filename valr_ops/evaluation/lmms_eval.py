"""The plug-in of lmms-eval: its tasks, asked of a model of ours or of a plain Qwen2.5-VL.

In: requests of lmms-eval 0.7.3, which finds `manifest` by the entry point `lmms_eval.models`, and `Settings`, which are
its ``--model_args``. Out: for each request the answer behind the reasoning, isolated by the rule `ISOLATION`, with
counts of tokens; on request a file with everything that was said.
Always: reasoning never reaches a scorer, with or without lmms-eval's own reasoning tags; the budget is that of the
settings, never that of a task, so that it stands in the results and in the key of ``--use_cache``; an answer that the
budget cut off is empty, which counts as wrong; what can't be asked stops the run and is no wrong answer.
lmms-eval has an environment of its own, `make lmms`; without it this module offers everything but `Valr`.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import PIL.ImageOps
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from rich.console import Console
from rich.progress import track

from valr_ops.data.images import ImageLimits, check_image, decode
from valr_ops.data.videos import read_frames
from valr_ops.evaluation.answers import isolate
from valr_ops.recipe.recipe import DataRecipe, EvaluationRecipe

if TYPE_CHECKING:
    from valr_ops.model.answering import Generation, Sampling

NAME = "valr"
"""What ``--model`` says."""
IMAGE_LIMITS = ImageLimits(min_side=1, max_pixels=DataRecipe().max_image_pixels)
"""A picture of a benchmark is asked about as it is, unless it is a bomb."""
_LIMITS = EvaluationRecipe()
_INJECTED = "\n\n"
"""lmms-eval writes it into `until` of every task that has none of its own; it would end reasoning after a step."""
_READ = ("until", "do_sample", "temperature", "top_p")
_NEUTRAL = {"num_beams": (None, 1), "top_k": (None, 0, -1), "repetition_penalty": (None, 1)}
"""What can't be done in latent mode, and the values that ask for nothing."""

Request = tuple[str, Any, Mapping[str, Any], int, str, str]
"""As lmms-eval asks a chat model: context, function from a document to its messages, generation_kwargs, number of the
document, task, split."""
Documents = Mapping[str, Mapping[str, Any]]
"""The rows of every split of every task."""

_log = logging.getLogger(__name__)


class LmmsEvalError(ValueError):
    """What lmms-eval asks for can't be done: the message names the setting or the document, and what to do."""


class Settings(BaseModel):
    """What ``--model_args``, ``--batch_size`` and ``--device`` may say; lmms-eval hands over text, numbers and truth
    values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    pretrained: Path
    """Folder of the model."""
    batch_size: PositiveInt = 1
    """Rows decoded together."""
    device: str | None = None
    """As PyTorch names it; None takes this process's GPU, if there is one. A GPU computes in bfloat16."""
    slots: PositiveInt | None = None
    """K; None is the K the model was trained with."""
    max_new_tokens: PositiveInt = _LIMITS.max_new_tokens
    """Text and control tokens of an answer with its reasoning; slots are not counted."""
    max_segments: PositiveInt = _LIMITS.max_segments
    force_first_latent: bool = False
    latent_settle: float | None = Field(default=None, ge=-1.0, le=1.0)
    """See `SegmentRules.settle`."""
    frames: PositiveInt = _LIMITS.frames
    """A video is asked as so many images."""
    max_pixels: PositiveInt | None = None
    """Of an image or a frame, after resizing; None is the bound of the model's image processor."""
    seed: int = Field(default=0, ge=0)
    """Of tasks that sample; the n-th repeat of a question takes the n-th seed from here on."""
    transcript: Path | None = None
    """A JSONL file to which every answer is added as a line, reasoning and control tokens included. Where several
    processes share a task, lmms-eval asks some of them the last question again, and drops the answer."""


@dataclass(frozen=True)
class Answered:
    """What lmms-eval is told about a request."""

    text: str | list[str]
    """The isolated answer, or those of all rounds."""
    input_tokens: int
    """Those of the images included."""
    output_tokens: int
    """All positions decoded: text, control tokens, slots."""
    reasoning_tokens: int
    """Those of them that are neither the isolated answer nor the end of turn; every slot is one."""


def read_settings(model_args: Mapping[str, Any]) -> Settings:
    """The settings in what lmms-eval hands over.

    Raises:
        LmmsEvalError: an unknown name, a value out of its range, or no model.
    """
    known = Settings.model_fields
    unknown = sorted(set(model_args) - set(known))
    if unknown:
        raise LmmsEvalError(
            f"--model_args {unknown[0]}={model_args[unknown[0]]}: no such setting; there are {', '.join(known)}"
        )
    if "pretrained" not in model_args:
        raise LmmsEvalError("no model is given; name its folder: --model_args pretrained=FOLDER")
    try:
        return Settings(**model_args)
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0]
        option = f"--{name} " if name in ("batch_size", "device") else f"--model_args {name}="
        raise LmmsEvalError(f"{option}{first['input']}: {first['msg'].lower()}") from None


def open_respondent(settings: Settings) -> Respondent:
    """The model that `settings` name, ready to answer.

    Raises:
        LmmsEvalError: no such device, or settings of latents for a model that has none.
        ModelError: no or another kind of model, or its files are not whole.
    """
    import torch

    from valr_ops.model.decoding import ValrForConditionalGeneration, fed_slots
    from valr_ops.model.qwen import load_model

    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = settings.device or own
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise LmmsEvalError(f"--device {device}: PyTorch finds no GPU here; leave the option out")
    model, processor = load_model(
        settings.pretrained,
        device,
        "bfloat16" if on_gpu else "float32",
        ValrForConditionalGeneration,
        plain=True,
    )
    asked = {
        "slots": settings.slots is not None,
        "force_first_latent": settings.force_first_latent,
        "latent_settle": settings.latent_settle is not None,
    }
    given = [name for name, there in asked.items() if there]
    if given and not fed_slots(model.config):
        raise LmmsEvalError(
            f"--model_args {given[0]}: {settings.pretrained} has no latents; leave it out, or take the artifact of a "
            "stage 2"
        )
    fed_slots(model.config, settings.slots)
    return Respondent(model, processor, settings)


class Respondent:
    """A model that answers lmms-eval's requests; it needs nothing of lmms-eval and keeps its model for the next run."""

    def __init__(self, model: Any, processor: Any, settings: Settings) -> None:
        """`model` and `processor` as `load_model` returns them; the processor gets the bound of the settings."""
        self.model, self.processor, self.settings = model, processor, settings
        if settings.max_pixels is not None:
            size = processor.image_processor.size
            least = min(int(size["shortest_edge"]), settings.max_pixels)
            processor.image_processor.size = type(size)(shortest_edge=least, longest_edge=settings.max_pixels)
        self.shows_progress = True
        self._warned: set[str] = set()

    def respond(self, requests: Sequence[Request], documents: Documents) -> list[Answered]:
        """The answer to each request, in order.

        Raises:
            LmmsEvalError: a request that can't be put to the model: audio, part of a video, a missing file, beams.
            BadRecord: an image or a video that can't be read.
            DecodingError: a prompt that is too long for the model.
        """
        answered: list[Answered] = []
        for batch in self._batches(requests):
            answered += self._ask(batch, [_messages(request, documents) for request, _ in batch])
        self._say_how_many_were_cut_off(answered)
        return answered

    def respond_in_rounds(self, requests: Sequence[Request], documents: Documents) -> list[Answered]:
        """The answers of all rounds to each request, in order; the task words a round when it has seen the one before.

        Raises:
            As `respond`.
        """
        answered: list[Answered] = []
        for batch in self._batches(requests):
            rounds: list[list[Answered]] = [[] for _ in batch]
            texts: list[list[str]] = [[] for _ in batch]
            notes: list[Any] = [None for _ in batch]
            messages = {place: _messages(request, documents) for place, (request, _) in enumerate(batch)}
            while messages:
                said = self._ask([batch[place] for place in messages], list(messages.values()))
                for place, one in zip(messages, said, strict=True):
                    rounds[place].append(one)
                    texts[place].append(str(one.text))
                open_places, messages = list(messages), {}
                for place in open_places:
                    following = _messages(
                        batch[place][0],
                        documents,
                        round_idx=len(rounds[place]),
                        previous_output=list(texts[place]),
                        previous_round_info=notes[place],
                    )
                    # Messages alone are those of a task that has one round.
                    if not isinstance(following, tuple):
                        continue
                    next_messages, ended, kept, notes[place] = following
                    texts[place] = texts[place] if kept is None else list(kept)
                    if not ended:
                        messages[place] = next_messages
            answered += [
                Answered(
                    text,
                    sum(one.input_tokens for one in said),
                    sum(one.output_tokens for one in said),
                    sum(one.reasoning_tokens for one in said),
                )
                for text, said in zip(texts, rounds, strict=True)
            ]
        self._say_how_many_were_cut_off(answered)
        return answered

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[Request, int]]]:
        """The requests, each with its seed, as they are decoded together."""
        asked: Counter[tuple[str, str, int]] = Counter()
        seeded = []
        for request in requests:
            document = (request[4], request[5], request[3])
            seeded.append((request, self.settings.seed + asked[document]))
            asked[document] += 1
        size = self.settings.batch_size
        batches = [seeded[start : start + size] for start in range(0, len(seeded), size)]
        console = Console(stderr=True)
        yield from track(batches, f"{NAME} answers", console=console, disable=not self.shows_progress)

    def _ask(self, batch: Sequence[tuple[Request, int]], messages: Sequence[Any]) -> list[Answered]:
        from valr_ops.model.answering import generate_answers

        limits = self.settings
        said = generate_answers(
            self.model,
            self.processor,
            [self._prompt(one, _where(request)) for (request, _), one in zip(batch, messages, strict=True)],
            max_new_tokens=limits.max_new_tokens,
            max_segments=limits.max_segments,
            slots=limits.slots,
            force_first_latent=limits.force_first_latent,
            settle=limits.latent_settle,
            sampling=[self._sampling(request, seed) for request, seed in batch],
        )
        answered = [self._answered(request, one) for (request, _), one in zip(batch, said, strict=True)]
        if limits.transcript is not None:
            lines = [
                _transcript_line(request, seed, one, about)
                for (request, seed), one, about in zip(batch, said, answered, strict=True)
            ]
            limits.transcript.parent.mkdir(parents=True, exist_ok=True)
            with limits.transcript.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        return answered

    def _answered(self, request: Request, said: Generation) -> Answered:
        stops = request[2].get("until") or []
        answer = isolate(said.text).text if said.finish_reason == "stop" else ""
        for stop in [stops] if isinstance(stops, str) else stops:
            if stop and stop != _INJECTED:
                answer = answer.split(stop, 1)[0].strip()
        ended = int(said.finish_reason == "stop")
        # The answer as the tokenizer writes it; what was generated may spell it in more tokens, but has no fewer.
        spoken = min(len(self.processor.tokenizer.encode(answer)), said.text_tokens - ended)
        return Answered(answer, said.prompt_tokens, said.decode_steps, said.decode_steps - ended - spoken)

    def _sampling(self, request: Request, seed: int) -> Sampling:
        """How the ids of an answer are drawn, from the generation_kwargs of the task."""
        from valr_ops.model.answering import Sampling

        wanted = request[2]
        temperature, top_p = wanted.get("temperature"), wanted.get("top_p")
        sampled = bool(wanted.get("do_sample", temperature))
        for name, value in wanted.items():
            if name in _NEUTRAL and (sampled or name != "top_k"):
                if value not in _NEUTRAL[name]:
                    raise LmmsEvalError(
                        f"{request[4]} asks for {name}={value}, which latent decoding can't do; add --gen_kwargs "
                        f"{name}={_NEUTRAL[name][1]}"
                    )
            elif name in Settings.model_fields:
                self._warn(
                    f"{request[4]}: {name}={value} has no effect; {name} in --model_args counts, "
                    f"{getattr(self.settings, name)}"
                )
            elif name not in (*_NEUTRAL, *_READ):
                self._warn(f"{request[4]}: {name}={value} has no effect on this model")
        if not sampled:
            return Sampling(temperature=0.0)
        return Sampling(1.0 if temperature is None else float(temperature), float(top_p or 1.0), seed)

    def _prompt(self, messages: Any, where: str) -> list[dict[str, Any]]:
        """A task's messages for the chat template, with pictures as pixels, worded at the end as in training."""
        from valr_ops.data.rewriting import prompt_messages

        prompt: list[dict[str, Any]] = []
        for message in messages:
            parts: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                else:
                    parts += [{"type": "image", "image": image} for image in self._images(part, where)]
            prompt.append({"role": message["role"], "content": parts})
        if not prompt or prompt[-1]["role"] != "user":
            raise LmmsEvalError(f"{where}: the last message is not the user's, so there is no question to answer")
        last = prompt[-1]["content"]
        question = last.pop()["text"] if last and last[-1]["type"] == "text" else ""
        last += prompt_messages(question, 0)[0]["content"]
        return prompt

    def _images(self, part: Mapping[str, Any], where: str) -> list[PIL.Image.Image]:
        """The pixels of an image, or of a video's frames."""
        kind, source = part["type"], part["url"]
        if kind == "video" and isinstance(source, str):
            frames = read_frames(_bytes(source, where), self.settings.frames, IMAGE_LIMITS, f"{where}, {source}")
            return [decode(frame.data) for frame in frames]
        if kind == "image" and isinstance(source, str | PIL.Image.Image):
            data = _bytes(source, where) if isinstance(source, str) else _lossless(source, where)
            return [decode(check_image(data, "input", IMAGE_LIMITS, where).data)]
        raise LmmsEvalError(
            f"{where}: {kind} given as {type(source).__name__} can't be asked about; images are pictures or files, "
            "videos are whole files, and there is no audio. Leave this task out"
        )

    def _say_how_many_were_cut_off(self, answered: Sequence[Answered]) -> None:
        empty = sum("" in ([one.text] if isinstance(one.text, str) else one.text) for one in answered)
        if empty:
            _log.warning(
                "%d of %d answers are empty and count as wrong: cut off by max_new_tokens=%d, or nothing stood behind "
                "the reasoning; transcript=FILE in --model_args shows which",
                empty,
                len(answered),
                self.settings.max_new_tokens,
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning(message)


def _messages(request: Request, documents: Documents, **before: Any) -> Any:
    """What the task says of a document: its messages, and of a later round, which follows `before`, what to do next."""
    _, say, _, row, task, split = request
    return say(documents[task][split][row], **before)


def _where(request: Request) -> str:
    return f"{request[4]}, document {request[3]} of {request[5]}"


def _bytes(path: str, where: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LmmsEvalError(
            f"{where}: {path} can't be read ({error.strerror}); get the task's files first, only local ones are opened"
        ) from None


def _lossless(picture: PIL.Image.Image, where: str) -> bytes:
    """A decoded picture as a file again, so that transparency and depth are treated as everywhere else."""
    if picture.width * picture.height > IMAGE_LIMITS.max_pixels:
        raise LmmsEvalError(f"{where}: {picture.width}x{picture.height} is more than {IMAGE_LIMITS.max_pixels} pixels")
    turned = PIL.ImageOps.exif_transpose(picture)
    file = io.BytesIO()
    (turned.convert("RGB") if turned.mode in ("CMYK", "YCbCr") else turned).save(file, "PNG", compress_level=0)
    return file.getvalue()


def _transcript_line(request: Request, seed: int, said: Generation, answered: Answered) -> str:
    line = {
        "task": request[4],
        "split": request[5],
        "doc_id": request[3],
        "seed": seed,
        "answer": answered.text,
        "isolation_rule": isolate(said.text).rule,
        "output": said.text,
        "finish_reason": said.finish_reason,
        "segments": said.segments,
        "latent_steps": said.latent_steps,
        "text_tokens": said.text_tokens,
        "seconds": round(said.seconds, 3),
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def manifest() -> Any:
    """What lmms-eval's entry-point group `lmms_eval.models` expects: a name, and where the class of it is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, chat_class_path=f"{__name__}.Valr")


try:
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
except ModuleNotFoundError as missing:
    if missing.name != "lmms_eval":
        raise
else:

    class Valr(lmms):
        """A `Respondent` as lmms-eval knows models."""

        is_simple = False

        def __init__(self, **model_args: Any) -> None:
            """`model_args` are those of `Settings`."""
            super().__init__()
            self.respondent = open_respondent(read_settings(model_args))

        @property
        def device(self) -> Any:
            """Where lmms-eval puts the tensors with which its processes agree."""
            return self.respondent.model.device

        def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
            """One answer a request."""
            self.respondent.shows_progress = self.rank == 0
            return [_result(one) for one in self.respondent.respond([r.args for r in requests], self.task_dict)]

        def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
            """The answers of all rounds, a list a request."""
            self.respondent.shows_progress = self.rank == 0
            said = self.respondent.respond_in_rounds([r.args for r in requests], self.task_dict)
            return [_result(one) for one in said]

        def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
            """Not of this kind of model."""
            raise LmmsEvalError(
                f"{requests[0].task_name} asks how likely given answers are. This model answers behind reasoning that "
                "it writes itself, so a given answer has no likelihood of its own; take a task whose output_type is "
                "generate_until"
            )

    def _result(answered: Answered) -> GenerationResult:
        counts = TokenCounts(answered.input_tokens, answered.output_tokens, answered.reasoning_tokens)
        return GenerationResult(answered.text, counts)


def main() -> None:
    """The command `lmms-eval`, also where torchvision does not fit torch, at which it stops by itself."""
    from valr_ops.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    from lmms_eval.cli.dispatch import main as run

    run()


if __name__ == "__main__":
    main()
