"""The recipe: one frozen, typed value that says everything about a run.

In: a scale (`tiny`, `mini`, `small`, `paper`) and overrides such as ``{"stage2.learning_rate": 1e-5}``.
Out: a validated `Recipe`; `fingerprint` is equal for equal recipes and differs for different ones.
Always: every field's docstring says where its value comes from, unknown keys are refused with the nearest known
name, equal recipes iterate their tables in the same order, and nothing here imports more than pydantic, so that
reading a recipe costs milliseconds.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""A name of a source, teacher or variant: it becomes part of folder names, stage names and dotted keys."""

Entry = TypeVar("Entry")


def _by_name(table: dict[str, Entry]) -> dict[str, Entry]:
    return dict(sorted(table.items()))


Table = Annotated[dict[Name, Entry], AfterValidator(_by_name)]
"""Named entries, always in the order of their names, so that the file they were read from can't change a result."""


QWEN_TOWER = "Qwen2_5_VisionTransformerPretrainedModel"
"""transformers' class of Qwen2.5-VL's vision tower and merger."""


class RecipeError(ValueError):
    """A recipe that can't be run: the message names the field, the value, what is allowed and the fix."""


def _check_pinned(hub_id: str | None, revision: str | None, instead: str) -> None:
    if hub_id is not None and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ValueError(
            f"hub_id={hub_id} needs revision, the full commit (40 hexadecimal digits) of the hub repository, "
            f"not {revision!r}; or set hub_id to null and {instead}"
        )


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class SyntheticRecipe(_Values):
    """The generated scenes that stand in for the six public sources at scale tiny."""

    train_records: PositiveInt = 800
    """Paper silent; records of a drawn source without a limit. Scale tiny has 800 of the form that the test asks in,
    600 in which every row is read, and a few of each other format; the tiny model learns the task from them."""
    test_records: PositiveInt = 256
    """Paper silent; we choose 256 because the 95 % interval of a score is then at most 6 points wide on each side."""
    rows: int = Field(default=4, ge=2)
    """Paper silent; we choose 4 rows, hence up to 4 reasoning steps, because that is enough to see several segments. At
    least 2: a region that is all of the picture would show nothing new."""
    columns: PositiveInt = 4
    """Paper silent; we choose 4 columns because 16 image positions hold the scene at one cell a position."""
    cell_pixels: PositiveInt = 16
    """Paper silent; we choose 16 px because it is one merged vision token of the tiny model."""


class SourceRecipe(_Values):
    """One source of records."""

    format: Literal["zebra_cot", "monet", "cogcom", "refocus", "visual_cot", "gcot", "onethinker", "jsonl"]
    """Paper: section 5 names the data sets; the format is their public on-disk layout, or our own JSONL."""
    path: str | None = None
    """Paper silent; a local folder, relative to the project, an ``s3://bucket/prefix``, or empty for scenes drawn by
    the generator."""
    limit: PositiveInt | None = None
    """Paper silent; at most so many rows of each split are read, or drawn; for trials. We choose no limit."""
    cap: PositiveInt | None = None
    """Paper: section 5 for the three parts of 125, 155 and 170 thousand; at most so many checked training records stay,
    the first of one seeded shuffle, so that a smaller cap keeps a part of what a larger one does."""
    weight: PositiveFloat = 1.0
    """Paper silent; how often an epoch visits each record: 2 is twice, 0.5 half of them, another half in the next."""
    license: str | None = None
    """Paper silent; the licence of records that name none; null takes the data set's own where it is known."""
    mapping: dict[str, str] = {}
    """Paper silent; the formats whose public layout is not documented (refocus, gcot) read these names of theirs for
    ours, e.g. ``{question: prompt}``. A name that a record lacks is `schema_mismatch`, never a guess."""


class MatchingRecipe(_Values):
    """Which image each step of a multi-view record looks at, where the data does not say it."""

    by: Literal["data", "similarity", "endpoint"] = "data"
    """Paper: appendix B lets GPT-4o match images to steps; `endpoint` asks any OpenAI-compatible server the same,
    `similarity` compares step and image in a local dual encoder, `data` takes only what the source states."""
    unmatched: Literal["no_target", "first_view", "reject"] = "no_target"
    """Paper silent; a step without a match trains on its text alone, looks at the first image, or its record is
    rejected."""
    model: str | None = None
    """Paper: appendix B, GPT-4o (2024-08-06); the endpoint's model name, or the local folder of a CLIP or SigLIP
    checkpoint for `similarity`."""
    endpoint: str | None = None
    """Paper silent; base URL ending in /v1. The key is read from the environment variable `VALR_MATCHING_API_KEY`."""
    requests_per_minute: PositiveInt = 60
    """Paper silent; the rate that the endpoint is asked at."""
    image_side: PositiveInt = 512
    """Paper silent; longer side in pixels of the images sent to the endpoint, which bounds the price."""
    dollars_per_million_input_tokens: float | None = Field(default=None, ge=0.0)
    """Paper silent; for the price that is shown before the first request. Needed by `endpoint`."""
    dollars_per_million_output_tokens: float | None = Field(default=None, ge=0.0)
    """Paper silent; for the price that is shown before the first request. Needed by `endpoint`."""
    max_dollars: PositiveFloat = 10.0
    """Paper silent; an estimate above this refuses the run before the first request."""

    @model_validator(mode="after")
    def _complete(self) -> MatchingRecipe:
        needed = {
            "data": (),
            "similarity": ("model",),
            "endpoint": (
                *("model", "endpoint"),
                *("dollars_per_million_input_tokens", "dollars_per_million_output_tokens"),
            ),
        }[self.by]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"by={self.by} needs {' and '.join(missing)}; set it, or set by to data")
        return self


class BenchmarkDataRecipe(_Values):
    """A benchmark that no training record may show."""

    path: str
    """Paper silent; a folder, or an ``s3://`` prefix: its images at any depth, ``scenes.txt`` with a scene id a line,
    ``questions.txt`` with a question a line; each of the three may be missing."""


