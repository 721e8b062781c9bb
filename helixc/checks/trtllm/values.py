"""HX95x: values that are read as something else than meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from helixc.checks.check import Finding, note, warning
from helixc.diagnostics import Related
from helixc.spec.source import KeyPath
from helixc.spec.trtllm.servers import TrtllmFile

_GRAPHS = "cuda_graph_config"


@warning("HX952")
def none_is_not_null(file: TrtllmFile) -> Iterator[Finding]:
    """The text None stands where nothing is meant.

    YAML's word for nothing is `null` (or `~`). `None` is a text of four letters: a config that is the text "None" is
    not a config that is left out.
    """
    for path in _texts(file.source.data, ()):
        message = f"`{path[-1]}: None` is the text None, not nothing"
        yield Finding(file.source.value_span(path), message, "write null")


@note("HX953")
def graphs_are_for_batches(file: TrtllmFile) -> Iterator[Finding]:
    """CUDA graphs are asked for that no batch will use.

    A batch has at most max_batch_size requests; graphs for larger ones are left out silently, and a size that is listed
    twice counts once.
    """
    for servers in file.roles:
        batch = servers.count("max_batch_size")
        largest = servers.count(_GRAPHS, "max_batch_size")
        related = (Related("max_batch_size is given here", servers.span("max_batch_size")),) if batch else ()
        if batch and largest and largest > batch:
            message = f"{_GRAPHS} of {servers.name} asks for batches of {largest}, but max_batch_size is {batch}"
            span = servers.span(_GRAPHS, "max_batch_size")
            yield Finding(span, message, f"use {batch}", related)
        path = servers.path(_GRAPHS, "batch_sizes")
        sizes = servers.value(_GRAPHS, "batch_sizes")
        if path is None or not isinstance(sizes, list):
            continue
        for index, size in enumerate(sizes):
            if size in sizes[:index]:
                message = f"batch size {size} is listed twice in {_GRAPHS} of {servers.name}"
                first = Related("first listed here", file.source.value_span((*path, sizes.index(size))))
                yield Finding(file.source.value_span((*path, index)), message, "remove one of the two", (first,))
        above = [i for i, size in enumerate(sizes) if batch and isinstance(size, int) and size > batch]
        if above:
            message = f"{_GRAPHS} of {servers.name} lists batches of up to {max(sizes[i] for i in above)}"
            message += f", but max_batch_size is {batch}"
            span = file.source.value_span((*path, above[0]))
            yield Finding(span, message, f"stop at {batch}", related)


def _texts(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Where the text None stands as a value."""
    if value == "None" and path:
        yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*path, key))
