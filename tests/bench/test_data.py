"""Pictures and questions of the user's own: what a folder and a dataset say, and what they must not do."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from vistok import catalogue
from vistok.bench import lmms_eval
from vistok.bench.auto import measure_settings
from vistok.bench.data import Source
from vistok.bench.folder import chosen
from vistok.bench.measure import answer_all, evidence_recall
from vistok.bench.pictures import Unusable
from vistok.world import sample, write_samples
from vistok.zoo.asking import is_right

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", DOCUMENT, flags=re.DOTALL)


def drawn(size=(24, 16), seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind="PNG") -> bytes:
    image.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def write(folder: Path, *lines, pictures=("a.png",)) -> Source:
    """A folder with these lines (objects, or text as it is) and a picture of 24 x 16 for each name."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(pictures):
        drawn(seed=number).save(folder / name)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "pictures.jsonl").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return Source.of("mine", {"folder": str(folder)})


def asked(**about):
    return {"image": "a.png", "questions": [{"text": "what?", **about}]}


# A table --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("mine", {}, "data.mine: must have one of folder and dataset"),
        ("mine", {"folder": "a", "dataset": "b"}, "must have one of folder and dataset"),
        ("mine", {"foldre": "a"}, "data.mine: got 'foldre': must be among folder, dataset"),
        ("mine", {"name": "a"}, "got 'name': must be among folder"),
        ("mine", {"folder": 3}, "data.mine: folder: got 3: must be a text"),
        ("mine", {"dataset": "a", "split": ""}, "data.mine: split: got '': must be a text"),
        ("mine", {"folder": "a", "split": "test"}, "data.mine: split: must stand beside dataset"),
        ("mine", {"dataset": ".", "revision": "main"}, "data.mine: revision: must be left out"),
        ("scenes", {"folder": "a"}, "data.scenes: must have another name"),
        ("all", {"folder": "a"}, "data.all: must have another name"),
    ],
)
def test_wrong_tables(name, table, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Source.of(name, table)


def test_a_source_travels(tmp_path, monkeypatch):
    source = write(tmp_path / "a", asked(answer="x"))
    assert pickle.loads(pickle.dumps(source)) == source
    assert {source: 1}[Source.of("mine", {"folder": str(tmp_path / "a")})] == 1
    monkeypatch.chdir(tmp_path)
    near = Source.of("mine", {"folder": "a"})
    monkeypatch.chdir("/")
    assert near.digest() == source.digest()
    error = pickle.loads(pickle.dumps(Unusable("a", "must be b")))
    assert (str(error), error.got, error.right) == ("a: must be b", "a", "must be b")


def test_the_draw():
    assert chosen(5, None, 0) == chosen(5, 5, 1) == chosen(5, 9, 1) == [0, 1, 2, 3, 4]
    few, more = chosen(1000, 10, 3), chosen(1000, 50, 3)
    assert len(few) == 10 and sorted(few) == few and set(few) < set(more)
    assert chosen(1000, 10, 4) != few
    assert chosen(6, 3, 0) == [2, 3, 4], "the draw is part of what a cell is: it must not change"
    with pytest.raises(ValueError, match="n: got 0"):
        chosen(5, 0, 0)


# A folder -------------------------------------------------------------------------------------------------------------


def test_every_key_of_a_line(tmp_path):
    source = write(
        tmp_path / "a",
        {
            "image": "a.png",
            "caption": "passed over",
            "questions": [
                {"text": "what?", "answer": "cat", "family": "objects", "box": [1, 2.5, 4, 5]},
                {"text": "how many?", "answer": 3},
                {"text": "which?", "answers": ["a cat", "cat", "a cat"]},
                {"text": "who?", "answer": "she", "answers": ["her", "she"]},
                {"text": "why?", "box": [0, 0, 1, 1]},
            ],
        },
        "",
        {"image": "b.png", "question": "where\u2028there?", "answer": "here", "family": "place"},
        pictures=("a.png", "b.png"),
    )
    cases = source.cases()
    assert [case.question for case in cases] == [
        "what?", "how many?", "which?", "who?", "why?", "where\u2028there?"
    ]  # fmt: skip
    told = [case.truth and (case.truth.family, case.truth.answer, case.truth.also) for case in cases]
    assert told == [
        ("objects", "cat", ()),
        ("question", "3", ()),
        ("question", "a cat", ("cat",)),
        ("question", "she", ("her",)),
        None,
        ("place", "here", ()),
    ]
    assert [case.name for case in cases] == ["a.png"] * 5 + ["b.png"]
    assert np.array_equal(np.asarray(cases[5].picture), np.asarray(drawn(seed=1)))
    right = np.zeros((16, 24), dtype=bool)
    right[2:5, 1:4] = True
    assert np.array_equal(cases[0].truth.evidence, right)
    assert all(not case.truth.evidence.any() for case in cases[1:] if case.truth)
    assert all(case.truth.evidence.shape == (16, 24) for case in cases if case.truth)


def test_a_folder_of_the_world_is_read_as_it_is(tmp_path):
    write_samples(tmp_path, "all", 4, seed=2, split="test", questions=2)
    cases = Source.of("mine", {"folder": str(tmp_path)}).cases()
    right = [(p, q) for p in sample("all", 4, 2, split="test", questions=2) for q in p.questions]
    for case, (picture, question) in zip(cases, right, strict=True):
        assert np.array_equal(np.asarray(case.picture), picture.image)
        assert (case.question, case.truth.answer, case.truth.family) == (
            question.text,
            question.answer,
            question.family,
        )
        assert np.array_equal(case.truth.evidence, question.evidence)


def test_a_byte_order_mark_and_the_line_ends_of_windows(tmp_path):
    source = write(tmp_path / "a", asked())
    path = tmp_path / "a" / "pictures.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(source.cases()) == 1


def test_boxes_count_pixels_of_the_upright_picture(tmp_path):
    source = write(tmp_path / "a", asked(answer="x", box=[0, 0, 16, 24]), pictures=())
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn().save(tmp_path / "a" / "a.png", exif=exif)
    (case,) = source.cases()
    assert case.picture.size == (16, 24) and case.truth.evidence.all()


def test_several_answers_count_as_right(tmp_path):
    (case,) = write(tmp_path / "a", asked(answers=["a cat", "Cat"])).cases()
    assert is_right(case.truth, " A Cat ") and is_right(case.truth, "cat")
    assert not is_right(case.truth, "cats")


def test_only_the_pictures_that_are_drawn_are_opened(tmp_path):
    lines = [{"image": f"{i}.png", "question": f"{i}?"} for i in range(6)]
    source = write(tmp_path / "a", *lines, pictures=[f"{i}.png" for i in range(6)])
    (tmp_path / "a" / "1.png").write_bytes(b"broken")
    assert [case.question for case in source.cases(3, seed=0)] == ["2?", "3?", "4?"]
    with pytest.raises(ValueError, match=r"line 2, image '1\.png': must be a picture \(PNG"):
        source.cases()


def test_the_digest_is_of_the_content(tmp_path):
    source = write(tmp_path / "a", asked(answer="x"), pictures=("a.png", "not_named.png"))
    digest = source.digest()
    assert re.fullmatch("[0-9a-f]{20}", digest)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = Source.of("other", {"folder": str(tmp_path / "b")})
    os.utime(tmp_path / "b" / "a.png", (0, 0))
    (tmp_path / "b" / "not_named.png").unlink()
    assert moved.digest() == digest
    picture = tmp_path / "b" / "a.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert moved.digest() != digest
    picture.write_bytes(whole)
    assert moved.digest() == digest
    lines = tmp_path / "b" / "pictures.jsonl"
    lines.write_bytes(lines.read_bytes() + b"\n")
    assert moved.digest() != digest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", 'line 1: must be {"image": file, "questions": '),
        ("[" * 100_000, 'line 1: must be {"image"'),
        ("[]", 'line 1: must be {"image"'),
        ("1" * 5000, 'line 1: must be {"image"'),
        ({"questions": []}, "line 1: must be .*; image is missing"),
        ({"image": "a.png"}, "line 1: must be .*; questions is missing"),
        ({"image": 3, "questions": []}, "line 1, image 3: must be a text"),
        ({"image": "a.png", "questions": {}}, "line 1, questions: must be a list"),
        ({"image": "a.png", "questions": ["what?"]}, "line 1, questions: must be a list"),
        ({"image": "a.png", "questions": []}, "pictures.jsonl: must have at least one question"),
        ({"image": "a.png", "question": 3}, "line 1, question 3: must be a text"),
        ({"image": "a.png", "questions": [{"text": "a"}, {}]}, "line 1, question 2: must be .*; text is missing"),
        (asked(text=" "), "line 1, text ' ': must be a text"),
        (asked(answer=""), "line 1, answer '': must be a text"),
        (asked(answer=True), "line 1, answer True: must be a text"),
        (asked(answer={"a": "b" * 100}), r"line 1, answer \{'a': 'b{70}\.\.\.: must be a text"),
        (asked(answers="cat"), "line 1, answers 'cat': must be a list"),
        (asked(answers=["cat", []]), r"line 1, answer \[\]: must be a text"),
        (asked(family=3), "line 1, family 3: must be a text"),
        (asked(answer="x", box=[0, 0, 1]), r"line 1, box \[0, 0, 1\]: must be \[x0, y0, x1, y1\]"),
        (asked(box=[0, 0, 25, 16]), "line 1, box .* within 24 x 16"),
        (asked(box=[4, 0, 4, 16]), "line 1, box"),
        (asked(box=[-1, 0, 4, 16]), "line 1, box"),
        (asked(box=[0, 0, float("nan"), 16]), "line 1, box"),
        (asked(box=[0, 0, "4", 16]), "line 1, box"),
        (asked(box="0 0 4 4"), "line 1, box"),
        (asked(evidence={"size": [24, 16], "counts": [384]}), r"line 1, evidence: .*\[16, 24\]"),
        (asked(evidence={"size": [16, 24], "counts": [10**12]}), "line 1, evidence: .*add up"),
        (asked(evidence={"size": [16, 24], "counts": [-6, 390]}), "line 1, evidence"),
        (asked(evidence={"size": [16, 24]}), "line 1, evidence"),
        (asked(evidence=[1]), "line 1, evidence"),
        ("", "pictures.jsonl: must have at least one question"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a", line).cases()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.png", "must be a file inside the folder"),
        ("a/../../secret.png", "must be a file inside the folder"),
        ("{folder}/secret.png", "must be a file inside the folder"),
        ("/dev/zero", "must be a file inside the folder"),
        ("out.png", "it is a link to"),
        ("up/secret.png", "it is a link to"),
        ("ring.png", "line 1, image 'ring.png'"),
        ("gone.png", "there is no such file"),
        ("dir", "it is a folder"),
        ("pipe", "must be a regular file"),
        ("empty.png", "the file is empty"),
        ("a\0.png", "line 1, image"),
        ("a" * 300, "line 1, image"),
        ("\ud800.png", "line 1, image"),
        ("text.png", r"line 1, image 'text.png': must be a picture"),
        ("half.png", "cut off or corrupt"),
        ("script.eps", "must be a picture"),
    ],
)
def test_hostile_and_broken_pictures(tmp_path, name, message):
    drawn().save(tmp_path / "secret.png")
    folder = tmp_path / "a"
    source = write(folder, {"image": name.format(folder=tmp_path), "question": "what?"})
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "ring.png").symlink_to("ring.png")
    (folder / "dir").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not a picture")
    (folder / "half.png").write_bytes(encoded(drawn((64, 64)))[:2000])
    (folder / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(Unusable, match=message):
        source.cases()
    if name not in ("text.png", "half.png", "script.eps"):
        with pytest.raises(Unusable, match=message):
            source.digest()


def test_links_within_the_folder_are_followed(tmp_path):
    source = write(tmp_path / "a", asked())
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "a" / "a.png").rename(tmp_path / "a" / "sub" / "b.png")
    (tmp_path / "a" / "a.png").symlink_to(Path("sub", "b.png"))
    (tmp_path / "a again").symlink_to(tmp_path / "a")
    assert len(Source.of("mine", {"folder": str(tmp_path / "a again")}).cases()) == len(source.cases()) == 1


