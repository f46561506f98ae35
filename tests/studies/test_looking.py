"""Looking into a model: the plain pass is the trained one, and what slots are fed is what the condition says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.studies.tiny_study import model
from valr_ops.model import latents
from valr_ops.studies.arms import ARMS
from valr_ops.studies.looking import CONDITIONS, Condition, Seen, Subject, _fed, _read, look
from valr_ops.studies.tiles import draw


def seen(condition: Condition = "normal", arm: str = "aligned") -> Seen:
    one, layout = model()
    return look(Subject(one, layout, ARMS[arm]), draw((9,), 6, 2, 4), condition)


def test_the_plain_pass_is_the_pass_of_training() -> None:
    one, layout = model()
    batch = layout.batch(draw((9,), 6, 2, 4), 4)
    trained = latents.forward(one, batch, method="reference", block=1)
    plain = seen().at_slots
    assert plain is not None and trained.states is not None
    # Plain attention takes its softmax in float32.
    assert plain[:, :, :, 2].flatten(0, 1).sub(trained.states).abs().max() < 1e-5


def test_a_step_is_right_where_the_likeliest_word_is_the_asked_one() -> None:
    one, layout = model()
    pictures = draw((9,), 6, 2, 4)
    logits = one.lm_head(seen().at_step[:, :, -1])
    words = torch.from_numpy(layout._words[pictures.answers])
    assert (seen().right == (logits.argmax(-1) == words).numpy()).all()


@pytest.mark.parametrize("condition", CONDITIONS[1:])
def test_every_condition_changes_what_a_step_sees(condition: Condition) -> None:
    assert (seen(condition).at_step - seen().at_step).abs().max() > 1e-6


def test_what_slots_are_fed() -> None:
    _, layout = model()
    pictures = draw((9,), 3, 2, 4)
    batch = layout.batch(pictures, 4)
    states = torch.randn(12, 4, 8, dtype=torch.float64)
    assert (_fed(states, batch, "other", (0,))[0:4] == states[8:12]).all(), "those of the picture before"
    assert (_fed(states, batch, "first", (0,)) == states[:, :1]).all()
    assert not _fed(states, batch, "zeroed", (0,)).any()
    noise = _fed(states, batch, "noised", (0,))
    assert torch.allclose(noise.norm(dim=-1), states.norm(dim=-1)) and not torch.allclose(noise, states)


def test_attention_on_the_picture_is_a_share_and_a_model_without_latents_has_no_slots() -> None:
    for arm in ("sft", "markers", "aligned", "pads"):
        found = seen(arm=arm)
        assert ((found.image_attention > 0) & (found.image_attention < 1)).all()
        assert (found.at_slots is not None) == bool(ARMS[arm].slots)


def test_pictures_looked_at_in_pieces_are_looked_at_alike() -> None:
    one, layout = model()
    subject, pictures = Subject(one, layout, ARMS["aligned"]), draw((9,), 130, 2, 4)
    together = look(subject, pictures).at_step
    alone = look(subject, pictures[128:]).at_step
    assert (together[128:] - alone).abs().max() < 1e-9


def test_a_probe_reads_what_is_there_and_only_chance_of_what_is_not() -> None:
    rng = np.random.default_rng(0)
    classes = torch.from_numpy(rng.integers(0, 13, 4000))
    told = torch.nn.functional.one_hot(classes, 13).double() @ torch.randn(13, 20, dtype=torch.float64)
    assert _read(told + 0.01 * torch.randn_like(told), classes) > 0.99
    assert _read(torch.randn_like(told), classes) < 0.13
