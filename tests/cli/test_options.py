"""What commands read alike: --keep, --methods, --model, and the command as it was typed."""

from __future__ import annotations

import json
from typing import Annotated

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vistok import catalogue
from vistok.cli import options
from vistok.cli.console import UserError
from vistok.cli.options import command_line, create, load_model, parse_keep, parse_keeps, parse_methods


@pytest.mark.parametrize(
    ("text", "keep"),
    [("64", 64), ("1", 1), ("1.0", 1.0), ("0.25", 0.25), (" 0.11 ", 0.11), ("25%", 0.25), ("2.5%", 0.025),
     ("1e-1", 0.1), ("100%", 1.0), (".5", 0.5), ("064", 64)],
)  # fmt: skip
def test_keep(text, keep):
    assert parse_keep(text) == keep
    assert type(parse_keep(text)) is type(keep)


@pytest.mark.parametrize(
    "text",
    ["0", "-3", "0.0", "0%", "-0.5", "1.5", "101%", "nan", "NaN", "inf", "-inf", "", " ", "abc", "0x10", "1_000", "٣",
     "1,5", "64 tokens", "%", "nan%", "99999999999"],
)  # fmt: skip
def test_wrong_keep(text):
    with pytest.raises(UserError, match=r"--keep: got .*must be a count of tokens such as 64, or a share"):
        parse_keep(text)


@settings(max_examples=60)
@given(st.text("0123456789.%-+eE naif٣_", max_size=8))
def test_keep_is_a_count_a_share_or_a_user_error(text):
    try:
        keep = parse_keep(text)
    except UserError:
        return
    assert keep >= 1 if isinstance(keep, int) else 0 < keep <= 1


def test_several_keeps():
    assert parse_keeps("0.25, 64,0.25,25%") == [0.25, 64]


def test_all_methods_have_dense_and_the_controls_first():
    names = parse_methods("all")
    assert names[:4] == ["dense", "random", "uniform", "pool"]
    assert set(names[1:]) == {card.slug for card in catalogue.methods("reduce")}
    assert len(names) == len(set(names))


def test_methods():
    assert parse_methods("fastervlm, Dense,VTC_CLS,fastervlm") == ["fastervlm", "dense", "vtc-cls"]
    assert parse_methods("random+pool") == ["random+pool"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastrvlm", "--methods: got fastrvlm, must be a system: did you mean fastervlm"),
        ("", "--methods: got nothing, must be a system"),
        ("random,", "must be a system"),
        ("dense+random", "must compose systems"),
        ("random+nope", "got nope"),
    ],
)
def test_wrong_methods(text, message):
    with pytest.raises(UserError) as caught:
        parse_methods(text)
    assert message in str(caught.value)


def test_the_seed_reaches_what_is_random():
    assert create("dense", 3) is None
    assert create("random", 3).seed == 3
    first, second = create("random+pool", 5)
    assert (first.seed, type(second).__name__) == (5, "Pool")


def test_models_that_cannot_be_loaded(tmp_path, small):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    for name, message in {
        str(tmp_path): "has no weights",
        str(tmp_path / "none"): "neither a folder",
        str(tmp_path / "config.json"): "not a model folder",
    }.items():
        with pytest.raises(UserError) as caught:
            load_model(name)
        assert str(caught.value).startswith("--model: got ")
        assert message in str(caught.value)


@pytest.mark.parametrize("broken", ["weights", "config", "no processor", "text model"])
def test_broken_model_folders(tmp_path, small, broken):
    import shutil

    shutil.copytree(small, tmp_path / "model")
    folder = tmp_path / "model"
    if broken == "weights":
        (folder / "model.safetensors").write_bytes(b"not safetensors")
    elif broken == "config":
        (folder / "config.json").write_text("{")
    elif broken == "text model":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    else:
        for name in ("processor_config.json", "preprocessor_config.json"):
            (folder / name).unlink(missing_ok=True)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="--model: got "):
        load_model(str(folder))


def test_the_command_can_be_typed_again():
    said = []

    def command(
        context: typer.Context,
        name: str,
        other: Annotated[str | None, typer.Argument()] = None,
        keep: str = "0.25",
        many: int = 3,
        flag: bool = False,
        unset: str | None = None,
    ) -> None:
        said.append(command_line(context))

    app = typer.Typer()
    app.command("do")(command)
    CliRunner().invoke(app, ["a picture.png", "it's", "--flag", "--keep", "0.1"])
    (line,) = said
    assert line.endswith("""'a picture.png' 'it'"'"'s' --keep 0.1 --flag""")


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: got .*must be a folder that can be written"):
        options.check_folder(tmp_path / "file" / "below")
