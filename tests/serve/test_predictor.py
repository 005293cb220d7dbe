import torch
from torch.testing import assert_close

from megamoe.serve.predictor import Predictor, PredictorShape, PredictorState

SHAPE = PredictorShape(d_model=6, n_layers=2, n_experts=5, width=8, context=4)
X = torch.randn(3, 12, 6, generator=torch.Generator().manual_seed(2))


def predictor() -> Predictor:
    torch.manual_seed(1)
    return Predictor(SHAPE).eval()


@torch.no_grad()
def test_pieces_are_one_text() -> None:
    model = predictor()
    whole, end = model(X)
    assert whole.shape == (3, 12, 2, 5)
    for lengths in ([5, 7], [1] * 12, [2, 1, 9]):
        state, parts = None, []
        for x_BSD in X.split(lengths, dim=1):
            part, state = model(x_BSD, state)
            parts.append(part)
        assert_close(torch.cat(parts, dim=1), whole)
        for ours, theirs in zip(state, end, strict=True):
            assert_close(ours, theirs)


@torch.no_grad()
def test_no_token_changes_what_is_said_of_earlier_ones() -> None:
    model, place = predictor(), 7
    changed = X.clone()
    changed[:, place] += 1
    before, after = model(X)[0], model(changed)[0]
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.allclose(before[:, place], after[:, place])


@torch.no_grad()
def test_texts_of_different_length_share_a_batch() -> None:
    model = predictor()
    states = [model(X[row : row + 1, :length])[1] for row, length in enumerate((2, 9, 5))]
    together, _ = model(X[:, -1:], PredictorState.stack(states))
    for row, state in enumerate(states):
        assert_close(together[row], model(X[row : row + 1, -1:], state)[0][0])


@torch.no_grad()
def test_attention_by_hand() -> None:
    """h_t . h_j over the latest positions, written as loops."""
    model = predictor()
    c = model.compress(X).relu()
    h, _ = model.recurrent(c)
    expected = torch.zeros_like(h)
    for row in range(3):
        for t in range(12):
            seen = h[row, max(0, t - SHAPE.context + 1) : t + 1]
            z = (seen @ h[row, t]).double()
            shifts = torch.linspace(z.min() - 1, z.max(), 200_001, dtype=torch.double)
            excess = (z[:, None] - shifts).clamp(min=0).sum(0) - 1
            a = (z - shifts[excess.abs().argmin()]).clamp(min=0)
            expected[row, t] = a.float() @ seen
    expected = model.heads(expected + model.residual(c)).unflatten(-1, (2, 5))
    assert_close(model(X)[0], expected, atol=2e-4, rtol=0)