class DataRecipe(_Values):
    """From sources to sequences."""

    sources: Table[SourceRecipe] = {}
    """Paper: section 5 and appendix B name six sources, 450,000 records. A mapping given for it is the whole list."""
    synthetic: SyntheticRecipe = SyntheticRecipe()
    """Paper silent; the generator exists so that scale tiny runs the same readers as scale paper."""
    placement: Literal["every_step", "appendix_b"] = "every_step"
    """Paper: section 3 puts a segment before every step; appendix B narrows it for each kind of record."""
    validation_fraction: Fraction = 0.05
    """Paper silent; we choose 5 %, split by image, because a run without held-out loss can't show over-fitting."""
    max_steps: PositiveInt = 64
    """Paper silent; we choose 64 because longer chains in the public sources are parsing accidents."""
    max_length: PositiveInt = 8192
    """Paper silent; we choose 8192 positions, image tokens and slots included, because 32 video frames fit."""
    reserved_slots: PositiveInt = 25
    """Paper: table 12 goes up to 25 slots; the length limit leaves room for them, so all cells see the same data."""
    min_image_side: PositiveInt = 8
    """Paper silent; we choose 8 px because below it a crop shows nothing."""
    max_image_pixels: PositiveInt = 40_000_000
    """Paper silent; we choose 40 megapixels as the bound against decompression bombs."""
    min_kept_fraction: Fraction = 0.5
    """Paper silent; a source that loses more than half of its records stops the run: then the reader is wrong. Records
    left out by choice (a cap, a licence, videos) do not count."""
    video_frames: PositiveInt | None = None
    """Paper: 32 frames on VSI-Bench, silent for training; so many frames at equal distances become the record's images.
    null rejects records with videos."""
    coordinate_answers: Literal["keep", "exclude"] = "exclude"
    """Paper silent; OneThinker's answers in coordinates of another processor's pixels are left out, since mixed
    conventions are silent damage."""
    matching: MatchingRecipe = MatchingRecipe()
    """Paper: appendix B, for multi-view records."""
    license_policy: Literal["any", "non_commercial_ok", "commercial"] = "any"
    """Paper silent; `commercial` keeps records whose licence is known to allow commercial use, `non_commercial_ok`
    those whose licence is known, `any` all."""
    near_duplicate_bits: int | None = Field(default=8, ge=0, le=16)
    """Paper silent; records with equal question and answer whose images' 192-bit perceptual hashes differ in at most so
    many bits an image are near duplicates; null keeps them. Re-encoding, blurring or resizing pictures moved 8 bits
    or fewer in most cases, and no two of 800 different drawings were nearer than 20."""
    benchmarks: Table[BenchmarkDataRecipe] = {}
    """Paper silent; training records that show an image, a scene or a question of one of these are rejected."""
    benchmark_image_bits: int = Field(default=8, ge=0, le=16)
    """Paper silent; images whose perceptual hashes differ in at most so many of 192 bits are the same picture."""
    benchmark_question_words: PositiveInt = 12
    """Paper silent; a question that a benchmark asks only once and that has at least so many words betrays an item by
    itself; shorter ones are templates, which many data sets share."""
    max_drift: Fraction | None = 0.25
    """Paper silent; if the same recipe finds data whose source mix, steps or lengths differ from the previous version
    by more than this (total variation distance), the new corpus is not published. null publishes it."""


class TinyModelRecipe(_Values):
    """Widths of a Qwen2.5-VL of transformers' own classes that is made on the spot, for scales tiny and mini."""

    hidden_size: PositiveInt = 128
    """Paper silent; 1 M parameters learn the synthetic task on one CPU core."""
    layers: PositiveInt = 4
    """Paper silent; 4 blocks leave a middle block to align."""
    attention_heads: PositiveInt = 4
    """Paper silent; head width 32."""
    key_value_heads: PositiveInt = 2
    """Paper silent; grouped-query attention as in the large model."""
    intermediate_size: PositiveInt = 256
    """Paper silent; twice the width."""
    vision_hidden_size: PositiveInt = 64
    """Paper silent; half the decoder's width."""
    vision_layers: PositiveInt = 2
    """Paper silent; enough to tell shapes and colours."""
    vision_patch_size: PositiveInt = 8
    """Paper silent; with merge 2 one image position covers 16 px, one cell of a synthetic scene."""
    vocabulary_size: PositiveInt = 1024
    """Paper silent; rows of the embedding table. The tokenizer is trained on the corpus itself, or the language
    model's."""
    rope_theta: PositiveFloat = 1000.0
    """Paper silent; 300 updates read .97 of held-out cells with base 1000 and .84 with base 10, which leaves no
    frequency slow enough to look a row up by content at every distance."""
    tower_pretraining_steps: int = Field(default=200, ge=0)
    """Paper silent; a stand-in for Qwen's pretrained vision tower: without it nothing is learned from images."""


_PUBLISHED_BLOCKS = {"Qwen/Qwen2.5-VL-3B-Instruct": 36, "Qwen/Qwen2.5-VL-7B-Instruct": 28}


