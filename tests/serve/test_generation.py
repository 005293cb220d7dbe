"""Texts of a checkpoint against texts made by scoring everything again for each token."""

from pathlib import Path
from typing import Any

import pytest
import torch

import megamoe
from megamoe.config import from_dict
from megamoe.data.tokenizers import ByteTokenizer
from megamoe.errors import CheckpointError, ConfigError, DataError
from megamoe.models.attention import AttentionSpan
from megamoe.serve.generation import TextGenerator, experts_to_use, require_language_model, text_span
from megamoe.serve.sampling import Sampler
from megamoe.serve.settings import Settings
from tests.serve.models import LETTERS, write_language_model

PROMPTS = [b"hello", b"x", b"it was the best of times, it was the worst of times"]
WINDOW = 14
"""Memory and segment of the small run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("run") / "best")


def texts_of(folder: Path, prompts: list[bytes], **settings: Any) -> list[str]:
    generator = TextGenerator(folder, Settings(**{"max_new_tokens": 30} | settings))
    return ["".join(pieces) for pieces in zip(*generator.stream(prompts), strict=True)]


@torch.no_grad()
def text_by_scoring_again(folder: Path, prompt: bytes, settings: Settings) -> str:
    model, sampler = megamoe.load_model(folder), Sampler(settings, [(prompt, 0)])
    ids = LETTERS.encode(prompt).tolist()
    for _ in range(settings.max_new_tokens):
        span = AttentionSpan(WINDOW, same_length=True)
        scored = model(torch.tensor([ids]), top_k=settings.k, step=1, span=span, return_logits=True)
        ids += sampler(scored.logits_BSV[:, -1]).tolist()
    return LETTERS.decode(ids[len(prompt) :]).decode(errors="replace")


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0, "k": 2}, {"temperature": 0.7, "top_p": 0.9, "k": 3, "seed": 4}, {"k": 1}],
)
def test_equals_scoring_the_whole_text_again_for_each_token(folder: Path, settings: dict[str, Any]) -> None:
    expected = [
        text_by_scoring_again(folder, prompt, Settings(max_new_tokens=30, **settings)) for prompt in PROMPTS
    ]
    assert texts_of(folder, PROMPTS, **settings) == expected


def test_a_text_is_the_same_whatever_stands_beside_it(folder: Path) -> None:
    together = texts_of(folder, PROMPTS, samples=3)
    assert len(set(together)) == 9
    for index, prompt in enumerate(PROMPTS):
        ours = together[3 * index : 3 * index + 3]
        assert texts_of(folder, [prompt], samples=3) == ours
        assert texts_of(folder, [prompt]) == ours[:1]
    assert texts_of(folder, PROMPTS[::-1]) == together[::3][::-1]
    assert texts_of(folder, PROMPTS[:1], seed=1) != together[:1]


def test_k_matters(folder: Path) -> None:
    assert texts_of(folder, [b"a"]) == texts_of(folder, [b"a"], k=2)
    assert len({texts_of(folder, [b"a"], k=k)[0] for k in (1, 2, 4)}) == 3


@pytest.mark.parametrize(
    ("moe", "k", "expected"),
    [
        ({}, None, 2), ({}, 3, 3), ({"layers": "none"}, 9, 0), ({"router": {"name": "base"}}, 3, 1),
        ({"router": {"name": "dense"}}, 2, 4),
    ],
)  # fmt: skip
def test_the_experts_that_are_used(moe: dict[str, Any], k: int | None, expected: int) -> None:
    run = from_dict({"moe": {"n_experts": 4, "top_k": 2} | moe})
    assert experts_to_use(run, k) == expected


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ({}, AttentionSpan(1024, True)),
        ({"segment_len": 8, "memory_len": 100, "clamp_len": 50}, AttentionSpan(108, True, 50)),
        ({"same_length": True, "memory_len": 100}, AttentionSpan(100, True)),
    ],
)
def test_a_token_sees_what_the_last_one_of_a_segment_sees_in_evaluation(
    evaluation: dict[str, Any], expected: AttentionSpan
) -> None:
    assert text_span(from_dict({"evaluation": evaluation})) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"moe": {"router": {"name": "expert_choice"}}}, "moe.router.name = 'expert_choice': its choices"),
        ({"task": {"name": "sst2", "checkpoint": "runs/lm"}}, "task.name = 'sst2': a classifier generates"),
    ],
)
def test_refusals_of_models(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        require_language_model(from_dict(values))


def test_refusal_of_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its tokenizer has 256 symbols, its model 32"):
        TextGenerator(write_language_model(tmp_path / "best", ByteTokenizer()), Settings())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"", "prompt = '': holds no symbol; give at least one"),
        (b"\n", r"prompt = '\\n': holds no symbol"),
        (b"Hello", "prompt = 'Hello': byte 72: is not among the 32 symbols"),
    ],
)
def test_refusals_of_prompts_come_at_once(folder: Path, prompt: bytes, message: str) -> None:
    generator = TextGenerator(folder, Settings())
    with pytest.raises(DataError, match=f"^{message}"):
        generator.stream([b"good", prompt])