def test_no_folder(tmp_path):
    for source in (Source.of("mine", {"folder": str(tmp_path / where)}) for where in ("none", ".")):
        for method in (source.cases, source.digest):
            with pytest.raises(ValueError, match=r"must be a folder with a file pictures\.jsonl"):
                method()
    (tmp_path / "pictures.jsonl").write_bytes(b"{}\n\xff\n")
    with pytest.raises(ValueError, match="line 1: must be"):
        Source.of("mine", {"folder": str(tmp_path)}).cases()


# What measures them ---------------------------------------------------------------------------------------------------


def test_they_are_measured(tmp_path, model, processor):
    (told, untold, unknown) = write(
        tmp_path / "a",
        asked(answer="zzz", box=[0, 0, 12, 16]),
        asked(answer="zzz"),
        asked(),
    ).cases()
    answer = answer_all(model, processor, "uniform", 49, [told])[0].answer
    right = write(tmp_path / "b", asked(answers=["zzz", answer.upper() or "zz"])).cases()
    found = answer_all(model, processor, "uniform", 49, [told, untold, unknown, *right])
    assert [one.correct for one in found[:3]] == [False, False, None]
    assert found[3].correct == bool(answer)
    assert found[0].evidence_recall == evidence_recall(told.truth.evidence, found[0].grid, found[0].kept)
    assert [one.evidence_recall for one in found[1:]] == [None, None, None]


