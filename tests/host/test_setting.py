"""Settings as files: what is written is read, and ``apply`` does as it says."""

from __future__ import annotations

import json

import pytest
import torch

import vistok
from tests.host.families import FAMILIES
from vistok.host.setting import Setting, read_setting
from vistok.reduce.holov import HoloV

LLAVA = FAMILIES["llava-clip"]


def test_written_and_read(tmp_path):
    setting = Setting(("fastervlm", "holov"), 0.25, ({}, {"beta": 0.5}), {"accuracy": 0.5})
    assert read_setting(setting.write(tmp_path / "a.json")) == setting
    assert setting.create()[1] == HoloV(beta=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = Setting(("random",), 4).write(tmp_path / "a.json")
    with pytest.raises(TypeError):
        Setting(("random",), 8, measured={"what": object()}).write(path)
    assert read_setting(path).keep == 4
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_apply_reads_it(tmp_path):
    model = LLAVA.model
    inputs, _, _ = LLAVA.pictures([0])
    ids = torch.tensor([[1, *[98] * 16, 5, 6]])
    path = str(Setting(("fastervlm",), 5).write(tmp_path / "a.json"))
    for method, keep, kept in ((path, None, 5), (path, 3, 3), ("fastervlm", None, 4)):
        with vistok.apply(model, method, keep) as session, torch.no_grad():
            model(input_ids=ids, **inputs)
        assert session.tokens_kept == kept


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "is no setting that can be read"),
        ("{", "is no setting that can be read"),
        ("[]", 'must have "methods"'),
        ('{"methods": []}', 'must have "methods"'),
        ('{"methods": ["random"]}', "keep: got None"),
        ('{"methods": ["random"], "keep": 0}', "keep: got 0"),
        ('{"methods": ["random"], "keep": 4, "hyper": [{}, {}]}', 'must have "hyper"'),
    ],
)
def test_what_is_no_setting_is_said(tmp_path, body, message):
    path = tmp_path / "a.json"
    if body is not None:
        path.write_text(body)
    with pytest.raises(ValueError, match=message):
        vistok.apply(LLAVA.model, str(path))


def test_unknown_method_or_hyper_parameter_is_told(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"methods": ["holov"], "keep": 4, "hyper": [{"gamma": 1}]}))
    with pytest.raises(ValueError, match="gamma: not a hyper-parameter of holov"):
        vistok.apply(LLAVA.model, str(path))
