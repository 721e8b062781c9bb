"""One rank's life: connect, load, then prefill prompts (context) or decode them with Helix (generation)."""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from helixc_runtime.artifact import Artifact, load
from helixc_runtime.attention_shape import attention_shape
from helixc_runtime.checked_ops import CheckedOps
from helixc_runtime.comm import Comm, Connection, TorchComm, connect
from helixc_runtime.events import Emitter
from helixc_runtime.ffn_shape import ffn_shape
from helixc_runtime.handoff import DistTransport, HandoffError, Outbox, receive
from helixc_runtime.job import Job, Request
from helixc_runtime.kv import KvCache, Row, pages_needed
from helixc_runtime.manifest import WITHOUT_HOP, Instance, Plan, Rank
from helixc_runtime.models.decoder import Decoder
from helixc_runtime.ops import Ops
from helixc_runtime.ops_torch import TorchOps
from helixc_runtime.page_writer import CudaPageWriter, PageKernel, PageWriter, TorchPageWriter
from helixc_runtime.sampling import finish_reason, sample, seed_of
from helixc_runtime.scheduler import Scheduler, assigned, attends, new_row
from helixc_runtime.step import DecodeStep, Readback, RowInput, StepResult, TokensOnTheWay
from helixc_runtime.switches import read_switches
from helixc_runtime.weights import load_weights

# Collectives wait this long. A rank that dies closes its connections at once and one that hangs misses its
# heartbeats; a long wait alone, behind a long prompt say, is no failure.
COLLECTIVE_TIMEOUT = timedelta(hours=12)
POLL_S = 0.001


@dataclass(frozen=True, slots=True)
class Session:
    """What every part of a running rank needs."""

    job: Job
    plan: Plan
    rank: Rank
    instance: Instance
    decoder: Decoder
    connection: Connection
    run_dir: Path
    emit: Emitter

    @property
    def requests(self) -> list[Request]:
        """The requests this instance serves, in order."""
        return assigned(self.plan, self.instance, self.job.requests)

    @property
    def leads(self) -> bool:
        """Whether this rank decides for its instance."""
        return self.rank.local_rank == 0

    @property
    def sampler(self) -> int:
        """Global rank that samples for the instance: the first of the last stage."""
        return self.instance.ranks[-self.instance.tp * self.instance.cp]

    def attends(self, request: Request) -> bool:
        """Whether this rank attends for `request`, and holds its KV."""
        return attends(self.plan, self.instance, self.rank, request)

    def broadcast(self, values: list[int], source: int, size: int) -> list[int]:
        """`values` (at most `size`) of global rank `source`, on every rank of the instance."""
        message = torch.zeros(size + 1, dtype=torch.int64)
        if self.rank.rank == source:
            message[0] = len(values)
            message[1 : len(values) + 1] = torch.tensor(values, dtype=torch.int64)
        dist.broadcast(message, source, group=self.connection.control)
        return [int(v) for v in message[1 : int(message[0]) + 1]]


def run(job: Job, rank: int, world_size: int, run_dir: Path, emit: Emitter) -> None:
    """Run global rank `rank` of the job to its end. Raises on any failure; the launcher ends the others."""
    artifact = load(Path(job.artifact), job.checkpoint)
    plan, own = artifact.plan, artifact.plan.ranks[rank]
    if world_size != len(plan.ranks):
        raise ValueError(f"WORLD_SIZE is {world_size}, the plan has {len(plan.ranks)} ranks")
    device = torch.device("cuda", own.device) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(job.threads)
    emit.emit("stage", stage="connect", done=0, total=1)
    connection = connect(plan, own, device, COLLECTIVE_TIMEOUT)
    with torch.inference_mode():
        decoder = load_decoder(plan, own, make_comm(artifact, own, connection, device, job.deadline_s), device, emit)
        session = Session(job, plan, own, plan.instance_of(own), decoder, connection, run_dir, emit)
        if own.role == "context":
            serve_context(session, make_writer(plan, own, artifact.directory, connection, device))
        else:
            serve_generation(session, make_ops(artifact, own, device, emit))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            decoder.comm.check()
    dist.barrier()  # nobody leaves while a peer may still need its connections
    dist.destroy_process_group()


