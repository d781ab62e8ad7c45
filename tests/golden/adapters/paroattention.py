"""The orders of each head, and attention by blocks between the two permutations."""

from __future__ import annotations

from vistok.attend.paroattention import Plan, paro_attention


def run(case):
    given, hyper = case.inputs, case.hyper
    mask = given["mask"].bool()[None]
    plan = Plan(tuple(hyper["grid"]), given["order"], mask, hyper["block"], hyper["text"])
    q, k, v = (given[name] for name in "qkv")
    out = paro_attention(q, k, v, plan)
    permuted = {"q_permuted": plan.permute(q), "v_permuted": plan.permute(v), "out_permuted": plan.permute(out)}
    return {"out": out} | permuted
