"""Text of a kernel: one Jinja environment whose templates hold constants only, so that lines map one to one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helixc.codegen.config import KernelConfig

if TYPE_CHECKING:  # imported where it is used: `helixc check` renders nothing and starts sooner
    import jinja2


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A rendered kernel and the headers its #include lines name (relative to include/)."""

    config: KernelConfig
    text: str
    headers: tuple[tuple[str, str], ...]

    @property
    def include_digest(self) -> str:
        """SHA-256 over the headers' names and texts."""
        digest = hashlib.sha256()
        for name, text in self.headers:
            digest.update(f"{name}\0{len(text)}\0{text}".encode())
        return digest.hexdigest()


class RenderError(ValueError):
    """A template is broken or names a parameter its kernel does not have; the message starts with template:line."""


class Renderer:
    """Renders kernels from one template folder (see template_root)."""

    def __init__(self, root: Path) -> None:
        import jinja2

        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(root),
            undefined=jinja2.StrictUndefined,
            finalize=_constant,
            autoescape=False,
            keep_trailing_newline=True,
        )
        include = root / "include"
        self._headers = tuple(
            (path.relative_to(include).as_posix(), path.read_text()) for path in sorted(include.rglob("*.cuh"))
        )

    def render(self, config: KernelConfig) -> KernelSource:
        """Render one kernel. Raises RenderError naming the template's line."""
        import jinja2

        template = f"kernels/{config.spec.template}.cu.j2"
        try:
            body = self._environment.get_template(template).render(name=config.spec.name, **config.params)
        except jinja2.TemplateSyntaxError as error:
            raise RenderError(f"{template}:{error.lineno}: {error.message}") from error
        except jinja2.TemplateNotFound as error:
            raise RenderError(f"{template}: there is no such template") from error
        except jinja2.UndefinedError as error:
            raise RenderError(f"{template}:{_line(error)}: {error.message}") from error
        return KernelSource(config, f'// {config.spec.name}\n#line 1 "{template}"\n{body}', self._headers)


def _constant(value: object) -> object:
    """Python's spelling of a value to C++'s."""
    return str(value).lower() if isinstance(value, bool) else value


def _line(error: jinja2.UndefinedError) -> int:
    """The template's line: Jinja rewrites the traceback's innermost frame to it."""
    frame, line = error.__traceback__, 0
    while frame is not None:
        line, frame = (frame.tb_lineno if frame.tb_frame.f_code.co_filename.endswith(".j2") else line), frame.tb_next
    return line