def make_comm(artifact: Artifact, rank: Rank, connection: Connection, device: torch.device, patience: float) -> Comm:
    """What the plan chose: one-sided on a GPU, where the ranks of a group can write into each other's memory.

    `patience`: seconds that a kernel waits for a peer.
    """
    instance = artifact.plan.instance_of(rank)
    if device.type == "cpu" or not (instance.exchange == "one_sided" or instance.reduce_rows):
        return TorchComm(rank, connection.compute)
    from helixc_runtime.one_sided import OneSidedComm  # needs cuda-bindings, as CudaOps

    kernels = artifact.plan.kernels_of(rank)
    return OneSidedComm(rank, connection.compute, instance, kernels, artifact.directory, device, patience)


def make_writer(
    plan: Plan, rank: Rank, folder: Path, connection: Connection, device: torch.device
) -> PageWriter | None:
    """Of a context rank that has peers among the generation ranks. `folder`: the artifact's, for its kernels."""
    if not has_peers(plan, rank):
        return None

    def handle_of(target: int) -> str:
        return str(connection.store.get(_arena_key(target)).decode())

    if device.type == "cpu":
        return TorchPageWriter(plan, rank, handle_of)
    return CudaPageWriter(PageKernel(plan, rank, plan.kernels_of(rank), folder, device), device, handle_of)


