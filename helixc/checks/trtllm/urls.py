"""HX92x: the workers' addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator

from helixc.checks.check import Finding, error
from helixc.diagnostics import Related, counted
from helixc.spec.source import KeyPath
from helixc.spec.trtllm.servers import Servers, TrtllmFile, at

_ADDRESS = re.compile(r"([A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?):([0-9]{1,5})")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SHARED = ("urls", "num_instances", "router")  # may differ between roles that sit in one worker


@error("HX921")
def urls_parse(file: TrtllmFile) -> Iterator[Finding]:
    """A url is not host:port.

    TensorRT-LLM splits each url at its only colon. A scheme such as `http://` and IPv6 addresses have more of them, and
    a path or a missing port fails as well, all with Python's error when the server starts.
    """
    for servers in file.roles:
        path = servers.path("urls")
        if path is None or at(file.source, path) is None:
            continue
        if not isinstance(at(file.source, path), list):
            message = f"urls of {servers.name} is not a list"
            yield Finding(file.source.value_span(path), message, 'write `urls: ["localhost:8001"]`')
            continue
        for place, url in _urls(servers):
            problem = _problem(url)
            if problem is not None:
                yield Finding(file.source.value_span(place), f"`{url}` {problem[0]}", problem[1])


@error("HX922")
def urls_differ(file: TrtllmFile) -> Iterator[Finding]:
    """Two servers have the same address.

    Two workers cannot listen on one port of a host, nor can a worker on that of the orchestrator. One worker may serve
    both roles, under the same url in both sections, if the sections are the same otherwise.
    """
    seen: dict[tuple[str, int], tuple[KeyPath, Servers | None]] = {}
    port = file.source.data.get("port")
    host = file.source.data.get("hostname", "localhost")
    if isinstance(host, str) and isinstance(port, int) and ("port",) in file.source.spans:
        seen[host.lower(), port] = (("port",), None)
    for servers in file.roles:
        for place, url in _urls(servers):
            found = _ADDRESS.fullmatch(url)
            if found is None:
                continue
            address = (found[1].lower(), int(found[2]))
            if address not in seen:
                seen[address] = (place, servers)
                continue
            first, other = seen[address]
            if other is not None and other.role != servers.role and _alike(other, servers):
                continue
            related = (Related("first given here", file.source.value_span(first)),)
            whose = "the orchestrator's own address" if other is None else "the address of another server"
            message = f"`{url}` is {whose}"
            yield Finding(file.source.value_span(place), message, "give each server a port of its own", related)


@error("HX923")
def urls_are_counted(file: TrtllmFile) -> Iterator[Finding]:
    """The number of urls is not num_instances.

    Each instance has one url, that of its first rank, however many GPUs it has. TensorRT-LLM refuses any other number.
    """
    for servers in file.roles:
        urls = servers.value("urls")
        if isinstance(urls, list) and urls and len(urls) != servers.instances:
            message = f"{counted(len(urls), 'url')} for {counted(servers.instances, 'instance')} of {servers.name}"
            span = servers.span("urls")
            related: tuple[Related, ...] = ()
            if servers.path("num_instances") is not None:
                related = (Related("num_instances is given here", servers.span("num_instances")),)
            yield Finding(span, message, f"list {servers.instances}, or set num_instances to {len(urls)}", related)


def _urls(servers: Servers) -> Iterator[tuple[KeyPath, str]]:
    path, urls = servers.path("urls"), servers.value("urls")
    if path is not None and isinstance(urls, list):
        yield from (((*path, index), str(url)) for index, url in enumerate(urls))


def _problem(url: str) -> tuple[str, str] | None:
    """(what is wrong with it, what to write) or None."""
    scheme = _SCHEME.match(url)
    if scheme is not None:
        rest = url[scheme.end() :].split("/")[0]
        return f"has a scheme ({scheme[0]}), for which there is no place", f"write `{rest}`"
    if url.count(":") > 1:
        return (
            "looks like an IPv6 address, which is not understood",
            "write a host name or an IPv4 address: `host:8001`",
        )
    if ":" not in url:
        return "has no port", f"write `{url or 'host'}:8001`"
    found = _ADDRESS.fullmatch(url)
    if found is None:
        return "is not host:port", "write for example `localhost:8001`"
    if not 0 < int(found[2]) < 65_536:
        return f"has the port {found[2]}", "ports are from 1 to 65535"
    return None


def _alike(first: Servers, second: Servers) -> bool:
    """Whether one worker can be both: the sections differ in nothing that configures it."""
    ours, theirs = ({k: v for k, v in at(s.source, s.section).items() if k not in _SHARED} for s in (first, second))
    return ours == theirs
