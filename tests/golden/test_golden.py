"""Every conformance vector whose system is here, against what the authors' code gave; and the runner against itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from tests.golden import cases

FOUND = [(case, cases.adapter_of(case)) for case in cases.find()]
READY = [pytest.param(case, adapter, id=case.name) for case, adapter in FOUND if adapter is not None]


def test_folder_is_there():
    if not FOUND:
        pytest.skip(f"no conformance vectors: VISTOK_GOLDEN names no folder with cases ({cases.ROOT.name})")
    assert READY


def test_systems_not_here_yet():
    """One line instead of a skip a case."""
    waiting = Counter(case.slug(()) for case, adapter in FOUND if adapter is None)
    if waiting:
        pytest.skip(f"{waiting.total()} of {len(FOUND)} cases are of {len(waiting)} systems that are not here yet")


@pytest.mark.parametrize(("case", "adapter"), READY)
def test_case(case, adapter):
    finding = getattr(adapter, "FINDINGS", {}).get(case.path.stem)
    if finding is None:
        cases.check(case, adapter.run(case))
        return
    with pytest.raises(AssertionError):
        cases.check(case, adapter.run(case))
    pytest.xfail(finding)


# The runner itself ------------------------------------------------------------------------------------------------


def case_file(folder, name="reduce/fastervlm-made", **metadata):
    """A case of FasterVLM on four tokens, of which 1 and 3 are kept."""
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    features = torch.arange(8.0).view(1, 4, 2)
    keep = torch.tensor([[1, 3]])
    tensors = {
        "in.features": features,
        "in.cls_attention": torch.tensor([[[0.1, 0.4, 0.2, 0.3]]]),
        "out.keep": keep,
        "out.tokens": features[:, keep[0]].contiguous(),
    }
    compare = '{"keep": "exact", "tokens": "close:0:0"}'
    save_file(tensors, path, {"hyper": '{"keep": 2}', "compare": compare, "system": "fastervlm"} | metadata)
    return path


def test_a_case_that_is_dropped_into_the_folder_runs(tmp_path):
    case_file(tmp_path)
    (case,) = cases.find(tmp_path)
    cases.check(case, cases.adapter_of(case).run(case))


def test_a_wrong_result_is_seen(tmp_path):
    case = cases.Case.open(case_file(tmp_path))
    results = cases.adapter_of(case).run(case)
    with pytest.raises(AssertionError, match=r"made: keep: 1 of 2 differ, the first at \(0, 1\): 2, must be 3"):
        cases.check(case, results | {"keep": torch.tensor([[1, 2]])})
    with pytest.raises(AssertionError, match="tokens"):
        cases.check(case, results | {"tokens": results["tokens"] + 1e-4})
    with pytest.raises(AssertionError, match="gives no tokens"):
        cases.check(case, {"keep": results["keep"]})
    with pytest.raises(AssertionError, match="shape"):
        cases.check(case, results | {"keep": torch.tensor([[1, 3, 3]])})


def test_an_unknown_system_waits(tmp_path):
    case = cases.Case.open(case_file(tmp_path, system="not-a-system"))
    assert cases.adapter_of(case) is None


def test_slug_is_the_longest_known_prefix_where_the_metadata_names_none(tmp_path):
    path = tmp_path / "reduce" / "vtc-cls-one-layer.safetensors"
    case = cases.Case(path, {}, ())
    assert case.slug(["vtc", "vtc-cls", "fastervlm"]) == "vtc-cls"
    assert cases.Case(path, {"system": "fopru"}, ()).slug(["vtc-cls"]) == "fopru"


@pytest.mark.parametrize(
    ("rule", "result", "same"),
    [
        ("exact", [3, 1, 2], False),
        ("exact", [1, 2, 3], True),
        ("set", [3, 1, 2], True),
        ("set", [3, 3, 2], False),
        ("close:1e-3:0", [1.0005, 2, 3], True),
        ("close:1e-4:0", [1.0005, 2, 3], False),
        ("close:0:1e-2", [1.005, 2, 3], True),
        ("close:0:1e-2", [float("nan"), 2, 3], False),
    ],
)
def test_rules(rule, result, same):
    expected = torch.tensor([[1, 2, 3]])
    expected = expected.float() if rule.startswith("close") else expected
    if same:
        cases.compare(rule, torch.tensor([result]), expected, "x")
    else:
        with pytest.raises(AssertionError):
            cases.compare(rule, torch.tensor([result]), expected, "x")


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="compare rule 'nearly'"):
        cases.compare("nearly", torch.ones(1), torch.ones(1), "x")