def test_auto_counts_every_answer(tmp_path, model, processor):
    (plain,) = write(tmp_path / "a", asked()).cases()
    answer = answer_all(model, processor, "dense", 1.0, [plain])[0].answer
    (case,) = write(tmp_path / "b", asked(answers=["zzz", answer or "zz"])).cases()
    rows, _ = measure_settings(model, processor, [(None, 1.0), ("uniform", 1.0)], [case], [case.truth.answer])
    assert [row["accuracy"] for row in rows] == [float(bool(answer))] * 2


# A dataset ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache" / name)
    return datasets


def table(datasets, count=4, **columns):
    """Pictures in memory, a question and two answers each."""
    columns = {
        "image": [{"bytes": encoded(drawn(seed=i)), "path": None} for i in range(count)],
        "question": [f"{i}?" for i in range(count)],
        "answers": [[f"a {i}", str(i), str(i)] for i in range(count)],
        "kind": [i % 2 for i in range(count)],
        **columns,
    }
    kinds = {
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "kind": datasets.ClassLabel(names=["even", "odd"]),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features({k: kinds[k] for k in columns}))


COLUMNS = {"answer": "answers", "family": "kind"}


def test_a_dataset_saved_to_disk(datasets, tmp_path):
    table(datasets).save_to_disk(tmp_path / "saved")
    source = Source.of("mine", {"dataset": str(tmp_path / "saved"), **COLUMNS})
    cases = source.cases()
    assert [case.question for case in cases] == ["0?", "1?", "2?", "3?"]
    assert [(case.truth.answer, case.truth.also, case.truth.family) for case in cases[:2]] == [
        ("a 0", ("0",), "even"),
        ("a 1", ("1",), "odd"),
    ]
    for number, case in enumerate(cases):
        assert np.array_equal(np.asarray(case.picture), np.asarray(drawn(seed=number)))
        assert case.truth.evidence.shape == (16, 24) and not case.truth.evidence.any()
    assert [case.name for case in source.cases(2, seed=1)] == [f"mine {i}" for i in chosen(4, 2, 1)]


