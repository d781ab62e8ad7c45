"""The contract of the bottlenecks, every member alike, and what each promises besides."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load, save
from torch.nn.functional import cosine_similarity, interpolate, normalize

from vistok.core.quantize import fsq_unbound, nearest_code
from vistok.parts.quantize import (
    FSQ,
    LFQ,
    EMAQuantizer,
    Gaussian,
    IBQuantizer,
    Identity,
    MultiScale,
    Product,
    Residual,
    SimVQuantizer,
    Stretches,
    VectorQuantizer,
)

DIM, SIDE = 6, 4
N = SIDE**2
VQ = partial(VectorQuantizer, 24, DIM, restart_after=3)
MEMBERS = {
    "vq": VQ,
    "vq-rotation": partial(VQ, gradient="rotation"),
    "vq-sphere": partial(VQ, norm="both"),
    "vq-sphere-rotation-entropy": partial(VQ, norm="both", gradient="rotation", entropy=0.1),
    "vq-input": partial(VQ, norm="input"),
    "vq-lookup": partial(VQ, norm="lookup"),
    "vq-two-parts": partial(VQ, norm="both", parts=(4, 2), weights=(1.0, 0.5)),
    "ema": partial(EMAQuantizer, 24, DIM, restart_after=3),
    "ema-sphere": partial(EMAQuantizer, 24, DIM, norm="both", write_back=True),
    "ibq": partial(IBQuantizer, 24, DIM, entropy=0.05),
    "simvq": partial(SimVQuantizer, 24, DIM),
    "fsq": partial(FSQ, (5, 4, 3, 3, 2, 2)),
    "fsq-groups": partial(FSQ, (7, 6, 5), 2, "first-highest"),
    "lfq": partial(LFQ, DIM),
    "lfq-highest": partial(LFQ, DIM, bit_order="first-highest"),
    "residual-shared": lambda: Residual([VQ(norm="both")], 3),
    "residual": lambda: Residual([EMAQuantizer(24, DIM, restart_after=3), EMAQuantizer(7, DIM, restart_after=3)]),
    "product": lambda: Product(
        [VectorQuantizer(24, 3, norm="both"), VectorQuantizer(7, 3)], reduce="mean", disentangle=0.1
    ),
    "two-stacks": lambda: Product([Residual([VectorQuantizer(24, 4)], 2), Residual([EMAQuantizer(9, 2)], 3)]),
    "scales": lambda: MultiScale(VQ(), (1, 2, SIDE), mixers=4),
    "scales-sphere": lambda: MultiScale(VQ(norm="both", parts=(4, 2)), (1, 3, SIDE), gradient="each", drop=0.5),
    "scales-sequence": lambda: MultiScale(VQ(), (1, 5, N), ndim=1),
    "gaussian": partial(Gaussian, DIM // 2, 1.0),
    "identity": partial(Identity, DIM),
}
SCALES = [name for name in MEMBERS if name.startswith("scales")]
DISCRETE = [name for name in MEMBERS if name not in ("gaussian", "identity")]
every = pytest.mark.parametrize("name", MEMBERS)
discrete = pytest.mark.parametrize("name", DISCRETE)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vectors(batch=3, seed=0, scale=1.0):
    return scale * torch.randn(batch, N, DIM, generator=torch.Generator().manual_seed(seed))


def made(name, steps=0):
    """A member that has seen ``steps`` training batches."""
    torch.manual_seed(1)
    quantizer = MEMBERS[name]()
    for step in range(steps):
        quantizer(vectors(seed=10 + step))
    return quantizer


# The contract ------------------------------------------------------------------------------------------------------


@discrete
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ids_give_the_same_vectors_bit_for_bit(name, training, dtype):
    quantizer = made(name, 2).train(training)
    for batch, scale in ((3, 1.0), (1, 100.0), (2, 1e-3)):
        codes = quantizer(vectors(batch, 3, scale).to(dtype))
        assert codes.z.dtype == torch.float32 and codes.ids.dtype == torch.int64
        assert torch.equal(quantizer.ids_to_z(codes.ids), codes.z)
        assert all(int(c.max()) < size for c, size in zip(columns(codes.ids), quantizer.sizes, strict=True))


def columns(ids):
    return (ids if ids.dim() == 3 else ids[..., None]).unbind(-1)


@every
def test_inside_all_is_float32_whatever_the_dtype_of_the_model(name):
    """Under autocast, and in a model cast to half precision: the ids are those of the same numbers in float32."""
    plain, x = made(name, 2).eval(), vectors(seed=4).bfloat16()
    expected = plain(x.float())
    cast = made(name, 2).eval().to(torch.bfloat16)
    assert all(t.dtype in (torch.float32, torch.int64) for t in cast.state_dict().values())
    with torch.autocast("cpu", torch.bfloat16):
        found = cast(x)
    assert torch.equal(found.z, expected.z)
    assert expected.ids is None or torch.equal(found.ids, expected.ids)


@pytest.mark.parametrize(
    "name", ["vq", "vq-sphere", "vq-two-parts", "ema", "ema-sphere", "simvq", "lfq", "lfq-highest", "product"]
)
def test_all_ids_go_round(name):
    """Every code there is, quantised again, is itself (where a code is the nearest to itself)."""
    quantizer = made(name, 2).eval()
    count = max(quantizer.sizes)
    ids = torch.stack([torch.arange(count) % size for size in quantizer.sizes], -1)[None]
    z = quantizer.ids_to_z(ids)
    torch.testing.assert_close(quantizer(z).z, z, atol=1e-6, rtol=1e-6)
    if name in ("vq", "simvq", "lfq", "lfq-highest"):  # others may hold one code twice
        assert torch.equal(quantizer(z).ids, ids[..., 0])


@pytest.mark.parametrize("levels", [(8, 5, 3), (7, 6, 5), (2, 2, 2, 2)])
@pytest.mark.parametrize("order", ["first-lowest", "first-highest"])
def test_all_ids_of_fsq_go_round(levels, order):
    quantizer = FSQ(levels, 2, order)
    one = torch.arange(math.prod(levels))
    ids = torch.stack([one, one.flip(0)], -1)[None]
    middle = torch.tensor([level // 2 for level in levels] * 2)
    z = fsq_unbound(quantizer.ids_to_z(ids) * middle, levels * 2)
    assert torch.equal(quantizer(z).ids, ids) and torch.equal(quantizer(z.half()).ids, ids)


@every
def test_padded_tokens_count_nowhere(name):
    quantizer, other = made(name, 2), made(name, 2)
    mask = torch.rand(3, N, generator=torch.Generator().manual_seed(1)) < 0.6
    x = vectors(seed=5)
    if name in SCALES:
        with pytest.raises(ValueError, match="mask: got one"):
            quantizer(x, mask)
        return
    junk = torch.where(mask[..., None], x, 1e3 * vectors(seed=6))
    torch.manual_seed(3)
    codes = quantizer(x, mask)
    torch.manual_seed(3)
    same = other(junk, mask)
    for term in codes.losses:
        torch.testing.assert_close(codes.losses[term], same.losses[term])
    for a, b in zip(quantizer.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(codes.z, same.z)
    assert (codes.z[~mask] == 0).all()
    if codes.ids is not None:
        assert torch.equal(codes.ids, same.ids) and (codes.ids[~mask] == -1).all() and (codes.ids[mask] >= 0).all()
        assert torch.equal(quantizer.ids_to_z(codes.ids), codes.z)
        assert codes.bits.tolist() == [quantizer.bits() * int(n) for n in mask.sum(1)]


@every
def test_state_goes_through_safetensors_and_training_goes_on_as_it_would(name):
    quantizer, other = made(name, 2), MEMBERS[name]()
    other.load_state_dict(load(save({k: v.clone() for k, v in quantizer.state_dict().items()})))
    for seed in (1, 2, 3, 4):
        torch.manual_seed(seed)
        codes = quantizer(vectors(seed=seed))
        torch.manual_seed(seed)
        again = other(vectors(seed=seed))
        assert torch.equal(codes.z, again.z) and torch.equal(codes.loss, again.loss)


@every
def test_gradients_are_finite_and_reach_the_input(name):
    quantizer = made(name, 1)
    x = vectors(seed=7).requires_grad_()
    codes = quantizer(x)
    (codes.z.square().sum() + codes.loss).backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in quantizer.parameters())


@every
def test_evaluation_changes_nothing(name):
    quantizer = made(name, 2).eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    first, second = quantizer(vectors(seed=8)), quantizer(vectors(seed=8))
    assert torch.equal(first.z, second.z)
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())


@every
def test_refusals(name):
    quantizer = made(name)
    with pytest.raises(ValueError, match=r"z: got shape \(2, 16, 5\), must be \(B, N, 6\)"):
        quantizer(torch.zeros(2, N, 5))
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 3\)"):
        quantizer(torch.zeros(2, N, DIM), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="grid: got 3 x 3"):
        quantizer(torch.zeros(2, N, DIM), grid=(3, 3))
    if not quantizer.sizes:
        with pytest.raises(ValueError, match="ids: codes of this bottleneck are continuous"):
            quantizer.ids_to_z(torch.zeros(1, 1, dtype=torch.int64))
        return
    ids = quantizer(vectors()).ids.clone()
    ids.view(-1)[0] = 10**6
    with pytest.raises(ValueError, match="ids: got 1000000, must be below"):
        quantizer.ids_to_z(ids)


@pytest.mark.parametrize("name", ["vq-rotation", "ibq", "fsq-groups", "residual", "product", "scales-sphere"])
def test_compiles_without_graph_breaks(name):
    quantizer = made(name, 1)
    x = vectors(seed=9).requires_grad_()

    def run(z):
        codes = quantizer(z)
        return codes.ids, codes.z, codes.loss

    torch._dynamo.reset()
    ids, z, loss = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    (z.sum() + loss).backward()
    torch.testing.assert_close(quantizer.ids_to_z(ids), z)
    assert x.grad.abs().sum() > 0


# Meters and dead codes ---------------------------------------------------------------------------------------------


def test_meters_count_training_since_the_last_reset():
    quantizer = VectorQuantizer(4, 2, restart_after=None)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0]]))
    quantizer(torch.tensor([[[0.0, 0], [0.1, 0], [1, 0], [1.1, 0]]]))
    assert quantizer.meters(reset=True) == {"usage": 0.5, "perplexity": pytest.approx(2)}
    quantizer.eval()(torch.zeros(1, 1, 2))
    assert quantizer.meters() == {"usage": 0, "perplexity": 1}
    assert Identity(2).meters() == {} and LFQ(30, entropy=0).meters() == {}


def test_first_batches_fill_the_table():
    quantizer = VectorQuantizer(40, DIM)
    x = vectors(1)
    quantizer(x)
    filled = {tuple(row) for row in quantizer.codebook.tolist()}
    assert {tuple(row) for row in x[0].tolist()} <= filled  # 16 vectors, 40 codes: all of them
    quantizer(vectors(2, 1))
    quantizer(vectors(1, 2))
    assert (quantizer.age < 100).all()


@pytest.mark.parametrize("make", [VectorQuantizer, EMAQuantizer])
def test_a_dead_code_comes_back_after_its_time_and_used_codes_stay(make):
    quantizer = make(8, 2, restart_after=3, seed=1)
    near = torch.randn(1, 50, 2)
    quantizer.requires_grad_(False)(near)
    quantizer.put(torch.arange(8) == 5, torch.full((8, 2), 1e3))  # far from everything
    held = quantizer.codebook.clone()
    ages = []
    for _ in range(5):
        quantizer(near)
        ages.append(int(quantizer.age[5]))
    assert ages[-1] == 0 and max(ages) == 3
    assert quantizer.codebook[5].abs().max() < 10
    if make is VectorQuantizer:
        used = torch.arange(8) != 5
        assert torch.equal(quantizer.codebook[used], held[used])


def test_restarts_are_the_same_under_a_seed_and_leave_the_random_state_alone():
    def run(seed):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(64, DIM, restart_after=1, seed=seed)
        state = torch.get_rng_state()
        for step in range(4):
            quantizer(vectors(seed=step))
        assert torch.equal(torch.get_rng_state(), state)
        return quantizer.codebook.detach()

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_restart_off_leaves_the_table_to_its_gradient():
    quantizer = VectorQuantizer(64, DIM, restart_after=None)
    before = quantizer.codebook.detach().clone()
    for step in range(3):
        quantizer(vectors(seed=step))
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("make", [VectorQuantizer, EMAQuantizer])
def test_a_table_from_elsewhere_is_not_overwritten(make):
    quantizer, table = make(24, DIM), torch.randn(24, DIM)
    quantizer.fill(table.half())
    quantizer(vectors())
    assert torch.equal(quantizer.codebook, table.half().float())


def test_restart_ends_collapse():
    """A table far from the vectors: without restart one code serves all."""
    x = torch.randn(20, 64, 2)

    def used(**how):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(64, 2, **how)
        with torch.no_grad():
            quantizer.codebook.add_(50)
        optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
        for batch in x:
            optimizer.zero_grad()
            quantizer(batch[None]).loss.backward()
            optimizer.step()
        quantizer.meters(reset=True)
        quantizer(x)
        return quantizer.meters()["usage"]

    assert used(restart_after=None) < 0.1
    assert used(restart_after=5) > 0.9


def test_a_second_forward_before_the_backward_pass_of_the_first_leaves_its_gradient_right():
    one, two = VQ(norm="both", restart_after=1), VQ(norm="both", restart_after=1)
    two.load_state_dict(one.state_dict())
    loss = one(vectors()).loss
    one(vectors(seed=1))
    loss.backward()
    two(vectors()).loss.backward()
    assert torch.equal(one.codebook.grad, two.codebook.grad)


# Members -----------------------------------------------------------------------------------------------------------


def test_gradient_on_the_sphere_is_the_jacobian_of_the_normalisation():
    quantizer = VQ(norm="both").eval()
    x, cotangent = vectors(seed=2).requires_grad_(), vectors(seed=3)
    (quantizer(x).z * cotangent).sum().backward()
    u = normalize(x.detach(), dim=-1)
    across = cotangent - (cotangent * u).sum(-1, keepdim=True) * u
    torch.testing.assert_close(x.grad, across / x.detach().norm(dim=-1, keepdim=True))


def test_two_parts_share_their_ids():
    quantizer = VQ(norm="both", parts=(4, 2), weights=(1.0, 0.0)).eval()
    x = vectors()
    halves = [t.split((4, 2), -1) for t in (x, quantizer.codebook)]
    semantic = [normalize(a, dim=-1) for a, _ in halves]
    assert torch.equal(quantizer(x).ids, nearest_code(*semantic))
    quantizer.weights = (1.0, 1e6)
    assert torch.equal(quantizer(x).ids, nearest_code(*(normalize(b, dim=-1) for _, b in halves)))
    z = quantizer(x).z
    torch.testing.assert_close(z[..., :4].norm(dim=-1), torch.ones(3, N))
    torch.testing.assert_close(z[..., 4:].norm(dim=-1), torch.ones(3, N))


def test_ema_moves_at_the_next_forward_and_not_before():
    quantizer = EMAQuantizer(4, 2, decay=0.0, restart_after=None)
    x = torch.randn(1, 30, 2)
    before = quantizer.codebook.clone()
    codes = quantizer(x)
    assert torch.equal(quantizer.codebook, before) and torch.equal(quantizer.ids_to_z(codes.ids), codes.z)
    quantizer(x)
    for k in range(4):
        mine = x[0][codes.ids[0] == k]
        expected = mine.mean(0) if len(mine) else torch.zeros(2)
        torch.testing.assert_close(quantizer.codebook[k], expected, rtol=1e-3, atol=1e-4)


def test_simvq_moves_every_code_when_one_is_used():
    quantizer = SimVQuantizer(24, DIM)
    before = quantizer.table().detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), 1.0)
    quantizer(vectors(1)[:, :1]).loss.backward()
    optimizer.step()
    assert [p for p, _ in quantizer.named_parameters()] == ["transform.weight"]
    assert ((quantizer.table() - before).norm(dim=1) > 0).all()


def test_ibq_teaches_all_codes_and_vq_only_those_it_used():
    x = vectors(1)[:, :3]
    for make, share in ((IBQuantizer, 1.0), (VectorQuantizer, 3 / 24)):
        quantizer = make(24, DIM, restart_after=None)
        quantizer(x).loss.backward()
        assert float((quantizer.codebook.grad.norm(dim=1) > 0).float().mean()) <= share + 1e-6
        assert (make is IBQuantizer) == bool((quantizer.codebook.grad.norm(dim=1) > 0).all())


def test_residual_error_falls_with_depth_and_prefixes_are_partial_sums():
    quantizer = Residual([VectorQuantizer(64, DIM) for _ in range(4)])
    for step in range(3):
        quantizer(vectors(8, step))
    with torch.no_grad():
        for stage in quantizer.stages:
            stage.codebook[0] = 0  # no code at all is one of the choices
    x = vectors(4, 9)
    codes = quantizer.eval()(x)
    sums = quantizer.partial_sums(codes.ids)
    errors = [float((x - s).detach().square().sum(-1).mean()) for s in sums]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2
    for k in range(1, 5):
        assert torch.equal(quantizer.ids_to_z(codes.depth(k).ids), sums[k - 1])


def test_chunks_of_a_product_are_independent():
    quantizer = Product([VectorQuantizer(24, 2, norm="both") for _ in range(3)]).eval()
    x = vectors()
    changed = x.clone()
    changed[..., 2:4] = 5
    one, two = quantizer(x).ids, quantizer(changed).ids
    assert torch.equal(one[..., 0], two[..., 0]) and torch.equal(one[..., 2], two[..., 2])
    assert not torch.equal(one[..., 1], two[..., 1])
    torch.testing.assert_close(quantizer(x).z.square().sum(-1), torch.full((3, N), 3.0))


def test_disentanglement_reaches_the_vectors_and_never_the_tables():
    books = [VectorQuantizer(24, 3, norm="both", codebook=0, commitment=0, restart_after=None) for _ in range(2)]
    quantizer = Product(books, disentangle=0.1)
    x = vectors().requires_grad_()
    codes = quantizer(x)
    a, b = codes.z.split(3, -1)
    torch.testing.assert_close(codes.loss, 0.1 * cosine_similarity(a, b, dim=-1).square().mean())
    codes.loss.backward()
    assert x.grad.abs().sum() > 0 and all(book.codebook.grad is None for book in books)
    with torch.no_grad():
        books[1].codebook.copy_(books[0].codebook)
    same = vectors()[..., :3].repeat(1, 1, 2)
    assert float(quantizer.eval()(same).loss) == pytest.approx(0.1)


def test_scales_are_area_down_and_bicubic_up():
    quantizer = MultiScale(VQ(), (1, 2, SIDE)).eval()
    x = vectors(2)
    rest = x.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    total, ids = torch.zeros_like(rest), []
    for side in (1, 2, SIDE):
        small = rest.unflatten(2, (side, -1)).unflatten(4, (side, -1)).mean((3, 5))
        chosen = nearest_code(small.flatten(2).transpose(1, 2), quantizer.inner.codebook)
        up = quantizer.inner.codebook[chosen].transpose(1, 2).unflatten(2, (side, side))
        up = interpolate(up, (SIDE, SIDE), mode="bicubic", align_corners=False)
        total, rest = total + up, rest - up
        ids.append(chosen)
    codes = quantizer(x)
    assert torch.equal(codes.ids, torch.cat(ids, 1)) and codes.format.scales == (1, 4, 16)
    torch.testing.assert_close(codes.z, total.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", SCALES)
def test_every_beginning_that_ends_on_a_scale_decodes(name):
    quantizer = made(name, 2).eval()
    codes = quantizer(vectors())
    ends = [sum(quantizer.lengths[: i + 1]) for i in range(3)]
    assert torch.equal(quantizer.ids_to_z(codes.prefix(ends[-1]).ids), codes.z)
    assert len({quantizer.ids_to_z(codes.prefix(k).ids).sum().item() for k in ends}) == 3
    with pytest.raises(ValueError, match="ids: got 2 tokens, must end on a scale"):
        quantizer.ids_to_z(codes.ids[:, :2])


def test_error_does_not_rise_with_scales_where_no_code_is_a_choice():
    quantizer = MultiScale(VectorQuantizer(64, DIM, restart_after=None), (1, 4, N), ndim=1).eval()
    with torch.no_grad():
        quantizer.inner.codebook[0] = 0
    x = vectors(8)
    codes = quantizer(x)
    sums = [quantizer.ids_to_z(codes.prefix(k).ids).detach() for k in (1, 5, 5 + N)]
    assert float((x - sums[2]).square().sum()) <= float((x - sums[1]).square().sum())


def test_a_dropped_scale_adds_nothing_and_the_first_is_never_dropped():
    quantizer = MultiScale(VQ(), (1, 2, SIDE), drop=1.0)
    dropped = set()
    for seed in range(12):
        torch.manual_seed(seed)
        codes = quantizer(vectors(seed=seed))
        gone = tuple(bool((part < 0).all()) for part in codes.ids.split((1, 4, 16), 1))
        assert torch.equal(quantizer.ids_to_z(codes.ids), codes.z) and sum(gone) == 1
        dropped.add(gone.index(True))
    assert dropped == {1, 2}
    assert (quantizer.eval()(vectors()).ids >= 0).all()


def test_gaussian():
    quantizer = Gaussian(3, kl=1.0)
    zero = torch.zeros(2, 5, 6)
    assert float(quantizer(zero).loss) == 0
    mean, log_variance = torch.randn(4, 1000, 3), torch.full((4, 1000, 3), -1.0)
    x = torch.cat([mean, log_variance], -1)
    expected = 0.5 * (mean.square() + math.exp(-1) - 1 + 1).mean()
    torch.testing.assert_close(quantizer(x).loss, expected)
    noise = (quantizer(x).z - mean) / math.exp(-0.5)
    assert abs(float(noise.std()) - 1) < 0.03
    assert torch.equal(quantizer.eval()(x).z, mean) and quantizer.bits() == 96


def test_codes_state_the_order_of_bits():
    assert LFQ(4, bit_order="first-highest")(torch.zeros(1, 1, 4)).format.bit_order == "first-highest"
    assert FSQ((4, 4))(torch.zeros(1, 1, 2)).format.bit_order == "first-lowest"
    assert VQ()(vectors()).format.bit_order is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VectorQuantizer(0, 2), "size: got 0"),
        (lambda: VectorQuantizer(2, 2, norm="l2"), "norm: got 'l2'"),
        (lambda: VectorQuantizer(2, 5, parts=(2, 2)), r"parts: got \(2, 2\), must add up to the 5 channels"),
        (lambda: VectorQuantizer(2, 4, parts=(2, 2), weights=(1.0,)), "weights: got"),
        (lambda: VectorQuantizer(2, 2, restart_after=0), "restart_after: got 0"),
        (lambda: VectorQuantizer(2, 2, gradient="magic"), "gradient: got 'magic'"),
        (lambda: EMAQuantizer(2, 2, decay=1.0), "decay: got 1.0"),
        (lambda: LFQ(63), "bits: got 63"),
        (lambda: LFQ(20), "entropy: got 0.1 with 20 bits"),
        (lambda: Residual([VQ(), VQ()], 3), "stages: got 2"),
        (lambda: Residual([FSQ((2, 2), 3)]), "stages: must each give one id"),
        (lambda: Product([Identity(2)]), "books: must be"),
        (lambda: Product([VQ(), LFQ(4)]), "one order of bits"),
        (lambda: Product([VQ(), VectorQuantizer(2, 3)], disentangle=1.0), "disentangle: needs books"),
        (lambda: MultiScale(VQ(), (2, 1)), "scales: got"),
        (lambda: MultiScale(VQ(), (1, 2), drop=2.0), "drop: got 2.0"),
        (lambda: FSQ((1, 2))(torch.zeros(1, 1, 2)), "levels: got"),
    ],
)
def test_arguments_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_book_for_each_stretch():
    books = [VectorQuantizer(16, dim, norm="both", restart_after=None) for dim in (6, 4)]
    codes = Stretches(books, (5, 9)).eval()
    z = torch.randn(2, 14, 6)
    found = codes(z)
    assert found.ids.shape == (2, 14) and found.bits.tolist() == [14 * 4] * 2
    for book, part in ((codes.books[0], slice(0, 5)), (codes.books[1], slice(5, 14))):
        alone = book(z[:, part, : book.dim])
        assert torch.equal(found.ids[:, part], alone.ids)
        assert torch.equal(found.z[:, part, : book.dim], alone.z)
    assert not found.z[:, 5:, 4:].any() and torch.equal(codes.ids_to_z(found.ids), found.z)
    each = [codes.books[0](z[:, :5]).loss, codes.books[1](z[:, 5:, :4]).loss]
    torch.testing.assert_close(found.loss, each[0] + each[1])
    mask = torch.arange(14).expand(2, -1) != 6
    masked = codes(z, mask)
    assert masked.ids[:, 6].tolist() == [-1, -1] and not masked.z[:, 6].any()
    with pytest.raises(ValueError, match="ids: got 13 tokens, must be 14"):
        codes.ids_to_z(found.ids[:, :-1])
    with pytest.raises(ValueError, match="books: got 2 for 1 stretches"):
        Stretches(books, (14,))
