"""The checkpoint's tokenizer: text to token ids and back, and text as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helixc.launch.chat import ChatTemplate, ChatTemplateError, load_chat_template

_WAY_OUT = "use --prompts with token_ids instead"
_HALF = "\ufffd"  # what a decoder gives for the bytes of an unfinished character


class TokenizerError(Exception):
    """Text cannot be turned into token ids; the message says why and the way out."""


class Tokenizer:
    """A tokenizers.Tokenizer with the two directions a launch needs."""

    def __init__(self, backend: Any, checkpoint: Path) -> None:
        self._backend = backend
        self._checkpoint = checkpoint
        self._template: ChatTemplate | None = None

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`, with the special tokens the tokenizer itself adds (such as <s>)."""
        return tuple(self._backend.encode(text).ids)

    def encode_chat(self, text: str) -> tuple[int, ...]:
        """Token ids of a conversation in which the user says `text`. Raises TokenizerError without a template."""
        try:
            if self._template is None:
                self._template = load_chat_template(self._checkpoint)
            rendered = self._template.render(text)
        except ChatTemplateError as error:
            raise TokenizerError(str(error)) from None
        # The template writes the special tokens itself.
        return tuple(self._backend.encode(rendered, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids` without special tokens."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))


def load_tokenizer(checkpoint: str | None) -> Tokenizer:
    """Read <checkpoint>/tokenizer.json. Raises TokenizerError; None is a model without a checkpoint."""
    if checkpoint is None:
        raise TokenizerError(f"a built-in geometry has no tokenizer; {_WAY_OUT}")
    path = Path(checkpoint) / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{path} does not exist, so text cannot be tokenized; {_WAY_OUT}")
    try:
        import tokenizers
    except ImportError:
        raise TokenizerError(
            f"the package tokenizers is not installed; `pip install tokenizers`, or {_WAY_OUT}"
        ) from None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path}: not a tokenizer: {error}; {_WAY_OUT}") from None
    backend.no_truncation()  # a tokenizer.json may carry the settings of its training
    backend.no_padding()
    return Tokenizer(backend, Path(checkpoint))


class TextStream:
    """Turns a growing token sequence into text pieces that join to the decoded whole; never half a character.

    A piece is the difference between decoding a short window with and without the newest tokens, because a token's
    text depends on its neighbours (spaces, characters split over several tokens).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window = 0  # tokens before it are final and not decoded again
        self._shown = 0  # tokens before it are on the screen

    def push(self, token: int) -> str:
        """The text that became final with `token`; empty in the middle of a character."""
        self._ids.append(token)
        before, now = self._texts()
        if now.endswith(_HALF) or len(now) <= len(before):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What is left when no token follows: an unfinished character shows as U+FFFD."""
        before, now = self._texts()
        self._shown = len(self._ids)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._ids[self._window : self._shown]), decode(self._ids[self._window :])
