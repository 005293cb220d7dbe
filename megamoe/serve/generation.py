"""Text from a trained language model: prompts are read once, then every row gets token after token.

Shapes: B rows, S tokens of a prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.load import load_model, load_tokenizer, open_model
from megamoe.config.schema import RunConfig
from megamoe.errors import CheckpointError, ConfigError, DataError
from megamoe.models.attention import AttentionSpan
from megamoe.models.decoding import Decoder, read_text
from megamoe.moe.routers import router_class
from megamoe.parallel.device import Device
from megamoe.serve.offload import OffloadedModel
from megamoe.serve.predictor import Predictor, PredictorState
from megamoe.serve.predictor_file import load_predictor
from megamoe.serve.prefetch import Prefetcher
from megamoe.serve.sampling import Sampler
from megamoe.serve.settings import Settings
from megamoe.serve.text_stream import TextStream
from megamoe.training.evaluation import evaluation_span, top_ks_to_score


class TextGenerator:
    """A language model that goes on with texts. Computes in fp32, on the GPU if there is one.

    Args:
        path: as `load_model` takes it.
        settings: how texts go on.

    Attributes:
        run: config of the model's run.
        top_k: experts that a token gets, which need not be `settings.k`; `NO_EXPERTS` where layers have none.
        offloaded: the model with its slots, where `settings.expert_budget` is given.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is not what it says; or no such predictor.
        ConfigError: it is no language model, has fewer than k experts, or the budget is too small.
    """

    def __init__(self, path: str | Path, settings: Settings) -> None:
        reader = open_model(path)
        self.run, self.settings, self._step = reader.config, settings, reader.state.step
        require_language_model(self.run)
        self.top_k = experts_to_use(self.run, settings.k)
        self.span = text_span(self.run)
        self.tokenizer = load_tokenizer(reader.folder)
        if self.tokenizer.vocab_size != self.run.model.vocab_size:
            raise CheckpointError(
                f"checkpoint {str(reader.folder)!r}: its tokenizer has {self.tokenizer.vocab_size} symbols,"
                f" its model {self.run.model.vocab_size}; it is corrupt or was changed"
            )
        self._device = torch.device(Device.detect().kind)
        self.offloaded: OffloadedModel | None = None
        self._predictor: Predictor | None = None
        if settings.expert_budget is None:
            self.model = load_model(reader.folder).to(self._device)
            return
        self.offloaded = OffloadedModel(reader.folder, settings.expert_budget)
        self.model = self.offloaded.model
        if settings.predictor is not None:
            self._predictor = load_predictor(settings.predictor, self.model)

    def stream(self, prompts: Sequence[bytes]) -> Iterator[list[str]]:
        """Go on with `settings.samples` texts of each prompt, those of the first prompt first.

        A text depends on the model, the settings and its prompt, not on the other prompts.

        Yields:
            after each token, what can be said of the text of each row, in whole characters: "" where a
            character is not complete. The last token completes them.

        Raises:
            DataError: a prompt holds no token, or something that the tokenizer has no id for; at once.
        """
        return self._stream(prompts, [self._encode(prompt) for prompt in prompts])

    @torch.no_grad()
    def _stream(self, prompts: Sequence[bytes], ids: Sequence[torch.Tensor]) -> Iterator[list[str]]:
        samples, n_tokens = range(self.settings.samples), self.settings.max_new_tokens
        rows = [(prompt, sample) for prompt in range(len(prompts)) for sample in samples]
        how: dict[str, Any] = {"span": self.span, "top_k": self.top_k, "step": self._step}
        pasts = [read_text(self.model, ids_S[:-1], **how) for ids_S in ids]
        decoder = Decoder(self.model, [pasts[prompt] for prompt, _ in rows], **how)
        sample_next = Sampler(
            self.settings, [(prompts[prompt], sample) for prompt, sample in rows], self._device
        )
        announce = self._announcer(ids, [prompt for prompt, _ in rows])
        latest_B = torch.stack([ids[prompt][-1] for prompt, _ in rows])
        texts = [TextStream(self.tokenizer, last_id) for last_id in latest_B.tolist()]
        for n in range(1, n_tokens + 1):
            announce(latest_B)
            latest_B = sample_next(decoder.read(latest_B))
            tokens = zip(texts, latest_B.tolist(), strict=True)
            yield [text.push(token_id, final=n == n_tokens) for text, token_id in tokens]

    def _announcer(
        self, ids: Sequence[torch.Tensor], prompt_of_row: Sequence[int]
    ) -> Callable[[torch.Tensor], object]:
        """What is told the tokens that the decoder is about to read, so that their experts are loaded."""
        if self._predictor is None or self.offloaded is None:
            return lambda latest_B: None
        states = [self._predictor.read_text(self.model.embedding(ids_S[None, :-1])) for ids_S in ids]
        state = PredictorState.stack([states[prompt] for prompt in prompt_of_row])
        prefetcher = Prefetcher(self._predictor, self.model, self.offloaded.slots, self.top_k, state)
        return lambda latest_B: prefetcher.read(latest_B[:, None])

    def _encode(self, prompt: bytes) -> torch.Tensor:
        shown = prompt[:40].decode(errors="replace")
        try:
            ids = self.tokenizer.encode(prompt)
        except DataError as error:
            raise DataError(f"prompt = {shown!r}: {error}; give another prompt") from None
        if not len(ids):
            raise DataError(f"prompt = {shown!r}: holds no {self.tokenizer.unit}; give at least one")
        return torch.from_numpy(ids.astype("int64")).to(self._device)


def require_language_model(run: RunConfig) -> None:
    """Refuse a model that cannot tell what comes next.

    Raises:
        ConfigError: it is a classifier, or chooses experts by later tokens.
    """
    if run.task.name:
        raise ConfigError(
            f"task.name = {run.task.name!r}: a classifier generates no text; give a language model's"
            f" checkpoint, as task.checkpoint = {run.task.checkpoint!r} was"
        )
    name = run.moe.router.name
    if run.moe.layer_indices(run.model.n_layers) and router_class(name).causal == "never":
        raise ConfigError(
            f"moe.router.name = {name!r}: its choices depend on later tokens, which are not there while text"
            " is generated; give a checkpoint of another policy"
        )


def experts_to_use(run: RunConfig, k: int | None) -> int:
    """The experts that a token gets where `k` are asked for; `moe.top_k` if that is None.

    Raises:
        ConfigError: there are fewer.
    """
    k = run.moe.top_k if k is None else k
    if run.moe.layer_indices(run.model.n_layers) and k > run.moe.n_experts:
        raise ConfigError(f"k = {k}: give a number up to moe.n_experts = {run.moe.n_experts}")
    return top_ks_to_score(run, [k])[0]


def text_span(run: RunConfig) -> AttentionSpan:
    """What attention sees of a text: for each token as much as evaluation shows the last one of a segment.

    With `evaluation.memory_len = auto` that is as much as training shows. It is the same for tokens of the
    prompt and for new ones, wherever segments begin.
    """
    span = evaluation_span(run)
    if span.same_length:
        return span
    return replace(span, memory_len=span.memory_len + run.evaluation.segment_len, same_length=True)