def test_the_digest_of_a_local_dataset(datasets, tmp_path):
    def digest(name, **about):
        return Source.of("mine", {"dataset": str(tmp_path / name), **COLUMNS, **about}).digest()

    table(datasets).save_to_disk(tmp_path / "a")
    assert re.fullmatch("[0-9a-f]{20}", digest("a"))
    table(datasets).save_to_disk(tmp_path / "b")
    assert digest("a") == digest("b")
    other = [{"bytes": encoded(drawn(seed=i))[:-1] + bytes([i]), "path": None} for i in range(4)]
    table(datasets, image=other).save_to_disk(tmp_path / "c")
    table(datasets, question=["0?", "1?", "2?", "4?"]).save_to_disk(tmp_path / "d")
    table(datasets, count=3).save_to_disk(tmp_path / "e")
    assert (
        len({digest(name) for name in "acde"} | {digest("a", answer="question"), digest("a", family="question")}) == 6
    )


def test_splits_saved_to_disk(datasets, tmp_path):
    both = datasets.DatasetDict(test=table(datasets, 2), train=table(datasets, 3))
    both.save_to_disk(tmp_path / "both")
    where = {"dataset": str(tmp_path / "both"), **COLUMNS}
    assert len(Source.of("mine", {**where, "split": "train"}).cases()) == 3
    for split, got in (({}, "nothing"), ({"split": "val"}, "val")):
        with pytest.raises(ValueError, match=f"data.mine, split {got}: must be among test, train"):
            Source.of("mine", {**where, **split}).cases()