def load_decoder(plan: Plan, rank: Rank, comm: Comm, device: torch.device, emit: Emitter) -> Decoder:
    """This rank's part of the model, its weights loaded."""

    def progress(done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            emit.emit("stage", stage="weights", done=done, total=total)

    weights = load_weights(plan.model, plan.shards[rank.shard], device, progress)
    dtype = getattr(torch, plan.model.dtype)
    hop = plan.instance_of(rank).hop if rank.role == "generation" else WITHOUT_HOP  # the reference has no instance
    return Decoder(plan.model.arch, rank, weights, comm, device, dtype, hop)


def make_ops(artifact: Artifact, rank: Rank, device: torch.device, emit: Emitter) -> Ops:
    """The fused operations: the artifact's cubins on a GPU, torch on the CPU. HELIXC_CHECK_NAN=1 checks either."""
    ops = _device_ops(artifact, rank, device, emit)
    return CheckedOps(ops, rank.rank, rank.layers[0]) if read_switches().check_nan else ops


def _device_ops(artifact: Artifact, rank: Rank, device: torch.device, emit: Emitter) -> Ops:
    shape = attention_shape(artifact.plan.model, rank, artifact.plan.tokens_per_block)
    ffn = ffn_shape(artifact.plan.model, rank, artifact.plan.instance_of(rank))
    if device.type == "cpu":
        return TorchOps(shape, ffn)
    from helixc_runtime.ops_cuda import CudaOps  # needs cuda-bindings, which a CPU launch does not

    emit.emit("stage", stage="kernels", done=0, total=len(rank.kernels))
    kernels = artifact.plan.kernels_of(rank)
    return CudaOps(shape, kernels, artifact.directory, device, ffn, artifact.plan.instance_of(rank).hop)


# --- Context ----------------------------------------------------------------------------------------------------


def serve_context(session: Session, writer: PageWriter | None) -> None:
    """Prefill this instance's requests in order, and hand each one's KV over. `writer`: make_writer's."""
    rotary, requests, patience = session.decoder.rotary(), session.requests, session.job.deadline_s
    outbox = Outbox(session.plan, session.rank, DistTransport(), writer, session.emit, patience)
    session.emit.emit("stage", stage="ready", done=1, total=1)
    for done, request in enumerate(requests):
        session.emit.emit("stage", stage="prefill", done=done, total=len(requests))
        tokens, own = torch.tensor(request.token_ids, device=session.decoder.device), session.attends(request)
        hidden, cached = session.decoder.prefill(tokens, rotary, attends=own, on_layer=_layer_progress(session))
        first = _first_token(session, request, hidden)
        outbox.settle()  # at most one prompt's KV waits to be taken
        _offer(session, request, first)
        if finish_reason(request, [first], session.plan.model.arch.eos_token_ids) is None:
            outbox.send(request, cached)
    outbox.settle()
    outbox.close()
    session.emit.emit("stage", stage="prefill", done=len(requests), total=len(requests))


def _first_token(session: Session, request: Request, hidden: Tensor) -> int:
    """Sample the token after the prompt, and tell the instance."""
    chosen: list[int] = []
    if session.decoder.is_last:
        logits = session.decoder.logits(hidden[-1:])[0]
        chosen = [sample(logits, request, len(request.token_ids))]
        if session.rank.rank == session.sampler:
            _keep_logits(session, request.index, "first", [logits])
            session.emit.emit("prefilled", request=request.index, token=chosen[0])
    return session.broadcast(chosen, session.sampler, 1)[0]


def _offer(session: Session, request: Request, token: int) -> None:
    """Tell the generation instance, through the store, that the request is ready: the last rank that is ready does.

    So who admits it waits for the handoff alone, and not for prompts before it that others have no room for.
    """
    if session.connection.store.add(f"{_ready_key(request)}/ranks", 1) == len(session.instance.ranks):
        session.connection.store.set(_ready_key(request), str(token))


def _layer_progress(session: Session) -> Callable[[int], None]:
    """A long prompt is seen to advance."""
    last = time.monotonic()

    def report(layer: int) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            session.emit.emit("stage", stage="prefill_layer", done=layer, total=session.rank.layers[1])

    return report


def _ready_key(request: Request) -> str:
    return f"helixc/prefilled/{request.index}"


def _arena_key(rank: int) -> str:
    return f"helixc/arena/{rank}"


def has_peers(plan: Plan, rank: Rank) -> bool:
    """Whether `rank` writes its KV into other ranks' pages, or others write into its own."""
    pairs = ((rank, r) if rank.role == "context" else (r, rank) for r in plan.ranks if r.role != rank.role)
    return any(plan.shares(*pair) for pair in pairs)


# --- Generation -------------------------------------------------------------------------------------------------


def serve_generation(session: Session, ops: Ops) -> None:
    """Decode this instance's requests, admitting each when its prompt is prefilled and its pages are free."""
    check_room(session.rank, session.instance, session.decoder.device)
    block, requests = session.plan.tokens_per_block, session.requests
    totals = [len(r.token_ids) + r.max_tokens for r in requests]
    width = max((pages_needed(total, block, session.instance.cp) for total in totals), default=1)
    rows, device = session.instance.max_batch_size, session.decoder.device
    shared = has_peers(session.plan, session.rank)
    cache = KvCache(session.plan.model, session.rank, block, rows, width, device, shared)
    if shared:
        session.connection.store.set(_arena_key(session.rank.rank), cache.arena.handle())
    scheduler = Scheduler(session.plan, session.instance, requests, cache.free_pages)
    Generation(session, ops, cache, scheduler).run()


def check_room(rank: Rank, instance: Instance, device: torch.device) -> None:
    """Raise MemoryError, with the way out, if the KV pool does not fit beside what is on the GPU already."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    needed = rank.memory.kv_per_token * rank.memory.kv_capacity_tokens
    if needed > instance.free_gpu_memory_fraction * free:
        raise MemoryError(
            f"the KV pool of {rank.memory.kv_capacity_tokens:,} tokens needs {needed / 2**30:.1f} GiB; "
            f"free_gpu_memory_fraction {instance.free_gpu_memory_fraction:g} of the {free / 2**30:.1f} GiB free on "
            f"{device} is less: lower max_batch_size, max_seq_len or kv_cache_config.max_tokens"
        )


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched, and whose tokens were not read yet."""

    rows: tuple[Row, ...]
    tokens: TokensOnTheWay | None  # on the ranks of the last stage
    logits: Tensor | None  # [rows, vocab], where they are kept


class Generation:
    """The decode loop of one rank. Every rank of the instance takes the same decisions.

    A model in one stage: the device feeds each step with the tokens of the one before, and the host launches a step
    before it reads the tokens of the one before. So a stop token is seen one step late; what its row has computed in
    that step is dropped, and lies in pages of its own request until nobody reads them. All ranks gather the same
    logits and choose the same tokens, which admission confirms. In several stages every token takes the way over the
    host, by broadcast.

    Which requests start, and when, is the leader's decision: it alone sees which prompts are ready. As the batch a row
    is in decides the order of its sums, two runs may differ in their last bits; HELIXC_DETERMINISTIC=1 has the leader
    wait for each prompt that there is room for, so that the steps of all runs have the same rows.
    """

    def __init__(self, session: Session, ops: Ops, cache: KvCache, scheduler: Scheduler) -> None:
        self.session, self.cache, self.scheduler = session, cache, scheduler
        self.step = DecodeStep(session.decoder, ops, cache, keep_logits=session.job.keep_logits)
        self.transport = DistTransport()
        self.requests = {r.index: r for r in session.requests}
        self.rows: list[Row] = []  # of the next step, by slot
        self.flights: deque[Flight] = deque()  # at most `lag` between two calls of `advance`
        self.lag = 1 if session.instance.pp == 1 else 0
        self.readback = Readback(session.instance.max_batch_size, self.lag + 1, session.decoder.device)
        self.logits: dict[int, list[Tensor]] = {}
        self.decided = 0  # requests that were admitted, or were at their end before
        self.stored = 0
        self.finished = 0
        self._deterministic = read_switches().deterministic
        self._changed = False  # rows have come or gone since the last step
        self._digest = 0  # of all tokens that were read

    def run(self) -> None:
        """Until every request is finished."""
        self.step.capture(sampled=any(request.temperature > 0 for request in self.requests.values()))
        self.session.emit.emit("stage", stage="ready", done=1, total=1)
        while self.finished < len(self.requests):
            while self._has_room() and self._admit() and self._deterministic:
                pass
            self.advance()
        self._decide([])
        self.session.emit.emit("kv_tokens", tokens=self.stored)

    def advance(self) -> None:
        """Launch a step of the rows there are, and read the tokens of the one before, or of all if no row is left."""
        if self.rows:
            self.flights.append(self._launch())
        while len(self.flights) > (self.lag if self.rows else 0):
            self._land(self.flights.popleft())

    def join(self, row: Row) -> None:
        """Let `row`, whose KV is in the cache, take part from the next step on."""
        self.rows = sorted([*self.rows, row], key=lambda row: row.slot)
        self._changed = True

    # --- Admission ---

    def _has_room(self) -> bool:
        """Whether a request is left, and a row for it."""
        return self.decided < len(self.requests) and len(self.rows) < self.session.instance.max_batch_size

    def _admit(self) -> bool:
        """Take in the requests that the leader found ready, and their KV. Whether there were any."""
        decided = self._decide(self._ready() if self.session.leads else [])
        for index, token in zip(decided[::2], decided[1::2], strict=True):
            self.decided += 1
            request = self.requests[index]
            if reason := self._finish_reason(request, [token]):
                self._announce_finish(index, reason)
                continue
            row = new_row(request, self._free_slot(), token)
            if self.session.attends(request):
                self.cache.reserve(row)
                self._receive(request, row)
            self.join(row)
        return bool(decided)

    def _decide(self, found: list[int]) -> list[int]:
        """`found` of the leader, on every rank. Raises RuntimeError on a rank that has read other tokens than it."""
        limit = 2 * self.session.instance.max_batch_size + 1
        digest, *decided = self.session.broadcast([self._digest, *found], self.session.instance.ranks[0], limit)
        if digest != self._digest:
            raise RuntimeError(
                f"rank {self.session.rank.rank} has chosen other tokens than rank {self.session.instance.ranks[0]}: "
                "the ranks of a stage must compute the same logits, bit by bit"
            )
        return decided

    def _receive(self, request: Request, row: Row) -> None:
        """The prompt's KV into the row's pages, which nobody writes any more if that fails with a HandoffError."""
        start, session = time.monotonic(), self.session
        try:
            receive(session.plan, session.rank, request, row, self.cache, self.transport, session.job.deadline_s)
        except HandoffError:
            self.cache.release(row)
            raise
        session.emit.emit("received", request=request.index, seconds=time.monotonic() - start)

    def _free_slot(self) -> int:
        """The lowest, so that steps are padded little."""
        return min(set(range(len(self.cache.table))) - {row.slot for row in self.rows})

    def _ready(self) -> list[int]:
        """[index, first token, ...] of the requests to admit now; waits for one if there is nothing else to do.

        Or if every run is to start it in the same step; not for a second: its sender may wait till the first is taken.
        """
        found: list[int] = []
        while (request := self.scheduler.head()) and len(found) < 2 * self.session.instance.max_batch_size:
            if not self.session.connection.store.check([_ready_key(request)]):
                if found or (self.rows and not self._deterministic):
                    break
                time.sleep(POLL_S)
                continue
            token = int(self.session.connection.store.get(_ready_key(request)))
            if self._finish_reason(request, [token]):
                self.scheduler.skip(request)
            else:
                self.scheduler.admit(request)
            found += [request.index, token]
        return found

    # --- Steps ---

    def _launch(self) -> Flight:
        """One step of every row. A row that now computes its last token takes part in no other."""
        if self._changed or not self.lag:
            self.step.assign([self._input(row) for row in self.rows])
            self._changed = False
        result = self.step()
        flight = Flight(
            tuple(self.rows), self.readback.start(result.tokens) if result else None, self._kept_logits(result)
        )
        for row in flight.rows:
            row.steps += 1
            if row.steps + 1 == row.max_tokens:
                self._leave(row)
        return flight

    def _input(self, row: Row) -> RowInput:
        request = self.requests[row.index]
        token = None if self.lag and row.steps else row.tokens[-1]
        attends, seed = self.session.attends(request), seed_of(request)
        return RowInput(row.slot, token, row.position, attends, request.temperature, request.top_p, seed)

    def _kept_logits(self, result: StepResult | None) -> Tensor | None:
        """For --verify, a copy: the next step overwrites them."""
        kept = self.session.job.keep_logits and self.session.rank.rank == self.session.sampler
        if not kept or result is None or result.logits is None:
            return None
        return result.logits[[row.slot for row in self.rows]]

    def _land(self, flight: Flight) -> None:
        """Read the tokens of a step, and tell them. Those of rows that had ended before are nobody's."""
        tokens = self._tokens(flight)
        self._digest = zlib.crc32(repr(tokens).encode(), self._digest)
        for place, (row, token) in enumerate(zip(flight.rows, tokens, strict=True)):
            if row.ended:
                continue
            row.tokens.append(token)
            if flight.logits is not None:
                self.logits.setdefault(row.index, []).append(flight.logits[place])
            if self.session.leads:
                self.session.emit.emit("token", request=row.index, token=token)
            if reason := self._finish_reason(self.requests[row.index], row.tokens):
                self._end(row, reason)

    def _tokens(self, flight: Flight) -> list[int]:
        """Of the step's rows, on every rank of the instance."""
        session, chosen = self.session, list[int]()
        if flight.tokens:
            by_slot = flight.tokens.wait()
            session.decoder.comm.check()  # the step has finished: did it wait in vain?
            chosen = [by_slot[row.slot] for row in flight.rows]
        if session.instance.pp == 1:
            return chosen
        own = chosen if session.rank.rank == session.sampler else []
        return session.broadcast(own, session.sampler, session.instance.max_batch_size)

    def _end(self, row: Row, reason: str) -> None:
        """The row's last token has been read."""
        row.ended = True
        if any(other is row for other in self.rows):  # a stop token; else its last step was known before
            self._leave(row)
        if self.session.attends(self.requests[row.index]):
            self.stored += self.cache.stored(row)
        if row.index in self.logits:
            _keep_logits(self.session, row.index, "rest", self.logits.pop(row.index))
        self._announce_finish(row.index, reason)

    def _leave(self, row: Row) -> None:
        """Let the row take part in no further step. Its place and its pages are free for what is enqueued from now."""
        self.rows = [other for other in self.rows if other is not row]
        self._changed = True
        request = self.requests[row.index]
        if self.session.attends(request):
            self.cache.release(row)
        if self.session.leads:
            self.scheduler.finish(request)

    def _finish_reason(self, request: Request, tokens: list[int]) -> str | None:
        return finish_reason(request, tokens, self.session.plan.model.arch.eos_token_ids)

    def _announce_finish(self, index: int, reason: str) -> None:
        self.finished += 1
        if self.session.leads:
            self.session.emit.emit("finished", request=index, reason=reason)


def _keep_logits(session: Session, index: int, part: str, logits: list[Tensor]) -> None:
    """For --verify: [tokens, vocab] float32 of one request, in the run directory."""
    if session.job.keep_logits:
        path = logits_file(session.run_dir, index, part)
        path.parent.mkdir(exist_ok=True)
        save_file({"logits": torch.stack(logits).cpu()}, path)


def logits_file(run_dir: Path, index: int, part: str) -> Path:
    """Where the logits of request `index` are kept: part "first" from the context instance, "rest" from decoding."""
    return run_dir / "logits" / f"{index}.{part}.safetensors"
