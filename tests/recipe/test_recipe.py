"""The recipe's types: what they accept, what they refuse and in which words, and what makes two recipes equal."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import Recipe, RecipeError, assumptions, override, read


def _models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found = {model.__name__: model}

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(_models(annotation))
        for part in get_args(annotation):
            visit(part)

    for field in model.model_fields.values():
        visit(field.annotation)
    return found


@pytest.mark.parametrize("model", _models(Recipe).values(), ids=_models(Recipe))
def test_every_field_says_where_its_value_comes_from(model: type[BaseModel]) -> None:
    silent = {name: field.description for name, field in model.model_fields.items()}
    assert silent and all((origin or "").startswith("Paper") for origin in silent.values()), silent


@pytest.mark.parametrize("name", recipes.SCALES)
def test_a_recipe_comes_back_unchanged_from_json(name: str) -> None:
    recipe = recipes.scale(name)
    back = read(json.loads(recipe.model_dump_json()))
    assert back == recipe
    assert back.fingerprint == recipe.fingerprint


def test_a_recipe_can_not_be_changed_in_place() -> None:
    with pytest.raises(Exception, match="frozen"):
        recipes.tiny().stage2.learning_rate = 1.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage2.learning_rat": 1}, r"^stage2.learning_rat: there is no such field; did you mean 'learning_rate'\?$"),
        ({"stage3": {"learning_rate": 1}}, r"^stage3: there is no such field; did you mean 'stage[12]'\?$"),
        ({"learning_rate": 1}, "did you mean stage1.learning_rate or stage2.learning_rate"),
        ({"teachers": {"dinov3": {"wieghts": "x"}}}, r"teachers.dinov3.wieghts: .*did you mean 'weights'"),
        ({"variants.valr_s.slotz": 1}, "did you mean 'slots'"),
        ({"teachers.dinov4.weights": "x"}, "teachers.dinov4.model: .*check the spelling of teachers.dinov4"),
        ({"seed.x": 1}, "^seed: is a single value, it has no fields below it$"),
        ({"stage2": None}, "^stage2: holds fields, not a value; give one, e.g. stage2.learning_rate"),
        ({"stage2": 3}, "^stage2: holds fields, not a value"),
        ({"stage1.schedule": "cosin"}, r"stage1.schedule: .*'cosine', 'linear' or 'constant' \(given: 'cosin'\)"),
        ({"stage1.learning_rate": float("inf")}, "stage1.learning_rate: .*finite"),
        ({"stage1.learning_rate": 0}, "stage1.learning_rate: .*greater than 0"),
        ({"latents.feedback_gradient": "hops:0"}, "latents.feedback_gradient: "),
        (
            {"latents": {"feedback_gradient": "hops:2", "method": "sequential"}},
            "feedback_gradient=hops:2 counts hops, which method=sequential does not make; set method to two_pass",
        ),
        ({"stage2.keep_checkpoints": 0}, "stage2.keep_checkpoints: .*greater than 0"),
        ({"latents.slots": 5}, "latents.slots=5 .*no square grid; choose 1, 4, 9"),
        ({"latents": {"slots": 2, "control_tokens": "inside"}}, "leaves no slot between the control tokens"),
        ({"latents": {"slots": 16, "control_tokens": "inside"}}, "feeds 14 slots"),
        (
            {"latents.slots": 36},
            r"feeds 36 slots, but latent_corpus .* data.reserved_slots=25 .*; raise data.reserved_slots to 36",
        ),
        ({"alignment.block": 4}, r"^alignment.block=4 but this model has blocks 0..3; set it to 1 "),
        (
            {"teachers.qwen.model": "qwen"},
            r"^teachers.qwen: model='qwen' but architecture qwen2_5_vl has one class; set",
        ),
        ({"teachers.qwen.pretraining_steps": 9}, r"^teachers.qwen: pretraining_steps can't be set with .*qwen2_5_vl"),
        (
            {"teachers.dinov3.architecture": "transformers"},
            r"^teachers.dinov3: arguments and pretraining_steps can't be set with architecture transformers",
        ),
        ({"teachers.pi3.layer": 3}, r"^teachers.pi3: layer=3 can't be chosen with architecture pi3, only with timm"),
        ({"teachers.dinov3.views": "joint"}, r"^teachers.dinov3: views=joint but timm sees one image at a time"),
        ({"variants.valr_s.block": 9}, r"^variants.valr_s.block=9 but this model has blocks 0..3"),
        ({"alignment.teachers": ["dinov4"]}, "alignment.teachers names 'dinov4', .* did you mean 'dinov3'"),
        ({"variants.valr_s.teachers": ["vggt"]}, "variants.valr_s.teachers names 'vggt', which is not in teachers"),
        ({"alignment.teachers": ["pi3", "pi3"]}, "names one twice"),
        ({"alignment.teachers": []}, "name a teacher or set weight to 0"),
        ({"base.path": "x"}, "exactly one of path, hub_id and from_scratch must be set, not path and from_scratch"),
        ({"base": {"from_scratch": None}}, "must be set, not none"),
        ({"base": {"from_scratch": None, "hub_id": "a/b", "revision": "main"}}, "full commit .* not 'main'"),
        ({"teachers.pi3.hub_id": "a/b"}, "full commit .* not None; or set hub_id to null and weights to"),
        ({"teachers.pi3": {"hub_id": "a/b", "weights": "x"}}, "keep one and set the other to null"),
        ({"data.sources": {"../up": {"format": "jsonl"}}}, "data.sources: '../up' is no name; use letters"),
    ],
)
def test_a_wrong_override_is_refused_with_field_reason_and_fix(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        override(recipes.tiny(), changes)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as refused:
        override(recipes.tiny(), {"stage1.learning_rate": -1, "seed": "x", "laten.slots": 4})
    assert len(str(refused.value).splitlines()) == 3


def test_keys_may_be_dotted_nested_or_both() -> None:
    nested = override(recipes.tiny(), {"data": {"synthetic": {"rows": 3}}})
    assert nested == override(recipes.tiny(), {"data.synthetic.rows": 3})
    assert nested == override(recipes.tiny(), {"data": {"synthetic.rows": 3}})
    assert nested.data.synthetic.rows == 3
    assert nested.data.synthetic.columns == recipes.tiny().data.synthetic.columns


def test_a_mapping_for_sources_is_the_whole_list_and_for_teachers_is_merged() -> None:
    own = {"mine": {"format": "jsonl", "path": "data/mine"}}
    for changes in ({"data.sources": own}, {"data": {"sources": own}}):
        assert list(override(recipes.tiny(), changes).data.sources) == ["mine"]
    one_path = override(recipes.tiny(), {"data.sources.zebra_cot.path": "here"}).data.sources
    assert (len(one_path), one_path["zebra_cot"].path) == (8, "here")
    teachers = override(recipes.tiny(), {"teachers": {"pi3": {"image_pixels": 28}}}).teachers
    assert (len(teachers), teachers["pi3"].image_pixels) == (7, 28)


def test_the_order_of_a_table_in_the_file_changes_nothing() -> None:
    values = recipes.tiny().model_dump(mode="json")
    values["data"]["sources"] = dict(reversed(values["data"]["sources"].items()))
    turned = read(values)
    assert list(turned.data.sources) == list(recipes.tiny().data.sources)
    assert turned.fingerprint == recipes.tiny().fingerprint


def test_any_changed_value_changes_the_fingerprint() -> None:
    changes: list[dict[str, Any]] = [{"seed": 1}, {"runtime.threads": 2}, {"variants.valr_s.weight": 0.1}]
    prints = {override(recipes.tiny(), change).fingerprint for change in [{}, *changes]}
    assert len(prints) == 4


def test_a_variant_changes_only_the_fields_it_names() -> None:
    recipe = recipes.paper()
    changed = recipe.for_variant("figure3_valr_m_50k")
    assert changed.alignment.teachers == ("dinov3", "siglip2", "pi3")
    assert changed.stage2.records == 50_000
    assert override(changed, {"alignment.teachers": ["dinov3"], "stage2.records": None}) == recipe


def test_an_unknown_variant_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="no variant 'valr_x' at scale tiny; did you mean 'valr_"):
        recipes.tiny().for_variant("valr_x")


def test_a_variant_that_does_not_fit_is_named() -> None:
    recipe = override(recipes.tiny(), {"variants.odd.slots": 5})
    with pytest.raises(RecipeError, match=r"^variants.odd: latents.slots=5"):
        recipe.for_variant("odd")


def test_slots_that_are_reserved_are_accepted() -> None:
    reserved = override(recipes.tiny(), {"latents.slots": 36, "data.reserved_slots": 36})
    assert reserved.latents.fed_slots == reserved.data.reserved_slots
    inside = override(recipes.tiny(), {"latents": {"slots": 27, "control_tokens": "inside"}})
    assert inside.latents.fed_slots == 25, "control tokens need no room of their own"


def test_the_ledger_names_every_field_once() -> None:
    fields = [field for field, _, _ in assumptions(recipes.paper())]
    assert len(fields) == len(set(fields))
    assert {"stage2.learning_rate", "teachers.pi3.license", "variants.table12_k25.slots", "alignment.block"} <= {
        *fields
    }
    assert "variants.table12_k25.teachers" not in fields
