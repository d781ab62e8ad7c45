"""A Hugging Face language model with continuous image embeddings among its words (VL-GPT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vistok.parts.visual_vocabulary import IGNORED, Mixed, VisualVocabulary, mixed_loss


class ContinuousWords(nn.Module):
    """A Hugging Face causal model with pictures of N embeddings of ``dim`` channels among its words.

    Its vocabulary is extended by one id that holds an embedding's place, by BOI and by EOI.
    """

    def __init__(self, llm: Any, dim: int, tokens: int) -> None:
        super().__init__()
        self.vocabulary = VisualVocabulary(llm.get_input_embeddings().num_embeddings, ((1, tokens),))
        self.vocabulary.extend(llm)
        self.llm = llm
        width = llm.get_input_embeddings().embedding_dim
        self.enter, self.leave = nn.Linear(dim, width), nn.Linear(width, dim)

    def picture(self) -> Tensor:
        """(N + 2,) int64: [BOI] places [EOI], to be packed with text."""
        return self.vocabulary.wrap(torch.zeros(1, self.vocabulary.tokens, dtype=torch.int64))[0]

    def places(self, ids: Tensor) -> Tensor:
        """(B, T) bool: where embeddings stand in ``ids``."""
        return ids == self.vocabulary.text

    def embed(self, ids: Tensor, pictures: Tensor) -> Tensor:
        """(B, T, width): inputs of the language model; ``pictures`` (P, N, dim) stand in ``ids`` in their order."""
        there = self.places(ids)
        if int(there.sum()) != pictures.shape[0] * pictures.shape[1]:
            raise ValueError(f"pictures: got {tuple(pictures.shape)}, must fill the {int(there.sum())} places in ids")
        embedded: Tensor = self.llm.get_input_embeddings()(ids)
        return embedded.masked_scatter(there[..., None], self.enter(pictures).to(embedded.dtype))

    def forward(self, ids: Tensor, pictures: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the next id, and the next embedding (B, T, dim), at each position."""
        found = self.llm(inputs_embeds=self.embed(ids, pictures), attention_mask=mask, output_hidden_states=True)
        return found.logits, self.leave(found.hidden_states[-1])

    def loss(self, ids: Tensor, labels: Tensor, mask: Tensor, pictures: Tensor, weight: float = 1.0) -> Mixed:
        """Of sequences that ``VisualVocabulary.pack`` made; places count as embeddings where they are learned."""
        logits, predicted = self(ids, pictures, mask)
        there = self.places(ids)
        flat = pictures.to(predicted.dtype).flatten(0, 1)
        targets = torch.zeros_like(predicted).masked_scatter(there[..., None], flat)
        continuous = there & (labels != IGNORED)
        return mixed_loss(logits, labels.masked_fill(there, IGNORED), predicted, targets, continuous, weight)

    @torch.no_grad()
    def draw(self, prompt: Tensor, fed: Tensor | None = None) -> Tensor:
        """(B, N, dim): the embeddings that follow ``prompt`` (B, T) and BOI, each fed back to predict the next.

        ``fed`` (B, N, dim): fed in their place (teacher forcing).
        """
        x = self.llm.get_input_embeddings()(nn.functional.pad(prompt, (0, 1), value=self.vocabulary.boi))
        cache, made = None, []
        for i in range(self.vocabulary.tokens):
            found = self.llm(inputs_embeds=x, past_key_values=cache, use_cache=True, output_hidden_states=True)
            cache = found.past_key_values
            made.append(self.leave(found.hidden_states[-1][:, -1:]))
            x = self.enter(made[-1] if fed is None else fed[:, i : i + 1])
        return torch.cat(made, 1)

    @torch.no_grad()
    def read(self, pictures: Tensor, count: int) -> Tensor:
        """(B, count): the ids that follow [BOI] each picture (B, N, dim) [EOI], greedily."""
        x = self.embed(self.picture().to(pictures.device).expand(len(pictures), -1), pictures)
        mask = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
        # No picture may begin inside an answer.
        words = list(range(self.vocabulary.text, self.vocabulary.size))
        found: Tensor = self.llm.generate(
            inputs_embeds=x, attention_mask=mask, max_new_tokens=count, do_sample=False, suppress_tokens=words
        )
        return found