class BaseModelRecipe(_Values):
    """The model that stage 1 starts from."""

    path: str | None = None
    """Paper silent; a local folder with a Qwen2.5-VL checkpoint in Hugging Face form, instead of the hub."""
    hub_id: str | None = None
    """Paper: section 4 starts from Qwen2.5-VL-7B. Needs `revision`; downloaded only when `base_model` runs."""
    revision: str | None = None
    """Paper silent; the full commit of the hub repository, so that the weights can't change under a run."""
    from_scratch: TinyModelRecipe | None = None
    """Paper silent; widths for a model made on the spot, for scales tiny and mini."""
    language_model: str | None = None
    """Paper silent; an installed Python package (`make mini`) whose language model becomes the decoder of what
    from_scratch makes, vocabulary included; the widths there have to be its own. null begins with random weights."""
    min_pixels: PositiveInt = 256
    """Paper silent; the processor's lower bound on the pixels of an image."""
    max_pixels: PositiveInt = 1_003_520
    """Paper silent; we choose 1280 merged patches of 28 px, the upper bound Qwen recommends."""

    @model_validator(mode="after")
    def _one_origin(self) -> BaseModelRecipe:
        origins = {"path": self.path, "hub_id": self.hub_id, "from_scratch": self.from_scratch}
        given = [name for name, value in origins.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of path, hub_id and from_scratch must be set, not {' and '.join(given) or 'none'}; "
                "give one and set the others to null"
            )
        if self.language_model is not None and self.from_scratch is None:
            raise ValueError(
                f"language_model={self.language_model} is for a model made on the spot; set from_scratch to its widths "
                "and the others to null, or set language_model to null"
            )
        _check_pinned(self.hub_id, self.revision, "path to a local folder")
        return self

    @property
    def blocks(self) -> int | None:
        """Number of decoder blocks; None where only the checkpoint says it."""
        return self.from_scratch.layers if self.from_scratch else _PUBLISHED_BLOCKS.get(self.hub_id or "")


class LatentRecipe(_Values):
    """Latent segments."""

    slots: PositiveInt = 16
    """Paper: table 12 and section 4, K = 16."""
    control_tokens: Literal["outside", "inside"] = "outside"
    """Paper ambiguous (section 3 counts the control tokens in K, section 4 says K latent steps); we choose outside."""
    supervise_close: bool = False
    """Paper silent; `</latent>` is forced after K slots at generation, so learning to predict it is left out."""
    feedback_gradient: str = Field(default="full", pattern=r"^(full|cut|hops:[1-9][0-9]*)$")
    """Paper silent; we choose the full gradient through the fed-back states, but one hop at scale small and two at
    scale paper, where each costs: on drawn tiles no difference to full is shown, while cut loses 4 points
    (EVIDENCE.md)."""
    method: Literal["two_pass", "sequential", "reference"] = "sequential"
    """Paper silent; `two_pass` rolls the slots out without gradient and then trains in parallel, `sequential` keeps the
    graph of every slot, `reference` re-runs the growing prefix for every slot and exists for tests."""

    @model_validator(mode="after")
    def _fields_fit(self) -> LatentRecipe:
        if self.control_tokens == "inside" and self.slots < 3:
            raise ValueError(f"slots={self.slots} leaves no slot between the control tokens; set slots to 3 or more")
        if self.feedback_gradient.startswith("hops") and self.method != "two_pass":
            raise ValueError(
                f"feedback_gradient={self.feedback_gradient} counts hops, which method={self.method} does not make; "
                "set method to two_pass, or feedback_gradient to full or cut"
            )
        return self

    @property
    def fed_slots(self) -> int:
        """Number of positions a segment really feeds back: K, or K - 2 where the control tokens count."""
        return self.slots if self.control_tokens == "outside" else self.slots - 2


class AlignmentRecipe(_Values):
    """REPA: latents pulled towards patch features of frozen teachers."""

    teachers: tuple[str, ...] = ("dinov3",)
    """Paper: section 4, VaLR-S aligns to DINOv3 and VaLR-M to DINOv3, SigLIP2 and pi3; names of `teachers`."""
    weight: float = Field(default=0.5, ge=0.0)
    """Paper: table 7, lambda = 0.5; 0 is the arm without alignment."""
    block: int = Field(default=12, ge=0)
    """Paper: table 6, block 12 of 28; we count from zero and take the block's raw output."""
    upsample: Literal["bilinear", "bicubic", "nearest", "linear_1d"] = "bilinear"
    """Paper silent on the mode; we choose bilinear on the sqrt(K) grid; `linear_1d` is for K that is no square."""
    projector_width: PositiveInt = 2048
    """Paper: section 3 says an MLP; width and depth (three linear layers, SiLU) follow REPA."""

    @model_validator(mode="after")
    def _teachers_make_sense(self) -> AlignmentRecipe:
        if len(set(self.teachers)) != len(self.teachers):
            raise ValueError(f"teachers={list(self.teachers)} names one twice; name each teacher once")
        if self.weight > 0 and not self.teachers:
            raise ValueError(f"weight={self.weight} but teachers is empty; name a teacher or set weight to 0")
        return self