def write_images(folder: Path, names=("a.png", "b.png")) -> Path:
    """A folder as the library's imagefolder wants it."""
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for number, name in enumerate(names):
            drawn(seed=number).save(folder / name)
            lines.write(json.dumps({"file_name": name, "question": f"{number}?", "answer": number}) + "\n")
    return folder


def test_a_folder_of_pictures_with_metadata(datasets, tmp_path):
    source = Source.of("mine", {"dataset": str(write_images(tmp_path / "images"))})
    cases = source.cases()
    assert [(case.question, case.truth.answer, case.truth.also) for case in cases] == [("0?", "0", ()), ("1?", "1", ())]
    assert np.array_equal(np.asarray(cases[1].picture), np.asarray(drawn(seed=1)))
    digest = source.digest()
    shutil.copytree(tmp_path / "images", tmp_path / "moved")
    moved = Source.of("mine", {"dataset": str(tmp_path / "moved")})
    assert moved.digest() == digest
    path = tmp_path / "moved" / "b.png"
    stamp, whole = path.stat(), path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert moved.digest() != digest
    path.write_bytes(whole[:300])
    with pytest.raises(ValueError, match=r"data\.mine, row 1, image: must be a whole picture"):
        moved.cases()


def test_splits_of_a_folder_of_pictures(datasets, tmp_path):
    for split, names in (("test", ("a.png",)), ("train", ("b.png", "c.png"))):
        write_images(tmp_path / "images" / split, names)
    where = {"dataset": str(tmp_path / "images")}
    assert len(Source.of("mine", {**where, "split": "train"}).cases()) == 2
    with pytest.raises(ValueError, match=r"data\.mine, split nothing: must be among"):
        Source.of("mine", where).cases()


def saved_paths(datasets, folder: Path, picture: dict) -> Source:
    """A saved dataset of one row whose picture is this; the library itself would put the file into the table."""
    made = table(datasets, 1).remove_columns("image")
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    made = made.add_column("image", [picture], feature=stored)
    made.save_to_disk(folder)
    info = folder / "dataset_info.json"
    told = json.loads(info.read_text())
    told["features"]["image"] = {"_type": "Image"}
    info.write_text(json.dumps(told))
    return Source.of("mine", {"dataset": str(folder), **COLUMNS})


