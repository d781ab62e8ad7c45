"""What the benchmarks of the family build on: the peer is the method it stands for, and counts are equal."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from benchmarks import vit
from benchmarks.vit import PublishedToMe
from benchmarks.vit_methods import CONTROLS, LEVELS, METHODS, Uniform, made
from benchmarks.vit_trained import STUDIES
from vistok.host.vit import Stage, TokenState, ViTEvidence
from vistok.vit.tome import ToMe

DEPTH, N, WIDTH, R = 12, 36, 16, 7


def case(prefix=1):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, prefix + N, WIDTH, generator=rng)
    q, k = torch.randn(2, 3, 2, prefix + N, 8, generator=rng)
    evidence = ViTEvidence(q, k, 8**-0.5, prefix, True, Stage(0, DEPTH, N))
    return TokenState.start(x, prefix, (6, 6)), evidence


def test_the_published_matching_gives_the_same_tokens_in_another_order():
    state, evidence = case()
    for _ in range(2):  # the second time on sizes above one
        ours = ToMe(r=R).reduce(state, evidence, state.num_slots - R)
        theirs = PublishedToMe(r=R).reduce(state, evidence, state.num_slots - R)
        order = theirs.anchor.argsort(1)
        assert torch.equal(theirs.anchor.gather(1, order), ours.anchor)
        assert torch.equal(theirs.size.gather(1, order), ours.size)
        torch.testing.assert_close(theirs.unmerge(), ours.unmerge())
        state = ours
        left = 1 + state.num_slots
        evidence = ViTEvidence(evidence.q[:, :, :left], evidence.k[:, :, :left], 1.0, 1, True, evidence.stage)


def test_the_measured_bound_is_the_plain_model_on_fewer_tokens():
    model, pixels = vit.build(16, 64, "cpu"), vit.pixels_for(2, 16, "cpu")
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1] - 1))
    with torch.no_grad():
        vit.at_counts(model, pixels, range(16, 4, -1))
        assert seen == list(range(16, 4, -1))
        whole = []
        model.norm.register_forward_hook(lambda module, args, output: whole.append(output))
        model(pixels)
        vit.at_counts(model, pixels, [16] * 12)
        assert torch.equal(*whole)


def test_a_run_goes_on_where_another_ended(tmp_path, monkeypatch, capsys):
    rows, page_ = tmp_path / "rows.json", tmp_path / "page.md"
    always = ["vit", "--batch", "1", "--tokens", "16", "--repeats", "1", "--clock", "cpu", "--save", str(rows)]

    def run(*more):
        monkeypatch.setattr("sys.argv", [*always, *more])
        vit.main()
        return json.loads(rows.read_text()), capsys.readouterr().out

    saved, told = run("--width", "128", "--methods", "tome", "--most", "1")
    assert saved["left_out"] == ["1 x 16, width 128"] and not saved["rows"] and "not run: 1 x 16" in told
    saved, told = run("--width", "128", "--methods", "tome")
    assert [row["method"] for row in saved["rows"]] == ["tome", vit.PUBLISHED, vit.WRITTEN_OUT]
    assert not saved["left_out"] and "method tome" in told
    ours = saved["rows"][0]
    assert set(ours["parts"]) == {"evidence", "matching", "merging"} and 0 < sum(ours["parts"].values())
    assert ours["of_bound"] == pytest.approx(ours["speedup"] / ours["bound"], abs=2e-3)
    both, told = run("--width", "64", "128", "--methods", "tome", "--markdown", str(page_))
    assert both["rows"][3:] == saved["rows"] and told.count("method tome") == 1
    assert page_.read_text().count("| tome |") == 2 and "## 1 x 16 patches, width 64" in page_.read_text()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", [*METHODS, *CONTROLS])
def test_methods_are_held_against_each_other_at_equal_tokens(name, level):
    wanted = statistics.mean(made("topk", level, 144, DEPTH).plan(144, DEPTH))
    found = statistics.mean(made(name, level, 144, DEPTH).plan(144, DEPTH))
    assert abs(found - wanted) < 2


def test_a_level_that_a_method_cannot_be_held_at_is_refused():
    with pytest.raises(ValueError, match=r"keep: got 0.3, a mean of 51.8 .* tome comes no nearer than \+15"):
        made("tome", 0.3, 144, DEPTH)


def test_uniform_patches_lie_evenly():
    state, evidence = case()
    kept = Uniform().reduce(state, evidence, 9).anchor[0]
    assert {(int(p) // 6 // 2, int(p) % 6 // 2) for p in kept} == {(i, j) for i in range(3) for j in range(3)}
    again = Uniform().reduce(Uniform().reduce(state, evidence, 9), evidence, 3).anchor[0]
    assert [kept.tolist().index(p) for p in again.tolist()] == [1, 4, 7]


def test_the_page_of_studies_has_a_row_for_each_result():
    study = {
        "title": "A against B",
        "about": "Both.",
        "rows": [{"method": "a", "share": 0.9999, "fused": True}, {"method": "b", "share": 1 / 3, "fused": False}],
        "seconds": 3,
        "machine": "one",
    }
    lines = STUDIES.markdown({"ab": study}, 10).splitlines()
    assert "| method | share | fused |" in lines
    assert "| a | 0.9999 | yes |" in lines and "| b | 0.333 | no |" in lines