class TeacherRecipe(_Values):
    """One frozen vision encoder."""

    architecture: Literal["timm", "transformers", "pi3", "qwen2_5_vl"]
    """Paper: section 4 names the encoders, tables 3 and 9 Qwen2.5-VL's own; what builds the class. `transformers` is
    for vision models that timm does not have."""
    model: str
    """Paper: "all ViT-L"; the timm name of the class (for pi3, of its image encoder), the model type of transformers
    (dinov2, siglip_vision_model ...), or for qwen2_5_vl its one class."""
    arguments: dict[str, Any] = {}
    """Paper silent; keyword arguments of the class, used for the tiny widths."""
    weights: str | None = None
    """Paper silent; a local safetensors file, or a folder with config.json and model.safetensors. Empty: qwen2_5_vl is
    the tower of base_model, and at scale tiny other teachers are trained on drawn scenes."""
    hub_id: str | None = None
    """Paper silent; a hub repository instead of a file. Needs `revision`."""
    revision: str | None = None
    """Paper silent; the full commit of the hub repository."""
    package: str | None = None
    """Paper silent; an installed Python package that carries the weights instead (see the extra
    teachers-cpu)."""
    pretraining_steps: int = Field(default=0, ge=0)
    """Paper silent; steps on drawn scenes for a teacher without weights, for scales tiny and mini."""
    layer: int | None = None
    """Paper silent; we choose the last layer after the final norm (null). A number takes the output of that block
    (timm, zero-based, negative from the end), unnormalised; of a convolutional network, of that stage."""
    image_pixels: PositiveInt = 256
    """Paper silent; we choose the native size. The image is squashed to a square, the same for every teacher."""
    views: Literal["single", "joint"] = "single"
    """Paper silent; `joint` (only pi3) sees a target that is one of several images of a question together with the
    others, as π³ was made to; a target that is cut out, or alone, is seen alone."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Paper silent; what the encoder computes in. We choose bfloat16 on GPUs; π³ keeps its weights and residual
    stream in float32, as its authors do."""
    compile: bool = False
    """Paper silent; torch.compile, which takes a minute and is worth it from some ten thousand images on."""
    features: Literal["auto", "online", "stored"] = "auto"
    """Paper silent; whether training computes the features or reads them from disk. `auto` takes what costs fewer
    seconds, from the encoder's measured speed; the numbers are printed."""
    storage: Literal["bfloat16", "float16", "int8"] = "bfloat16"
    """Paper silent; of stored features. int8 has a scale a patch and halves the bytes. The cosine to what was
    computed is measured and must be at least 0.999."""
    trainings: PositiveInt = 1
    """Paper silent; how many models will be trained on the same features, for the choice `auto` (an ablation reads
    them once a cell)."""
    license: str = "unknown"
    """Paper silent; carried with the features and into the model card."""

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherRecipe:
        origins = [name for name in ("weights", "hub_id", "package") if getattr(self, name) is not None]
        if len(origins) > 1:
            raise ValueError(f"{' and '.join(origins)} are both set; keep one and set the other to null")
        _check_pinned(self.hub_id, self.revision, "weights to a local file")
        return self

    @model_validator(mode="after")
    def _only_some_can(self) -> TeacherRecipe:
        if self.views == "joint" and self.architecture != "pi3":
            raise ValueError(f"views=joint but {self.architecture} sees one image at a time; only pi3 has joint views")
        if self.layer is not None and self.architecture != "timm":
            raise ValueError(
                f"layer={self.layer} can't be chosen with architecture {self.architecture}, only with timm"
            )
        foreign = [name for name in ("arguments", "package", "pretraining_steps") if getattr(self, name)]
        if self.architecture == "transformers" and foreign:
            raise ValueError(
                f"{' and '.join(foreign)} can't be set with architecture transformers, whose widths and weights are "
                "those of a checkpoint; leave it out, and set weights to a folder, or hub_id and revision"
            )
        return self

    @model_validator(mode="after")
    def _a_tower_is_what_its_checkpoint_says(self) -> TeacherRecipe:
        if self.architecture != "qwen2_5_vl":
            return self
        if self.model != QWEN_TOWER:
            raise ValueError(
                f"model={self.model!r} but architecture qwen2_5_vl has one class; set model to {QWEN_TOWER}"
            )
        foreign = [name for name in ("hub_id", "package", "arguments", "pretraining_steps") if getattr(self, name)]
        if foreign:
            raise ValueError(
                f"{' and '.join(foreign)} can't be set with architecture qwen2_5_vl, whose widths and weights are "
                "those of a checkpoint; leave it out, and set weights to a folder unless base_model's tower is meant"
            )
        return self


class TrainingRecipe(_Values):
    """One training stage."""

    learning_rate: PositiveFloat
    """Paper: table 7, 1e-5 in stage 1 and 2e-6 in stage 2."""
    projector_learning_rate: PositiveFloat = 1e-5
    """Paper: table 7, stage 2."""
    epochs: PositiveFloat = 1.0
    """Paper: table 7."""
    max_updates: PositiveInt | None = None
    """Paper silent; an upper bound on optimizer updates, for trials."""
    records: PositiveInt | None = None
    """Paper: figure 3, only so many training records, repeated up to the number of updates that all would give."""
    micro_batch: PositiveInt = 2
    """Paper: table 7, records on a GPU at a time."""
    accumulation: PositiveInt = 16
    """Paper: table 7, micro-batches in an update."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Paper: table 7."""
    warmup_fraction: Fraction = 0.03
    """Paper: table 7."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Paper silent on the decay; we choose cosine to zero."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Paper silent; AdamW's defaults."""
    max_gradient_norm: PositiveFloat = 1.0
    """Paper silent; we choose 1.0, the usual bound."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """Paper: table 7 uses DeepSpeed ZeRO-2; `torch` is the same loop in one process."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Paper silent; bfloat16 on GPUs, float32 on the CPU."""
    checkpoint_every: PositiveInt = 100
    """Paper silent; updates between two checkpoints from which a killed run goes on."""
    keep_checkpoints: PositiveInt = 2
    """Paper silent; newest checkpoints that stay on disk, two because one may be damaged there."""
    log_every: PositiveInt = 1
    """Paper silent; updates between two lines of the training log."""


class BenchmarkRecipe(_Values):
    """One benchmark that models are asked."""

    path: str | None = None
    """Paper silent; the folder that holds the public files; null draws a small one in the same layout."""
    format: str | None = None
    """Paper silent; whose layout and rules it has, e.g. vsi_bench or jsonl; null where its name says it."""
    profile: str | None = None
    """Paper: section 4 says VLMEvalKit; null takes the authors' own, where they need no judge."""
    limit: PositiveInt | None = None
    """Paper silent; the first questions only; null asks all and verifies that they are as many as published."""
    drawn: PositiveInt = 8
    """Paper silent; number of drawn questions, where there is no path."""


class EvaluationRecipe(_Values):
    """How answers are generated and scored."""

    benchmarks: Table[BenchmarkRecipe] = {}
    """Paper: section 5, beside the test records of the jsonl sources."""
    frames: PositiveInt = 32
    """Paper: table 8, frames of a video."""
    study_items: PositiveInt = 64
    """Paper silent; questions asked in each study: enough for an interval, few enough to ask them many times."""

    batch_size: PositiveInt = 64
    """Paper silent; rows decoded together."""
    max_new_tokens: PositiveInt = 256
    """Paper silent; text tokens and control tokens, slots not counted."""
    max_segments: PositiveInt = 64
    """Paper silent; bound on latent segments in one answer."""
    force_first_latent: bool = False
    """Paper silent; the model has to open its first segment by itself, and the trigger rate is reported."""
    latent_settle: float | None = Field(default=None, ge=-1.0, le=1.0)
    """Paper silent; cosine of successive latents from which a segment ends early; null always uses all slots."""
    limit: PositiveInt | None = None
    """Paper silent; the first items only, for trials."""
    confidence: Fraction = 0.95
    """Paper silent; level of every interval."""


