"""Every loss against its definition, and the chunked form against autograd over the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from headwise.train import losses

TOKENS, VOCABULARY = 13, 29


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(TOKENS, VOCABULARY), 2 * torch.randn(TOKENS, VOCABULARY)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits.double() / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_what_they_are_called(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    student, teacher = logits
    s, t = (probabilities(x, temperature) for x in logits)
    middle = (s + t) / 2

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(-1)

    for found, wanted in [
        (losses.forward_kl(student, teacher, temperature), kl(t, s)),
        (losses.reverse_kl(student, teacher, temperature), kl(s, t)),
        (losses.jsd(student, teacher, temperature), (kl(s, middle) + kl(t, middle)) / 2),
    ]:
        torch.testing.assert_close(found.double(), wanted * temperature**2, rtol=1e-5, atol=1e-6)
    for divergence in (losses.forward_kl, losses.reverse_kl, losses.jsd):
        assert divergence(teacher, teacher).abs().max() < 1e-6


def test_top_k_puts_the_rest_into_one_bucket(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    s, t = (probabilities(x, 1.0) for x in logits)
    whole = losses.forward_kl(student, teacher)
    for k in (1, 5, VOCABULARY):
        kept, ids = teacher.log_softmax(-1).topk(k)
        found = losses.topk_kl(student, ids, kept)
        p, q = t.gather(1, ids), s.gather(1, ids)
        wanted = (p * (p / q).log()).sum(-1)
        if k < VOCABULARY:
            rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
            wanted = wanted + rest_p * (rest_p / rest_q).log()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
        assert bool((found <= whole + 1e-5).all())
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_a_certain_teacher_gives_finite_losses_and_gradients() -> None:
    student = torch.zeros(2, VOCABULARY, requires_grad=True)
    sure = torch.full((2, 3), -60.0)
    sure[:, 0] = 0.0
    ids = torch.tensor([[4, 1, 2], [7, 8, 9]])
    loss = losses.topk_kl(student, ids, sure).sum()
    loss.backward()
    assert loss.item() == pytest.approx(2 * torch.log(torch.tensor(29.0)).item(), rel=1e-4)
    assert student.grad is not None and bool(student.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 1 << 25])
def test_chunks_add_up_to_the_whole(logits: tuple[Tensor, Tensor], chunk: int, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in logits)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[3] = losses.IGNORED
    weights = torch.rand(TOKENS)

    def both(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.9 * losses.forward_kl(s, t) + 0.1 * losses.cross_entropy(s, y)

    def gradient(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        value = loss(leaf)
        (3 * value).backward()
        assert leaf.grad is not None
        return value.detach(), leaf.grad

    whole, wanted = gradient(lambda s: (both(s.float(), teacher.float(), labels) * weights).sum())
    chunked, found = gradient(lambda s: losses.over_tokens(both, s, teacher, labels, weights=weights, chunk=chunk))
    torch.testing.assert_close(chunked, whole)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_no_gradient_is_formed_where_none_is_wanted(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    with torch.no_grad():
        found = losses.over_tokens(losses.jsd, student, teacher, weights=torch.ones(TOKENS))
    assert not found.requires_grad
    torch.testing.assert_close(found, losses.jsd(student, teacher).sum())


def test_cross_entropy_ignores_what_it_is_told_to(logits: tuple[Tensor, Tensor]) -> None:
    labels = torch.arange(TOKENS)
    labels[0] = losses.IGNORED
    found = losses.cross_entropy(logits[0], labels)
    assert found[0] == 0
    torch.testing.assert_close(found[1:], functional.cross_entropy(logits[0], labels, reduction="none")[1:])


def test_the_relative_error_knows_of_a_scaled_stream() -> None:
    torch.manual_seed(0)
    theirs = [torch.randn(2, 5, 8) for _ in range(3)]
    ours = [0.3 * (x + 0.1 * x.norm() / x.numel() ** 0.5) for x in theirs]
    assert losses.relative_squared_error([0.3 * x for x in theirs], theirs, 0.3) < 1e-12
    assert losses.relative_squared_error(ours, theirs, 0.3).item() == pytest.approx(0.01, rel=1e-4)