def test_pictures_outside_a_dataset_are_not_read(datasets, tmp_path):
    drawn().save(tmp_path / "secret.png")
    within = tmp_path / "within"
    within.mkdir()
    source = saved_paths(datasets, within, {"bytes": None, "path": str(within / "a.png")})
    drawn().save(within / "a.png")
    assert len(source.cases()) == 1
    (within / "a.png").unlink()
    with pytest.raises(ValueError, match=r"row 0, image .*a\.png: there is no such file"):
        source.digest()
    (within / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="must be in the dataset, not elsewhere"):
        source.cases()
    for number, path in enumerate(
        (str(tmp_path / "secret.png"), "https://example.org/a.png", f"{within}/../secret.png")
    ):
        source = saved_paths(datasets, tmp_path / str(number), {"bytes": None, "path": path})
        for method in (source.cases, source.digest):
            with pytest.raises(ValueError, match=r"data\.mine, row 0, image .*: must be in the dataset, not elsewhere"):
                method()
    source = saved_paths(datasets, tmp_path / "none", {"bytes": None, "path": None})
    with pytest.raises(ValueError, match="row 0, image None: must be a picture"):
        source.cases()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"image": "picture"}, "data.mine, image 'picture': must be a column: image, question, answers, kind"),
        ({"answer": "answer"}, "data.mine, answer 'answer': must be a column"),
        ({"family": "family"}, "data.mine, family 'family': must be a column"),
        ({"image": "question"}, "data.mine, image 'question': must be a column of pictures"),
        ({"question": "kind"}, "data.mine, row 0, kind 0: must be a text"),
        ({"split": "test"}, "data.mine, split: must be left out"),
        ({"config": "a"}, "data.mine, config: must be left out"),
    ],
)
def test_wrong_columns_are_named(datasets, tmp_path, about, message):
    table(datasets).save_to_disk(tmp_path / "saved")
    source = Source.of("mine", {"dataset": str(tmp_path / "saved"), **COLUMNS, **about})
    with pytest.raises(ValueError, match=re.escape(message)):
        source.cases()


def test_what_is_not_told(datasets, tmp_path):
    kind, right = [None, -1, 0, 1], [None, [], ["a"], [""]]
    table(datasets, kind=kind, answers=right).save_to_disk(tmp_path / "saved")
    source = Source.of("mine", {"dataset": str(tmp_path / "saved"), **COLUMNS})
    with pytest.raises(ValueError, match=r"data\.mine, row 3, answers, answer '': must be a text"):
        source.cases()
    table(datasets, 3, kind=kind[:3], answers=right[:3]).save_to_disk(tmp_path / "three")
    source = Source.of("mine", {"dataset": str(tmp_path / "three"), **COLUMNS})
    assert [case.truth and case.truth.answer for case in source.cases()] == [None, None, "a"]
    source = Source.of("mine", {"dataset": str(tmp_path / "three"), "answer": "kind", "family": "kind"})
    assert [case.truth and (case.truth.answer, case.truth.family) for case in source.cases()] == [
        None, None, ("even", "even")
    ]  # fmt: skip


