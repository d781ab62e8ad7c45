"""The link to a look: what is written is read again, and what cannot be had is said and never fatal."""

from __future__ import annotations

from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistok.catalogue import methods
from vistok.studio import link, samples
from vistok.studio.link import Look

MODELS = ("vistok-tiny", "vistok-tiny-qwen")
SLUGS = [card.slug for card in methods("reduce")]


def opened(text):
    return link.read({name: values[-1] for name, values in parse_qs(text, keep_blank_values=True).items()}, MODELS)


@given(
    st.sampled_from(MODELS),
    st.sampled_from(["world:scenes:3", "world:words:0", "world:charts:4294967295", *samples.samples()]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=40),
    st.lists(st.sampled_from(SLUGS), unique=True, max_size=link.MOST_METHODS),
    st.integers(1, 100),
)
def test_what_is_written_is_read_again(model, picture, question, chosen, percent):
    look = Look(model, picture, question, tuple(chosen), percent / 100)
    assert opened(link.write(look)) == (look, [])


def test_without_a_query_it_is_the_first_look():
    look, wrong = opened("")
    assert (look, wrong) == (link.first(MODELS), [])
    assert look.model == "vistok-tiny" and look.picture == "world:scenes:28"
    case = samples.case(look.picture, None, look.question)
    assert case.truth is not None and not case.truth.evidence.all()


def test_a_picture_of_ones_own_is_no_part_of_the_link():
    written = link.write(Look("vistok-tiny", samples.OWN, "what is this?"))
    assert "picture" not in parse_qs(written) and "question" in parse_qs(written)


def test_a_picture_alone_brings_a_question_of_its_own():
    look, _ = opened("picture=world:words:5")
    assert look.question == samples.picture("world:words:5")[1][0].text


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("picture=world:nowhere:3", "The picture world:nowhere:3: must be world:TASK:NUMBER"),
        ("picture=world:scenes:-1", "The picture world:scenes:-1: must be"),
        ("picture=../../etc/passwd", "The picture ../../etc/passwd: must be"),
        ("picture=photo:nobody", "or one of"),
        ("model=gpt", "The model gpt is not here; there is vistok-tiny, vistok-tiny-qwen."),
        ("methods=fastv,fastvv", "There is no method fastvv."),
        ("methods=dmllm-redundancy", "There is no method dmllm-redundancy."),
        ("keep=0", "keep is 0, it must be a share"),
        ("keep=nan", "keep is nan"),
        ("keep=1.01", "keep is 1.01"),
        ("keep=lots", "keep is lots"),
        ("methods=" + ",".join(SLUGS[:9]), "Only the first 6 methods are shown."),
        ("question=" + "why+" * 200, "The question was cut to 300 characters."),
    ],
)
def test_what_cannot_be_had_is_said_and_the_rest_is_kept(query, sentence):
    look, wrong = opened(f"{query}&nonsense=1")
    assert len(wrong) == 1 and sentence in wrong[0]
    first = link.first(MODELS)
    assert look.picture == first.picture and look.model == first.model and look.keep == first.keep
    assert len(look.question) <= link.LONGEST and len(look.methods) <= link.MOST_METHODS
    assert set(look.methods) <= set(SLUGS)


def test_methods_are_named_once_and_none_is_a_choice_too():
    assert opened("methods=fastv,fastv,holov")[0].methods == ("fastv", "holov")
    assert opened("methods=") == (link.first(MODELS).__class__(**{**vars(link.first(MODELS)), "methods": ()}), [])
