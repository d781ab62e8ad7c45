"""Bridge: a pretrained multimodal language model learns to draw with a second expert in each layer.

What: each layer has two experts, the pretrained weights, frozen, and a copy that learns; norms, projections and MLP are
an expert's own. A token's kind decides its expert, text and what the model sees to the pretrained one, what it draws to
the other; one causal attention over all joins them. A picture that is drawn is [BOI], semantic ids (81), pixel ids
(1024), [EOI]: 7.9% longer than pixels alone. Source: paper and page, hywang66/Bridge (no code was released).

Decided here, as not published: the drawing expert begins as a copy of the other; BOI and EOI are its own, so BOI
predicts the first semantic id; the new ids have a table and a read-out of their own, so that no row of the model's own
changes.
Sizes of the codebooks are unverified. Both kinds of ids condition what follows; which of them a decoder of pixels is
given is its affair. The language model's linear maps and norms are exchanged for routed ones by their attributes; its
forward, attention and cache stay those of transformers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.cluster import k_means
from vistok.core.flow import cfg
from vistok.core.quantize import nearest_code
from vistok.parts.visual_vocabulary import Packed, Piece, VisualVocabulary, learn, small_llama
from vistok.tokenize._pairs import TEXT, captions, written
from vistok.tokenize._routing import Route, Routed
from vistok.tokenize.vq_grid import VQGrid

CARD = Card(
    title="Growing Visual Generative Capacity for Pre-Trained MLLMs",
    kind="trained",
    site="every layer of a language model: an expert more; its output: semantic, then pixel ids",
    paper="Bridge, hywang66/Bridge",
    repository="hywang66/Bridge",
    mechanism=("transformation",),
    claim="A model that learns to draw with a second expert still answers as before; fine-tuned, it forgets.",
)


class TwoExperts(nn.Module):
    """``llm``, a Hugging Face causal model, with a second expert in each layer; it is changed in place."""

    def __init__(self, llm: Any, vocabulary: VisualVocabulary) -> None:
        super().__init__()
        self.vocabulary, self.route = vocabulary, Route()
        if (had := llm.get_input_embeddings().num_embeddings) != vocabulary.text:
            raise ValueError(f"llm: got one of {had} ids, must have the {vocabulary.text} of text")
        self.llm = llm.requires_grad_(False)
        decoder = llm.get_decoder()
        for layer in decoder.layers:
            for name, part in list(layer.named_children()):
                # Of the attention the maps and norms are routed, not its softmax over all tokens.
                holder, parts = (part, list(part.named_children())) if "attn" in name else (layer, [(name, part)])
                for each, module in parts:
                    setattr(holder, each, Routed(module, self.route))
        decoder.norm = Routed(decoder.norm, self.route)
        width, new = llm.get_input_embeddings().embedding_dim, vocabulary.size - vocabulary.text
        self.table, self.head = nn.Embedding(new, width), nn.Linear(width, new, bias=False)
        for module in (self.table, self.head):
            nn.init.normal_(module.weight, std=0.02)

    def drawn(self, ids: Tensor) -> Tensor:
        """(B, T) bool: which of ``ids`` are the drawing expert's: codes, BOI and EOI."""
        return ids >= self.vocabulary.text

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T, width): the inputs of ids (B, T), each from its expert's table."""
        text = self.vocabulary.text
        seen = self.llm.get_input_embeddings()(ids.clamp_max(text - 1))
        return torch.where(self.drawn(ids)[..., None], self.table((ids - text).clamp_min(0)).to(seen.dtype), seen)

    def forward(
        self,
        embeds: Tensor,
        drawn: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any]:
        """Logits (B, T, text and new ids), and the cache, by position whichever expert a token has.

        ``embeds`` (B, T, width): ``embed(ids)``, or features of pictures that are seen, projected to that width, among
        them; ``drawn`` (B, T) bool, None: no token is.
        """
        self.route.drawn = drawn if drawn is not None and bool(drawn.any()) else None
        try:
            found = self.llm.get_decoder()(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
        finally:
            self.route.drawn = None
        hidden = found.last_hidden_state
        logits = torch.cat([self.llm.get_output_embeddings()(hidden), self.head(hidden)], 2)
        return logits, found.past_key_values

    def loss(self, batch: Packed) -> Tensor:
        """Mean cross-entropy of the learned ids of a packed batch; learn pictures only, or text too."""
        ids = batch.input_ids
        logits, _ = self(self.embed(ids), self.drawn(ids), batch.attention_mask)
        return cross_entropy(logits[:, :-1].float().flatten(0, 1), batch.labels[:, 1:].flatten())

    @torch.no_grad()
    def generate_image(
        self,
        prompt: Tensor,
        guidance: float = 1.0,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        """The semantic and the pixel codes, (B, tokens) each, of a picture after each ``prompt`` (B, T), unpadded.

        ``guidance`` other than 1: classifier-free, the unconditional answer from BOI alone (train it by leaving out
        some prompts). ``temperature`` 0 takes the likeliest id.
        """
        begun = prompt.new_full((len(prompt), 1), self.vocabulary.boi)
        ids = torch.cat([prompt, begun], 1)
        inputs, caches = [ids, begun][: 1 + (guidance != 1)], [None, None]
        for _ in range(self.vocabulary.tokens + 1):
            each = []
            for i, x in enumerate(inputs):
                logits, caches[i] = self(self.embed(x), self.drawn(x), None, caches[i], True)
                each.append(logits[:, -1].float())
            logits = self.vocabulary(ids, each[0] if guidance == 1 else cfg(each[0], each[1], guidance))
            if temperature > 0:
                new = (logits / temperature).softmax(1).multinomial(1, generator=generator)
            else:
                new = logits.argmax(1, keepdim=True)
            ids, inputs = torch.cat([ids, new], 1), [new] * len(inputs)
        return self.vocabulary.unwrap(ids[:, prompt.shape[1] :])


@dataclass(frozen=True)
class Bridge:
    """The layout of a picture that is drawn."""

    semantic: tuple[int, int] = (65536, 81)
    """Codes and tokens of the semantic part, 9 x 9."""
    pixel: tuple[int, int] = (16384, 1024)
    """Codes and tokens of the pixel part, 32 x 32."""

    def vocabulary(self, text: int) -> VisualVocabulary:
        """The ids of a language model that has ``text`` ids: text, semantic codes, pixel codes, BOI, EOI."""
        return VisualVocabulary(text, (self.semantic, self.pixel))

    def grow(self, llm: Any) -> TwoExperts:
        """``llm`` with a second expert that draws; changed in place, its own weights frozen."""
        return TwoExperts(llm, self.vocabulary(llm.get_input_embeddings().num_embeddings))


def claim(trial: TokenizeTrial, steps: int = 60, words: int = 300) -> Outcome:
    """Captions' ids that a Llama reads off 64 pictures after it has learned to draw them: fine-tuned, and with Bridge.

    It first learns to read them, from 3 x 3 features of the zoo's vision transformer, then to draw: semantic ids (the
    nearest of 64 centres of such features), then 16 ids of a VQ grid. Holds if Bridge's reading is as it was and better
    than the other's by 10 points, and both draw 0.95 of the ids right.
    """
    x, labels = (torch.cat(parts)[:64] for parts in zip(*trial.held_out(), strict=True))
    vision, texts = trial.vision(), captions(labels)
    torch.manual_seed(trial.seed)
    grid = VQGrid("T", trial.size, trial.size // 4, 512, 16, 20).build()
    trial.fit(grid, steps)
    with torch.no_grad():
        pixel = grid.eval().encode(x).ids
        laid = vision(x).transpose(1, 2).unflatten(2, vision.grid)
        seen = adaptive_avg_pool2d(laid, 3).flatten(2).transpose(1, 2)
    assert pixel is not None
    centres = k_means(seen.flatten(0, 1), min(64, seen.shape[0] * 9), seed=trial.seed)
    recipe = Bridge((64, 9), (512, 16))
    vocabulary = recipe.vocabulary(TEXT)
    torch.manual_seed(trial.seed)
    llm, project = small_llama(TEXT), nn.Linear(seen.shape[2], 64)

    def reading() -> Tensor:
        inputs = torch.cat([project(seen), llm.get_input_embeddings()(texts)], 1)
        logits = llm(inputs_embeds=inputs).logits[:, 8:-1]
        return cross_entropy(logits.flatten(0, 1), texts.flatten())

    learn(nn.ModuleList([llm, project]), reading, words)
    tuned = copy.deepcopy(llm)
    vocabulary.extend(tuned)
    codes = (nearest_code(seen, centres), pixel)
    rows = zip(texts, vocabulary.wrap(*codes), strict=True)
    drawing = vocabulary.pack([[Piece(text, False), Piece(picture)] for text, picture in rows])

    def read_by(model: Any, logits: Any) -> float:
        found = written(logits, model.get_input_embeddings(), project(seen))
        return float((found == texts).float().mean())

    before = read_by(llm, lambda e: llm(inputs_embeds=e).logits)
    learn(tuned, lambda: tuned(**drawing._asdict()).loss, words)
    two = recipe.grow(llm)
    learn(two, lambda: two.loss(drawing), words)
    read = [read_by(tuned, lambda e: tuned(inputs_embeds=e).logits), read_by(two.llm, lambda e: two(e)[0])]
    made = [torch.cat(drawn, 1) for drawn in (vocabulary.draw(tuned.eval(), texts), two.eval().generate_image(texts))]
    drew = [float((m == torch.cat(codes, 1)).float().mean()) for m in made]
    told = f"read before {before:.3f}; drawn: fine-tuned {drew[0]:.3f}, Bridge {drew[1]:.3f}"
    holds = read[1] == before and read[1] >= read[0] + 0.1 and min(drew) >= 0.95
    return Outcome("captions' ids still read", read[0], read[1], holds, told)
