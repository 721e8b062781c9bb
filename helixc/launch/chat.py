"""The checkpoint's chat template, rendered in jinja2's sandbox: a template is somebody else's program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any


class ChatTemplateError(Exception):
    """--chat cannot be applied; the message says why and the way out."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's source and the special tokens it may name (bos_token, eos_token, ...)."""

    path: Path
    source: str
    special_tokens: Mapping[str, str]

    def render(self, text: str) -> str:
        """The prompt for one user message, up to where the assistant's answer begins. Raises ChatTemplateError."""
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ChatTemplateError("--chat needs the package jinja2; `pip install jinja2`") from None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, **form: json.dumps(value, ensure_ascii=False, **form)
        messages = [{"role": "user", "content": text}]
        try:
            template = environment.from_string(self.source)
            return template.render(messages=messages, add_generation_prompt=True, **self.special_tokens)
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(f"{self.path}: the chat template failed: {error}") from None


def load_chat_template(checkpoint: Path) -> ChatTemplate:
    """Read chat_template.jinja, or chat_template of tokenizer_config.json. Raises ChatTemplateError."""
    config_path, template_path = checkpoint / "tokenizer_config.json", checkpoint / "chat_template.jinja"
    config = _read_config(config_path)
    tokens = {name: text for name in config if name.endswith("_token") and (text := _token_text(config[name]))}
    if template_path.is_file():
        return ChatTemplate(template_path, template_path.read_text(encoding="utf-8"), tokens)
    if source := _default_template(config.get("chat_template")):
        return ChatTemplate(config_path, source, tokens)
    raise ChatTemplateError(f"--chat: {checkpoint} has no chat template; leave --chat out, or use an instruct model")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ChatTemplateError(f"{path}: not JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def _default_template(value: Any) -> str | None:
    """A checkpoint gives one template, or several of which one is named default."""
    if isinstance(value, list):
        return next((t["template"] for t in value if t.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _token_text(value: Any) -> str | None:
    """Special tokens stand as text or as an object with their content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _refuse(message: str) -> str:
    from jinja2 import TemplateError

    raise TemplateError(message)
