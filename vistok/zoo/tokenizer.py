"""The tokenizer of the small models: one token a word of the world, one token a character of what is written in it."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vistok.world import VOCABULARY

PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
CAPTION_PROMPT = "describe the picture ."
"""What the world's dense captions answer."""
CHARACTERS = string.ascii_letters + string.digits + string.punctuation

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.content is string %}{% set parts = [{'type': 'text', 'text': message.content}] %}"
    "{% else %}{% set parts = message.content %}{% endif %}"
    "{% for part in parts %}{% if part.type == 'image' %}IMAGE_PLACEHOLDER{% endif %}{% endfor %}"
    "{% if message.role == 'user' %}<user>{% elif message.role == 'assistant' %}<assistant>{% endif %}"
    "{% for part in parts %}{% if part.type == 'text' %} "
    "{{ part.text | lower if message.role == 'user' else part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""``<s><image><user> is there a red star ? <assistant> yes</s>``; the user's words are lower-cased, the model knows no
others; what is written in a picture is upper-case, as in the answers."""


def build_tokenizer(placeholder: tuple[str, ...], others: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer over the world's words.

    ``placeholder``: the special tokens that stand for a picture in a prompt; ``others``: more that the model must know.

    A string that is no word of the world falls apart into characters ("KITE": K ##I ##T ##E), so nothing is unknown.
    """
    special = [PAD, UNKNOWN, BOS, EOS, "<user>", "<assistant>", *placeholder, *others]
    words = set(VOCABULARY) | set(CAPTION_PROMPT.split()) | set(CHARACTERS)
    pieces = [*sorted(words), *(f"##{c}" for c in CHARACTERS)]
    vocabulary = {token: index for index, token in enumerate([*special, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=64))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=["<user>", "<assistant>", *placeholder, *others],
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE.replace("IMAGE_PLACEHOLDER", "".join(placeholder))
    return fast