def test_no_dataset(datasets, tmp_path, monkeypatch):
    for name, message in (
        ("./none", "data.mine, dataset ./none: there is no such folder"),
        ("nobody/nothing", "data.mine, dataset nobody/nothing: cannot be read"),
        (str(tmp_path), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Source.of("mine", {"dataset": name}).cases()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"data\.mine: must have at least one row"):
        patch.setattr(datasets, "load_dataset", lambda **how: table(datasets, 0))
        Source.of("mine", {"dataset": "owner/name", "split": "test", **COLUMNS}).cases()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'vistok\[data\]'"):
        Source.of("mine", {"dataset": "nobody/nothing"}).cases()


def test_a_dataset_of_the_hub(datasets, tmp_path, monkeypatch):
    """What the library is asked for; the hub itself is not there."""
    calls = []
    made = {"main": table(datasets, 3), "v2": table(datasets, 2)}
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, config_name, revision: ["val"])

    def load_dataset(**how):
        calls.append(how)
        return made[how["revision"] or "main"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first, second = (Source.of("mine", {"dataset": "owner/name", **COLUMNS, **r}) for r in ({}, {"revision": "v2"}))
    assert [len(first.cases()), len(second.cases())] == [3, 2]
    assert calls[0] == {"path": "owner/name", "revision": None, "name": None, "split": "val"}
    assert calls[1]["revision"] == "v2"
    assert first.digest() == Source.of("other", {"dataset": "owner/name", **COLUMNS}).digest() != second.digest()
    Source.of("mine", {"dataset": "owner/name", "config": "c", "split": "test[:9]", **COLUMNS}).cases()
    assert calls[-1] == {"path": "owner/name", "revision": None, "name": "c", "split": "test[:9]"}


# The document and the suites ------------------------------------------------------------------------------------------


def test_the_examples_of_the_document(datasets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (lines,), (code,) = blocks("json"), blocks("python")
    folder = tmp_path / "photos"
    for line in lines.splitlines():
        path = folder / json.loads(line)["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn((80, 48)).save(path)
    (folder / "pictures.jsonl").write_text(lines)
    sweep, signs = (tomllib.loads(block) for block in blocks("toml"))
    assert set(sweep["data"]) == set(sweep["tasks"])
    source = Source.of("photos", sweep["data"]["photos"])
    assert [case.truth.answer for case in source.cases()] == ["STOP", "dog", "2"]
    exec(code, {})
    assert source.digest() in capsys.readouterr().out
    table(datasets).save_to_disk(tmp_path / "signs" / "test")
    (tmp_path / "signs" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert len(Source.of("signs", signs["data"]["signs"]).cases()) == 4


SUITES = ROOT / "benchmarks" / "configs" / "lmms_eval.yaml"


def value_of(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def test_the_configuration_of_the_suites(model, processor, monkeypatch):
    """Every entry has what lmms-eval 0.7 reads, and our model takes its arguments."""
    monkeypatch.setattr(lmms_eval, "load", lambda name, dtype, device: model)
    monkeypatch.setattr(lmms_eval, "load_processor", lambda name: processor)
    entries = yaml.safe_load(SUITES.read_text(encoding="utf-8"))
    reducers = {card.slug for card in catalogue.methods("reduce")}
    tables: dict[str, list] = {}
    for entry in entries:
        assert set(entry) == {"model", "model_args", "tasks", "batch_size", "log_samples", "output_path"}
        assert entry["model"] == lmms_eval.NAME
        given = {key: value_of(value) for key, value in (part.split("=") for part in entry["model_args"].split(","))}
        lmms_eval.Answers(**given, batch_size=entry["batch_size"], max_batch_size=None, device=None)
        tables.setdefault(entry["tasks"], []).append(given)
    for runs in tables.values():
        methods = [given.get("method", "dense") for given in runs]
        assert methods[:3] == ["dense", "random", "uniform"] and set(methods[1:]) <= reducers
        assert len({given["keep"] for given in runs[1:]}) == 1, "equal counts in one table"
        assert len({(given["pretrained"], given.get("num_frames")) for given in runs}) == 1
    pictures, videos = tables
    assert {"gqa", "mme", "pope", "textvqa_val", "scienceqa_img"} <= set(pictures.split(","))
    assert videos == "videomme"
    assert len({entry["output_path"] for entry in entries}) == len(entries)


def test_the_command_of_the_suites():
    command = f"lmms-eval --config {SUITES.relative_to(ROOT).as_posix()}"
    assert command in SUITES.read_text(encoding="utf-8") and command in DOCUMENT
    with pytest.raises(ValueError, match="must be text, image or video"):
        lmms_eval.messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], "clotho", list)