class RuntimeRecipe(_Values):
    """Where it runs; part of the recipe because it can change the last bits of a result."""

    threads: PositiveInt = 1
    """Paper silent; one thread because single-position steps are slower with two."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Paper: table 7, A100 GPUs."""
    processes: PositiveInt = 1
    """Paper: table 7, 4 GPUs."""
    feature_bytes_per_second: PositiveFloat = 1e9
    """Paper silent; what the disk of stored features reads and writes, for the choice between stored and online."""
    feature_bytes: PositiveFloat = 2e12
    """Paper silent; stored features of one teacher larger than this are computed online."""


Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
"""A name in Kubernetes: lower case letters, digits and - inside."""

Quantity = Annotated[str, Field(pattern=r"^[1-9][0-9]*(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
"""An amount in Kubernetes' notation, such as 500m or 64Gi."""


class ClusterRecipe(_Values):
    """Where stages run. No stage's parameters list this section, for no result depends on it."""

    dispatch: Literal["local", "kubernetes"] = "local"
    """Paper silent; with kubernetes every stage that wants a GPU is a Job, the others run where Dagster does."""
    namespace: Label = "valr"
    """Paper silent; the namespace whose Jobs and Pods the orchestrator may make and read."""
    image: str = "valr-ops:0.1.0"
    """Paper silent; image of the Pods, with a tag other than latest, better with its digest (@sha256:...)."""
    bucket: str = Field(default="s3://valr", pattern=r"^s3://[^/]+")
    """Paper silent; s3://bucket/prefix of jobs and artifacts: the URL of the DVC remote."""
    secrets: tuple[Label, ...] = ()
    """Paper silent; Secrets whose keys become the Pods' environment: keys of the bucket, address of MLflow."""
    service_account: Label | None = None
    """Paper silent; account of the Pods, where the cloud gives it access to the bucket; they get no API token."""
    data_claim: Label | None = None
    """Paper silent; PersistentVolumeClaim with what the recipe names by local paths, read-only: the Pod of a stage that
    reads one finds the claim's folders, such as weights and data, in its project. Null refuses such a stage."""
    queue: Label | None = None
    """Paper silent; Kueue's LocalQueue; Jobs are made suspended and Kueue starts them. Null starts them at once."""
    priority_class: Label | None = None
    """Paper silent; which Pods make room for which, null for the cluster's default."""
    nodes: PositiveInt = 1
    """Paper: table 7, one node; training divides runtime.processes among them, one GPU a process; other stages are
    on one."""
    gang: Literal["indexed_job", "jobset"] = "indexed_job"
    """Paper silent; what training on several nodes is: an Indexed Job, which every cluster knows, or a JobSet."""
    cpu: Quantity = "2"
    """Paper silent; cores of a Pod."""
    memory: Quantity = "8Gi"
    """Paper silent; memory of a Pod, what is in /dev/shm included."""
    shared_memory: Quantity = "1Gi"
    """Paper silent; size of /dev/shm: NCCL and loader processes need more than the usual 64 MB."""
    scratch: Quantity = "20Gi"
    """Paper silent; node-local disk for inputs, checkpoints and the artifact being made."""
    grace_seconds: PositiveInt = 120
    """Paper silent; from SIGTERM to SIGKILL: more than finishing an update and writing a checkpoint takes."""
    deadline_hours: PositiveFloat = 72.0
    """Paper silent; a Job that runs longer is stopped, and goes on from its checkpoint when it is run again."""
    wait_hours: PositiveFloat = 24.0
    """Paper silent; how long a run waits for its place in the queue or for a node with free GPUs."""
    keep_hours: PositiveFloat = 168.0
    """Paper silent; how long a Job that has ended stays in the cluster: longer than the orchestrator may be down."""

    @model_validator(mode="after")
    def _image_is_fixed(self) -> ClusterRecipe:
        name = self.image.rpartition("/")[2]
        fixed = re.fullmatch(r"[^:@\s]+(:[\w.-]+)?@sha256:[0-9a-f]{64}|[^:@\s]+:[\w.-]+", name)
        if fixed is None or name.endswith(":latest"):
            raise ValueError(
                f"image={self.image} may be another one tomorrow; name it with a tag other than latest, or with its "
                "digest: registry/valr-ops@sha256:..."
            )
        return self


def _from_low_to_high(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError(f"begins at {span[0]:g}, which is more than its end {span[1]:g}; write the smaller one first")
    return span


Span = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_from_low_to_high)]
"""The least and the most that a number may be."""


class PriceRecipe(_Values):
    """What a price before dispatch is computed from, and above what nothing is dispatched. No result depends on it."""

    max_dollars: PositiveFloat = 5000.0
    """Paper silent; a stage whose price may be higher is not dispatched."""
    max_hours: PositiveFloat = 168.0
    """Paper silent; a stage that may take longer is not dispatched; we choose a week."""
    gpu: str = "NVIDIA A100-SXM4-80GB"
    """Paper: table 7, A100; silent on which. Its peak is the data sheet's."""
    gpu_bytes: PositiveFloat = 84e9
    """Paper silent; memory of that GPU which the driver leaves to a process, of 80 GiB."""
    gpu_bytes_per_second: PositiveFloat = 2.0e12
    """Paper silent; its memory bandwidth by the data sheet."""
    dollars_per_gpu_hour: Span = (1.5, 4.1)
    """Paper silent; set what you pay. On demand an A100 of 80 GB cost 1.49 to 2.49 an hour at smaller clouds early in
    2026 (pricegpu.pages.dev), 2.45 at RunPod in March 2026 (deploybase.ai), and 4.10 was an eighth of Amazon's
    p4d.24xlarge, 32.77, in 2024 (xither.com), before it was lowered in June 2025."""
    utilisation: Span = (0.25, 0.5)
    """Paper silent; computed FLOPs, activations computed again included, over the dense peak. We measured 0.26 with
    micro-batches of two records on an H200 (perf: gpu_stage1_utilisation) and take one half as the best."""
    bandwidth_utilisation: Span = (0.3, 0.6)
    """Paper silent; bytes of weights over bandwidth where positions are computed one by one. We measured 0.31 on an
    H200 (perf: gpu_latent_step), and 0.6 is the goal."""
    eager_step_seconds: Span = (0.025, 0.039)
    """Paper silent; the least that one pass over the blocks takes with latents.method=sequential, whose small products
    are launched one by one: 28 to 36 blocks of about a millisecond. A slot of Qwen2.5-VL-3B took 0.1 s on an H200,
    three of them (perf: gpu_step_sequential_1)."""
    cpu_flops_per_second: PositiveFloat = 8e10
    """Paper silent; what a core multiplies in float32 at most, in place of a GPU's peak. At scale tiny stage 1 reached
    0.36 of it and stage 2, whose slots come one by one, 0.15."""
    images_per_second: Span = (300.0, 700.0)
    """Paper silent; images that two cores decode, for cot_corpus to check or for a model to be asked about; we measured
    694 (perf: images_per_second) and take less than half for large ones."""
    records_per_second: Span = (1500.0, 11000.0)
    """Paper silent; rows that cot_corpus reads, checks and writes on two cores without their images; we measured 11,300
    of 450,000 (perf: corpus_450000_seconds), and rows of a line of text are the shortest."""
    rewritten_per_second: Span = (40.0, 400.0)
    """Paper silent; records that latent_corpus rewrites on two cores; at scale tiny 90, start included."""
    start_seconds: Span = (5.0, 60.0)
    """Paper silent; from the start of a stage's process to its first work: imports took 9 to 20 s on a CPU, and the
    weights are read from disk."""
    disk_bytes_per_second: Span = (5e8, 2e9)
    """Paper silent; one process writing a checkpoint or reading inputs on a node's disk."""
    network_bytes_per_second: Span = (2.5e8, 1.25e9)
    """Paper silent; one Pod to or from the object store, between 2 and 10 Gbit/s."""
    notice_seconds: PositiveFloat = 120.0
    """Paper silent; from the notice of a preemption to its end; clouds give 30 to 120 s."""
    full_feedback_hops: PositiveInt = 12
    """Paper silent; hops after which latents.feedback_gradient=full with two_pass may stop, because one more changes
    less than states in bfloat16 hold; between 8 and 16 with random weights (perf: gradient_error_hops*). At most, and
    with weights in float32 always, all slots."""
    images_per_record: PositiveFloat = 4.0
    """Paper silent; before there is a corpus: one or two images for 295 thousand records, about eight views for 155."""
    image_pixels: PositiveInt = 640 * 480
    """Paper silent; before there is a corpus: of an image, the size of COCO's, GQA's and ScanNet's."""
    image_bytes: PositiveFloat = 1e5
    """Paper silent; of a JPEG of that size."""
    text_tokens: PositiveInt = 400
    """Paper silent; before there is a corpus: question, steps and answer of a record."""
    supervised_share: Fraction = 0.75
    """Paper silent; of the text that is steps and answer, on which the model is trained."""
    segments_per_record: PositiveFloat = 3.0
    """Paper silent; before there is a corpus: (125 x 3 + 155 x 4 + 170 x 1) / 450, rounded up."""
    most_segments: PositiveInt = 10
    """Paper silent; before there is a corpus: the longest chains of Zebra-CoT."""
    answer_tokens: PositiveInt = 300
    """Paper silent; among the lengths of figure 2; an answer of evaluation.max_new_tokens tokens is the most."""


class ReleaseRecipe(_Values):
    """Which model is put forward as champion, and what the gate asks of it. No artifact depends on this section."""

    challenger: Literal["sft", "valr_s", "valr_m"] = "valr_m"
    """Paper: section 4, its best model; the one whose scores go through the gate."""
    baseline: Literal["base", "sft", "valr_s"] | None = "sft"
    """Paper: table 1, the model without latents; with its scores the first challenger is compared, null for none."""
    target: Name = "vsi_bench"
    """Paper: table 1, VSI-Bench; the benchmark that has to rise."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Paper silent; the largest loss, as a share of the full score, that may be risked on any other benchmark."""
    automatic: bool = False
    """Paper silent; whether the pipeline may move the alias champion where the gate lets a challenger through."""

    @model_validator(mode="after")
    def _two_models_are_compared(self) -> ReleaseRecipe:
        if self.challenger == self.baseline:
            raise ValueError(
                f"challenger and baseline are both {self.challenger}, which can't win against itself; set "
                "release.baseline to another model, or to null"
            )
        return self


class StudyRecipe(_Values):
    """The studies of the method on drawn tiles. No model that is released depends on this section."""

    model: TinyModelRecipe = TinyModelRecipe(vocabulary_size=320, rope_theta=10.0)
    """Paper silent; four blocks, so that a step's word can follow from no more than four looks one after another. A
    base of 10 lets rows and columns of so few cells differ."""
    side: int = Field(default=2, ge=2, le=3)
    """Paper silent; tiles on each side of a picture."""
    steps: int = Field(default=3, ge=1, le=9)
    """Paper silent; tiles that a trail visits, a segment of latents before each."""
    chain_steps: tuple[PositiveInt, ...] = (2, 4)
    """Paper silent; lengths of trails that `chain_check` compares, beside those of `steps` in `method_check`."""
    block: int = Field(default=2, ge=0)
    """Paper: table 6, the middle; the block whose states are aligned."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Paper silent; of the weights and the pictures of training; all of them are reported."""
    search_seed: int = 0
    """Paper silent; the seed with which each arm's learning rate is chosen, of the towers and of held-out pictures."""
    learning_rates: tuple[PositiveFloat, ...] = (1e-3, 3e-3)
    """Paper silent; every arm is tried at each of them, and keeps the one at which most steps are right."""
    teacher_updates: PositiveInt = 200
    """Paper silent; of each teacher's own training, after which all it is asked about unseen cells is right."""
    stage1_learning_rate: PositiveFloat = 3e-3
    """Paper silent; stage 1 is shared by all arms of a seed."""
    projector_learning_rate: PositiveFloat = 1e-3
    """Paper silent; the same in every arm."""
    stage1_updates: PositiveInt = 100
    """Paper silent; fine-tuning before the arms begin, after which it knows how chains are written."""
    updates: PositiveInt = 400
    """Paper silent; of each arm; with seeds 0 to 3 the aligned one had learned the task by then (EVIDENCE.md)."""
    warmup_updates: PositiveInt = 20
    """Paper silent; then the rate stays, so that a curve shows what stopping earlier would have given."""
    batch: PositiveInt = 128
    """Paper silent; pictures in an update, none of which comes again. With 32 no arm learned the task, and on simpler
    ones the seed decided whether an arm left its plateau."""
    score_every: PositiveInt = 25
    """Paper silent; updates between two points of a learning curve."""
    pictures: PositiveInt = 512
    """Paper silent; held-out pictures that each point is scored on."""
    quick: bool = False
    """Paper silent; the first seed, one learning rate, two arms, fewer updates and held-out pictures: ten minutes
    instead of hours."""

    @model_validator(mode="after")
    def _seeds_make_sense(self) -> StudyRecipe:
        if len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < 2:
            raise ValueError(f"seeds={list(self.seeds)}: an interval needs at least two, each named once")
        if (longest := max(self.steps, *self.chain_steps)) > self.side**2:
            raise ValueError(
                f"steps={self.steps}, chain_steps={list(self.chain_steps)}: a picture of side={self.side} has "
                f"{self.side**2} tiles, and none is visited twice, so {longest} are too many"
            )
        if self.search_seed in self.seeds:
            raise ValueError(
                f"search_seed={self.search_seed} is among seeds, which would be scored by what they were chosen for; "
                "take another number"
            )
        if self.block >= self.model.layers:
            raise ValueError(f"block={self.block} but study.model has blocks 0..{self.model.layers - 1}")
        return self


class Variant(_Values):
    """What one model of the paper's tables changes; empty fields keep the recipe's value."""

    teachers: tuple[str, ...] | None = None
    """Paper: tables 3, 4, 5 and 9."""
    weight: float | None = Field(default=None, ge=0.0)
    """Paper: tables 3 and 11."""
    block: int | None = Field(default=None, ge=0)
    """Paper: table 6."""
    slots: PositiveInt | None = None
    """Paper: table 12."""
    records: PositiveInt | None = None
    """Paper: figure 3, training records of stage 2 at a fixed number of updates."""
    stage1_records: PositiveInt | None = None
    """Paper: figure 3, training records of stage 1, for the models without latents, which end there."""


class Recipe(_Values):
    """Everything about a run."""

    scale: Literal["tiny", "mini", "small", "paper"]
    """Paper: 7B on 4 A100 is scale paper; tiny and mini run on two CPU cores, small on one GPU."""
    seed: int = Field(default=0, ge=0)
    """Paper silent; one seed for weights, order and sampling."""
    data: DataRecipe
    """Paper: section 5."""
    base: BaseModelRecipe
    """Paper: section 4."""
    latents: LatentRecipe = LatentRecipe()
    """Paper: section 3."""
    alignment: AlignmentRecipe = AlignmentRecipe()
    """Paper: section 3."""
    teachers: Table[TeacherRecipe]
    """Paper: section 4."""
    stage1: TrainingRecipe
    """Paper: table 7."""
    stage2: TrainingRecipe
    """Paper: table 7."""
    evaluation: EvaluationRecipe = EvaluationRecipe()
    """Paper: section 4."""
    runtime: RuntimeRecipe = RuntimeRecipe()
    """Paper: table 7."""
    cluster: ClusterRecipe = ClusterRecipe()
    """Paper silent; where stages run, which no result depends on."""
    price: PriceRecipe = PriceRecipe()
    """Paper silent; what a stage may cost, and what is assumed to say so before it runs."""
    release: ReleaseRecipe = ReleaseRecipe()
    """Paper silent; who may become champion, which no result depends on."""
    study: StudyRecipe = StudyRecipe()
    """Paper silent; what its claims are tried on in miniature."""
    variants: Table[Variant] = {}
    """Paper: tables 3 to 6, 9, 11, 12 and figure 3, one entry a trained model."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        self._check_teachers("alignment.teachers", self.alignment.teachers)
        self._check_block("alignment.block", self.alignment.block)
        for name, variant in self.variants.items():
            self._check_teachers(f"variants.{name}.teachers", variant.teachers or ())
            if self.base.from_scratch:
                # Elsewhere for_variant refuses it: another base model makes only the variants that name a block wrong.
                self._check_block(f"variants.{name}.block", variant.block or 0)
        if self.runtime.processes % self.cluster.nodes:
            raise ValueError(
                f"runtime.processes={self.runtime.processes} don't divide among cluster.nodes={self.cluster.nodes}; "
                "set runtime.processes to the number of GPUs of all nodes together"
            )
        fed = self.latents.fed_slots
        if self.alignment.upsample != "linear_1d" and math.isqrt(fed) ** 2 != fed:
            raise ValueError(
                f"latents.slots={self.latents.slots} with control_tokens={self.latents.control_tokens} feeds {fed} "
                "slots, which make no square grid; choose 1, 4, 9, 16, 25 ... or set alignment.upsample to linear_1d"
            )
        if fed > self.data.reserved_slots:
            # The sequences were cut to what leaves room for the reserved ones, which training would notice hours later.
            raise ValueError(
                f"latents.slots={self.latents.slots} with control_tokens={self.latents.control_tokens} feeds {fed} "
                f"slots, but latent_corpus keeps records that leave room for data.reserved_slots="
                f"{self.data.reserved_slots} a segment; raise data.reserved_slots to {fed}, or lower latents.slots"
            )
        return self

    def _check_teachers(self, where: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.teachers:
                raise ValueError(f"{where} names {name!r}, which is not in teachers{_nearest(name, self.teachers)}")

    def _check_block(self, where: str, block: int) -> None:
        if self.base.blocks is not None and block >= self.base.blocks:
            last = self.base.blocks - 1
            raise ValueError(
                f"{where}={block} but this model has blocks 0..{last}; "
                f"set it to {round(last * 12 / 27)} (paper, table 6: block 12 of 0..27)"
            )

    def for_variant(self, name: str) -> Recipe:
        """The recipe of one model of the paper's tables, e.g. ``recipe.for_variant("valr_m")``.

        Raises:
            RecipeError: no such variant, or one that does not go with the rest of the recipe.
        """
        if name not in self.variants:
            raise RecipeError(f"there is no variant {name!r} at scale {self.scale}{_nearest(name, self.variants)}")
        variant = self.variants[name]
        changes = {
            "alignment.teachers": variant.teachers,
            "alignment.weight": variant.weight,
            "alignment.block": variant.block,
            "latents.slots": variant.slots,
            "stage2.records": variant.records,
            "stage1.records": variant.stage1_records,
        }
        try:
            return override(self, {key: value for key, value in changes.items() if value is not None})
        except RecipeError as error:
            raise RecipeError(f"variants.{name}: {error}") from None

    @property
    def processes_of_a_node(self) -> int:
        """How many of `runtime.processes` work on each of `cluster.nodes`, where each has a GPU to itself."""
        return self.runtime.processes // self.cluster.nodes

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits, equal for equal recipes."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


_WHOLE_LISTS = ("data.sources", "evaluation.benchmarks")


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A copy of `recipe` with some fields replaced, e.g. ``{"stage2.learning_rate": 1e-5}``.

    Keys may be dotted, nested, or both. Tables are merged, so that one field of one teacher can change; only a mapping
    given for ``data.sources`` or ``evaluation.benchmarks`` is the whole list: what is listed is what is used.

    Raises:
        RecipeError: an unknown key (with the nearest known one) or a value the field refuses.
    """
    values = recipe.model_dump(mode="json")
    _merge(values, changes)
    return _validated(values)


def read(values: Mapping[str, Any]) -> Recipe:
    """The recipe from a plain mapping, as `Recipe.model_dump` wrote it. Raises `RecipeError`."""
    return _validated(dict(values))


def assumptions(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Every field of a recipe: (dotted name, value as JSON, where the value comes from)."""
    yield from _walk(recipe, "")


def _walk(model: BaseModel, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(model, Variant) and value is None:
            continue
        if isinstance(value, BaseModel):
            yield from _walk(value, f"{prefix}{name}.")
        elif isinstance(value, dict) and value and all(isinstance(entry, BaseModel) for entry in value.values()):
            for key, entry in value.items():
                yield from _walk(entry, f"{prefix}{name}.{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, default=list)
            yield f"{prefix}{name}", shown, " ".join((field.description or "").split())


def _merge(values: dict[str, Any], changes: Mapping[str, Any], above: str = "") -> None:
    for key, value in changes.items():
        name, _, rest = str(key).partition(".")
        if rest:
            value = {rest: value}
        replaces = f"{above}{name}" in _WHOLE_LISTS and not rest
        if isinstance(value, Mapping) and not replaces:
            if not isinstance(values.get(name), dict):
                values[name] = {}
            _merge(values[name], value, f"{above}{name}.")
        else:
            values[name] = value


def _validated(values: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    location: tuple[Any, ...] = problem["loc"]
    where = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        name = str(location[-1])
        same_name = [field for field in _all_fields(Recipe) if field.endswith(f".{name}")]
        hint = f"; did you mean {' or '.join(same_name)}?" if same_name else None
        return f"{where}: there is no such field{hint or _nearest(name, _model_at(location[:-1]).model_fields)}"
    if problem["type"] == "missing":
        above = ".".join(str(part) for part in location[:-1])
        return f"{where}: this field has no default; give it a value" + (
            f", or check the spelling of {above}" * bool(above)
        )
    if problem["type"] == "string_pattern_mismatch" and location[-1] == "[key]":
        return f"{'.'.join(location[:-2])}: {problem['input']!r} is no name; use letters, digits, - and _"
    if problem["type"] == "model_type":
        return (
            f"{where}: holds fields, not a value; give one, e.g. {where}.{_first_field(location)}, or remove the line"
        )
    if isinstance(problem["input"], dict) and problem["type"] != "value_error":
        return f"{where}: is a single value, it has no fields below it"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], Mapping | BaseModel) else f" (given: {problem['input']!r})"
    return f"{where}: {message}{given}" if where else f"{message}{given}"


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names) or 'none'}"


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_inside, get_args(annotation))), None)


def _model_at(location: Sequence[Any]) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    entry_of_table = False
    for part in location:
        if entry_of_table:
            entry_of_table = False
            continue
        annotation = model.model_fields[part].annotation
        entry_of_table = get_origin(annotation) is dict
        model = _model_inside(annotation) or model
    return model


def _first_field(location: Sequence[Any]) -> str:
    return next(iter(_model_at(location).model_fields))


def _all_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        below = None if get_origin(field.annotation) is dict else _model_inside(field.annotation)
        if below:
            yield from _all_fields(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
